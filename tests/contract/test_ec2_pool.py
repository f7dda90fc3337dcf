"""Builders found in EC2, by real boto3 over HTTP, from moto's server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixops.build.pool import pool_of
from nixops.errors import NixopsError, SecretUnavailable, Unreachable, UsageError
from nixops.inventory.building import Ec2Pool
from nixops.inventory.ec2 import discover_ec2
from nixops.inventory.load import load
from nixops.lab.aws import AwsServer
from nixops.lab.process import free_port

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAqt16V6G0qKcT6D39YUHzI+3tuqFe2e4XYfp4KVZysp"
ROLE = {"role": "nix-runner"}
PINNED = {**ROLE, "ssh-host-key": KEY}


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsServer]:
    with AwsServer() as server:
        yield server


@pytest.fixture(autouse=True)
def environment(aws: AwsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in aws.environ().items():
        monkeypatch.setenv(name, value)


def pool(**given: object) -> Ec2Pool:
    return Ec2Pool.model_validate({"tags": ROLE, **given})


def test_an_instance_becomes_a_builder_by_its_tags(aws: AwsServer) -> None:
    """Proves: name, address, system by architecture, pinned key and the pool's own settings reach the builder."""
    tags = {"team": "a", "ssh-host-key": KEY + " root@x"}
    (number,) = aws.run_instances("Nix builder 1", tags=tags, region="us-east-1")
    aws.run_instances("arm", tags=tags, region="us-east-1", architecture="arm64")
    settings = pool(tags={"team": "a"}, regions=["us-east-1"], user="nix", port=2222, builder={"max_jobs": 4})
    first, second = discover_ec2(settings)
    assert (first.name, first.systems) == ("Nix-builder-1", ("x86_64-linux",))
    assert (first.target.host_keys, first.target.user, first.target.port) == ((KEY,), "nix", 2222)
    assert (first.max_jobs, first.source, first.excluded) == (4, "ec2 us-east-1", None)
    instance = aws.client("ec2", "us-east-1").describe_instances(InstanceIds=[number])["Reservations"][0]["Instances"][
        0
    ]
    assert first.target.address == instance["PrivateIpAddress"]
    (public, _) = discover_ec2(settings.model_copy(update={"address": "public"}))
    assert public.target.address == instance["PublicIpAddress"] != instance["PrivateIpAddress"]
    assert (second.name, second.systems) == ("arm", ("aarch64-linux",))


def test_every_page_is_read_and_every_region_and_nobody_else(aws: AwsServer) -> None:
    """Proves: more instances than EC2 gives in one answer, in two regions; those of other tags and those that are
    stopped are not among them.
    """
    many = [f"b{n}" for n in range(12)]
    for name in many:  # moto counts its pages in what was started at once
        aws.run_instances(name, tags=PINNED)
    aws.run_instances("elsewhere", tags=PINNED, region="us-east-1")
    aws.run_instances("other", tags={"role": "web"})
    (stopped,) = aws.run_instances("stopped", tags=PINNED)
    aws.client("ec2").stop_instances(InstanceIds=[stopped])
    first = aws.client("ec2").describe_instances(MaxResults=5)
    assert "NextToken" in first, "the server does not page: this test would prove nothing"
    found = discover_ec2(pool(regions=["eu-central-1", "us-east-1"]), page=5)
    assert [str(b.name) for b in found] == [*sorted(many), "elsewhere"]
    assert {b.source for b in found} == {"ec2 eu-central-1", "ec2 us-east-1"}
    # Without regions in the inventory: boto3's own.
    assert len(discover_ec2(pool())) == 12


def test_a_tags_value_is_no_pattern(aws: AwsServer) -> None:
    """Proves: a ``*`` in the inventory's tag finds the instance that has a ``*`` there, not all of them."""
    aws.run_instances("literal", tags={"stage": "a*"}, region="us-east-1")
    aws.run_instances("prefixed", tags={"stage": "abc"}, region="us-east-1")
    found = discover_ec2(pool(tags={"stage": "a*"}, regions=["us-east-1"]))
    assert "prefixed" not in [b.name for b in found]


def test_instances_of_one_name_are_told_apart_by_their_id(aws: AwsServer) -> None:
    """Proves: no builder hides another, here or in another region."""
    ids = aws.run_instances("twin", "twin", tags={**PINNED, "set": "twins"}, region="eu-central-1")
    ids += aws.run_instances("twin", tags={**PINNED, "set": "twins"}, region="us-east-1")
    found = discover_ec2(pool(tags={"set": "twins"}, regions=["eu-central-1", "us-east-1"]))
    names = [str(b.name) for b in found]
    assert len(set(names)) == 3 and names[0] == "twin"
    assert set(names[1:]) < {f"twin-{number}" for number in ids}


