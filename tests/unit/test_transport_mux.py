"""SshPool and MuxRunner with the real ssh: against a small server in this process, and against nothing at all.

What depends on OpenSSH's sshd, on real sudo and on nix is in tests/lab/test_mux_lab.py.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nixops.errors import (
    CommandTimeout,
    ConnectionLost,
    HostFault,
    HostKeyChanged,
    HostKeyUnknown,
    Interrupted,
    LoginRefused,
    NixopsError,
    Unreachable,
)
from nixops.secret import Redactor, Secret
from nixops.transport.command import Command, Result
from nixops.transport.exec import Cancellation, cancellable
from nixops.transport.fleet import fan_out
from nixops.transport.hostkey import fingerprint
from nixops.transport.mux import COMMANDS, SshPool
from nixops.transport.muxsession import Session
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName
from tests.unit.transport_server import Lab, keys, open_lab, text, write_key

WEB = HostName("web")
# Says that it waits, and leaves a mark when it is asked to stop.
MARKS = "trap 'echo bye >&2; echo bye; echo stopped >{mark}; exit' TERM; echo waiting >&2; while :; do sleep 0.1; done"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    with open_lab(tmp_path, monkeypatch) as lab:
        yield lab


@pytest.fixture
def pool(server: Lab) -> Iterator[SshPool]:
    with SshPool([server.target]) as made:
        yield made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper on a busy machine is waited for: the mark comes once it has stopped the command."""
    monkeypatch.setattr("nixops.transport.master._HEARD", 10.0)


def refusal(target: SshTarget, timeout: float = 5.0) -> NixopsError:
    """How a connection to ``target`` fails."""
    with SshPool([target]) as pool, pytest.raises(NixopsError) as caught:
        pool.connect(target.name, timeout=timeout)
    return caught.value


# -- commands -------------------------------------------------------------------------------------------------


def test_stdin_variables_outputs_and_exit_code_are_the_commands(pool: SshPool) -> None:
    lines: list[str] = []
    command = Command.of(
        "sh", "-c", 'cat; echo one >&2; printf %s "$V" >&2; exit 255', stdin=b"\0in", env={"V": "a 'b"}
    )
    result = pool.runner(WEB).run(command, lines.append)
    assert (result.code, result.stdout, result.stderr) == (255, b"\0in", b"one\na 'b")
    assert lines == ["one", "a 'b"]
    assert (result.host, result.command) == ("web", command)


