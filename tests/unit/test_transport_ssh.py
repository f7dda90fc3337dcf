"""SshRunner: commands over one connection."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest

from nixops.errors import CommandTimeout, ConnectionLost, HostFault, Interrupted
from nixops.secret import Redactor, Secret
from nixops.transport.command import Command
from nixops.transport.exec import Cancellation, cancellable
from nixops.transport.ssh import CHANNELS, SshRunner
from tests.unit.transport_server import Lab, open_lab

MIB = 1024 * 1024


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    with open_lab(tmp_path, monkeypatch) as opened:
        yield opened


def test_stdout_stderr_code_and_host_come_back_apart(lab: Lab) -> None:
    with lab.runner() as runner:
        result = runner.run(Command.of("sh", "-c", "echo out; echo err >&2; exit 7"))
    assert (result.code, result.stdout, result.stderr, result.host) == (7, b"out\n", b"err\n", "web")


def test_one_connection_serves_many_commands_and_fresh_makes_another(lab: Lab) -> None:
    with lab.runner() as runner:
        for _ in range(3):
            runner.run(Command.of("true")).check()
        assert lab.server.logins == 1
        with runner.fresh() as fresh:
            fresh.run(Command.of("true")).check()
    assert lab.server.logins == 2


def test_large_data_both_ways_at_once_does_not_deadlock(lab: Lab) -> None:
    data = os.urandom(MIB) * 20
    with lab.runner() as runner:
        result = runner.run(Command.of("sh", "-c", "tee /dev/stderr", stdin=data, timeout=100))
    assert result.stdout == data
    assert result.stderr == data


def test_a_program_that_does_not_read_its_stdin_ends_normally(lab: Lab) -> None:
    with lab.runner() as runner:
        assert runner.run(Command.of("echo", "hi", stdin=b"x" * 8 * MIB, timeout=20)).out == "hi\n"


def test_lines_of_stderr_come_as_they_are_written_and_without_secrets(lab: Lab) -> None:
    seen: list[str] = []
    redactor = Redactor([Secret("hunter22")])
    with SshRunner(lab.target, redactor=redactor) as runner:
        result = runner.run(Command.of("sh", "-c", "echo a hunter22 >&2; printf b >&2"), seen.append)
    assert seen == ["a ***", "b"]
    assert result.stderr == b"a hunter22\nb"


def test_many_threads_share_one_connection_within_the_hosts_bound_of_sessions(lab: Lab) -> None:
    with lab.runner() as runner:
        threads = [threading.Thread(target=runner.run, args=(Command.of("sleep", "0.1"),)) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert lab.server.logins == 1
    assert 2 <= lab.server.most_sessions <= CHANNELS


def test_a_refused_session_is_asked_for_again_when_another_has_ended(lab: Lab) -> None:
    lab.server.max_sessions = 1
    with lab.runner() as runner:
        results: list[int] = []
        threads = [
            threading.Thread(target=lambda: results.append(runner.run(Command.of("sleep", "0.3")).code))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [0, 0, 0]


def test_a_refusal_whose_reason_paramiko_gave_to_another_thread_is_asked_for_again_too(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = paramiko.Transport.open_session
    refusals = iter([paramiko.SSHException("Unable to open channel."), None])

    def open_session(transport: paramiko.Transport, *args: Any, **kwargs: Any) -> paramiko.Channel:
        if refusal := next(refusals):
            raise refusal
        return real(transport, *args, **kwargs)

    monkeypatch.setattr(paramiko.Transport, "open_session", open_session)
    with lab.runner() as runner:
        assert runner.run(Command.of("true")).code == 0


def test_an_interrupt_cannot_strike_between_paramikos_locks(lab: Lab) -> None:
    """It strikes the main thread alone, which therefore never is in paramiko's reading and writing."""
    threads: list[threading.Thread] = []

    def sink(_: str) -> None:
        threads.append(threading.current_thread())

    with lab.runner() as runner:
        runner.run(Command.of("sh", "-c", "echo a >&2; echo b >&2"), sink)
    assert len(threads) == 2 and threading.main_thread() not in threads


def test_a_host_that_opens_no_session_is_a_host_fault(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nixops.transport.ssh.CHANNEL_PATIENCE", 0.5)
    lab.server.max_sessions = 0
    with lab.runner() as runner, pytest.raises(HostFault, match="opens no further session"):
        runner.run(Command.of("true"))


def test_a_login_that_may_run_nothing_is_a_host_fault(lab: Lab) -> None:
    lab.server.refuse_exec = True
    with lab.runner() as runner, pytest.raises(HostFault, match="refused to start true"):
        runner.run(Command.of("true"))


def test_a_command_past_its_time_ends_with_what_it_said(lab: Lab) -> None:
    with lab.runner() as runner:
        with pytest.raises(CommandTimeout) as caught:
            runner.run(Command.of("sh", "-c", "echo waiting >&2; sleep 1000", timeout=3.0))
        assert "ran past its 3 s" in str(caught.value)
        assert "waiting" in str(caught.value)
        assert runner.run(Command.of("echo", "still here")).out == "still here\n"


def test_a_command_without_a_bound_gets_the_targets(lab: Lab) -> None:
    with lab.runner(command_timeout=0.5) as runner, pytest.raises(CommandTimeout, match=r"0\.5 s"):
        runner.run(Command.of("sleep", "1000", timeout=None))


def test_a_connection_lost_in_the_middle_says_so_and_the_next_command_connects_again(lab: Lab) -> None:
    with lab.runner() as runner:
        with pytest.raises(ConnectionLost) as caught:
            runner.run(
                Command.of("sh", "-c", "echo started >&2; sleep 1000"), lambda _: lab.server.transports[0].close()
            )
        assert "web was lost while sh ran" in str(caught.value)
        assert "started" in str(caught.value)
        assert runner.run(Command.of("echo", "back")).out == "back\n"


def test_a_thrown_switch_stops_a_command_in_another_thread(lab: Lab) -> None:
    switch = Cancellation()
    with lab.runner() as runner, cancellable(switch):
        runner.run(Command.of("true"))
        threading.Timer(0.3, switch.cancel).start()
        started = time.monotonic()
        with pytest.raises(Interrupted):
            runner.run(Command.of("sleep", "1000"))
    assert time.monotonic() - started < 10


def test_nothing_is_left_running_when_a_runner_is_closed(lab: Lab) -> None:
    before = set(threading.enumerate())
    with lab.runner() as runner:
        runner.run(Command.of("true"))
    left = [
        thread
        for thread in set(threading.enumerate()) - before
        if isinstance(thread, paramiko.Transport) and not thread.server_mode
    ]
    assert left == []