def test_a_name_that_differs_in_case_alone_is_another(aws: AwsServer) -> None:
    """Proves: an instance that takes another's name in capitals does not get its key let pass for the other's: ssh
    takes no notice of case where it looks up a host's key."""
    (_, number) = aws.run_instances("shadow", "SHADOW", tags={**PINNED, "set": "case"}, region="us-east-1")
    found = sorted(str(b.name) for b in discover_ec2(pool(tags={"set": "case"}, regions=["us-east-1"])))
    assert len({name.lower() for name in found}) == 2, found
    assert any(name.lower().startswith("shadow-i-") for name in found), (found, number)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (None, "its tag ssh-host-key pins no host key"),
        ("SHA256:abc", "its tag ssh-host-key holds no host key: not a host key of a known type"),
    ],
)
def test_an_instance_without_a_pinned_key_is_shown_and_not_used(aws: AwsServer, key: str | None, reason: str) -> None:
    """Proves: nothing is trusted that nobody pinned; the reason names the tag."""
    tags = {"set": f"unpinned-{key is None}", **({"ssh-host-key": key} if key else {})}
    aws.run_instances("unpinned", tags=tags, region="us-east-1")
    (builder,) = discover_ec2(pool(tags={"set": tags["set"]}, regions=["us-east-1"]))
    assert builder.excluded is not None and builder.excluded.startswith(reason)


def test_the_inventorys_pool_has_them(aws: AwsServer, tmp_path: Path) -> None:
    """Proves: ``build.ec2`` in the inventory file is enough."""
    aws.run_instances("from-ec2", tags={**PINNED, "set": "inventory"}, region="us-east-1")
    (tmp_path / "hosts.yml").write_text(
        "build: {ec2: {tags: {set: inventory}, regions: [us-east-1]}}\nhosts: {desk: {address: desk}}\n"
    )
    assert [b.name for b in pool_of(load(tmp_path / "hosts.yml"))] == ["from-ec2"]


# -- faults ---------------------------------------------------------------------------------------------------


def refused(kind: type[NixopsError], settings: Ec2Pool | None = None) -> str:
    with pytest.raises(kind) as caught:
        discover_ec2(settings or pool())
    assert type(caught.value) is kind
    return str(caught.value)


def test_no_credentials_are_told_with_the_way_to_get_some(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Proves: SecretUnavailable (2) in words, and nothing of the machine's own configuration is read."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    text = refused(SecretUnavailable)
    assert "there are no AWS credentials" in text and "aws sso login" in text


def test_no_region_is_told_with_where_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves: UsageError that names the inventory's setting."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    assert "build.ec2.regions" in refused(UsageError)


def test_a_profile_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves: boto3's own complaint about the configuration is no traceback."""
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "the AWS configuration does not hold (ProfileNotFound)" in refused(UsageError)


def test_an_endpoint_that_nobody_listens_on_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves: Unreachable (3), after bounded retries."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port('127.0.0.1')}")
    assert "EC2 in eu-central-1 does not answer" in refused(Unreachable)


def test_an_identity_that_may_not_ask_is_told_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves: IAM's refusal names the missing permission and never the key."""
    with AwsServer() as strict:
        number, secret = strict.ask_permission()
        for name, value in strict.environ().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", number)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret.reveal())
        text = refused(SecretUnavailable)
        assert "may not look for builders in EC2 in eu-central-1" in text and "ec2:DescribeInstances" in text
        assert secret.reveal() not in text
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        assert "wrong or have ended" in refused(SecretUnavailable)


def test_the_pool_of_an_inventory_without_ec2_loads_no_boto3(tmp_path: Path) -> None:
    """Proves: a build that has no AWS does not even load its library."""
    (tmp_path / "hosts.yml").write_text("hosts: {desk: {address: desk, builder: {}}}\n")
    program = (
        "import sys; from pathlib import Path; from nixops.build.pool import pool_of; "
        "from nixops.inventory.load import load; import nixops.build.failover, nixops.build.show, nixops.vault.store; "
        f"assert len(pool_of(load(Path({str(tmp_path / 'hosts.yml')!r})))) == 1; "
        "print([m for m in ('boto3', 'botocore', 'paramiko', 'fabric', 'hvac', 'requests') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
