"""A small SSH server in this process, for what needs no root and no sshd. It is paramiko's server side.

What depends on OpenSSH and on real sudo is in tests/lab/test_transport_lab.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import paramiko
import pytest
from paramiko.common import (
    AUTH_FAILED,
    AUTH_PARTIALLY_SUCCESSFUL,
    AUTH_SUCCESSFUL,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_SUCCEEDED,
    cMSG_CHANNEL_SUCCESS,
)
from paramiko.message import Message

from nixops.transport.hostkey import HostKey
from nixops.transport.ssh import SshRunner
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName

# Speaks sudo's part: options, prompt on stderr, password as one line of stdin, three tries; then the command.
FAKE_SUDO = """\
#!/bin/sh
prompt= ask=1
while [ "$1" != -- ]; do
  case "$1" in -n) ask=0;; -p) shift; prompt=$1;; esac
  shift
done
shift
tries=0
if [ -n "$SUDO_EXPECTS" ]; then
  [ $ask = 1 ] || { echo "sudo: a password is required" >&2; exit 1; }
  while :; do
    tries=$((tries + 1))
    printf %s "$prompt" >&2
    IFS= read -r line || { echo "sudo: no password was provided" >&2; exit 1; }
    echo "$line" >>"$SUDO_LOG"
    [ "$line" = "$SUDO_EXPECTS" ] && break
    [ $tries -lt 3 ] || { echo "sudo: 3 incorrect password attempts" >&2; exit 1; }
    echo "Sorry, try again." >&2
  done
fi
[ -z "$SUDO_SLOW" ] || { : >"$SUDO_LOG.slow"; sleep "$SUDO_SLOW"; }
exec "$@"
"""


class Transport(paramiko.Transport):
    """Knows which channels it has said to that their command has started."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self._said: defaultdict[int, threading.Event] = defaultdict(threading.Event)

    def said_started(self, channel: int) -> threading.Event:
        """Set once a channel, by its number at the other end, has heard of it."""
        return self._said[channel]

    def _send_user_message(self, data: Message) -> None:
        super()._send_user_message(data)  # type: ignore[misc]  # it is not public, and has no type
        sent = data.asbytes()
        if sent[:1] == cMSG_CHANNEL_SUCCESS:
            self._said[int.from_bytes(sent[1:5], "big")].set()


@dataclass
class Server(paramiko.ServerInterface):
    """One SSH server on the loopback. ``keys`` are its host keys, ``admitted`` who may log in."""

    keys: list[paramiko.PKey]
    admitted: list[paramiko.PKey]
    env: dict[str, str] = field(default_factory=dict)
    max_sessions: int = 100
    refuse_exec: bool = False
    also_wants: str = ""
    logins: int = 0
    sessions: int = 0
    most_sessions: int = 0
    port: int = 0
    transports: list[Transport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            transport = Transport(connection)
            transport.set_log_channel("nixops.transport.paramiko")
            for key in self.keys:
                transport.add_server_key(key)
            self.transports.append(transport)
            transport.start_server(event=threading.Event(), server=self)

    def stop(self) -> None:
        # shutdown() wakes the thread in accept(), which close() alone does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for transport in self.transports:
            transport.close()

    def get_allowed_auths(self, _username: str) -> str:
        return self.also_wants or "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        if username == "operator" and any(key.asbytes() == known.asbytes() for known in self.admitted):
            self.logins += 1
            return AUTH_PARTIALLY_SUCCESSFUL if self.also_wants else AUTH_SUCCESSFUL
        return AUTH_FAILED

    def check_channel_request(self, _kind: str, _chanid: int) -> int:
        if self.sessions >= self.max_sessions:
            return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        self.sessions += 1
        self.most_sessions = max(self.most_sessions, self.sessions)
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        if self.refuse_exec:
            return False
        threading.Thread(target=self._run, args=(channel, command), daemon=True).start()
        return True

    def _run(self, channel: paramiko.Channel, command: bytes) -> None:
        process = subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **self.env},
            bufsize=0,
            start_new_session=True,
        )
        assert process.stdin and process.stdout and process.stderr

        def feed() -> None:
            assert process.stdin
            try:
                while piece := channel.recv(65536):
                    process.stdin.write(piece)
                process.stdin.close()
            except OSError:
                pass
            # What still runs when the channel ends, ends with it: nothing may outlive a test.
            while process.poll() is None:
                if channel.closed:
                    with contextlib.suppress(ProcessLookupError):  # it may end in this very moment
                        os.killpg(process.pid, signal.SIGKILL)
                    return
                time.sleep(0.05)

        def pump(read: int, send: object) -> None:
            assert callable(send)
            try:
                while piece := os.read(read, 32000):
                    send(piece)
            except OSError:
                pass

        pumps = [
            threading.Thread(target=pump, args=(process.stdout.fileno(), channel.sendall), daemon=True),
            threading.Thread(target=pump, args=(process.stderr.fileno(), channel.sendall_stderr), daemon=True),
        ]
        threading.Thread(target=feed, daemon=True).start()
        for thread in pumps:
            thread.start()
        for thread in pumps:
            thread.join()
        code = process.wait()
        # One that ends at once must not end its channel before the word that it has started.
        transport = channel.get_transport()
        assert isinstance(transport, Transport)
        transport.said_started(channel.remote_chanid).wait(10)
        # Before the client hears of the end: it may open its next session at once.
        self.sessions -= 1
        # The connection may end at this moment: there is nobody left to tell then.
        with contextlib.suppress(EOFError, OSError):
            if not channel.closed:
                channel.send_exit_status(code if code >= 0 else 128 - code)
            channel.close()


@dataclass
class Lab:
    server: Server
    target: SshTarget
    directory: Path

    def runner(self, **changes: object) -> SshRunner:
        return SshRunner(replace(self.target, **changes))  # type: ignore[arg-type]  # any field of the target


@cache
def keys() -> dict[str, paramiko.PKey]:
    """Keys by their part in the tests. Made once, as an RSA key takes its time."""
    host, login, other, wrong = (paramiko.ECDSAKey.generate() for _ in range(4))
    return {"host": host, "login": login, "other": other, "wrong": wrong, "rsa": paramiko.RSAKey.generate(2048)}


@contextmanager
def open_lab(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A server with a fake sudo on its PATH, a target that may log in to it, and a home directory without keys."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setenv("HOME", str(directory / "home"))
    # This server takes no signals, so the wait for their effect would only cost time.
    monkeypatch.setattr("nixops.transport.sshchannel.GRACE", 0.2)
    identity = write_key(keys()["login"], directory / "identity")
    sudo = directory / "bin" / "sudo"
    sudo.parent.mkdir()
    sudo.write_text(FAKE_SUDO)
    sudo.chmod(0o755)
    server = Server([keys()["host"], keys()["rsa"]], [keys()["login"]])
    server.env = {"PATH": f"{sudo.parent}:{os.environ['PATH']}", "SUDO_LOG": str(directory / "sudo.log")}
    target = SshTarget(
        HostName("web"),
        Address("127.0.0.1"),
        port=server.port,
        user="operator",
        host_keys=(text(keys()["host"]),),
        identity_file=identity,
        connect_timeout=3.0,
        login_timeout=5.0,
    )
    try:
        yield Lab(server, target, directory)
    finally:
        server.stop()


def text(key: paramiko.PKey) -> str:
    return str(HostKey(key.get_name(), key.asbytes()))


def write_key(key: paramiko.PKey, path: Path) -> Path:
    key.write_private_key_file(str(path))
    path.chmod(0o600)
    return path
