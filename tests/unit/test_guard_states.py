"""The guard's transaction, state by state and fault by fault, with the real script in a tree of stand-ins."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.guard_host import NEW, OLD, THIRD, GuardHost

BACK = (OLD, OLD, OLD)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[GuardHost]:
    made = GuardHost(tmp_path / "host")
    yield made
    made.stop_everything()


def begun(host: GuardHost, *, watched: bool = False) -> None:
    host.prepare()
    if watched:
        host.start("watch")
    host.start("run")


def test_a_confirmed_generation_runs_and_boots(host: GuardHost) -> None:
    begun(host, watched=True)
    host.reach("awaiting-confirm")
    assert (host.running, host.profile, host.boot_default) == (NEW, OLD, OLD)
    host.give("confirm")
    host.reach("committed")
    host.until(lambda: host.roots == 0, "the roots are gone")
    assert host.is_at == (NEW, NEW, NEW)
    for unit in host.running_units:
        assert unit.wait(timeout=5) == 0


@pytest.mark.parametrize("code", ["1", "2", "3", "4", "127"])
def test_an_activation_that_fails_is_rolled_back_and_moves_no_boot_default(host: GuardHost, code: str) -> None:
    host.fault(f"test-{NEW}", code)
    begun(host)
    host.reach("rolled-back")
    assert host.is_at == BACK and not any(call.startswith("boot") for call in host.calls)


def test_units_that_had_failed_before_do_not_condemn_the_new_generation(host: GuardHost) -> None:
    (host.root / "failed").write_text("old-trouble.service loaded failed failed An old one\n")
    host.fault(f"test-{NEW}", "4")
    begun(host)
    host.reach("awaiting-confirm")
    host.give("confirm")
    host.reach("committed")


def test_a_token_among_the_arguments_of_a_failed_unit_is_not_kept_in_the_log(host: GuardHost) -> None:
    switch = host.store(NEW) / "bin/switch-to-configuration"
    switch.write_text("#!/bin/sh\necho 'act_runner register --token very-secret-token --name x'; exit 3\n")
    begun(host)
    host.reach("rolled-back")
    log = (host.directory / "activation.log").read_text()
    assert "very-secret-token" not in log and "--token *** --name x" in log


@pytest.mark.parametrize("how", ["hang", "half"])
def test_an_activation_that_hangs_is_rolled_back_after_its_time(host: GuardHost, how: str) -> None:
    host.activation_seconds = 1
    host.fault(f"test-{NEW}", how)
    begun(host)
    host.reach("rolled-back")
    assert host.is_at == BACK and "ran past 1 s" in host.reason


def test_a_verdict_without_the_nonce_confirms_nothing(host: GuardHost) -> None:
    host.confirm_seconds = 1
    begun(host)
    host.reach("awaiting-confirm")
    host.give("confirm", nonce="stale")
    host.reach("rolled-back")
    assert host.is_at == BACK and "no confirmation within 1 s" in host.reason


def test_an_abort_says_why(host: GuardHost) -> None:
    begun(host)
    host.reach("awaiting-confirm")
    host.give("abort", why="checks failed: unit-active")
    host.reach("rolled-back")
    assert host.is_at == BACK and host.reason == "checks failed: unit-active"


def test_an_abort_before_the_activation_keeps_it_from_beginning(host: GuardHost) -> None:
    host.prepare()
    host.give("abort", why="the connection was lost")
    host.start("run")
    host.reach("refused")
    host.until(lambda: host.roots == 0, "the roots are gone")
    assert host.calls == [] and host.is_at == BACK


def test_failed_units_of_the_old_generation_are_said(host: GuardHost) -> None:
    host.fault(f"test-{NEW}", "4")
    host.fault(f"test-{OLD}", "4")
    begun(host)
    host.reach("rolled-back")
    assert "with failed units" in host.reason


def test_a_roll_back_that_fails_is_never_called_rolled_back(host: GuardHost) -> None:
    host.fault(f"test-{OLD}", "2")
    begun(host)
    host.reach("awaiting-confirm")
    host.give("abort")
    host.reach("rollback-failed")
    assert host.running == NEW and "ended with 2" in host.reason and host.roots == 2


def test_a_roll_back_that_failed_is_tried_again_by_the_next_run(host: GuardHost) -> None:
    test_a_roll_back_that_fails_is_never_called_rolled_back(host)
    host.run("recover")
    assert host.state == "rollback-failed"
    host.mend(f"test-{OLD}")
    host.run("recover")
    assert host.state == "rolled-back" and host.is_at == BACK and host.roots == 0


def test_a_failed_roll_back_that_was_settled_by_hand_is_taken_as_it_is(host: GuardHost) -> None:
    test_a_roll_back_that_fails_is_never_called_rolled_back(host)
    host.set_running(THIRD)
    host.run("recover")
    assert host.state == "rolled-back" and THIRD in host.reason and host.running == THIRD


@pytest.mark.parametrize("how", ["1", "silent"])
def test_a_loader_that_does_not_take_the_new_generation_undoes_the_commit(host: GuardHost, how: str) -> None:
    host.fault(f"boot-{NEW}", how)
    begun(host)
    host.reach("awaiting-confirm")
    host.give("confirm")
    host.reach("rolled-back")
    assert host.is_at == BACK and "boot loader" in host.reason


def test_a_profile_that_cannot_be_set_undoes_the_commit(host: GuardHost) -> None:
    host.fault("nix-env--set")
    begun(host)
    host.reach("awaiting-confirm")
    host.give("confirm")
    host.reach("rolled-back")
    assert host.is_at == BACK


def test_a_profile_that_cannot_be_put_back_is_a_failed_roll_back(host: GuardHost) -> None:
    host.fault(f"boot-{NEW}")
    host.fault("nix-env--switch-generation")
    begun(host)
    host.reach("awaiting-confirm")
    host.give("confirm")
    host.reach("rollback-failed")
    assert host.running == OLD and host.profile == NEW and "could not be put back" in host.reason


def test_with_an_unreadable_loader_the_exit_code_of_its_undo_counts(host: GuardHost) -> None:
    (host.root / "boot/loader/loader.conf").unlink()
    host.fault(f"boot-{NEW}")
    host.fault(f"boot-{OLD}")
    begun(host)
    host.reach("awaiting-confirm")
    host.give("confirm")
    host.reach("rollback-failed")
    assert (host.running, host.profile) == (OLD, OLD)


def test_a_loader_that_did_not_start_the_profile_is_put_back_to_what_it_started(host: GuardHost) -> None:
    host.set_boot_default(THIRD, 40)
    (host.root / "nix/var/nix/profiles/system-40-link").symlink_to(host.store(THIRD))
    host.fault(f"boot-{NEW}")
    begun(host)
    host.reach("awaiting-confirm")
    host.give("confirm")
    host.reach("rolled-back")
    assert host.is_at == (OLD, OLD, THIRD)


def test_a_profile_moved_by_somebody_else_stays_theirs(host: GuardHost) -> None:
    begun(host)
    host.reach("awaiting-confirm")
    host.set_profile(THIRD)
    host.give("confirm")
    host.reach("rolled-back")
    assert (host.running, host.profile) == (OLD, THIRD) and "someone else" in host.reason


@pytest.mark.parametrize("word", ["confirm", "abort"])
def test_a_system_activated_by_somebody_else_is_left_as_it_is_and_said(host: GuardHost, word: str) -> None:
    begun(host)
    host.reach("awaiting-confirm")
    host.set_profile(THIRD)
    host.set_running(THIRD)
    host.set_boot_default(THIRD, 42)
    host.give(word)
    host.reach("rollback-failed")
    assert host.is_at == (THIRD, THIRD, THIRD) and THIRD in host.reason


def test_a_host_that_runs_something_else_by_now_is_not_touched(host: GuardHost) -> None:
    host.prepare()
    host.set_running(THIRD)
    host.start("run")
    host.reach("refused")
    host.until(lambda: host.roots == 0, "the roots are gone")
    assert host.running == THIRD and host.calls == []


def test_a_commit_whose_state_cannot_be_written_does_not_begin(host: GuardHost) -> None:
    begun(host)
    host.reach("awaiting-confirm")
    host.fault("sync")
    host.give("confirm")
    host.until(lambda: host.running == OLD, "the old generation runs")
    assert host.running_units[0].wait(timeout=5) is not None
    assert host.is_at == BACK and "nix-env --set" not in host.calls
    host.mend("sync")
    host.run("recover")
    assert host.state == "rolled-back"


def test_an_activation_whose_state_cannot_be_written_does_not_begin(host: GuardHost) -> None:
    host.prepare()
    host.fault("sync")
    host.start("run").wait(timeout=10)
    assert host.calls == [] and host.state == "prepared"


def test_a_log_that_cannot_be_opened_keeps_nothing_from_being_rolled_back(host: GuardHost) -> None:
    begun(host)
    host.reach("awaiting-confirm")
    (host.directory / "rollback.log").mkdir()
    host.give("abort")
    host.reach("rolled-back")
    assert host.is_at == BACK


# -- the guard dies or hangs ------------------------------------------------------------------------------------


def test_the_watchdog_rolls_back_for_a_guard_killed_while_it_waits(host: GuardHost) -> None:
    begun(host, watched=True)
    host.reach("awaiting-confirm")
    host.kill()
    host.reach("rolled-back")
    assert host.is_at == BACK and "guard was stopped" in host.reason


@pytest.mark.parametrize("how", ["hang", "half"])
def test_the_watchdog_rolls_back_for_a_guard_killed_in_the_activation(host: GuardHost, how: str) -> None:
    host.activation_seconds = 20
    host.fault(f"test-{NEW}", how)
    begun(host, watched=True)
    host.until(lambda: f"test {NEW}" in host.calls, "the activation began")
    host.kill()
    host.reach("rolled-back")
    assert host.is_at == BACK


def test_the_watchdog_ends_a_guard_that_is_frozen_past_its_deadline(host: GuardHost) -> None:
    begun(host, watched=True)
    host.reach("awaiting-confirm")
    os.kill(host.running_units[1].pid, signal.SIGSTOP)
    (host.directory / "deadline").write_text("0\n")
    host.reach("rolled-back")
    assert host.is_at == BACK
    assert host.running_units[1].wait(timeout=5) == -signal.SIGKILL


def test_the_watchdog_finishes_a_commit_whose_guard_died_after_the_profile(host: GuardHost) -> None:
    host.activation_seconds = 20
    host.fault(f"boot-{NEW}", "hang")
    begun(host, watched=True)
    host.reach("awaiting-confirm")
    host.give("confirm")
    host.until(lambda: f"boot {NEW}" in host.calls, "the loader is written")
    host.mend(f"boot-{NEW}")
    host.kill()
    host.reach("committed")
    assert host.is_at == (NEW, NEW, NEW)


def test_a_watchdog_without_a_guard_ends_as_refused_once_it_is_told(host: GuardHost) -> None:
    host.prepare()
    host.give("abort", why="the guard could not be started")
    host.start("watch")
    host.reach("refused")
    assert host.is_at == BACK and host.calls == []


def test_a_guard_that_comes_after_the_decision_does_nothing(host: GuardHost) -> None:
    host.prepare("refused")
    assert host.run("run").returncode == 0
    assert host.calls == [] and host.state == "refused"


def test_a_guard_that_lives_is_asked_to_end_by_the_next_run(host: GuardHost) -> None:
    host.confirm_seconds = 60
    begun(host, watched=True)
    host.reach("awaiting-confirm")
    host.run("recover")
    assert host.state == "rolled-back" and host.is_at == BACK and "later deploy" in host.reason
    assert host.calls.count(f"test {OLD}") == 1, "two of them rolled back"


# -- the host restarts, or the next run finds what was left -----------------------------------------------------


def left(host: GuardHost, state: str, *, running: str, profile: str, loader: str, restarted: bool) -> None:
    if restarted:
        host.boot_id = "another-boot"
    host.prepare(state)
    host.set_running(running)
    if profile != OLD:
        host.set_profile(profile)
    if loader != OLD:
        host.set_boot_default(loader, 42)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("loader", [OLD, NEW])
@pytest.mark.parametrize("profile", [OLD, NEW])
@pytest.mark.parametrize("running", [OLD, NEW])
@pytest.mark.parametrize("state", ["awaiting-confirm", "committing", "rolling-back"])
def test_no_crash_leaves_a_mixture(
    host: GuardHost, state: str, running: str, profile: str, loader: str, restarted: bool
) -> None:
    """Whatever stood when it died: after the next run, running, profile and boot default are of one generation."""
    left(host, state, running=running, profile=profile, loader=loader, restarted=restarted)
    host.run("recover")
    finished = state == "committing" and running == profile == NEW
    assert host.state == ("committed" if finished else "rolled-back")
    assert host.is_at == ((NEW, NEW, NEW) if finished else BACK)
    assert host.roots == 0


@pytest.mark.parametrize("state", ["none", "prepared"])
def test_what_never_began_is_refused_and_activates_nothing(host: GuardHost, state: str) -> None:
    left(host, state, running=OLD, profile=OLD, loader=OLD, restarted=True)
    if state == "none":
        (host.directory / "state").unlink()
    host.run("recover")
    assert host.state == "refused" and host.calls == [] and host.roots == 0


def test_a_restart_into_what_the_loader_chose_is_said(host: GuardHost) -> None:
    left(host, "awaiting-confirm", running=THIRD, profile=OLD, loader=OLD, restarted=True)
    host.run("recover")
    assert host.state == "rolled-back" and host.running == THIRD and THIRD in host.reason


@pytest.mark.parametrize("state", ["committed", "rolled-back", "refused"])
def test_what_is_finished_is_left_alone(host: GuardHost, state: str) -> None:
    left(host, state, running=NEW, profile=NEW, loader=NEW, restarted=False)
    host.run("recover")
    assert host.state == state and host.is_at == (NEW, NEW, NEW)


# -- the boot loader's configuration ----------------------------------------------------------------------------

GENERATIONS = f"init=/nix/store/{OLD}/init root=LABEL=nixos\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            {"boot/loader/loader.conf": "default a\n", "boot/loader/entries/a.conf": f"options {GENERATIONS}"},
            OLD,
            id="systemd-boot, no .conf",
        ),
        pytest.param(
            {
                "efi/loader/loader.conf": "default a.conf\n",
                "boot/loader/entries/a.conf": f"options quiet {GENERATIONS}",
            },
            OLD,
            id="entries on XBOOTLDR",
        ),
        pytest.param(
            {
                "boot/efi/loader/loader.conf": "default a.conf\n",
                "boot/efi/loader/entries/a.conf": f"options {GENERATIONS}",
            },
            OLD,
            id="ESP below /boot",
        ),
        pytest.param(
            {"boot/grub/grub.cfg": f"menuentry {{\n linux /kernel {GENERATIONS}}}\n linux /k init=/nix/store/x/init\n"},
            OLD,
            id="grub",
        ),
        pytest.param(
            {"boot/extlinux/extlinux.conf": f"LABEL nixos-default\n  APPEND {GENERATIONS}"}, OLD, id="extlinux"
        ),
        pytest.param({"boot/loader/loader.conf": "default nixos-generation-*.efi\n"}, "unknown", id="unified images"),
        pytest.param({"boot/loader/loader.conf": "default @saved\n"}, "unknown", id="saved"),
        pytest.param({"boot/loader/loader.conf": "default ../../etc/x.conf\n"}, "unknown", id="a path"),
        pytest.param({}, "unknown", id="none"),
    ],
)
def test_the_boot_default_is_read_from_each_loader(host: GuardHost, files: dict[str, str], expected: str) -> None:
    (host.root / "boot/loader/loader.conf").unlink()
    for name, text in files.items():
        (host.root / name).parent.mkdir(parents=True, exist_ok=True)
        (host.root / name).write_text(text)
    host.prepare()
    assert host.boot_default == expected


def test_a_loader_that_is_no_longer_in_use_is_not_believed(host: GuardHost) -> None:
    """Its configuration was left behind by an earlier installation and names no generation of the profile."""
    host.set_boot_default(THIRD, 7)
    assert host.facts() == "unknown"
    host.set_boot_default(OLD, 41)
    assert host.facts() == str(host.store(OLD))
