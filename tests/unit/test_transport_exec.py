"""Pieces that the runners share: lines, pipes between machines, fan-out, quoting."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nixops.errors import CommandFailed, CommandTimeout, HostFault, Interrupted
from nixops.transport.command import Command
from nixops.transport.exec import Cancellation, Lines, cancellable, chunks, pipe
from nixops.transport.fleet import Outcome, fan_out
from nixops.transport.local import LocalRunner
from nixops.transport.sudo import SudoStart

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


# -- quoting --------------------------------------------------------------------------------------------------


# Shells that a login may have; sh is always there.
LOGIN_SHELLS = [shell for shell in ("sh", "bash", "zsh", "fish") if shutil.which(shell)]
TRICKY = st.text(st.sampled_from("\\'\"$`!~*#\n a"), max_size=12)


@pytest.mark.parametrize("shell", LOGIN_SHELLS)
@settings(max_examples=80, deadline=None)
@given(args=st.lists(TEXT | TRICKY, min_size=1, max_size=5), value=TEXT | TRICKY)
@example(args=["\\", "'\\'", "a\\'; echo out; '\\"], value="\\\\")
def test_a_real_shell_parses_a_shell_line_back_into_the_arguments(shell: str, args: list[str], value: str) -> None:
    command = Command.of("sh", "-c", 'printf "%s\\0" "$V" "$@"', "sh", *args, env={"V": value})
    out = subprocess.run([shell, "-c", command.shell_line()], capture_output=True, check=True).stdout
    assert out == b"".join(text.encode() + b"\0" for text in (value, *args))


def test_a_backslash_stands_between_double_quotes() -> None:
    """To fish, which need not be installed here, it may be an escape between single ones."""
    assert Command.of("echo", "a\\", "b").shell_line() == r"""echo 'a'"\\"'' b"""


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4), TEXT)
def test_the_line_for_sudo_gives_the_payload_its_arguments_and_variables(args: list[str], value: str) -> None:
    command = Command.of("sh", "-c", 'printf "%s\\0" "$V" "$@"', "sh", *args, env={"V": value}, root=True)
    start = SudoStart(command, None)
    # In place of sudo: drop its options and run the rest, as sudo does.
    line = start.shell_line.replace("sudo -n --", "env", 1)
    done = subprocess.run(["sh", "-c", line], capture_output=True, check=True)
    assert done.stdout == b"".join(text.encode() + b"\0" for text in (value, *args))
    assert start.stderr(done.stderr) == b""
    assert start.entered


# -- lines and pieces -----------------------------------------------------------------------------------------


@given(st.binary(), st.integers(min_value=1, max_value=7))
def test_lines_are_the_same_however_the_bytes_were_cut(data: bytes, size: int) -> None:
    whole: list[str] = []
    cut: list[str] = []
    for sink, step in ((whole, max(1, len(data))), (cut, size)):
        lines = Lines(sink.append)
        for piece in chunks(data, step):
            lines.feed(piece)
        lines.close()
    assert whole == cut
    assert len(whole) == data.count(b"\n") + (bool(data) and not data.endswith(b"\n"))


# -- pipes ----------------------------------------------------------------------------------------------------


def test_a_pipe_carries_everything_and_gives_both_results() -> None:
    local = LocalRunner()
    source = Command.of("head", "-c", "150000000", "/dev/zero")
    made, taken = pipe(local, source, local, Command.of("wc", "-c"))
    assert taken.out.strip() == "150000000"
    assert (made.code, made.stdout) == (0, b"")


def test_a_sink_never_takes_half_of_a_failed_source_for_the_whole() -> None:
    local = LocalRunner()
    with pytest.raises(CommandFailed) as caught:
        pipe(
            local,
            Command.of("sh", "-c", "echo half; echo broke >&2; exit 3", title="the source"),
            local,
            Command.of("sh", "-c", "cat >/dev/null && echo whole", title="the sink"),
        )
    assert "the source failed" in str(caught.value)
    assert "broke" in str(caught.value)


def test_a_sink_that_fails_stops_the_source_and_its_error_is_told() -> None:
    local = LocalRunner()
    started = time.monotonic()
    with pytest.raises(CommandFailed) as caught:
        pipe(
            local,
            Command.of("sh", "-c", "yes; sleep 1000"),
            local,
            Command.of("sh", "-c", "head -c 10; echo No space left on device >&2; exit 4", title="the sink"),
        )
    assert "the sink failed" in str(caught.value)
    assert "No space left" in str(caught.value)
    assert time.monotonic() - started < 10


def test_a_source_that_is_not_there_is_told_and_stops_the_sink() -> None:
    local = LocalRunner()
    with pytest.raises(HostFault, match="nixops-no-such-program"):
        pipe(local, Command.of("nixops-no-such-program"), local, Command.of("cat"))


def test_a_pipe_whose_sink_runs_out_of_time_stops_both() -> None:
    local = LocalRunner()
    with pytest.raises(CommandTimeout):
        pipe(local, Command.of("sleep", "1000"), local, Command.of("cat", timeout=0.5))


# -- fan-out --------------------------------------------------------------------------------------------------


def test_fan_out_keeps_order_and_gives_each_item_its_value_or_exception() -> None:
    def work(number: int) -> int:
        time.sleep(0.05 * (3 - number))
        if number == 1:
            raise HostFault("one is broken")
        return number * 10

    outcomes = fan_out([0, 1, 2], work)
    assert [outcome.item for outcome in outcomes] == [0, 1, 2]
    assert [outcome.value for outcome in outcomes] == [0, None, 20]
    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    with pytest.raises(HostFault, match="one is broken"):
        outcomes[1].unwrap()


def test_fan_out_never_runs_more_than_its_limit() -> None:
    running = 0
    most = 0
    lock = threading.Lock()
    first = threading.Barrier(3, timeout=20)

    def work(number: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if number < 3:
            first.wait()
        time.sleep(0.02)
        with lock:
            running -= 1

    fan_out(range(20), work, limit=3)
    assert most == 3


def test_fan_out_over_nothing_is_nothing() -> None:
    empty: list[Outcome[int, int]] = fan_out([], lambda number: number)
    assert empty == []


def test_an_interrupt_cancels_what_waits_and_stops_what_runs() -> None:
    begun: list[int] = []
    ended: list[Exception] = []
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    both = threading.Barrier(2, timer.start, timeout=20)

    def ready(_: str) -> None:
        both.wait()

    def work(number: int) -> None:
        begun.append(number)
        try:
            script = "echo ready >&2; exec sleep 1000"
            LocalRunner().run(Command.of("sh", "-c", script, timeout=None), ready)
        except Exception as error:
            ended.append(error)
            raise

    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            fan_out(range(10), work, limit=2)
    finally:
        timer.cancel()  # it is for this test alone
    assert time.monotonic() - started < 8
    assert sorted(begun) == [0, 1]
    assert [type(error) for error in ended] == [Interrupted, Interrupted]


def test_a_fan_out_inside_a_cancelled_one_ends_too() -> None:
    switch = Cancellation()
    threading.Timer(0.5, switch.cancel).start()
    with cancellable(switch), pytest.raises(Interrupted):
        fan_out([1], lambda _: LocalRunner().run(Command.of("sleep", "1000")))


def test_a_line_without_an_end_is_handed_over_in_parts_and_costs_no_more_than_its_length() -> None:
    seen: list[str] = []
    lines = Lines(seen.append)
    piece = b"x" * 65536
    for _ in range(64):
        lines.feed(piece)
    lines.close()
    assert sum(map(len, seen)) == 64 * 65536
    assert 2 <= len(seen) <= 5
