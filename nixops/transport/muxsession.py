"""One command over ssh: what the login shell says is set aside, the command's own end is told from the connection's,
and a command that is not waited for any more is stopped on the host.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from pathlib import Path

from nixops.errors import ConnectionLost, HostFault, Interrupted, LoginRefused
from nixops.nix.log import ssh_fault
from nixops.transport.agent import bare_environment
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.exec import (
    GRACE,
    TICK,
    Cancellation,
    ChunkSink,
    Deadline,
    cancellable,
    chunks,
    raise_if_cancelled,
    timed_out,
)
from nixops.transport.keeper import Wrapped
from nixops.transport.local import LocalRunner
from nixops.transport.master import Master

# How much of what comes before a command's own output is kept, bytes.
_NOISE = 64 * 1024
_REFUSED = "Session open refused by peer"


class Session:
    """One attempt at one command.

    :param master: the connection; its keeper stops the command where that is needed.
    :param shared: run it over that connection; else ssh makes one for it alone.
    :param stdout: gets the command's output as it comes.
    :param on_line: gets each line of the command's stderr, after ``clean``.
    """

    def __init__(
        self,
        master: Master,
        config: Path,
        command: Command,
        *,
        shared: bool,
        stdout: ChunkSink,
        on_line: LineSink | None,
        clean: Callable[[str], str],
    ) -> None:
        self._master = master
        self._target = master.target
        self._config = config
        self._command = command
        through_sudo = command.root and self._target.user != "root"
        self._wrapped = Wrapped.of(
            command, mark=master.mark, through_sudo=through_sudo, waits=through_sudo or not shared
        )
        self.shared = shared
        self._stdout = stdout
        self._on_line = on_line
        self._clean = clean
        self._group: str | None = None
        self._begun = threading.Event()
        self._over = threading.Event()
        self._held: bytes | None = b""
        self._own_lines = False
        self._dropping = False
        self._stopped = False
        self._tail: deque[str] = deque(maxlen=20)

    @property
    def begun(self) -> bool:
        """Whether it holds a session on the host, or did."""
        return self._begun.is_set()

    def run(self, stdin: Iterable[bytes] | None) -> Result | None:
        """To the command's end; ``None`` when the host refused the session, and nothing of ``stdin`` was taken.

        Raises what :meth:`nixops.transport.mux.MuxRunner.run` does.
        """
        target = self._target
        timeout = target.command_timeout if self._command.timeout is None else self._command.timeout
        source = chunks(self._command.stdin_bytes) if stdin is None else stdin
        at_hand = stdin is None or isinstance(stdin, list | tuple)
        if self._wrapped.waits:
            source = self._once_begun(self._told(source, at_hand=at_hand))
        elif not at_hand:
            source = self._once_begun(source)
        # A master that goes in this moment must not make ssh log in anew behind our back, and its successor's keeper
        # knows nothing of this command.
        how = (f"ControlPath={self._master.control}", "ProxyCommand=false") if self.shared else ("ControlPath=none",)
        options = [word for option in how for word in ("-o", option)]
        ssh = ("ssh", "-F", str(self._config), "-T", *options, str(target.name), self._wrapped.line)
        local = Command(ssh, env=bare_environment(), timeout=None, title=self._command.name)
        result = self._carried_out(local, source, Deadline(timeout), timeout)
        if self._group is not None:
            self._master.tell(f"del {self._group}")
        return self._read(result)

    def _carried_out(self, local: Command, stdin: Iterable[bytes], deadline: Deadline, timeout: float) -> Result:
        """Run ssh in a thread of its own, so that its output is still read while the command is being stopped on the
        host: one that cleans up after itself must not be killed by its own last words.
        """
        made: list[Result] = []
        failure: list[BaseException] = []
        done = threading.Event()
        switch = Cancellation()

        def carry() -> None:
            try:
                with cancellable(switch):
                    # Not even for a moment does a process of ours have the operator's tokens.
                    runner = LocalRunner(without=tuple(os.environ))
                    made.append(runner.stream(local, stdin=stdin, stdout=self._out, on_line=self._line))
            except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
                failure.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=copy_context().run, args=(carry,), name="nixops-mux", daemon=True)
        try:
            thread.start()
            while not done.wait(deadline.tick()):
                raise_if_cancelled()
                if deadline.passed:
                    tail = "\n".join(self._tail).encode()
                    raise timed_out(self._command, str(self._target.name), tail, timeout)
            if failure:
                raise failure[0]
        except BaseException:
            self._dropping = True
            try:
                self._stop(done)
            finally:
                self._over.set()
                switch.cancel()
                if thread.ident is not None:
                    done.wait(2 * GRACE)
                self._stop_group()  # one that has begun in the meantime
            raise
        self._over.set()
        return made[0]

    # -- while it runs ----------------------------------------------------------------------------------------

    def _once_begun(self, stdin: Iterable[bytes]) -> Iterator[bytes]:
        # An iterator is there once: nothing is taken from it for a session that may be refused. What can be had again
        # goes ahead of the answer, which saves a round trip.
        while not self._begun.wait(TICK):
            if self._over.is_set():
                # A command that begins after all must not take an end of its stdin for an empty one.
                raise Interrupted("given up before it began")
        yield from stdin

    def _told(self, stdin: Iterable[bytes], *, at_hand: bool) -> Iterator[bytes]:
        if not self._master.alive:
            raise ConnectionLost(
                f"the connection to {self._target.name} was lost before {self._command.name} could start"
            )
        pieces = iter(stdin)
        # In one write where it can be: between two a kill of ours would make an empty stdin of it.
        yield b"\n" + (next(pieces, b"") if at_hand else b"")
        yield from pieces

    def _out(self, chunk: bytes) -> None:
        if self._dropping:
            return
        if self._held is None:
            self._stdout(chunk)
            return
        self._held += chunk
        found = self._wrapped.begin.search(self._held)
        if found is None:
            self._held = self._held[-_NOISE:]
            return
        self._begin(found[1].decode())
        rest, self._held = self._held[found.end() :], None
        if rest:
            self._stdout(rest)

    def _line(self, line: str) -> None:
        whole = line.encode(errors="replace") + b"\n"
        found = self._wrapped.begin.search(whole)
        if found is not None:
            self._begin(found[1].decode())
            self._tail.clear()
            self._own_lines = True
            return
        ended = self._wrapped.end.search(whole)
        text = line if ended is None else whole[: ended.start()].decode()
        if ended is not None and not text:
            return
        self._tail.append(text)
        if self._on_line is not None and self._own_lines and not self._dropping:
            self._on_line(self._clean(text))

    def _begin(self, number: str) -> None:
        if self._begun.is_set():
            return
        self._group = f"sudo:{number}" if self._wrapped.through_sudo else number
        self._master.tell(f"add {self._group}")
        self._begun.set()

    def _stop(self, done: threading.Event) -> None:
        # A command that is on its way may begin yet; if it has not by then, it finds nobody to hear it.
        deadline = Deadline(GRACE)
        while not (self._begun.is_set() or done.is_set() or deadline.passed):
            self._begun.wait(0.02)
        self._stop_group()

    def _stop_group(self) -> None:
        if self._group is not None and not self._stopped:
            self._stopped = True
            self._master.stop(self._group)
            self._master.tell(f"del {self._group}")

    # -- afterwards -------------------------------------------------------------------------------------------

    def _read(self, result: Result) -> Result | None:
        found = self._wrapped.begin.search(result.stderr)
        noise, err = (result.stderr, b"") if found is None else (b"", result.stderr[found.end() :])
        ended = self._wrapped.end.search(err)
        if ended is not None:
            own = err[: ended.start()] + err[ended.end() :]
            return Result(self._command, int(ended[1]), b"", own, result.seconds)
        if not self._begun.is_set():
            self._not_begun(noise.decode(errors="replace"), result)
            return None
        if self._is_lost(err.decode(errors="replace"), result):
            raise ConnectionLost(
                f"the connection to {self._target.name} was lost while {self._command.name} ran",
                hint="what became of it there is unknown: look at the host before you conclude anything",
                detail=Result(self._command, -1, b"", err).tail(5) if err else None,
            )
        # Somebody on the host killed it together with the wrapper around it.
        return Result(self._command, result.code, b"", err, result.seconds)

    def _not_begun(self, said: str, result: Result) -> None:
        """Return where another try makes sense; raise what it means where none does."""
        name, what = self._target.name, self._command.name
        if _REFUSED in said:
            return
        if self._is_lost(said, result):
            # Over a shared connection, ssh's own words are about the way that it was kept from.
            fault = None if self.shared else ssh_fault(said, name, what)
            raise fault or ConnectionLost(f"the connection to {name} was lost before {what} could start")
        detail = Result(self._command, -1, b"", said.encode()).tail(5) or None
        if self._wrapped.through_sudo and result.code == 127:
            raise HostFault(
                f"{what} needs root on {name}, and the login {self._target.user} finds no sudo there",
                hint="on NixOS it is /run/wrappers/bin/sudo: is that on the login's PATH?",
                detail=detail,
            )
        if self._wrapped.through_sudo:
            raise LoginRefused(
                f"sudo on {name} did not let {self._target.user} in",
                hint=f"let {self._target.user} use sudo there without a password (NOPASSWD), or log in as root",
                detail=detail,
            )
        raise HostFault(f"{name} refused to start {what}", hint="does the login take commands?", detail=detail)

    def _is_lost(self, said: str, result: Result) -> bool:
        """Whether the connection, and not the command, is what ended."""
        if self.shared:
            # The master's end and that of its sessions are seen in no particular order.
            return self._master.lost.wait(1.0)
        return result.code == 255 and bool(said.strip())
