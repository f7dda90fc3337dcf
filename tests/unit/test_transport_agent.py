"""KeyAgent: a real ssh-agent that has the key while it is needed, and no longer than its process."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nixops.errors import SecretUnavailable
from nixops.secret import Redactor, Secret
from nixops.transport.agent import KeyAgent, private_parent


@pytest.fixture
def key(tmp_path: Path) -> Secret:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "pool", "-f", tmp_path / "id"], check=True)
    return Secret((tmp_path / "id").read_text())


def keys_of(socket: Path) -> str:
    done = subprocess.run(
        ["ssh-add", "-L"], env={**os.environ, "SSH_AUTH_SOCK": str(socket)}, capture_output=True, text=True, check=False
    )
    return done.stdout


def gone(path: Path, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return not path.exists()


def test_it_has_the_key_in_a_private_place_and_is_gone_afterwards(key: Secret, tmp_path: Path) -> None:
    redactor = Redactor()
    with KeyAgent(key, redactor=redactor) as agent:
        socket = agent.socket
        assert keys_of(socket) == (tmp_path / "id.pub").read_text()
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        line = key.reveal().splitlines()[2]
        assert redactor.clean(f"a server quotes {line}") == "a server quotes ***"
        assert [path.name for path in socket.parent.iterdir()] == ["agent"], "the key is in no file"
    assert not socket.parent.exists()
    assert keys_of(socket) == ""
    with pytest.raises(RuntimeError):
        _ = agent.socket


@pytest.mark.parametrize("change", [str.strip, lambda text: text.replace("\n", "\r\n"), lambda text: f"\n\n{text}\n"])
def test_a_key_that_was_pasted_with_other_line_ends_is_taken(key: Secret, change: object) -> None:
    assert callable(change)
    with KeyAgent(Secret(change(key.reveal()))) as agent:
        assert keys_of(agent.socket).startswith("ssh-ed25519 ")


def test_text_that_is_no_key_is_told_without_quoting_it() -> None:
    with (
        pytest.raises(SecretUnavailable, match="is not one that ssh-add takes") as caught,
        KeyAgent(Secret("no-key-1")),
    ):
        pass
    assert "no-key-1" not in str(caught.value)


def test_a_key_with_a_passphrase_is_refused_at_once_and_asks_nobody(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret words", "-f", tmp_path / "id"], check=True)
    began = time.monotonic()
    with pytest.raises(SecretUnavailable, match="without a passphrase"):
        KeyAgent(Secret((tmp_path / "id").read_text())).__enter__()
    assert time.monotonic() - began < 5


HOLDER = """\
import sys, time
from nixops.secret import Secret
from nixops.transport.agent import KeyAgent
with KeyAgent(Secret(sys.stdin.read())) as agent:
    print(agent.socket, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_agent_ends_with_its_process_however_that_ends(key: Secret, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(key.reveal().encode())
    process.stdin.close()
    socket = Path(process.stdout.readline().decode().strip())
    assert "ssh-ed25519" in keys_of(socket)
    process.send_signal(number)
    process.wait(10)
    process.stdout.close()
    assert gone(socket)
    assert keys_of(socket) == ""
    assert gone(socket.parent), "nothing is left for a later run to sweep"


# Killed as soon as the agent is there, before it could say a word.
KILLED_AT_ONCE = """
import os, signal, subprocess, time
from nixops.secret import Secret
from nixops.transport.agent import KeyAgent
real = subprocess.Popen
def popen(argv, **options):
    process = real(argv, **options)
    if argv[0] == "ssh-agent":
        process.stdout.close()
        while not os.path.exists(argv[2]):
            time.sleep(0.001)
        print(argv[2], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return process
subprocess.Popen = popen
KeyAgent(Secret("no key")).__enter__()
"""


def test_the_agent_ends_with_a_process_that_is_killed_while_it_starts() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_AT_ONCE], stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    socket = done.stdout.strip()
    deadline = time.monotonic() + 6  # by itself the agent looks after its parent every ten seconds
    while (left := with_argument(socket)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert gone(Path(os.fsdecode(socket)).parent)


def with_argument(word: bytes) -> list[int]:
    """The processes that have ``word`` among their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if word in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_neither_key_nor_tokens_of_the_operator_are_in_its_arguments_or_environment(
    key: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_TOKEN", "operators-own-token")
    with KeyAgent(key) as agent:
        seen = b""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (process / "cmdline").read_bytes()
                if str(agent.socket).encode() in arguments or b"SSH_AGENT_PID" in arguments:
                    seen += arguments + (process / "environ").read_bytes()
            except OSError:
                continue
    assert b"SSH_AGENT_PID" in seen
    assert b"operators-own-token" not in seen
    assert key.reveal().splitlines()[1].encode() not in seen


def test_the_place_for_sockets_is_short_and_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("with a space", "x" * 80):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / name))
        parent = private_parent()
        assert parent is not None and parent != tmp_path / name
        assert len(str(parent)) <= 60
    short = Path("/tmp") / f"nixops-test-{os.getpid()}"
    short.mkdir()
    try:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
        assert private_parent() == short
    finally:
        short.rmdir()
