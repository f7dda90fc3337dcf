"""The shell text that signals a process group, run by real shells."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nixops.transport.group import signal_group
from tests.unit.local_processes import gone

SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A group's leader whose name looks like the rest of a line of /proc, and what it put into another session."""
    name = tmp_path / "x) S 1 1 ("
    name.symlink_to("/bin/sh")
    script = "setsid sh -c 'echo $$; sleep 60; :' & while :; do sleep 1; done"
    leader = subprocess.Popen([name, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout is not None
    below = int(leader.stdout.readline())
    yield leader, below
    for group in (leader.pid, below):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    leader.stdout.close()
    leader.wait()


def send(shell: str, name: str, group: int) -> int:
    """As on a host whose PATH is empty."""
    program = shutil.which(shell)
    assert program is not None
    return subprocess.run((program, *signal_group(group, name).argv[1:]), env={}, check=False).returncode


@pytest.mark.parametrize("shell", SHELLS)
def test_kill_is_for_the_group_and_all_that_descends_from_it(
    shell: str, odd: tuple[subprocess.Popen[bytes], int]
) -> None:
    leader, below = odd
    assert os.getsid(below) != leader.pid
    assert send(shell, "0", leader.pid) == 0
    assert send(shell, "KILL", leader.pid) == 0
    assert leader.wait(3) == -signal.SIGKILL
    assert gone(below)


def living(mark: str) -> list[str]:
    """The processes that have ``mark`` in their environment; one that has ended has none."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (place / "environ").read_bytes():
                found.append((place / "cmdline").read_bytes().decode())
    return found


def until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_build_that_starts_programs_all_the_time_is_killed_whole_and_soon(shell: str) -> None:
    mark = os.urandom(8).hex()
    loop = "while :; do sleep 0.17; done"
    script = f"for i in 1 2 3 4 5 6 7 8; do ({loop}) & sleep 0.02; done; setsid sh -c '({loop}) & {loop}'"
    leader = subprocess.Popen(
        ["sh", "-c", script], env={**os.environ, "NIXOPS_TEST_MARK": mark}, start_new_session=True
    )
    try:
        until(lambda: len(living(mark)) > 10, 20)
        started = time.monotonic()
        assert send(shell, "KILL", leader.pid) == 0
        assert time.monotonic() - started < 10
        assert leader.wait(3) == -signal.SIGKILL
        # Whoever was left out goes on without end.
        until(lambda: living(mark) == [], 5)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["0", "TERM", "KILL"])
def test_a_group_without_anybody_is_told_apart(shell: str, name: str) -> None:
    gone_by_now = subprocess.Popen(["true"], start_new_session=True)
    gone_by_now.wait()
    assert send(shell, name, gone_by_now.pid) != 0


@pytest.mark.parametrize("shell", SHELLS)
def test_term_is_for_the_group_which_ends_its_own_children(
    shell: str, odd: tuple[subprocess.Popen[bytes], int]
) -> None:
    leader, below = odd
    assert send(shell, "TERM", leader.pid) == 0
    assert leader.wait(3) == -signal.SIGTERM
    assert Path(f"/proc/{below}").exists()
