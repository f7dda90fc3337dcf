"""One command over one channel: both directions at once, an end, or a stop that reaches the host."""

from __future__ import annotations

import functools
import select
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import paramiko
from paramiko.channel import Channel
from paramiko.common import cMSG_CHANNEL_REQUEST
from paramiko.message import Message

from nixops.errors import ConnectionLost, HostFault
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.exec import (
    CHUNK,
    GRACE,
    ChunkSink,
    Deadline,
    Lines,
    chunks,
    raise_if_cancelled,
    timed_out,
)
from nixops.transport.sshconnect import SIGNALLED
from nixops.transport.sshgate import Gate

# What fits into one message to OpenSSH (32 KiB packets, less paramiko's margin).
_MESSAGE = 32 * 1024 - 64


class Exchange:
    """Runs one command line on an open channel.

    :param filter_stderr: takes each piece of stderr and returns what of it belongs to the command.
    """

    def __init__(
        self,
        channel: Channel,
        line: str,
        command: Command,
        host: str,
        filter_stderr: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._channel = channel
        self._line = line
        self._command = command
        self._host = host
        self._filter = filter_stderr
        self._gate = Gate(channel)
        self._transport: Any = channel.get_transport()
        self._err: list[bytes] = []
        self._error: Exception | None = None

    def run(self, stdin: Iterable[bytes], stdout: ChunkSink, on_line: LineSink | None, timeout: float | None) -> Result:
        """To the command's end.

        :raises ConnectionLost: the connection ended first.
        :raises CommandTimeout: ``timeout`` seconds passed; the caller stops what runs.
        """
        started = time.monotonic()
        deadline = Deadline(timeout)
        lines = Lines(on_line)
        feeder = threading.Thread(target=self._feed, args=(stdin,), name="nixops-ssh-stdin", daemon=True)
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        feeder.start()
        while True:
            over = self._channel.closed or (self._channel.eof_received and self._channel.status_event.is_set())
            self._drain(stdout, lines)
            if over:
                break
            raise_if_cancelled()
            if self._error:
                raise self._failure()
            if deadline.passed:
                raise timed_out(self._command, self._host, b"".join(self._err), timeout)
            if self._channel.eof_received:
                # The descriptor stays readable from here on; only the exit status is still to come.
                self._channel.status_event.wait(deadline.tick())
            else:
                poll.poll(deadline.tick() * 1000)
        lines.close()
        if self._channel.exit_status == -1:
            feeder.join(1.0)  # a command that the host refused to start ends the channel first, and then that thread
        if self._error:
            raise self._failure()
        status = self._channel.exit_status
        if status == -1:
            raise self._lost()
        code = status - SIGNALLED if status < SIGNALLED else status
        return Result(self._command, code, b"", b"".join(self._err), time.monotonic() - started, self._host)

    def signal(self, name: str) -> None:
        """Ask sshd to signal the command's process group (RFC 4254, 6.9; OpenSSH 7.9 and later)."""
        message = Message()
        message.add_byte(cMSG_CHANNEL_REQUEST)
        message.add_int(self._channel.remote_chanid)
        message.add_string("signal")
        message.add_boolean(False)
        message.add_string(name)
        # paramiko has no public way to send this request.
        self._gate.send(lambda: self._transport._send_user_message(message))

    def close(self) -> None:
        """Close the channel, behind what is on its way."""
        self._gate.shut(self._channel.close)

    def settle(self, settled: Callable[[], bool]) -> None:
        """Read on until ``settled()`` or the command has ended; at most for a grace."""
        deadline = Deadline(GRACE)
        while not (settled() or deadline.passed or self._channel.closed or self._channel.status_event.is_set()):
            self._channel.status_event.wait(0.02)
            self._drain(_drop, Lines(None))

    def stop(self, send: Callable[[str], None]) -> None:
        """TERM, and KILL after a grace; ``send`` delivers a signal by its name. Output is read and dropped, so
        that nothing on the host blocks on it. Gives up when the connection is gone.
        """
        for name, grace in (("TERM", GRACE), ("KILL", 2.0)):
            if self._channel.status_event.is_set() or self._channel.closed:
                return
            send(name)
            deadline = Deadline(grace)
            while not deadline.passed and not self._channel.closed and not self._channel.status_event.is_set():
                self._drain(_drop, Lines(None))
                self._channel.status_event.wait(0.02)

    def _drain(self, stdout: ChunkSink, lines: Lines) -> None:
        while self._channel.recv_stderr_ready():
            piece = self._channel.recv_stderr(CHUNK)
            if self._filter is not None:
                piece = self._filter(piece)
            if piece:
                self._err.append(piece)
                lines.feed(piece)
        while self._channel.recv_ready():
            stdout(self._channel.recv(CHUNK))

    def _feed(self, stdin: Iterable[bytes]) -> None:
        try:
            self._channel.exec_command(self._line)
        except (paramiko.SSHException, EOFError, OSError) as error:
            self._error = HostFault(
                f"{self._host} refused to start {self._command.name}: {error}",
                hint="does the login have a shell that takes commands?",
            )
            return
        try:
            for piece in stdin:
                for part in chunks(piece, _MESSAGE):
                    if not self._send(part):
                        return
            self._gate.send(self._channel.shutdown_write)
        except (OSError, EOFError, paramiko.SSHException):
            pass  # it ended without reading everything (its status tells), or the connection did (the reader tells)
        except Exception as error:  # noqa: BLE001 - the source of stdin failed; raised by the thread that waits
            self._error = error

    def _send(self, part: bytes) -> bool:
        """Send one part as the host takes it; false when the channel is closed."""
        view = memoryview(part)
        while view:
            if not self._channel.send_ready():
                if self._channel.closed or not self._gate.open:
                    return False
                time.sleep(0.002)  # the window is full: the command does not read as fast
                continue
            sent: list[int] = []
            if not self._gate.send(functools.partial(self._send_some, view, sent)):
                return False
            if not sent[0]:
                return False  # paramiko's word for closed
            view = view[sent[0] :]
        return True

    def _send_some(self, view: memoryview, sent: list[int]) -> None:
        sent.append(self._channel.send(bytes(view)))

    def _failure(self) -> Exception:
        assert self._error is not None  # asked for only after it was seen
        return self._lost() if not self._transport.is_active() else self._error

    def _lost(self) -> ConnectionLost:
        err = b"".join(self._err)
        return ConnectionLost(
            f"the connection to {self._host} was lost while {self._command.name} ran",
            hint="what became of it there is unknown: look at the host before you conclude anything",
            detail=Result(self._command, -1, b"", err).tail(5) if err else None,
        )


def _drop(_: bytes) -> None:
    return None
