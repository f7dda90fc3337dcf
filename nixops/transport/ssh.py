"""Running commands on a host over SSH: one connection, opened when first needed, many channels.

Fabric makes the connection (:mod:`.sshconnect`). Commands go over channels of our own: Fabric's ``run`` polls
stdin, quotes ``env`` not at all, and prints the command in its errors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import paramiko
from paramiko.channel import Channel

from nixops.errors import ConnectionLost, HostFault, LoginRefused, NixopsError
from nixops.secret import Redactor, Secret
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.exec import (
    TICK,
    Cancellation,
    ChunkSink,
    Deadline,
    cancellable,
    chunks,
    raise_if_cancelled,
)
from nixops.transport.fleet import aside
from nixops.transport.group import signal_group
from nixops.transport.hostkey import fingerprint
from nixops.transport.sshchannel import Exchange
from nixops.transport.sshconnect import Link, connect, offered_host_key
from nixops.transport.start import Start
from nixops.transport.sudo import SudoStart
from nixops.transport.target import SshTarget

__all__ = ["SshRunner", "SshTarget", "fingerprint", "offered_host_key"]

# sshd takes 10 sessions on a connection (MaxSessions); two stay free to stop what runs in the others.
CHANNELS = 8
# How long to wait for a channel that the host refuses at first, seconds.
CHANNEL_PATIENCE = 10.0
# The same for the one that kills what a login as root left, seconds: sshd can do a part of it without.
KILL_PATIENCE = 2.0


class SshRunner:
    """Runs commands on one host. Safe to use from several threads at once.

    :param target: where and how; nothing else is read, no user configuration.
    :param sudo_password: asked at most once, and only when sudo asks. ``None``: sudo must need no password.
    :param redactor: learns the password, and cleans the lines that ``on_line`` gets.
    """

    def __init__(
        self,
        target: SshTarget,
        *,
        sudo_password: Callable[[], Secret] | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        self.target = target
        self._redactor = redactor or Redactor()
        self._password_source = sudo_password
        self._password: Secret | None = None
        self._link: Link | None = None
        self._connecting = threading.Lock()
        self._slots = threading.BoundedSemaphore(CHANNELS)
        self._sudo = _SudoGate()

    @property
    def host(self) -> str:
        """The host's name in the inventory."""
        return str(self.target.name)

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        """Run ``command`` to its end; see :class:`nixops.transport.command.Runner`.

        A command without a time-out of its own gets ``target.command_timeout``. With ``command.root`` it runs as
        root: directly where that is the login, else through sudo. However it ends early (time-out, interrupt,
        cancellation), it is stopped on the host.

        :raises Unreachable: or a subclass, when there is no connection or it was lost.
        :raises LoginRefused: sudo did not let us in.
        :raises CommandTimeout: its time was up.
        :raises HostFault: the host opens no channel, has no sudo, or no shell for this login.
        """
        return self.stream(command, on_line=on_line)

    def stream(
        self,
        command: Command,
        *,
        stdin: Iterable[bytes] | None = None,
        stdout: ChunkSink | None = None,
        on_line: LineSink | None = None,
    ) -> Result:
        """As :meth:`run`, piece by piece; see :class:`nixops.transport.exec.StreamRunner`."""
        raise_if_cancelled()
        if command.cwd is not None:
            raise ValueError("a working directory is for local commands only")
        out: list[bytes] = []
        source = chunks(command.stdin_bytes) if stdin is None else stdin
        sink = _cleaned(on_line, self._redactor)
        through_sudo = command.root and self.target.user != "root"
        if through_sudo:
            first = Command.of("true", root=True, timeout=60.0)
            self._sudo.pass_once(lambda: self._once(first, (), out.append, None, through_sudo=True))
        result = self._once(command, source, stdout or out.append, sink, through_sudo=through_sudo)
        return Result(command, result.code, b"".join(out), result.stderr, result.seconds, self.host)

    def fresh(self) -> SshRunner:
        """A runner with a connection of its own to the same host: proves that a new login works."""
        fresh = SshRunner(self.target, sudo_password=self._password_source, redactor=self._redactor)
        # What sudo thinks of the password is the same on every connection; it is neither fetched nor tried anew.
        fresh._sudo, fresh._password = self._sudo, self._password
        return fresh

    def close(self) -> None:
        """End the connection. A later command would open a new one."""
        with self._connecting:
            if self._link is not None:
                self._link.close()
                self._link = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- connection and channels ------------------------------------------------------------------------------

    def _transport(self) -> paramiko.Transport:
        """The transport of the one connection; a lost one is replaced, so that the host can be asked again."""
        with self._connecting:
            if self._link is None or not self._link.active:
                self._link = connect(self.target)
            return self._link.transport

    def _channel(self, transport: paramiko.Transport, seconds: float) -> Channel:
        patience = Deadline(seconds)
        while True:
            raise_if_cancelled()
            try:
                return transport.open_session(timeout=patience.left())
            except (paramiko.SSHException, EOFError, OSError) as error:
                if not transport.is_active():
                    message = f"the connection to {self.host} was lost before a command could start"
                    raise ConnectionLost(message) from None
                # Somebody else's sshd may allow fewer sessions: one of ours may end in time. A refusal is not always
                # a ChannelException: paramiko keeps one for the whole connection, so that of two threads refused at
                # the same moment the second gets a bare SSHException.
                if patience.passed:
                    raise HostFault(
                        f"{self.host} opens no further session: {error}",
                        hint="MaxSessions in its sshd_config bounds the commands that run at once",
                    ) from None
                threading.Event().wait(TICK)

    def _once(
        self,
        command: Command,
        stdin: Iterable[bytes],
        stdout: ChunkSink,
        on_line: LineSink | None,
        *,
        through_sudo: bool,
        reserved: bool = False,
        patience: float | None = None,
    ) -> Result:
        transport = self._transport()
        start: Start | None = None
        if through_sudo:
            start = SudoStart(command, self._ask_password if self._password_source else None)
        elif command.root:
            start = Start(command)
        timeout = self.target.command_timeout if command.timeout is None else command.timeout
        if not reserved:
            while not self._slots.acquire(timeout=TICK):
                raise_if_cancelled()
        try:
            channel = self._channel(transport, CHANNEL_PATIENCE if patience is None else patience)
            line = start.shell_line if start else command.shell_line()
            exchange = Exchange(channel, line, command, self.host, start.stderr if start else None)
            try:
                source = start.stdin(stdin) if start else stdin
                # Struck between paramiko's lock.acquire() and the try behind it, the lock would stay taken for good,
                # and whoever asks the channel next would wait for ever.
                result = aside(lambda: exchange.run(source, stdout, on_line, timeout))
            except BaseException as error:
                # What stops others is not stopped itself: that would never come to an end.
                if not reserved and not isinstance(error, ConnectionLost):
                    self._stop(exchange, start)
                raise
            finally:
                if start:
                    start.abandon()
                exchange.close()
        finally:
            if not reserved:
                self._slots.release()
        if isinstance(start, SudoStart) and not start.entered:
            raise start.refusal(result, self.host, self.target.user)
        return start.ended(result) if start else result

    def _stop(self, exchange: Exchange, start: Start | None) -> None:
        """Stop what runs on the host; the reason is about to be raised, so nothing else may be."""

        def stop(group: int, name: str, *, through_sudo: bool, patience: float | None) -> None:
            kill = signal_group(group, name, root=True)
            self._once(kill, (), lambda _: None, None, through_sudo=through_sudo, reserved=True, patience=patience)

        def send(name: str) -> None:
            if isinstance(start, SudoStart):
                assert start.group is not None  # it has entered
                stop(start.group, name, through_sudo=True, patience=None)
                return
            if name == "KILL" and start is not None and start.group is not None:
                try:
                    stop(start.group, name, through_sudo=False, patience=KILL_PATIENCE)
                except NixopsError:
                    pass  # the host opens no further session, or does not answer
                else:
                    return
            exchange.signal(name)

        with cancellable(Cancellation()):
            try:
                if start is not None:
                    # What is on its way in may be let in yet; if it is not by then, it finds nobody to hear it.
                    start.abandon()
                    exchange.settle(lambda: start.settled)
                    if not start.entered:
                        return
                exchange.stop(send)
            except (NixopsError, paramiko.SSHException, EOFError, OSError):
                return  # the connection is gone; the first error says more than this one

    def _ask_password(self) -> Secret:
        if self._password is None:
            assert self._password_source is not None  # only ever asked where there is one
            self._password = self._redactor.add(self._password_source())
        return self._password


class _SudoGate:
    """Lets the first sudo of a runner go alone, so that a wrong password costs one try and not eight."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._passed = False
        self._refused: LoginRefused | None = None

    def pass_once(self, probe: Callable[[], object]) -> None:
        """:raises LoginRefused: sudo refused, now or before; it is not asked again."""
        with self._lock:
            if self._refused is not None:
                raise self._refused
            if self._passed:
                return
            try:
                probe()
            except LoginRefused as error:
                self._refused = error
                raise
            self._passed = True


def _cleaned(on_line: LineSink | None, redactor: Redactor) -> LineSink | None:
    if on_line is None:
        return None
    sink = on_line
    return lambda line: sink(redactor.clean(line))


def reachable(target: SshTarget) -> None:
    """Log in and out again. Raises what :meth:`SshRunner.run` would.

    :raises Unreachable: with the hop that failed.
    """
    connect(target).close()
