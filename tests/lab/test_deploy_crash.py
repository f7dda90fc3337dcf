"""What a crash in the middle of an activation leaves, of the host, the guard or the roll-back, on a real host."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from nixops.lab.setting import Setting
from tests.lab.transacting import came_up, configure, deploy, deployed, note, started, unchanged


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    yield from deployed(tmp_path_factory)


@pytest.fixture
def before(setting: Setting) -> Iterator[dict[str, str]]:
    yield from unchanged(setting)


def test_power_loss_before_the_commit_boots_the_old_generation_and_is_said(
    setting: Setting, before: dict[str, str]
) -> None:
    """The plug is pulled while the host waits: it boots what its loader said before; the operator is told 4."""
    configure(setting, note("power"))
    process = started(setting, "awaiting-confirm")
    setting.host.power_off()
    setting.host.power_on()
    came_up(setting)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4 and "restarted" in err, err


def test_a_profile_moved_by_somebody_else_is_not_overwritten(setting: Setting, before: dict[str, str]) -> None:
    """Between the activation and the confirmation someone sets the profile: the deploy gives way, theirs stays."""
    configure(setting, note("theirs"))
    process = started(setting, "awaiting-confirm")
    base = setting.base["nix-cache02"]
    number = setting.host.exec("readlink", "/nix/var/nix/profiles/system").stdout.decode().split("-")[1]
    setting.host.exec("nix-env", "-p", "/nix/var/nix/profiles/system", "--set", base)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 4 and "someone else" in err and setting.profile() == base, err
    setting.host.exec("nix-env", "-p", "/nix/var/nix/profiles/system", "--switch-generation", number)


def test_a_crash_between_profile_and_loader_is_undone_by_the_next_run(setting: Setting, before: dict[str, str]) -> None:
    """The host dies after the profile was set and before the loader was: the next run puts the profile back."""
    configure(setting, note("crash"))
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
    came_up(setting)
    configure(setting, "")
    done = deploy(setting)
    assert done.code == 0 and "rolled-back" in done.err, done


def test_a_guard_that_is_killed_is_replaced_by_its_watchdog(setting: Setting, before: dict[str, str]) -> None:
    """The second unit sees that the first is gone and rolls back, with no operator needed."""
    configure(setting, note("watchdog"))
    process = started(setting, "awaiting-confirm")
    setting.host.exec("systemctl", "kill", "--signal=KILL", "nixops-guard-*")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4 and "guard was stopped" in err, err


def test_an_upgrade_of_the_host_itself_is_held_off_while_the_lease_stands(
    setting: Setting, before: dict[str, str]
) -> None:
    """nixos-upgrade.service started in the middle of a deploy is skipped by systemd, and runs again afterwards."""
    unit = "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo ran >>/var/log/nixos-upgrade.ran'\n"
    setting.host.exec("sh", "-c", "cat >/run/systemd/system/nixos-upgrade.service", stdin=unit.encode())
    setting.host.exec("systemctl", "daemon-reload")
    configure(setting, note("upgrade"))
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
