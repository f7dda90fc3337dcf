"""Fixtures of the lab tests: real hosts, up for a session, and taken down however it ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from nixops.lab.lab import HostSpec, Lab, LabHost
from nixops.lab.registry import RegistryServer
from nixops.lab.setting import NIX_CONFIG
from tests.lab.toplevel_site import Machine, Site, make_site, on_base

LabFactory = Callable[..., Lab]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is below this directory ``lab``, and leave it out, in one line, where there is no root."""
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.lab)
    if os.geteuid() == 0 or not ours:
        return
    config.hook.pytest_deselected(items=ours)
    items[:] = [item for item in items if item not in ours]
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"left out: {len(ours)} lab tests, which boot real hosts and need root")


@pytest.fixture(scope="session", autouse=True)
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends a session as Ctrl-C does, so that the fixtures take down what they put up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, former)


@pytest.fixture(scope="session")
def lab_factory() -> Iterator[LabFactory]:
    """``lab_factory(HostSpec(…), …)`` boots a lab of one's own; it is up until the session ends, or its ``down()``.

    The names carry the process's number, so that two sessions at once do not meet; a killed session's labs are
    taken down by the next ``Lab.up`` of any name.
    """
    labs: list[Lab] = []

    def make(*specs: HostSpec) -> Lab:
        lab = Lab.up(specs, name=f"test-{os.getpid()}-{len(labs)}")
        labs.append(lab)
        return lab

    try:
        yield make
    finally:
        for lab in reversed(labs):
            lab.down()


@pytest.fixture(scope="session")
def lab(lab_factory: LabFactory) -> Lab:
    """The lab that tests share: ``nix-cache02`` and ``builder01`` plain, ``gunter`` awkward. Leave them as found."""
    return lab_factory(HostSpec("nix-cache02"), HostSpec("builder01"), HostSpec("gunter", "awkward"))


@pytest.fixture
def plain(lab: Lab) -> LabHost:
    """The plain host ``nix-cache02``."""
    return lab.hosts["nix-cache02"]


@pytest.fixture
def awkward(lab: Lab) -> LabHost:
    """The awkward host ``gunter``."""
    return lab.hosts["gunter"]


@pytest.fixture
def nix_of_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    """No nix that this process starts waits for a substituter or wants a sandbox."""
    monkeypatch.setenv("NIX_CONFIG", NIX_CONFIG)


@pytest.fixture(scope="module")
def registry(builders: Lab) -> Iterator[RegistryServer]:
    """Where a module's ``builders`` push to: basic authentication, TLS by an authority that nobody else knows."""
    with RegistryServer(bind=builders.gateway) as server:
        yield server


@pytest.fixture(scope="module")
def site(lab_factory: LabFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A lab of both shapes with its services, each host on the first generation of a user's checkout."""
    lab = lab_factory(HostSpec("nix-cache02", "plain"), HostSpec("awkward01", "awkward"))
    with make_site(lab, tmp_path_factory.mktemp("site")) as made:
        yield made
    lab.down()


@pytest.fixture(params=["nix-cache02", "awkward01"])
def either(site: Site, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Each host of the ``site``; it is brought back to its first generation."""
    with on_base(site, request.param) as machine:
        yield machine


@pytest.fixture
def machine(site: Site) -> Iterator[Machine]:
    """The plain host of the ``site``; it is brought back to its first generation."""
    with on_base(site, "nix-cache02") as machine:
        yield machine