def test_a_command_runs_over_the_connection_whose_keeper_knows_it_or_not_at_all(
    pool: SshPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another thread has opened the next one in between, its keeper would not stop the command."""
    runner = pool.connect(WEB, timeout=20)
    run = Session.run

    def late(session: Session, stdin: Iterable[bytes] | None) -> Result | None:
        pool.drop(WEB)
        pool.connect(WEB, timeout=20)
        return run(session, stdin)

    monkeypatch.setattr(Session, "run", late)
    with pytest.raises(ConnectionLost, match="before touch could start"):
        runner.run(Command.of("touch", str(tmp_path / "ran")))
    monkeypatch.undo()
    assert not (tmp_path / "ran").exists()
    assert runner.run(Command.of("echo", "on")).out == "on\n"


def test_one_login_carries_every_command(pool: SshPool, server: Lab) -> None:
    outcomes = fan_out(range(20), lambda n: pool.runner(WEB).run(Command.of("echo", str(n))).out, limit=20)
    assert [outcome.unwrap() for outcome in outcomes] == [f"{n}\n" for n in range(20)]
    assert server.server.logins == 1
    assert server.server.most_sessions <= COMMANDS + 1


def test_what_a_login_shell_says_is_not_the_commands(pool: SshPool, server: Lab) -> None:
    server.server.env |= {"ENV": "ignored", "HELLO": "x"}
    noisy = server.server._run
    server.server._run = lambda channel, command: noisy(  # type: ignore[method-assign]  # a login shell that talks
        channel, b"echo welcome; printf 'no end'; echo warning >&2; " + command
    )
    lines: list[str] = []
    result = pool.runner(WEB).run(Command.of("sh", "-c", "echo out; echo err >&2"), lines.append)
    assert (result.out, result.err, lines) == ("out\n", "err\n", ["err"])


def test_megabytes_stream_both_ways(pool: SshPool) -> None:
    got: list[bytes] = []
    pieces = (bytes([n % 251]) * 50_000 for n in range(100))
    result = pool.runner(WEB).stream(Command.of("cat", timeout=60), stdin=pieces, stdout=got.append)
    assert result.stdout == b""
    assert b"".join(got) == b"".join(bytes([n % 251]) * 50_000 for n in range(100))


def test_a_source_of_stdin_that_fails_stops_the_command(pool: SshPool) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise NixopsError("the source failed")

    with pytest.raises(NixopsError, match="the source failed"):
        pool.runner(WEB).stream(Command.of("cat"), stdin=broken())


def test_a_command_past_its_time_is_stopped_on_the_host(pool: SshPool, tmp_path: Path, patient: None) -> None:
    script = MARKS.format(mark=tmp_path / "mark")
    # The time begins before ssh does.
    with pytest.raises(CommandTimeout, match="sh on web ran past its 4 s") as caught:
        pool.runner(WEB).run(Command.of("sh", "-c", script, timeout=4.0))
    assert "waiting" in str(caught.value)
    assert (tmp_path / "mark").read_text() == "stopped\n"


def test_a_cancelled_command_is_stopped_on_the_host(pool: SshPool, tmp_path: Path, patient: None) -> None:
    switch = Cancellation()
    script = MARKS.format(mark=tmp_path / "mark")
    with cancellable(switch), pytest.raises(Interrupted):
        pool.runner(WEB).run(Command.of("sh", "-c", script), lambda _: switch.cancel())
    assert (tmp_path / "mark").read_text() == "stopped\n"


def test_lines_are_cleaned_of_secrets(server: Lab) -> None:
    lines: list[str] = []
    with SshPool([server.target], redactor=Redactor([Secret("hunter22")])) as pool:
        pool.runner(WEB).run(Command.of("sh", "-c", "echo token hunter22 >&2"), lines.append)
    assert lines == ["token ***"]


def test_a_command_as_root_goes_through_sudo_that_asks_nothing(pool: SshPool, server: Lab) -> None:
    result = pool.runner(WEB).run(Command.of("sh", "-c", "cat; exit 4", stdin="payload", root=True))
    assert (result.code, result.out) == (4, "payload")
    server.server.env |= {"SUDO_EXPECTS": "a password"}
    with pytest.raises(LoginRefused, match="sudo on web did not let operator in") as caught:
        pool.runner(WEB).run(Command.of("id", root=True, stdin="payload"))
    assert "a password is required" in str(caught.value)
    assert not (server.directory / "sudo.log").exists(), "the payload was given to sudo"


def test_a_login_without_sudo_is_a_fault_of_the_host(pool: SshPool, server: Lab) -> None:
    (server.directory / "bin/sudo").unlink()
    (server.directory / "bin/sh").symlink_to("/bin/sh")
    server.server.env |= {"PATH": str(server.directory / "bin")}
    with pytest.raises(HostFault, match="finds no sudo there"):
        pool.runner(WEB).run(Command.of("id", root=True))


def test_a_working_directory_is_for_local_commands(pool: SshPool) -> None:
    with pytest.raises(ValueError, match="local commands only"):
        pool.runner(WEB).run(Command.of("pwd", cwd=Path("/")))


# -- connections ----------------------------------------------------------------------------------------------


def test_a_lost_connection_is_no_exit_code_and_the_next_command_makes_a_new_one(pool: SshPool, server: Lab) -> None:
    runner = pool.runner(WEB)
    sleeping = Command.of("sh", "-c", "echo x >&2; exec sleep 30", title="sleep")
    with pytest.raises(ConnectionLost, match="the connection to web was lost while sleep ran"):
        runner.run(sleeping, lambda _: server.server.transports[0].close())
    assert runner.run(Command.of("echo", "again")).out == "again\n"
    assert server.server.logins == 2


def test_a_dropped_host_holds_nothing_up(pool: SshPool) -> None:
    runner = pool.runner(WEB)
    threading.Timer(0.7, pool.drop, (WEB,)).start()
    began = time.monotonic()
    with pytest.raises(ConnectionLost):
        runner.run(Command.of("sleep", "30"))
    assert time.monotonic() - began < 5
    pool.drop(WEB)  # a second time is nothing


def test_a_host_that_takes_one_session_on_a_connection_works_by_a_login_for_each(pool: SshPool, server: Lab) -> None:
    """The keeper has the one session; what it guards comes by connections of its own."""
    server.server.max_sessions = 1
    per_connection(server)
    runner = pool.runner(WEB)
    outcomes = fan_out(range(6), lambda n: runner.stream(Command.of("cat"), stdin=iter([b"%d" % n])).code, limit=6)
    assert [outcome.unwrap() for outcome in outcomes] == [0] * 6
    assert server.server.logins >= 7
    with pytest.raises(CommandTimeout):
        runner.run(Command.of("sleep", "30", timeout=1.0))


def per_connection(lab: Lab) -> None:
    """Let ``max_sessions`` count for each connection, as sshd's MaxSessions does."""
    open_sessions = lab.server.check_channel_request

    def check(kind: str, number: int) -> int:
        # The client numbers its channels from 0 on each connection; the keeper's is the first.
        lab.server.sessions = 0 if number == 0 else lab.server.max_sessions
        return open_sessions(kind, number)

    lab.server.check_channel_request = check  # type: ignore[method-assign,assignment]  # the server's own count is for all


def test_a_missing_key_pin_or_identity_fails_that_host_alone(server: Lab, tmp_path: Path) -> None:
    unpinned = replace(server.target, name=HostName("unpinned"), host_keys=())
    keyless = replace(server.target, name=HostName("keyless"), identity_file=tmp_path / "none")
    with SshPool([unpinned, keyless, server.target]) as pool:
        with pytest.raises(HostKeyUnknown, match="invoke trust unpinned"):
            pool.connect(HostName("unpinned"), timeout=5)
        with pytest.raises(LoginRefused, match="the identity file"):
            pool.connect(HostName("keyless"), timeout=5)
        assert pool.connect(WEB, timeout=5).run(Command.of("echo", "hi")).out == "hi\n"


def test_a_key_of_the_vaults_goes_into_an_agent_and_no_other_is_tried(server: Lab, tmp_path: Path) -> None:
    wrong = replace(server.target, identity_file=write_key(keys()["wrong"], tmp_path / "wrong"))
    secret = Secret((tmp_path / "identity").read_text())
    with SshPool([wrong], identity=secret) as pool:
        assert pool.runner(WEB).run(Command.of("echo", "hi")).out == "hi\n"
        assert "SSH_AUTH_SOCK" not in pool.nix_env()
        named = re.search(r"IdentityAgent (\S+)", pool.files.config.read_text())
        assert named is not None
        agent = Path(named[1])
        assert agent.is_socket()
    assert not agent.exists()
    other = Secret((tmp_path / "wrong").read_text())
    with SshPool([server.target], identity=other) as pool, pytest.raises(LoginRefused, match="keys tried: ECDSA SHA"):
        pool.connect(WEB, timeout=5)


def test_names_are_once_each_and_known(server: Lab) -> None:
    with pytest.raises(ValueError, match="the same name"):
        SshPool([server.target, server.target])
    with SshPool([server.target]) as pool, pytest.raises(ValueError, match="none of the pool's"):
        pool.connect(HostName("other"), timeout=1)
    with pytest.raises(RuntimeError):
        pool.nix_env()


def test_a_changed_key_shows_both_fingerprints(server: Lab) -> None:
    other = text(keys()["other"])
    error = refusal(replace(server.target, host_keys=(other,)))
    assert type(error) is HostKeyChanged
    assert str(error).count("SHA256:") == 2
    assert "THE HOST KEY OF web HAS CHANGED" in str(error)


def test_a_refused_login_names_the_key_that_was_tried(server: Lab, tmp_path: Path) -> None:
    error = refusal(replace(server.target, identity_file=write_key(keys()["wrong"], tmp_path / "wrong")))
    assert type(error) is LoginRefused
    assert f"keys tried: {tmp_path}/wrong" in str(error)
    (tmp_path / "wrong.pub").write_text(text(keys()["wrong"]))
    error = refusal(replace(server.target, identity_file=tmp_path / "wrong"))
    assert f"keys tried: ECDSA {fingerprint(text(keys()['wrong']))}" in str(error)


def test_a_login_that_runs_no_commands_is_told_as_such(server: Lab) -> None:
    server.server.refuse_exec = True
    error = refusal(server.target)
    assert type(error) is LoginRefused
    assert "let us in and runs no command" in str(error)


def test_a_login_bound_to_one_command_that_waits_is_told_within_the_time(server: Lab) -> None:
    run = server.server._run
    waiting = b"cat >/dev/null"  # as nix-daemon --stdio would
    server.server._run = lambda channel, command: run(channel, waiting or command)  # type: ignore[method-assign]  # forced
    began = time.monotonic()
    error = refusal(server.target, timeout=2.0)
    assert type(error) is LoginRefused
    assert re.search(r"its shell did not answer within [\d.]+ s", str(error))
    assert time.monotonic() - began < 4


def test_a_port_that_refuses_says_so(server: Lab) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        error = refusal(replace(server.target, port=unheard.getsockname()[1]))
    assert type(error) is Unreachable
    assert "connection refused" in str(error)


def test_a_port_that_says_nothing_ends_at_the_deadline(server: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        error = refusal(replace(server.target, port=silent.getsockname()[1]), timeout=1.0)
    assert type(error) is Unreachable
    assert "took the connection, and the SSH handshake was not done within" in str(error)
    assert time.monotonic() - began < 3


def test_a_port_that_speaks_something_else_says_so(server: Lab) -> None:
    with speaking(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        error = refusal(replace(server.target, port=port), timeout=5.0)
    assert type(error) is Unreachable
    assert "does not speak SSH" in str(error)


@contextmanager
def speaking(words: bytes) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(words)

        threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()[1]


def test_a_name_that_is_not_there_says_so(server: Lab) -> None:
    error = refusal(replace(server.target, address=Address("no-such-host.invalid")), timeout=10.0)
    assert type(error) is Unreachable
    assert "does not resolve" in str(error)


def test_a_cancelled_connection_ends_at_once(server: Lab) -> None:
    switch = Cancellation()
    threading.Timer(0.5, switch.cancel).start()
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = replace(server.target, port=silent.getsockname()[1])
        with SshPool([target]) as pool, cancellable(switch), pytest.raises(Interrupted):
            pool.connect(WEB, timeout=30)
    assert time.monotonic() - began < 3


def test_nothing_is_left_of_a_closed_pool(server: Lab) -> None:
    with SshPool([server.target]) as pool:
        pool.runner(WEB)
        directory = pool.files.directory
        assert processes(directory)
    assert not directory.exists()
    assert not processes(directory)


def processes(directory: Path) -> list[str]:
    """Command lines on this machine that name a pool's directory."""
    out = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    return [line for line in out.splitlines() if str(directory) in line]


def test_the_pool_loads_nothing_heavy() -> None:
    code = "import sys, nixops.transport.mux; print(*(n for n in ('paramiko', 'fabric', 'boto3') if n in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []


def test_a_connection_that_replaces_another_is_shared_like_the_first(pool: SshPool, server: Lab) -> None:
    """The dying ssh of the old one must not take the new one's socket along."""
    runner = pool.runner(WEB)
    for round_ in range(4):
        pool.drop(WEB)
        outcomes = fan_out(range(6), lambda n: runner.run(Command.of("echo", str(n))).out, limit=6)
        assert [outcome.unwrap() for outcome in outcomes] == [f"{n}\n" for n in range(6)]
        assert pool.files.control(WEB).resolve().is_socket()
        assert server.server.logins == round_ + 2
