"""LocalRunner on real programs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixops.errors import CommandTimeout, HostFault, Interrupted
from nixops.transport.command import Command
from nixops.transport.exec import Cancellation, cancellable
from nixops.transport.local import LocalRunner
from tests.unit.local_processes import gone

MIB = 1024 * 1024


def test_stdout_stderr_and_exit_code_come_back_apart() -> None:
    result = LocalRunner().run(Command.of("sh", "-c", "echo out; echo err >&2; exit 7"))
    assert (result.code, result.stdout, result.stderr, result.host) == (7, b"out\n", b"err\n", "localhost")


def test_arguments_and_variables_are_not_touched_by_a_shell() -> None:
    awkward = "a 'b' \"c\" $HOME `id` \\ \n *"
    script = 'printf \'%s|%s\' "$1" "$V"'
    result = LocalRunner(env={"V": "overridden"}).run(Command.of("sh", "-c", script, "sh", awkward, env={"V": awkward}))
    assert result.out == f"{awkward}|{awkward}"


def test_variables_that_no_command_may_have_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "let-me-in")
    monkeypatch.setenv("MY_EDITOR", "ed")
    said = LocalRunner(without=("MY_TOKEN",)).run(Command.of("env")).out
    assert "MY_TOKEN" not in said and "MY_EDITOR=ed" in said


def test_a_hundred_mebibytes_in_and_out_at_once_do_not_deadlock() -> None:
    data = os.urandom(MIB) * 100
    result = LocalRunner().run(Command.of("sh", "-c", "tee /dev/stderr", stdin=data, timeout=60))
    assert result.stdout == data
    assert result.stderr == data


def test_a_program_that_ignores_its_stdin_ends_normally() -> None:
    assert LocalRunner().run(Command.of("echo", "hi", stdin=b"x" * 10 * MIB)).out == "hi\n"


def test_without_stdin_a_program_sees_its_end_at_once() -> None:
    assert LocalRunner().run(Command.of("cat", timeout=10)).stdout == b""


def test_each_line_of_stderr_comes_as_it_is_written_and_the_last_without_an_end_too(tmp_path: Path) -> None:
    seen: list[str] = []
    heard = tmp_path / "heard"

    def sink(line: str) -> None:
        seen.append(line)
        heard.touch()

    # It goes on once its first line is here.
    script = f"echo one >&2; while [ ! -e {heard} ]; do sleep 0.02; done; printf 'tw\\303\\303o' >&2"
    LocalRunner().run(Command.of("sh", "-c", script, timeout=20), sink)
    assert seen == ["one", "tw\ufffd\ufffdo"]


def test_death_by_a_signal_is_a_negative_code() -> None:
    assert LocalRunner().run(Command.of("sh", "-c", "kill -KILL $$")).code == -signal.SIGKILL


def test_a_command_past_its_time_is_stopped_with_everything_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 1000 & echo $! >>{pids}; echo $$ >>{pids}; echo working >&2; wait"
    with pytest.raises(CommandTimeout) as caught:
        LocalRunner().run(Command.of("sh", "-c", script, timeout=3.0))
    assert "ran past its 3 s" in str(caught.value)
    assert "working" in str(caught.value)
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def test_a_child_that_ignores_term_is_killed_with_its_group(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"(trap '' TERM; echo $$ >/dev/null; exec sleep 1000) & echo $! >{pids}; wait"
    with pytest.raises(CommandTimeout):
        LocalRunner().run(Command.of("sh", "-c", script, timeout=3.0))
    assert gone(int(pids.read_text().strip()))


def test_what_a_group_that_ignores_term_has_put_into_a_session_of_its_own_is_killed_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the builders of a Nix that does not stop."""
    monkeypatch.setattr("nixops.transport.local.GRACE", 0.5)
    pids = tmp_path / "pids"
    script = f"trap '' TERM; setsid sh -c 'echo $$ >{pids}; sleep 1000; :' & while :; do sleep 0.1; done"
    with pytest.raises(CommandTimeout):
        LocalRunner().run(Command.of("sh", "-c", script, timeout=3.0))
    assert gone(int(pids.read_text().strip()))


