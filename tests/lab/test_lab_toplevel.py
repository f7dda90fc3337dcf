"""The generations of the lab's stand-in for NixOS, on real hosts: switched to, booted, and misbehaving on purpose.

Each test begins and ends on the host's first generation. It builds another one from the user's checkout, as nixops
would, and looks at what the host became.
"""

from __future__ import annotations

import contextlib
import socket

import pytest

from nixops.errors import Unreachable
from tests.lab.toplevel_site import SLEEPER, Machine, eventually

# -- a whole host ------------------------------------------------------------------------------------------------


def test_the_first_generation_runs_is_booted_is_the_default_and_all_of_it_outlives_a_power_loss(
    either: Machine,
) -> None:
    """Proves that install_base leaves what the seed's host has, and that a power cycle really boots it."""

    def as_installed() -> None:
        assert either.running() == either.base
        assert either.ask("readlink", "-f", "/run/booted-system") == either.base
        assert either.ask("readlink", "-f", "/nix/var/nix/profiles/system") == either.base
        assert either.boot_default() == f"{either.base}/init"
        assert either.ask("hostname") == either.host.name
        eventually(lambda: either.unit("gitea-runner-actions1.service") == "active", "actions1 runs")
        for secret in ("cache-secret", "forgejo-runner-token"):
            assert either.ask("stat", "-c", "%a %U %G", f"/run/secrets/{secret}") == "400 root root"
        assert either.ask("systemctl", "list-units", "--state=failed", "--plain", "--no-legend") == ""

    as_installed()
    boot = either.host.boot_id()
    either.power_cycle()
    assert either.host.boot_id() != boot
    as_installed()


def test_the_programs_of_a_generation_are_links_into_the_store_and_coreutils_is_one_program(either: Machine) -> None:
    """Proves the trap of the field: a tool's directory is in the store, and the end of its link loses its name."""
    assert either.ask("readlink", "-f", "/run/current-system/sw/bin").startswith("/nix/store/")
    assert either.ask("readlink", "-f", "/run/current-system/sw/bin/cat").endswith("/bin/coreutils")
    assert either.ask("/run/current-system/sw/bin/cat", "/etc/hostname") == either.host.name
    revision = either.ask("/run/current-system/sw/bin/nixos-version", "--configuration-revision")
    assert revision == either.site.repo.base_revision


def test_a_test_activation_starts_stops_and_restarts_units_and_leaves_the_boot_default(either: Machine) -> None:
    """Proves that units are compared with the generation before, as NixOS does, and that a power loss undoes it all."""
    first = either.generation(SLEEPER.format(1000) + ' environment.etc."lab.txt".text = "one";')
    assert either.switch(first) == 0
    assert either.running() == first
    assert either.unit("sleeper.service") == "active"
    assert either.ask("cat", "/etc/lab.txt") == "one"
    started = either.unit("sleeper.service", "MainPID")
    other = either.unit("gitea-runner-actions1.service", "MainPID")

    second = either.generation(SLEEPER.format(2000) + ' environment.etc."lab.txt".text = "two";')
    assert either.switch(second) == 0
    assert either.unit("sleeper.service", "MainPID") not in (started, "0")
    assert either.unit("gitea-runner-actions1.service", "MainPID") == other, "an unchanged unit was restarted"
    assert either.ask("cat", "/etc/lab.txt") == "two"
    assert either.boot_default() == f"{either.base}/init"

    assert either.switch(either.base) == 0
    assert either.unit("sleeper.service", "LoadState") == "not-found"
    assert either.unit("sleeper.service") == "inactive"
    assert either.ask("ls", "/etc/lab.txt") == ""

    assert either.switch(second) == 0
    either.power_cycle()
    assert either.running() == either.base
    assert either.unit("sleeper.service", "LoadState") == "not-found"
    assert either.ask("find", "/etc", "-name", "lab.txt", "-o", "-name", "sleeper.service") == ""


def test_boot_moves_the_default_only_to_a_generation_of_the_profile_and_that_one_boots(machine: Machine) -> None:
    """Proves that `boot` changes the next boot and nothing of the running system."""
    new = machine.generation(SLEEPER.format(1000))
    assert machine.switch(new, "boot") == 0
    assert machine.boot_default() == f"{machine.base}/init", "no generation of the profile has this system"

    machine.host.exec("nix-env", "-p", "/nix/var/nix/profiles/system", "--set", new)
    assert machine.switch(new, "boot") == 0
    assert machine.boot_default() == f"{new}/init"
    assert machine.running() == machine.base
    assert machine.unit("sleeper.service", "LoadState") == "not-found"

    machine.power_cycle()
    assert machine.running() == new
    eventually(lambda: machine.unit("sleeper.service") == "active", "the new generation's unit runs")


def test_a_dry_activation_names_the_units_and_changes_nothing(machine: Machine) -> None:
    """Proves that dry-activate is a question."""
    new = machine.generation(SLEEPER.format(1000))
    dry = machine.host.exec(f"{new}/bin/switch-to-configuration", "dry-activate")
    assert "would start the following units: sleeper.service" in dry.stderr.decode()
    assert machine.running() == machine.base
    assert machine.unit("sleeper.service", "LoadState") == "not-found"


# -- what can go wrong, each of which the next activation of the first generation repairs ---------------------------


