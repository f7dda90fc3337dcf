"""What goes wrong during the activation, on a real host: the old generation or the new one, and which is said."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nixops.lab.setting import Invoked, Setting

# Bounds short enough to be waited for; seconds.
BOUNDS = {"deploy": {"activation_timeout": 12, "confirm_timeout": 25, "lease_timeout": 20}}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """A host with the runner deployed, which every test of this module leaves as it found it."""
    directory = tmp_path_factory.mktemp("transaction")
    with Setting(directory, name=f"trans-{os.getpid()}", settings={"nix-cache02": BOUNDS}) as made:
        first = made.invoke("deploy-runner", "--yes", "--commit")
        assert first.code == 0, first
        yield made


@pytest.fixture
def before(setting: Setting) -> Iterator[dict[str, str]]:
    """The state before the test; at its end the host, Forgejo, OpenBao and the checkout's content are as they were."""
    state = setting.snapshot()
    yield state
    configure(setting, "")
    assert setting.snapshot() == state
    wait_for(lambda: not units(setting), 10, "the guard's units are gone")


def configure(setting: Setting, nix: str) -> None:
    """The host's own settings, edited and not committed: the checkout's revision stays what it is."""
    setting.repo.configure("nix-cache02", nix, commit=False)


def units(setting: Setting) -> str:
    """Guards, watchdogs and leases that are still at work on the host."""
    listed = setting.host.exec("systemctl", "list-units", "--no-legend", "--plain", "nixops-*", check=False)
    return "\n".join(
        line
        for line in listed.stdout.decode().splitlines()
        if line.startswith(("nixops-guard", "nixops-watchdog", "nixops-lease"))
    )


def deploy(setting: Setting, *args: str) -> Invoked:
    done = setting.invoke("deploy-runner", "--yes", *args)
    assert "Traceback" not in done.err and "a defect in nixops" not in done.err, done
    return done


def guard_state(setting: Setting) -> str:
    """The state of the newest deploy, from outside."""
    script = "d=$(ls -d /var/lib/nixops/deploys/*/ | tail -n 1); cat $d/state"
    return setting.host.exec("sh", "-c", script, check=False).stdout.decode().strip()


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def started(setting: Setting, state: str) -> subprocess.Popen[str]:
    """A deploy that has reached ``state``, left running."""
    known = setting.host.exec("ls", "/var/lib/nixops/deploys").stdout.split()
    process = setting.start("deploy-runner", "--yes")

    def reached() -> bool:
        assert process.poll() is None, process.communicate()
        now = setting.host.exec("ls", "/var/lib/nixops/deploys").stdout.split()
        return len(now) > len(known) and guard_state(setting) == state

    wait_for(reached, 60, f"state {state}")
    return process


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
    configure(setting, _note("interrupted"))
    process = started(setting, "awaiting-confirm")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err


def test_a_killed_operator_leaves_a_host_that_goes_back_and_the_next_command_says_so(
    setting: Setting, before: dict[str, str]
) -> None:
    """SIGKILL while the host waits: it rolls back by itself after deploy.confirm_timeout."""
    configure(setting, _note("killed"))
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
    configure(setting, _note("leased"))
    process = started(setting, "awaiting-confirm")
    other = deploy(setting)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert other.code == 6 and "since" in other.err and "deploy-runner actions2" in other.err, other


@pytest.mark.xdist_group("transaction, second half")
def test_power_loss_before_the_commit_boots_the_old_generation_and_is_said(
    setting: Setting, before: dict[str, str]
) -> None:
    """The plug is pulled while the host waits: it boots what its loader said before; the operator is told 4."""
    configure(setting, _note("power"))
    process = started(setting, "awaiting-confirm")
    setting.host.power_off()
    setting.host.power_on()
    setting.host.wait_ready()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4 and "restarted" in err, err


@pytest.mark.xdist_group("transaction, second half")
def test_a_profile_moved_by_somebody_else_is_not_overwritten(setting: Setting, before: dict[str, str]) -> None:
    """Between the activation and the confirmation someone sets the profile: the deploy gives way, theirs stays."""
    configure(setting, _note("theirs"))
    process = started(setting, "awaiting-confirm")
    base = setting.base["nix-cache02"]
    number = setting.host.exec("readlink", "/nix/var/nix/profiles/system").stdout.decode().split("-")[1]
    setting.host.exec("nix-env", "-p", "/nix/var/nix/profiles/system", "--set", base)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 4 and "someone else" in err and setting.profile() == base, err
    setting.host.exec("nix-env", "-p", "/nix/var/nix/profiles/system", "--switch-generation", number)


