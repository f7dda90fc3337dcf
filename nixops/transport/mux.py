"""OpenSSH with one login for each host and run: our commands and nix share a connection that is opened when it is
first needed. Nothing of paramiko is loaded.

    with SshPool(targets) as pool:
        runner = pool.connect(HostName("builder01"), timeout=5.0)
        runner.run(Command.of("uname", "-m")).check()
        Nix(LocalRunner(), env=pool.nix_env()).build(…, store=StoreUri.ssh_ng(runner.target), …)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from nixops.errors import ConnectionLost, HostFault, NixopsError
from nixops.secret import Redactor, Secret
from nixops.transport.agent import KeyAgent, private_parent
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.exec import TICK, ChunkSink, Deadline, raise_if_cancelled
from nixops.transport.master import Master
from nixops.transport.muxsession import Session
from nixops.transport.openssh import OpenSshFiles, require_identity, require_pinned
from nixops.transport.target import SshTarget
from nixops.values import HostName

# sshd takes 10 sessions on a connection (MaxSessions). One is the keeper's; nix takes one for each store that it has
# open, and logs in once more where there is no room; two stay free for others who share the limit.
COMMANDS = 5
# How long to wait for a session that the host refuses at first, seconds.
SESSION_PATIENCE = 10.0
# For how long it refuses them, with none of ours there, until it is taken for one that takes no second, seconds. One
# that is busy may hear of several ends and beginnings at once, and count the beginnings first.
_ALONE = 1.0


@dataclass
class _Host:
    """What there is of one host."""

    target: SshTarget
    lock: threading.Lock = field(default_factory=threading.Lock)
    slots: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(COMMANDS))
    sessions: set[Session] = field(default_factory=set)
    master: Master | None = None
    # Its sshd takes one session on a connection: each command logs in for itself.
    one_session: bool = False


class SshPool:
    """Connections to some hosts, at most one each, opened when first used; all gone at the end of the block, or of
    this process. Safe to use from several threads.

    :param targets: the hosts, each name once. One without a pinned key, or with a missing identity file, fails alone,
        when it is connected to.
    :param redactor: learns ``identity``, and cleans the lines that ``on_line`` gets.
    :param identity: a private key for all targets, kept by an ssh-agent of our own; ``None``: each target's
        ``identity_file``, or else the operator's agent and default keys.
    :param runtime: where sockets go; by default a directory in memory.
    :raises SecretUnavailable: ``identity`` is no private key.
    """

    def __init__(
        self,
        targets: Sequence[SshTarget],
        *,
        redactor: Redactor | None = None,
        identity: Secret | None = None,
        runtime: Path | None = None,
    ) -> None:
        self.redactor = redactor or Redactor()
        self._hosts = {target.name: _Host(target) for target in targets}
        if len(self._hosts) != len(targets):
            raise ValueError("two targets have the same name")
        self._identity = identity
        self._runtime = runtime
        self._agent: KeyAgent | None = None
        self._files: OpenSshFiles | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._identity is not None:
                self._agent = stack.enter_context(KeyAgent(self._identity, redactor=self.redactor))
            usable = [host.target for host in self._hosts.values() if self._fault(host.target) is None]
            self._files = stack.enter_context(
                OpenSshFiles(
                    usable,
                    shared=True,
                    agent=self._agent.socket if self._agent else None,
                    parent=self._runtime or private_parent(executable=True),
                )
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; remove the key and the files. May be called twice."""
        with self._stack:
            masters = [host.master for host in self._hosts.values() if host.master is not None]
            for master in masters:
                master.hang_up()
            for master in masters:
                master.close()
            for host in self._hosts.values():
                host.master = None
            self._files = None

    def connect(self, name: HostName, *, timeout: float) -> MuxRunner:
        """Log in to a host, or take the connection there is.

        :param timeout: seconds for everything: its name, TCP, its key, the login, its shell.
        :raises HostKeyUnknown: no key is pinned. :raises HostKeyChanged: it offers another.
        :raises LoginRefused: it did not let us in, or runs no commands.
        :raises Unreachable: any other hop failed, or took too long; the message says which.
        """
        self.master(self._host(name), Deadline(timeout))
        return MuxRunner(self, self._host(name))

    def runner(self, name: HostName) -> MuxRunner:
        """As :meth:`connect`, with the target's own time-outs."""
        target = self._host(name).target
        return self.connect(name, timeout=target.connect_timeout + target.login_timeout)

    def drop(self, name: HostName) -> None:
        """Close the connection to a host now; whatever runs over it ends with :class:`ConnectionLost`, here at once
        and there as soon as the host notices. A later command would open a new one.
        """
        master, self._host(name).master = self._host(name).master, None
        if master is not None:
            master.close()

    def nix_env(self) -> dict[str, str]:
        """Environment for a ``nix`` that shall use these connections, or where there is none make its own by the same
        keys and pins. An agent of ours stands in the configuration: nix's other uses of ssh, such as a flake's inputs,
        keep the operator's.
        """
        return self.files.nix_env()

    @property
    def files(self) -> OpenSshFiles:
        """The ssh config that both use."""
        if self._files is None:
            raise RuntimeError("SshPool has its connections only inside its with block")
        return self._files

    def master(self, host: _Host, deadline: Deadline) -> Master:
        """The open connection; for this module's own use."""
        files = self.files
        while not host.lock.acquire(timeout=TICK):
            raise_if_cancelled()
            if deadline.passed:
                raise ConnectionLost(f"the login on {host.target}, which another thread began, is not done in time")
        try:
            if host.master is None or not host.master.alive:
                fault = self._fault(host.target)
                if fault is not None:
                    raise fault
                control = files.control(host.target.name)
                host.master = Master.open(host.target, files.config, control, files.guard, deadline)
            return host.master
        finally:
            host.lock.release()

    def unshare(self, host: _Host) -> None:
        """From now on every command on this host logs in for itself; so does nix. For this module's own use."""
        host.one_session = True
        # So that nix does not ask in vain first. The keeper goes on over that connection.
        self.files.control(host.target.name).unlink(missing_ok=True)

    def _host(self, name: HostName) -> _Host:
        if name not in self._hosts:
            raise ValueError(f"{name} is none of the pool's hosts")
        return self._hosts[name]

    def _fault(self, target: SshTarget) -> NixopsError | None:
        try:
            require_pinned(target)
            if self._identity is None:
                require_identity(target)
        except NixopsError as error:
            return error
        return None