def test_a_generation_with_a_failing_unit_is_activated_and_ends_with_4_naming_it(machine: Machine) -> None:
    """Proves exit code 4 of switch-to-configuration."""
    bad = machine.generation("lab.failingUnit = true;")
    done = machine.host.exec(f"{bad}/bin/switch-to-configuration", "test", check=False)
    assert done.returncode == 4
    assert "the following units failed: lab-failing.service" in done.stderr.decode()
    assert machine.running() == bad
    assert machine.switch(machine.base) == 0


def test_an_activation_can_be_made_to_fail_in_one_generation_and_in_all(machine: Machine) -> None:
    """Proves the two knobs with which a deploy's, and a roll-back's, failure is tried."""
    bad = machine.generation("lab.activationFails = 3; " + SLEEPER.format(1000))
    assert machine.switch(bad) == 3
    assert machine.running() == bad
    assert machine.switch(machine.base) == 0
    machine.file("/run/nixos/lab-activation-exit", "9\n")
    assert machine.switch(machine.base) == 9


def test_what_a_killed_switch_had_stopped_is_started_by_the_next_one(machine: Machine) -> None:
    """Proves that a roll-back after a hang brings back units which only the killed switch knew of."""
    good = machine.generation(SLEEPER.format(1000))
    assert machine.switch(good) == 0
    hangs = machine.generation("lab.activationHangs = true; " + SLEEPER.format(2000))
    machine.host.exec("systemd-run", "--unit=hanging-switch", f"{hangs}/bin/switch-to-configuration", "test")
    eventually(
        lambda: machine.running() == hangs and machine.unit("sleeper.service") == "inactive",
        "the switch has stopped the sleeper and hangs",
        90,
    )
    machine.host.exec("systemctl", "kill", "--signal=KILL", "hanging-switch.service")
    eventually(lambda: machine.unit("hanging-switch.service") == "failed", "the switch is dead", 90)
    machine.host.exec("systemctl", "reset-failed", "hanging-switch.service")
    assert machine.unit("sleeper.service") == "inactive"
    assert machine.switch(good) == 0
    assert machine.unit("sleeper.service") == "active"


def test_a_second_switch_at_the_same_time_is_refused(machine: Machine) -> None:
    """Proves that two activations never run into each other, as on NixOS."""
    hangs = machine.generation("lab.activationHangs = true;")
    machine.host.exec("systemd-run", "--unit=first-switch", f"{hangs}/bin/switch-to-configuration", "test")
    eventually(lambda: machine.running() == hangs, "the first switch is on its way")
    second = machine.host.exec(f"{machine.base}/bin/switch-to-configuration", "test", check=False)
    assert second.returncode == 1
    assert "Could not acquire lock" in second.stderr.decode()
    machine.host.exec("systemctl", "kill", "--signal=KILL", "first-switch.service")
    machine.host.exec("systemctl", "stop", "first-switch.service", check=False)


def test_a_generation_can_take_the_network_away_and_the_former_one_brings_it_back(either: Machine) -> None:
    """Proves that a host can be lost by an activation, and found again without anybody touching it."""
    bad = either.generation("lab.activationDropsNetwork = true;")
    assert either.switch(bad) == 0
    with pytest.raises(Unreachable):
        either.host.wait_ready(timeout=3)
    assert either.switch(either.base) == 0
    either.host.wait_ready(timeout=10)
    assert either.switch(bad) == 0
    either.power_cycle()  # waits until the host answers again
    assert either.running() == either.base


def test_a_generation_can_refuse_new_logins_while_a_connection_goes_on(machine: Machine) -> None:
    """Proves why a confirmation needs a new connection: the old one works on where no new one does."""
    bad = machine.generation("lab.breakSshd = true;")
    with contextlib.closing(socket.create_connection((machine.host.address, 22), timeout=5)) as standing:
        assert standing.recv(4) == b"SSH-"
        assert machine.switch(bad) == 0
        with pytest.raises(Unreachable):
            machine.host.wait_ready(timeout=2)
        standing.settimeout(5)
        standing.sendall(b"SSH-2.0-still-here\r\n")
        assert standing.recv(4), "the standing connection was closed"
    assert machine.switch(machine.base) == 0
    machine.host.wait_ready(timeout=10)


def test_a_boot_loader_update_can_fail_silently_and_a_full_boot_fails_loudly(machine: Machine) -> None:
    """Proves both: exit 0 with the default not moved (nixpkgs#189966), and exit 1 with the old files whole."""
    silent = machine.generation("lab.bootloaderSilentlyFails = true;")
    machine.host.exec("nix-env", "-p", "/nix/var/nix/profiles/system", "--set", silent)
    assert machine.switch(silent, "boot") == 0
    assert machine.boot_default() == f"{machine.base}/init"

    full = machine.generation(SLEEPER.format(1000))
    machine.host.exec("nix-env", "-p", "/nix/var/nix/profiles/system", "--set", full)
    machine.host.exec("sh", "-c", "cp -a /boot /run/boot; mount -t tmpfs -o size=4k,nr_inodes=64 tmpfs /boot")
    try:
        machine.host.exec(
            "sh", "-c", "cp -a /run/boot/loader /boot/ 2>/dev/null; head -c 9000 /dev/zero >/boot/fill", check=False
        )
        assert machine.switch(full, "boot") == 1
    finally:
        machine.host.exec("sh", "-c", "umount /boot; rm -rf /run/boot")
    assert machine.boot_default() == f"{machine.base}/init"
