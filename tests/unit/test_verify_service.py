"""A service counts as up when one process of it has stayed up."""

from __future__ import annotations

import pytest

from nixops.verify.packages import brings_nix, programs_of
from nixops.verify.unit import read_units
from tests.unit.verify_recorded import OURS, Clock, RecordedHost, check, failures, inventory_host


def started(ago: float, host: RecordedHost) -> RecordedHost:
    host.started = host.uptime - ago
    return host


def test_an_old_process_needs_no_waiting() -> None:
    clock = Clock()
    results = check(started(100, RecordedHost()), clock=clock)
    assert results["unit-active"].ok
    assert clock.now == 0


def test_a_young_process_is_watched_until_it_has_stayed() -> None:
    clock = Clock()
    recorded = started(1, RecordedHost(looks=[{}] * 10))
    assert check(recorded, clock=clock)["unit-active"].ok
    assert 2 <= clock.now <= 5


def test_a_process_that_was_restarted_before_is_watched_longer() -> None:
    clock = Clock()
    recorded = started(1, RecordedHost(looks=[{}] * 20))
    recorded.unit["NRestarts"] = "3"
    assert check(recorded, clock=clock)["unit-active"].ok
    assert clock.now > 10


@pytest.mark.parametrize(
    "then",
    [
        {"MainPID": "900", "NRestarts": "1"},
        {"NRestarts": "1"},
        {"ActiveState": "activating", "SubState": "auto-restart", "MainPID": "0"},
        {"ActiveState": "failed", "SubState": "failed", "MainPID": "0"},
    ],
)
def test_a_crash_loop_that_looks_active_for_a_moment_is_found(then: dict[str, str]) -> None:
    recorded = started(1, RecordedHost(looks=[{}, {}, then]))
    results = check(recorded)
    assert "unit-active" in failures(results)
    assert "journalctl -u" in results["unit-active"].detail


def test_a_service_that_is_still_starting_is_waited_for() -> None:
    clock = Clock()
    recorded = started(
        60, RecordedHost(looks=[{}, {}, {"ActiveState": "active", "SubState": "running", "MainPID": "7"}])
    )
    recorded.unit |= {"ActiveState": "activating", "SubState": "start-pre", "MainPID": "0"}
    assert failures(check(recorded, clock=clock)) == set()
    assert clock.now >= 2


def test_a_service_that_is_yet_to_start_is_waited_for() -> None:
    """As after a boot: its job waits for that of another unit."""
    clock = Clock()
    recorded = started(
        60, RecordedHost(looks=[{}, {"ActiveState": "active", "SubState": "running", "MainPID": "7", "Job": "0"}])
    )
    recorded.unit |= {"ActiveState": "inactive", "SubState": "dead", "MainPID": "0", "Job": "311"}
    assert failures(check(recorded, clock=clock)) == set()
    assert clock.now >= 2


def test_a_service_whose_process_is_systemds_still_is_waited_for() -> None:
    """Between fork and exec the unit is active, and its process says nothing of the runner's."""
    clock = Clock()
    recorded = started(60, RecordedHost(looks=[{}, {"MainPID": "7"}]))
    recorded.unit["MainPID"] = "0"
    assert failures(check(recorded, clock=clock)) == set()
    assert clock.now >= 2


def test_a_service_that_never_comes_up_is_not_waited_for_for_ever() -> None:
    clock = Clock()
    recorded = RecordedHost()
    recorded.unit |= {"ActiveState": "activating", "SubState": "auto-restart", "MainPID": "0", "NRestarts": "9"}
    results = check(recorded, clock=clock)
    assert "unit-active" in failures(results)
    assert "activating/auto-restart" in results["unit-active"].detail
    assert clock.now <= 50


def test_a_stopped_service_fails_at_once() -> None:
    clock = Clock()
    recorded = RecordedHost()
    recorded.unit |= {"ActiveState": "inactive", "SubState": "dead", "MainPID": "0"}
    assert "unit-active" in failures(check(recorded, clock=clock))
    assert clock.now == 0


@pytest.mark.parametrize(
    ("package", "programs"),
    [
        ("gitMinimal", ("git",)),
        ("gnused", ("sed",)),
        ("nodejs_22", ("node",)),
        ("nixVersions.latest", ("nix",)),
        ("python312", ("python3",)),
        ("jq", ("jq",)),
        ("nodePackages.pnpm", ("pnpm",)),
    ],
)
def test_a_package_is_known_by_its_programs(package: str, programs: tuple[str, ...]) -> None:
    assert programs_of(package) == programs


def test_packages_that_bring_nix_are_known() -> None:
    assert brings_nix(("bash", "nix"))
    assert brings_nix(("lix",))
    assert not brings_nix(("bash", "nix-prefetch-git"))


@pytest.mark.parametrize(
    ("package", "found"),
    [("mystery", False), ("gitMinimalExtras", False), ("coreutils-prefixed", False)],
)
def test_a_package_nothing_is_known_of_must_show_in_the_name_of_a_path_entry(package: str, found: bool) -> None:
    results = check(RecordedHost(), inventory_host(host_packages=[package]))
    assert results["host-packages"].ok is found


def test_a_package_without_a_program_of_its_name_counts_by_its_store_name() -> None:
    recorded = RecordedHost(
        programs=set(), path="/nix/store/1svk98kqvif242ifrxfwnzh7x9wk8ws8-python3.12-black-24.1/bin"
    )
    assert check(recorded, inventory_host(host_packages=["python3Packages.black"]))["host-packages"].ok
    assert not check(recorded, inventory_host(host_packages=["python3Packages.flask"]))["host-packages"].ok


def test_a_process_that_ends_while_it_is_read_is_none() -> None:
    """Its files are read one after the other; what comes after its end is empty."""
    assert read_units(RecordedHost(), [OURS])[0].process is not None
    assert read_units(RecordedHost(nice=""), [OURS])[0].process is None
