"""A push whose builder is cut off, or whose operator stops or dies: no tag half-moved, no login left behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from nixops.lab.lab import HostSpec, Lab
from nixops.lab.registry import RegistryServer
from tests.lab.conftest import LabFactory
from tests.lab.imaging import (
    X86,
    Imaging,
    chosen,
    ended,
    eventually,
    push_places,
    pushing,
    skopeo,
    works,
)
from tests.lab.reaching import processes

# The pause of the lab's image `endless-push` before it pushes, as it shows among the processes.
ENDLESS = "sleep 77103"

pytestmark = pytest.mark.usefixtures("nix_of_the_lab")


@pytest.fixture(scope="module")
def builders(lab_factory: LabFactory) -> Lab:
    """``first`` and ``second``. A test that cuts one off puts it back."""
    return lab_factory(HostSpec("first"), HostSpec("second"))


@pytest.fixture
def imaging(builders: Lab, registry: RegistryServer, tmp_path: Path) -> Imaging:
    return Imaging(tmp_path, builders, registry, hosts=("first", "second"))


def named(registry: RegistryServer, reference: str) -> str:
    """The digest that a tag names."""
    digest: str = json.loads(skopeo(registry, "inspect", f"docker://{reference}"))["Digest"]
    return digest


def test_a_builder_cut_off_during_the_push_moves_no_tag_and_keeps_no_login(
    imaging: Imaging, builders: Lab, registry: RegistryServer
) -> None:
    """Proves: a builder whose network goes away while it pushes is given up, another builds and pushes, and the tag
    moves once, to a whole image. On the builder that was cut off the push ends by itself, and the login to the registry
    is gone from it."""
    reference = imaging.reference("team/cut:1")
    before = imaging.build("docker", push=reference)
    call = imaging.begin(lambda: imaging.build("slow-push", push=reference))
    host, other = chosen(builders, pushing, "the push")
    assert push_places(host) != []
    host.partition(True)
    try:
        eventually(lambda: call.result or f"{host.name} is left out" in imaging.said(), 30, "the builder is given up")
        # Nobody but that one pushed so far, and that tag must not have moved half-way.
        assert call.result or named(registry, reference) == before.digest
        result = call.wait(60)
        (image,) = result.images
        assert image.built is not None and image.built.builder == other.name
        assert named(registry, reference) == result.digest != before.digest
        eventually(lambda: push_places(host) == [], 30, "the login is gone from the builder that was cut off")
        eventually(lambda: not processes(host, "copy-to"), 10, "its push has ended")
    finally:
        host.partition(False)


def test_when_the_only_builder_is_cut_off_the_tag_stays(
    imaging: Imaging, builders: Lab, registry: RegistryServer
) -> None:
    """Proves: with nobody left, exit 3 with the reason, and the tag names what it named before."""
    reference = imaging.reference("team/alone:1")
    before = imaging.build("docker", push=reference)
    imaging.change(lambda document: document["hosts"].pop("second"))
    host = builders.hosts["first"]
    process = imaging.start(*imaging.image("endless-push", "--systems", X86, "--push", f"docker://{reference}"))
    eventually(lambda: works(host, ENDLESS), 90, "the push")
    host.partition(True)
    try:
        done = ended(process)
        assert done.code == 3 and "no builder for x86_64-linux" in done.err and "first: " in done.err, done
        assert named(registry, reference) == before.digest
        assert registry.tags("team/alone")[0] == "1" and len(registry.tags("team/alone")) == 2
        eventually(lambda: push_places(host) == [], 30, "the login is gone from the builder")
    finally:
        host.partition(False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_operator_that_stops_or_dies_during_a_push_leaves_neither_push_nor_login(
    imaging: Imaging, builders: Lab, registry: RegistryServer, number: signal.Signals
) -> None:
    """Proves: interrupted (130) or killed on the spot, the operator's process leaves no running push on the builder, no
    login to the registry there, and no tag in the registry."""
    imaging.change(lambda document: document["hosts"].pop("second"))
    host = builders.hosts["first"]
    reference = imaging.reference(f"team/stopped-{number.name.lower()}:1")
    process = imaging.start(*imaging.image("endless-push", "--systems", X86, "--push", f"docker://{reference}"))
    eventually(lambda: works(host, ENDLESS), 90, "the push")
    (place,) = push_places(host)
    mode = host.exec("stat", "-c", "%a %U %a", place, f"{place}/auth.json").stdout.decode().splitlines()
    assert [line.split()[0] for line in mode] == ["700", "600"]
    assert host.exec("stat", "-f", "-c", "%T", place).stdout.decode().strip() == "tmpfs"
    process.send_signal(number)
    done = ended(process)
    assert done.code == (130 if number == signal.SIGINT else -signal.SIGKILL), done
    eventually(lambda: push_places(host) == [], 10, "the login is gone")
    eventually(lambda: not works(host, ENDLESS), 10, "the push has ended")
    assert registry.tags(f"team/stopped-{number.name.lower()}") == ()