def test_an_interrupt_stops_the_command_and_goes_on(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"echo $$ >{pids}; echo ready >&2; exec sleep 1000"
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            LocalRunner().run(Command.of("sh", "-c", script, timeout=60), lambda _: timer.start())
    finally:
        timer.cancel()  # it is for this test alone
    assert gone(int(pids.read_text().strip()))


STRUCK = """
import signal, sys
from nixops.errors import CommandTimeout
from nixops.transport import exec
from nixops.transport.command import Command
from nixops.transport.local import LocalRunner

def interrupt(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
exec.TICK = 0.01
for number in range(60):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.00005 * (number + 1))
        LocalRunner().run(Command.of("sleep", sys.argv[1], timeout=2.0))
    except (KeyboardInterrupt, CommandTimeout):
        pass  # Python itself loses one that strikes in a finaliser
"""


def test_an_interrupt_as_the_command_is_made_leaves_nothing_running() -> None:
    """Between the fork and the moment at which anybody here knows the process' number."""
    seconds = f"{random.randrange(10**6, 10**7)}"
    subprocess.run([sys.executable, "-c", STRUCK, seconds], check=True, timeout=300)
    running = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line for line in running if line == f"sleep {seconds}"] == []


def test_a_thrown_switch_stops_a_command_in_another_thread() -> None:
    switch = Cancellation()
    threading.Timer(0.3, switch.cancel).start()
    started = time.monotonic()
    with cancellable(switch), pytest.raises(Interrupted):
        LocalRunner().run(Command.of("sleep", "1000"))
    assert time.monotonic() - started < 5


def test_a_missing_program_is_named_with_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostFault) as caught:
        LocalRunner().run(Command.of("nix-instantiate"))
    assert "nix-instantiate is not installed" in str(caught.value)
    assert "nix-bin" in str(caught.value)


def test_a_program_that_is_nowhere_is_a_host_fault_that_names_it() -> None:
    with pytest.raises(HostFault) as caught:
        LocalRunner().run(Command.of("nixops-no-such-program"))
    assert "nixops-no-such-program is not installed" in str(caught.value)


def test_a_missing_working_directory_is_not_mistaken_for_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(HostFault) as caught:
        LocalRunner().run(Command.of("true", cwd=tmp_path / "gone"))
    assert "there is no directory" in str(caught.value)


def test_a_file_that_is_no_program_is_a_host_fault(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("hello")
    with pytest.raises(HostFault) as caught:
        LocalRunner().run(Command.of(path))
    assert "cannot be run" in str(caught.value)


def test_root_is_refused_where_we_are_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostFault) as caught:
        LocalRunner().run(Command.of("true", root=True))
    assert "needs root" in str(caught.value)


def test_stdin_from_an_iterator_and_stdout_to_a_sink_hold_nothing_in_between() -> None:
    counted = 0

    def count(piece: bytes) -> None:
        nonlocal counted
        counted += len(piece)

    def source() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * MIB

    result = LocalRunner().stream(Command.of("cat", timeout=60), stdin=source(), stdout=count)
    assert counted == 200 * MIB
    assert result.stdout == b""


def test_an_error_of_the_stdin_source_stops_the_command_and_comes_out() -> None:
    def source() -> Iterator[bytes]:
        yield b"some"
        raise RuntimeError("the source broke")

    started = time.monotonic()
    with pytest.raises(RuntimeError, match="the source broke"):
        LocalRunner().stream(Command.of("sh", "-c", "cat; sleep 1000"), stdin=source())
    assert time.monotonic() - started < 8


def test_a_line_sink_that_raises_stops_the_command() -> None:
    def sink(line: str) -> None:
        raise ValueError(line)

    with pytest.raises(ValueError, match="stop me"):
        LocalRunner().run(Command.of("sh", "-c", "echo stop me >&2; sleep 1000"), sink)