class MuxRunner:
    """Runs commands on one host over the pool's connection. Safe to use from several threads; made by the pool."""

    def __init__(self, pool: SshPool, host: _Host) -> None:
        self._pool = pool
        self._host = host

    @property
    def host(self) -> str:
        """The host's name in the inventory."""
        return str(self.target.name)

    @property
    def target(self) -> SshTarget:
        return self._host.target

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        """Run ``command`` to its end; see :class:`nixops.transport.command.Runner`.

        A command without a time-out of its own gets ``target.command_timeout``. With ``command.root`` it runs as
        root: directly where that is the login, else through ``sudo -n``. One that a signal ended has 128 and the
        signal's number as its code, as shells have it. However it ends early (time-out, interrupt, cancellation),
        it is stopped on the host, also when this process is killed.

        :raises ConnectionLost: the connection ended first.
        :raises Unreachable: or a subclass, when there was none any more and a new one could not be opened.
        :raises LoginRefused: sudo did not let us in.
        :raises CommandTimeout: its time was up.
        :raises HostFault: the host opens no session.
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
        with self._slot():
            patience = Deadline(SESSION_PATIENCE)
            alone: Deadline | None = None
            while True:
                session = Session(
                    self._pool.master(self._host, Deadline(self.target.connect_timeout + self.target.login_timeout)),
                    self._pool.files.config,
                    command,
                    shared=not self._host.one_session,
                    stdout=stdout or out.append,
                    on_line=on_line,
                    clean=self._pool.redactor.clean,
                )
                self._host.sessions.add(session)
                try:
                    result = session.run(stdin)
                finally:
                    self._host.sessions.discard(session)
                if result is not None:
                    return Result(command, result.code, b"".join(out), result.stderr, result.seconds, self.host)
                # Refused before it began: another session may end in time. Where there is none for a while, the host
                # takes one session on a connection, which the keeper has.
                if alone is None or any(other.begun for other in list(self._host.sessions)):
                    alone = Deadline(_ALONE)
                if session.shared and (patience.passed or alone.passed):
                    self._pool.unshare(self._host)
                elif patience.passed and not session.shared:
                    raise HostFault(
                        f"{self.host} opens no further session",
                        hint="MaxSessions in its sshd_config bounds the commands that run at once",
                    )
                threading.Event().wait(TICK)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        while not self._host.slots.acquire(timeout=TICK):
            raise_if_cancelled()
        try:
            yield
        finally:
            self._host.slots.release()
