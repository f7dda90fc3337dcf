"""The way of the seed: the builders' key from AWS Secrets Manager, the registry's token from ECR, both by boto3."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixops.lab.aws import AwsServer
from nixops.lab.lab import HostSpec, Lab
from nixops.lab.registry import RegistryServer
from nixops.secret import Secret
from tests.lab.conftest import LabFactory
from tests.lab.imaging import X86, Imaging, raw


@pytest.fixture(scope="module")
def builder(lab_factory: LabFactory) -> Lab:
    return lab_factory(HostSpec("only"))


@pytest.fixture(scope="module")
def aws(builder: Lab) -> Iterator[AwsServer]:
    with AwsServer() as server:
        server.put_secret("nix-runner-ssh-key", Secret(builder.identity_file.read_text(encoding="ascii")))
        yield server


@pytest.fixture(scope="module")
def registry(builder: Lab, aws: AwsServer) -> Iterator[RegistryServer]:
    """A registry that takes the token of the lab's ECR, as ECR itself does."""
    answer = aws.client("ecr").get_authorization_token()
    token = base64.b64decode(answer["authorizationData"][0]["authorizationToken"]).decode()
    user, _, password = token.partition(":")
    with RegistryServer(bind=builder.gateway, user=user, password=Secret(password)) as server:
        yield server


@pytest.fixture
def imaging(tmp_path: Path, builder: Lab, registry: RegistryServer) -> Imaging:
    """No key is named by a host, and no login by the inventory: both come from AWS."""
    made = Imaging(
        tmp_path,
        builder,
        registry,
        build={"ssh_key": {"aws": "nix-runner-ssh-key"}},
        settings={"only": {"ssh": {"connect_timeout": 5.0}}},
    )
    made.change(
        lambda document: document["registries"].update(
            {str(registry.name): {"ecr": True, "ca_file": str(registry.ca_file)}}
        )
    )
    return made


def test_key_and_token_come_from_aws_when_they_are_needed(
    imaging: Imaging, registry: RegistryServer, aws: AwsServer
) -> None:
    """Proves: with the key in Secrets Manager and the token from ECR, an image is built and pushed, and the tag names
    it; the key is in no file of the operator's afterwards."""
    reference = imaging.reference("team/aws:1")
    flags = imaging.image("docker", "--systems", X86, "--push", f"docker://{reference}")
    done = imaging.invoke(*flags, environ=aws.environ())
    assert done.code == 0, done
    assert raw(registry, reference)["config"]["digest"].startswith("sha256:")
    key = imaging.lab.identity_file.read_bytes()
    # The inventory's directory and the operator's home and state: nothing of ours wrote it down there.
    held = [path for path in imaging.directory.rglob("*") if path.is_file() and key[40:120] in path.read_bytes()]
    assert held == []


def test_without_a_push_only_the_key_is_asked_for(imaging: Imaging, aws: AwsServer) -> None:
    """Proves: a build that is not pushed asks ECR for nothing; where ECR is not to be had, only a push fails."""
    nowhere = {"AWS_ENDPOINT_URL_ECR": "http://127.0.0.1:1"}
    done = imaging.invoke(*imaging.image("docker", "--systems", X86), environ={**aws.environ(), **nowhere})
    assert done.code == 0, done
    pushed = ("--push", f"docker://{imaging.reference('team/aws:2')}")
    done = imaging.invoke(*imaging.image("docker", "--systems", X86, *pushed), environ={**aws.environ(), **nowhere})
    assert done.code == 2 and "no token for the registry" in done.err, done


def test_no_credentials_are_told_by_name_and_nothing_is_tried(imaging: Imaging, aws: AwsServer) -> None:
    """Proves: without AWS credentials the task ends with 2, and says which secret was not read and how to log in."""
    environ = {key: value for key, value in aws.environ().items() if "KEY" not in key}
    done = imaging.invoke(*imaging.image("docker", "--systems", X86), environ=environ)
    assert done.code == 2, done
    assert "nix-runner-ssh-key" in done.err and "aws sso login" in done.err
