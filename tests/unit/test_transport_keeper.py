"""The keeper and the wrapper, run by real shells on this machine; and the guard."""

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
from hypothesis import given, settings
from hypothesis import strategies as st

from nixops.transport.command import Command
from nixops.transport.guard import Guard
from nixops.transport.keeper import Wrapped, keeper_line
from tests.unit.local_processes import gone

SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]
STUBBORN = ("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
Start = Callable[..., subprocess.Popen[bytes]]


class Keeper:
    """A keeper of this machine's own processes, as one talks to it."""

    def __init__(self, shell: str, patience: float) -> None:
        # As a login shell gets it, but under the shell that is tried.
        line = keeper_line("token", patience, "nixops-mark").replace("exec sh -c", f"exec {shell} -c", 1)
        self.process = subprocess.Popen(
            ["sh", "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
        )
        assert self.hears() == "token"

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    def hears(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait()

    def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts programs in process groups of their own; none outlives the test."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*argv: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(argv, start_new_session=True))
        return started[-1]

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(params=SHELLS)
def keeper(request: pytest.FixtureRequest) -> Iterator[Keeper]:
    made = Keeper(request.param, 60.0)
    yield made
    with suppress(ProcessLookupError):
        os.killpg(made.process.pid, signal.SIGKILL)
    made.close()


def test_it_stops_what_it_is_told_and_says_when_it_is_gone(keeper: Keeper, start: Start) -> None:
    polite, other = start("sleep", "60"), start("sleep", "60")
    keeper.tell(f"stop {polite.pid}")
    assert keeper.hears() == f"heard {polite.pid}"
    assert polite.wait(3) == -signal.SIGTERM
    assert keeper.hears() == f"gone {polite.pid}"
    assert other.poll() is None


def test_what_ignores_term_is_killed_after_a_grace_with_all_that_descends_from_it(
    keeper: Keeper, start: Start, tmp_path: Path
) -> None:
    # As a builder: a session of its own, below a Nix that does not stop.
    below = f"setsid sh -c 'echo $$ >{tmp_path}/builder; sleep 60; :'"
    stubborn = start("sh", "-c", f"trap '' TERM; {below} & {STUBBORN[2]}")
    builder = int(content(tmp_path / "builder"))
    assert os.getsid(builder) != stubborn.pid
    keeper.tell(f"stop {stubborn.pid}")
    began = time.monotonic()
    assert stubborn.wait(15) == -signal.SIGKILL
    assert time.monotonic() - began > 4
    assert gone(builder)


def test_at_the_end_it_stops_all_that_was_added_and_not_taken_back(keeper: Keeper, start: Start) -> None:
    one, two, three = (start("sleep", "60") for _ in range(3))
    for process in (one, two, three):
        keeper.tell(f"add {process.pid}")
    keeper.tell(f"del {two.pid}")
    keeper.tell("")
    keeper.leave()
    assert one.wait(5) == three.wait(5) == -signal.SIGTERM
    keeper.process.wait(5)
    assert two.poll() is None


def test_at_the_end_it_stops_the_connections_commands_that_it_never_heard_of(
    keeper: Keeper, start: Start, tmp_path: Path
) -> None:
    def run(mark: str) -> subprocess.Popen[bytes]:
        command = Command.of("sh", "-c", f"echo >{tmp_path}/{mark}; exec sleep 60")
        process = start("sh", "-c", Wrapped.of(command, mark=mark, through_sudo=False).line)
        content(tmp_path / mark)
        return process

    ours, others = run("nixops-mark"), run("nixops-other")
    keeper.leave()
    assert ours.wait(5) == -signal.SIGTERM
    keeper.process.wait(5)
    assert others.poll() is None


def test_it_signals_no_group_that_somebody_elses_process_with_the_mark_is_in(
    keeper: Keeper, start: Start, tmp_path: Path
) -> None:
    # Who may see the mark may show it too, in a group that others lead.
    shown = tmp_path / "shown"
    victim = start("sh", "-c", f"sh -c ': nixops'-'mark\necho yes >{shown}; sleep 60; :' & wait")
    content(shown)
    keeper.leave()
    keeper.process.wait(30)
    assert victim.poll() is None


@pytest.mark.parametrize("shell", SHELLS)
def test_a_late_sign_of_life_does_not_end_its_end_in_the_middle(shell: str, start: Start, tmp_path: Path) -> None:
    keeper, asked = Keeper(shell, 1.0), tmp_path / "asked"
    script = f"trap 'echo yes >{asked}' TERM; echo yes >{tmp_path}/begun; while :; do sleep 0.1; done"
    stubborn = start("sh", "-c", script)
    content(tmp_path / "begun")
    keeper.tell(f"add {stubborn.pid}")
    content(asked)  # it has begun to stop
    keeper.tell("")
    assert stubborn.wait(60) == -signal.SIGKILL
    keeper.process.wait(30)
    keeper.close()


@pytest.mark.parametrize("told", [True, False])
def test_a_command_on_a_connection_of_its_own_waits_for_a_line(told: bool) -> None:
    wrapped = Wrapped.of(Command.of("cat"), mark="nixops-mark", through_sudo=False, waits=True)
    done = subprocess.run(
        ["sh", "-c", wrapped.line], input=b"\npayload" if told else b"", stdout=subprocess.PIPE, start_new_session=True
    )
    begun = wrapped.begin.match(done.stdout)
    assert begun is not None
    assert done.stdout[begun.end() :] == (b"payload" if told else b"")
    assert (done.returncode == 0) is told


def test_without_a_sign_of_life_it_acts_as_if_we_had_gone(start: Start) -> None:
    # Every shell's at once, as it is the patience that takes the time.
    keepers = [(Keeper(shell, 3.0), start("sleep", "60")) for shell in SHELLS]
    for keeper, watched in keepers:
        keeper.tell(f"add {watched.pid}")
    for _ in range(16):
        time.sleep(0.25)
        for keeper, _ in keepers:
            keeper.tell("")
    assert all(watched.poll() is None for _, watched in keepers), "signs of life came in time, and it was stopped"
    for keeper, watched in keepers:
        assert watched.wait(10) == -signal.SIGTERM
        keeper.process.wait(10)
        keeper.close()


@pytest.mark.parametrize("shell", SHELLS)
def test_it_leaves_nothing_behind_when_it_ends(shell: str) -> None:
    keeper = Keeper(shell, 60.0)
    for _ in range(5):
        keeper.tell("")
    keeper.leave()
    keeper.process.wait(5)
    deadline = time.monotonic() + 5
    while members(keeper.process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members(keeper.process.pid) == []
    keeper.close()


def test_where_there_is_no_sleep_it_still_waits_for_us(tmp_path: Path, start: Start) -> None:
    (tmp_path / "sh").symlink_to("/bin/sh")
    watched = start("sleep", "60")
    process = subprocess.Popen(
        ["/bin/sh", "-c", keeper_line("token", 1.0, "nixops-mark")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={"PATH": str(tmp_path)},
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(f"add {watched.pid}\n".encode())
    process.stdin.flush()
    time.sleep(1.5)
    assert process.poll() is None and watched.poll() is None
    process.stdin.close()
    # One that nobody has waited for is still there for the keeper.
    assert watched.wait(5) in (-signal.SIGTERM, -signal.SIGKILL)
    process.wait(5)


def content(file: Path) -> str:
    """What a program writes into a file, once it is there."""
    end = time.monotonic() + 10
    while not file.exists() or not file.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    return file.read_text()


def members(group: int) -> list[str]:
    out = subprocess.run(["ps", "-eo", "pgid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in out.splitlines() if line.split()[0] == str(group)]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=4))
@settings(max_examples=25, deadline=None)
def test_arguments_variables_and_the_exit_code_pass_through_the_wrapper(arguments: list[str]) -> None:
    command = Command.of(
        "sh", "-c", 'printf "%s\\n" "$V" "$@"; exit 255', "sh", *arguments, env={"V": "".join(arguments)}
    )
    wrapped = Wrapped.of(command, mark="nixops-mark", through_sudo=False)
    done = subprocess.run(["sh", "-c", wrapped.line], capture_output=True, start_new_session=True, check=False)
    begun = wrapped.begin.match(done.stdout)
    assert begun is not None and wrapped.begin.match(done.stderr) is not None
    assert done.stdout[begun.end() :].decode() == "".join(f"{a}\n" for a in ("".join(arguments), *arguments))
    ended = wrapped.end.search(done.stderr)
    assert ended is not None and int(ended[1]) == done.returncode == 255


def test_the_group_that_the_wrapper_names_is_the_commands_own() -> None:
    wrapped = Wrapped.of(Command.of("sleep", "60"), mark="nixops-mark", through_sudo=False)
    process = subprocess.Popen(
        ["sh", "-c", wrapped.line], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdout is not None
    begun = wrapped.begin.match(process.stdout.readline())
    assert begun is not None
    assert int(begun[1]) == process.pid
    os.killpg(int(begun[1]), signal.SIGKILL)
    process.communicate()


def test_a_command_through_sudo_has_no_password_to_give() -> None:
    line = Wrapped.of(Command.of("id", env={"V": "x"}), mark="nixops-mark", through_sudo=True).line
    assert line.startswith("exec sudo -n -- sh -c ")
    assert line.endswith(" env V=x id")


def test_the_guard_kills_what_is_left_and_removes_the_directory(tmp_path: Path, start: Start) -> None:
    private = tmp_path / "private"
    guard, left, released = Guard(), start("sleep", "60"), start("sleep", "60")
    guard.remove_in_the_end(private)
    (private / "bin").mkdir(parents=True)
    guard.add(left.pid)
    guard.add(released.pid)
    guard.release(released.pid)
    assert private.is_dir()
    guard.close()
    assert left.wait(3) == -signal.SIGKILL
    assert released.poll() is None
    assert not private.exists()
    guard.add(released.pid)  # after its end: no error, no effect
    guard.close()


def test_the_guard_leaves_a_directory_that_it_need_no_longer_remove(tmp_path: Path) -> None:
    guard = Guard()
    guard.remove_in_the_end(tmp_path)
    guard.remove_in_the_end(None)
    guard.close()
    assert tmp_path.is_dir()
