"""What every runner shares: stopping from another thread, deadlines, lines out of bytes, streams, pipes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Protocol

from nixops.errors import CommandFailed, CommandTimeout, Interrupted
from nixops.transport.command import Command, LineSink, Result, Runner

# How often a waiting runner looks whether it has been cancelled, seconds. Data and exit wake it at once.
TICK = 0.2
# How long a stopped program has between TERM and KILL, seconds. Nix needs some of it to stop its builders.
GRACE = 5.0
CHUNK = 256 * 1024
# A longer line is handed over in parts.
_LONGEST_LINE = 1024 * 1024

ChunkSink = Callable[[bytes], None]


class Cancellation:
    """A switch that one thread throws to stop the commands that another is running.

    Only the main thread gets a KeyboardInterrupt; this is how it reaches the rest.

    :param parent: cancelled with it.
    """

    def __init__(self, parent: Cancellation | None = None) -> None:
        self._event = threading.Event()
        self._parent = parent

    def cancel(self) -> None:
        """Every command that runs under this switch is stopped and ends with :class:`Interrupted`."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set() or (self._parent is not None and self._parent.cancelled)


# Carried by the context (as the time zone of a decimal context is), so that it follows a call through code
# that knows nothing of threads, and two fan-outs at the same time do not see each other's.
_current: ContextVar[Cancellation | None] = ContextVar("nixops_cancellation", default=None)


def current_cancellation() -> Cancellation | None:
    """The switch that the caller runs under, if any."""
    return _current.get()


@contextmanager
def cancellable(switch: Cancellation) -> Iterator[None]:
    """Commands run inside this block, by this thread, stop when ``switch`` is thrown."""
    token = _current.set(switch)
    try:
        yield
    finally:
        _current.reset(token)


def raise_if_cancelled() -> None:
    """:raises Interrupted: when the current switch has been thrown."""
    switch = _current.get()
    if switch is not None and switch.cancelled:
        raise Interrupted("stopped by the operator")


class Deadline:
    """A point on the monotonic clock, ``seconds`` from now; ``None`` is never."""

    def __init__(self, seconds: float | None) -> None:
        self._at = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Seconds until then, at least 0, or ``None``."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    @property
    def passed(self) -> bool:
        return self._at is not None and time.monotonic() >= self._at

    def tick(self) -> float:
        """How long to wait before looking again, seconds."""
        left = self.left()
        return TICK if left is None else min(TICK, left)


def timed_out(command: Command, host: str, stderr: bytes, seconds: float | None) -> CommandTimeout:
    """The error of a command whose ``seconds`` are up; it has been stopped by then."""
    tail = Result(command, -15, b"", stderr, host=host).tail() if stderr else None
    return CommandTimeout(
        f"{command.name} on {host} ran past its {seconds:g} s and was stopped",
        hint="give it more time, or find out what it waits for",
        detail=tail,
    )


class Lines:
    """Cuts a stream of bytes into lines for a sink. Bytes that are not UTF-8 become U+FFFD.

    :param sink: gets each line without its end; ``None`` drops them.
    """

    def __init__(self, sink: LineSink | None) -> None:
        self._sink = sink
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        if self._sink is None:
            return
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._sink(line.rstrip(b"\r").decode(errors="replace"))
        if len(self._rest) > _LONGEST_LINE:
            self.close()  # a line without end would be copied with every piece of it

    def close(self) -> None:
        """Hand over a last line that had no end."""
        if self._sink is not None and self._rest:
            self._sink(self._rest.decode(errors="replace"))
        self._rest = b""


def chunks(data: bytes, size: int = CHUNK) -> Iterator[bytes]:
    """``data`` in pieces, without copying the rest each time."""
    view = memoryview(data)
    for start in range(0, len(view), size):
        yield bytes(view[start : start + size])


class StreamRunner(Runner, Protocol):
    """A runner that also takes stdin and gives stdout as they come, so that gigabytes need no memory."""

    def stream(
        self,
        command: Command,
        *,
        stdin: Iterable[bytes] | None = None,
        stdout: ChunkSink | None = None,
        on_line: LineSink | None = None,
    ) -> Result:
        """As ``run``, but ``stdin`` is read piece by piece (from a thread of its own, instead of
        ``command.stdin``), and ``stdout`` gets each piece instead of ``Result.stdout``.

        When ``stdin`` raises, the command is stopped and that error comes out of here.
        """
        ...


class _Pipe:
    """A bounded queue of pieces between the thread that makes them and the one that takes them."""

    def __init__(self) -> None:
        self._queue: queue.Queue[bytes | None] = queue.Queue(maxsize=16)
        self._failed = threading.Event()
        self.abandoned = threading.Event()

    def put(self, piece: bytes | None) -> None:
        while not self.abandoned.is_set():
            try:
                self._queue.put(piece, timeout=TICK)
                return
            except queue.Full:
                raise_if_cancelled()

    def fail(self) -> None:
        """There will be no proper end: whoever reads must not take what came so far for all of it."""
        self._failed.set()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            if self._failed.is_set():
                raise CommandFailed("the other end of the pipe failed")
            if self.abandoned.is_set():
                return
            try:
                piece = self._queue.get(timeout=TICK)
            except queue.Empty:
                continue
            if piece is None:
                return
            yield piece


def pipe(
    source_runner: StreamRunner, source: Command, sink_runner: StreamRunner, sink: Command
) -> tuple[Result, Result]:
    """Run ``source`` on one machine with its stdout as the stdin of ``sink`` on another; nothing is held in memory.

    The sink sees the end of its input only when the source ended with 0: half an archive is never taken for
    a whole one. A source that outlives a sink that failed is stopped.

    :returns: the results of source and sink; both ended with 0.
    :raises CommandFailed: either ended with another code (the sink's error wins: it is what broke the pipe).
    """
    between = _Pipe()
    switch = Cancellation(current_cancellation())
    made: list[Result] = []
    failure: list[Exception] = []

    def produce() -> None:
        try:
            with cancellable(switch):
                made.append(source_runner.stream(source, stdout=between.put).check())
        except Exception as error:  # noqa: BLE001 - carried to the caller's thread and raised there
            failure.append(error)
            between.fail()
        else:
            between.put(None)

    thread = threading.Thread(target=copy_context().run, args=(produce,), name="nixops-pipe", daemon=True)
    thread.start()
    try:
        taken = sink_runner.stream(sink, stdin=between)
        taken.check()
    except BaseException:
        sink_first = not failure
        switch.cancel()
        between.abandoned.set()
        thread.join()
        if failure and not sink_first:
            raise failure[0] from None
        raise
    between.abandoned.set()
    thread.join()
    if failure:
        raise failure[0]
    return made[0], taken
