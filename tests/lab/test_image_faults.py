"""Builders that die, vanish or fill up while an image is built or pushed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from nixops.errors import ConnectionLost, NixopsError, NoBuilder, RegistryError, Unreachable
from nixops.lab.lab import HostSpec, Lab
from nixops.lab.registry import RegistryServer
from tests.lab.conftest import LabFactory
from tests.lab.imaging import X86, Imaging, chosen, disregard_load, eventually, pushing
from tests.lab.reaching import has, processes

pytestmark = pytest.mark.usefixtures("nix_of_the_lab")


@pytest.fixture(scope="module")
def builders(lab_factory: LabFactory) -> Lab:
    """``first`` and ``second``, and ``small`` with hardly any disk. A test that breaks one puts it back."""
    return lab_factory(HostSpec("first"), HostSpec("second"), HostSpec("small", disk_mib=96))


@pytest.fixture
def imaging(builders: Lab, registry: RegistryServer, tmp_path: Path) -> Imaging:
    return Imaging(tmp_path, builders, registry, hosts=("first", "second"))


def test_a_builder_killed_in_the_middle_of_a_build_is_replaced_and_the_log_says_why(
    imaging: Imaging, builders: Lab
) -> None:
    """Proves: the machine that builds loses power in the middle of a build; the build finishes on another, the log and
    the document say who was left out and why, and for a while the dead one is not asked first."""
    call = imaging.begin(lambda: imaging.build("slow"))
    host, other = chosen(builders, lambda host: processes(host, "-layer.sh") != [], "the build")
    host.power_off()
    try:
        result = call.wait(60)
        (image,) = result.images
        assert image.built is not None and image.built.builder == other.name
        assert has(other, image.out)
        (tried,) = result.tried
        assert tried.builder == host.name and "lost" in tried.reason, tried
        assert result.document()["tried"] == [{"builder": host.name, "system": X86, "reason": tried.reason}]
        assert f"fault {X86}: {host.name} is left out: {tried.reason}" in imaging.said()
        assert json.loads(result.record.read_text())["tried"][0]["builder"] == host.name
        assert host.name in json.loads((imaging.state / "nixops" / "quarantine.json").read_text())["builders"]
    finally:
        host.power_on()
        host.wait_ready()


def test_when_all_builders_are_dead_the_answer_comes_within_the_deadline_with_each_reason(
    builders: Lab, tmp_path: Path
) -> None:
    """Proves: one builder that refuses, one that nothing answers for, and one with another key: exit 3 within the
    probe's deadline of 5 s (and the start of the command), with the reason of each."""
    imaging = Imaging(tmp_path, builders, build={"probe_timeout": 5.0})
    other = builders.hosts["second"].host_key
    imaging.change(lambda document: document["hosts"]["first"].update(port=1))
    imaging.change(lambda document: document["hosts"]["small"].update(host_key=other))
    builders.hosts["second"].partition(True)

    def start() -> float:
        """What the start, the inventory and the evaluation alone take, on a machine that may have much else to do."""
        began = time.monotonic()
        assert imaging.invoke(*imaging.image("nothing-of-the-kind", "--systems", X86)).code == 2
        return time.monotonic() - began

    try:
        before = start()
        began = time.monotonic()
        done = imaging.invoke(*imaging.image("docker", "--systems", X86))
        took = time.monotonic() - began
        alone = max(before, start())
    finally:
        builders.hosts["second"].partition(False)
    assert done.code == 3, done
    assert took < 5.0 + 1.0 + 2 * alone, (took, alone)
    reasons = {line.split(": ")[0]: line for line in done.err.splitlines() if line.split(": ")[0] in builders.hosts}
    assert "refused" in reasons["first"]
    assert "no answer within" in reasons["second"] or "no route" in reasons["second"], reasons
    assert "KEY" in reasons["small"]


def test_a_builder_whose_disk_fills_up_is_left_for_another(
    builders: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves: no space in the middle of a build is the builder's fault: the build moves on, and says so."""
    disregard_load(monkeypatch)
    settings = {"small": {"builder": {"max_jobs": 4, "systems": [X86], "speed_factor": 9}}}
    imaging = Imaging(tmp_path, builders, hosts=("small", "second"), settings=settings, build={"min_free": 1})
    result = imaging.build("large")
    (image,) = result.images
    assert image.built is not None and image.built.builder == "second", imaging.said()
    assert [t.builder for t in result.tried] == ["small"] and "full" in result.tried[0].reason
    delete = 'rm -f /nix/var/nix/gcroots/nixops-images/*; nix-store --delete "$0"'
    # The daemon that built it may still hold it for a moment.
    eventually(
        lambda: builders.hosts["second"].exec("sh", "-c", delete, image.out, check=False).returncode == 0,
        60,
        "the image is deleted",
    )


def test_builders_that_do_not_reach_the_registry_are_told_as_that(builders: Lab, tmp_path: Path) -> None:
    """Proves: where the registry answers the operator and none of the builders, that is said of each, and it is no
    fault of the image's or the registry's."""
    with RegistryServer(bind="127.0.0.1") as server:
        imaging = Imaging(tmp_path, builders, server, hosts=("first", "second"))
        with pytest.raises(NoBuilder) as caught:
            imaging.build("docker", push=imaging.reference())
    for name in ("first", "second"):
        assert f"{name}: {name} does not reach the registry {server.name}" in str(caught.value)
    assert imaging.build("docker").images[0].built is not None


def test_a_registry_that_dies_during_the_push_is_told_as_that(builders: Lab, tmp_path: Path) -> None:
    """Proves: exit 1 that names the registry, no builder is blamed for it, and none is tried again for nothing."""
    with RegistryServer(bind=builders.gateway) as server:
        imaging = Imaging(tmp_path, builders, server, hosts=("first", "second"))
        call = imaging.begin(lambda: imaging.build("slow-push", push=imaging.reference()))
        eventually(lambda: any(pushing(builders.hosts[n]) for n in ("first", "second")), 90, "the push")
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(NixopsError) as caught:
            call.wait(60)
    assert isinstance(caught.value, RegistryError) and not isinstance(caught.value, Unreachable | ConnectionLost), (
        caught
    )
    assert "left out" not in imaging.said()


def test_nobody_is_asked_twice_and_each_reason_is_told(imaging: Imaging, builders: Lab) -> None:
    """Proves: when every builder dies in turn, NoBuilder has the reason of each: nothing is tried without end."""
    for name in ("first", "second"):
        builders.hosts[name].exec("systemctl", "stop", "nix-daemon.socket", "nix-daemon.service")
        builders.hosts[name].exec("sh", "-c", "mv /usr/bin/nix-daemon /usr/bin/nix-daemon.away")
    try:
        with pytest.raises(NoBuilder) as caught:
            imaging.build("docker")
        assert {line.split(":")[0] for line in (caught.value.detail or "").splitlines()} == {"first", "second"}
    finally:
        for name in ("first", "second"):
            builders.hosts[name].exec("sh", "-c", "mv /usr/bin/nix-daemon.away /usr/bin/nix-daemon")
            builders.hosts[name].exec("systemctl", "start", "nix-daemon.socket")
