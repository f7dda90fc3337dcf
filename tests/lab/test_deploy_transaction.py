"""What goes wrong during the activation, on a real host: the old generation or the new one, and which is said."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from nixops.lab.setting import Setting
from tests.lab.transacting import configure, deploy, deployed, guard_state, note, started, unchanged, units, wait_for


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    yield from deployed(tmp_path_factory)


@pytest.fixture
def before(setting: Setting) -> Iterator[dict[str, str]]:
    yield from unchanged(setting)


def test_an_activation_that_fails_is_rolled_back(setting: Setting, before: dict[str, str]) -> None:
    """switch-to-configuration ends with 3: exit 4, the host is back, its boot default never moved."""
    configure(setting, "lab.activationFails = 3;")
    done = deploy(setting, "--format", "json")
    assert done.code == 4, done
    result = done.document["hosts"][0]
    assert done.document["outcome"] == "rolled-back" == result["outcome"] and "ended with 3" in result["error"]


def test_a_unit_that_fails_is_rolled_back(setting: Setting, before: dict[str, str]) -> None:
    """Activated, but units failed: exit 4, and the unit's own words are shown."""
    configure(setting, "lab.failingUnit = true;")
    done = deploy(setting)
    assert done.code == 4 and "this unit fails on purpose" in done.err, done


def test_an_activation_that_hangs_is_rolled_back_after_its_time(setting: Setting, before: dict[str, str]) -> None:
    """It runs past deploy.activation_timeout."""
    configure(setting, "lab.activationHangs = true;")
    done = deploy(setting)
    assert done.code == 4 and "12 s" in done.err, done


def test_failed_checks_roll_back(setting: Setting, before: dict[str, str]) -> None:
    """The generation activates well, but makes every user trusted: a check says no, and the host goes back."""
    configure(setting, 'nix.settings.trusted-users = [ "root" "*" ];')
    done = deploy(setting)
    assert done.code == 4 and "nix-trust" in done.err, done


def test_a_host_that_can_no_longer_be_logged_in_to_goes_back_by_itself(
    setting: Setting, before: dict[str, str]
) -> None:
    """The SSH server stops; the connection that stands goes on, but a new one is what counts."""
    configure(setting, "lab.breakSshd = true;")
    done = deploy(setting)
    assert done.code == 4 and "no new connection" in done.err, done


def test_a_connection_lost_in_the_middle_ends_with_4_once_the_host_is_back(
    setting: Setting, before: dict[str, str]
) -> None:
    """The new generation takes the network down: nobody can confirm, the host goes back, and is then seen to be."""
    configure(setting, "lab.activationDropsNetwork = true;")
    done = deploy(setting)
    assert done.code == 4 and "back on the old generation" in done.err, done


def test_a_boot_loader_that_silently_does_nothing_is_not_believed(setting: Setting, before: dict[str, str]) -> None:
    """switch-to-configuration boot ends with 0 and changed nothing (nixpkgs#189966): the commit is undone."""
    configure(setting, "lab.bootloaderSilentlyFails = true;")
    done = deploy(setting)
    assert done.code == 4 and "boot loader" in done.err, done
    links = (
        setting.host.exec("sh", "-c", "ls -dv /nix/var/nix/profiles/system-*-link | xargs readlink -f")
        .stdout.decode()
        .split()
    )
    assert links[-1] == before["profile"], "the generation that lost would be offered in the boot menu"


def test_an_interrupted_operator_rolls_back_and_ends_with_130(setting: Setting, before: dict[str, str]) -> None:
    """Ctrl-C while the host waits for the verdict."""
    configure(setting, note("interrupted"))
    process = started(setting, "awaiting-confirm")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err


def test_a_killed_operator_leaves_a_host_that_goes_back_and_the_next_command_says_so(
    setting: Setting, before: dict[str, str]
) -> None:
    """SIGKILL while the host waits: it rolls back by itself after deploy.confirm_timeout."""
    configure(setting, note("killed"))
    process = started(setting, "awaiting-confirm")
    process.kill()
    process.communicate()
    wait_for(lambda: guard_state(setting) == "rolled-back", 45, "rolled back by itself")
    assert setting.running() == before["running"] and setting.boot_default() == before["boot default"]
    wait_for(lambda: not units(setting), 45, "the lease ended by itself")
    configure(setting, "")
    done = deploy(setting)
    assert done.code == 0 and "was killed before it was confirmed" in done.err, done


def test_while_one_deploys_another_ends_with_6_and_is_told_who(setting: Setting, before: dict[str, str]) -> None:
    """Two at once: the lease says who holds it, since when and for what."""
    configure(setting, note("leased"))
    process = started(setting, "awaiting-confirm")
    other = deploy(setting)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert other.code == 6 and "since" in other.err and "deploy-runner actions2" in other.err, other