@pytest.mark.xdist_group("transaction, second half")
def test_a_crash_between_profile_and_loader_is_undone_by_the_next_run(setting: Setting, before: dict[str, str]) -> None:
    """The host dies after the profile was set and before the loader was: the next run puts the profile back."""
    configure(setting, _note("crash"))
    process = started(setting, "awaiting-confirm")
    # Freeze both guards, do by hand what the commit does first, and pull the plug.
    process.kill()
    process.communicate()
    script = """
        d=$(ls -d /var/lib/nixops/deploys/*/ | tail -n 1)
        systemctl kill --signal=KILL 'nixops-guard-*' 'nixops-watchdog-*'
        . $d/params
        nix-env -p /nix/var/nix/profiles/system --set "$new"
        echo committing >$d/state; sync
    """
    setting.host.exec("sh", "-c", script)
    setting.host.power_off()
    setting.host.power_on()
    setting.host.wait_ready()
    configure(setting, "")
    done = deploy(setting)
    assert done.code == 0 and "rolled-back" in done.err, done


@pytest.mark.xdist_group("transaction, second half")
def test_a_guard_that_is_killed_is_replaced_by_its_watchdog(setting: Setting, before: dict[str, str]) -> None:
    """The second unit sees that the first is gone and rolls back, with no operator needed."""
    configure(setting, _note("watchdog"))
    process = started(setting, "awaiting-confirm")
    setting.host.exec("systemctl", "kill", "--signal=KILL", "nixops-guard-*")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4 and "guard was stopped" in err, err


@pytest.mark.xdist_group("transaction, second half")
def test_an_upgrade_of_the_host_itself_is_held_off_while_the_lease_stands(
    setting: Setting, before: dict[str, str]
) -> None:
    """nixos-upgrade.service started in the middle of a deploy is skipped by systemd, and runs again afterwards."""
    unit = "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo ran >>/var/log/nixos-upgrade.ran'\n"
    setting.host.exec("sh", "-c", "cat >/run/systemd/system/nixos-upgrade.service", stdin=unit.encode())
    setting.host.exec("systemctl", "daemon-reload")
    configure(setting, _note("upgrade"))
    process = started(setting, "awaiting-confirm")
    setting.host.exec("systemctl", "start", "nixos-upgrade.service", check=False)
    ran = setting.host.exec("cat", "/var/log/nixos-upgrade.ran", check=False).stdout
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    setting.host.exec("systemctl", "start", "nixos-upgrade.service")
    after = setting.host.exec("cat", "/var/log/nixos-upgrade.ran").stdout
    setting.host.exec("rm", "/run/systemd/system/nixos-upgrade.service", "/var/log/nixos-upgrade.ran")
    setting.host.exec("systemctl", "daemon-reload")
    assert ran == b"" and after == b"ran\n"


@pytest.mark.xdist_group("transaction, second half")
def test_a_failed_roll_back_ends_with_7_and_says_what_to_do(setting: Setting, tmp_path: Any) -> None:
    """Neither generation can be activated: exit 7, never 4, with the command to run by hand."""
    configure(setting, "lab.failingUnit = true;")
    setting.host.exec("sh", "-c", "mkdir -p /run/nixos; echo 2 >/run/nixos/lab-activation-exit")
    before = setting.snapshot()
    done = deploy(setting)
    assert done.code == 7 and "switch-to-configuration test" in done.err and "act now" in done.err, done
    assert setting.boot_default() == before["boot default"]
    # Mended by hand, as the message says; then everything is as it was.
    setting.host.exec("rm", "/run/nixos/lab-activation-exit")
    setting.host.exec(f"{before['running']}/bin/switch-to-configuration", "test")
    configure(setting, "")
    again = deploy(setting)
    assert again.code == 0 and setting.running() == before["running"], again


@pytest.mark.xdist_group("transaction, second half")
def test_a_host_that_never_comes_back_ends_with_7(setting: Setting) -> None:
    """Power loss without a return: nobody knows what it runs, and that is said; the next run takes up from there."""
    configure(setting, _note("gone"))
    running = setting.running()
    process = started(setting, "awaiting-confirm")
    setting.host.power_off()
    _, err = process.communicate(timeout=150)
    setting.host.power_on()
    setting.host.wait_ready()
    assert process.returncode == 7 and "did not say" in err, err
    configure(setting, "")
    done = deploy(setting)
    assert done.code == 0 and "deploy" in done.err and setting.running() == running, done


def _note(word: str) -> str:
    """A harmless change that restarts the runner: its checks then take the seconds that these tests need."""
    return f'systemd.services.gitea-runner-actions2.restartTriggers = [ "{word}" ];'
