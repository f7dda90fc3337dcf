"""The same work on many hosts at once, with a bound, and an outcome for each."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Generic, TypeVar

from nixops.errors import Interrupted
from nixops.transport.exec import TICK, Cancellation, cancellable, current_cancellation, raise_if_cancelled

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Outcome(Generic[T, R]):
    """What came of one item: a value, or the exception that its work raised."""

    item: T
    value: R | None = None
    error: Exception | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    def unwrap(self) -> R:
        """The value; raises the work's own exception when there is none."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # None only where R itself admits it


def fan_out(items: Sequence[T], work: Callable[[T], R], *, limit: int = 16) -> list[Outcome[T, R]]:
    """Run ``work`` on every item, at most ``limit`` at once, and return the outcomes in the order of ``items``.

    An exception of one item stops no other. A KeyboardInterrupt cancels what has not begun, stops the commands
    that run (see :class:`nixops.transport.exec.Cancellation`), waits until they have stopped, and goes on.

    :param limit: how many threads, at least 1.
    """
    if limit < 1:
        raise ValueError("fan_out needs a limit of at least 1")
    switch = Cancellation(current_cancellation())
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(items)):
        waiting.put(index)
    outcomes: dict[int, Outcome[T, R]] = {}

    def worker(ended: threading.Event) -> None:
        try:
            with cancellable(switch):
                while not switch.cancelled:
                    try:
                        index = waiting.get_nowait()
                    except queue.Empty:
                        return
                    try:
                        outcomes[index] = Outcome(items[index], value=work(items[index]))
                    except Exception as error:  # noqa: BLE001 - one item's failure is its outcome
                        outcomes[index] = Outcome(items[index], error=error)
        finally:
            ended.set()

    # Not waited for with Thread.join: an interrupt in it makes Python before 3.13 take the thread for dead
    # (python/cpython#90882), and what it runs would not be waited for.
    ends = [threading.Event() for _ in range(min(limit, len(items)))]
    # Each worker gets a copy of the caller's context, so that what the caller runs under holds there too.
    threads = [
        threading.Thread(target=copy_context().run, args=(worker, end), name=f"nixops-fleet-{n}", daemon=True)
        for n, end in enumerate(ends)
    ]
    try:
        for thread in threads:
            thread.start()
        for end in ends:
            while not end.wait(TICK):
                raise_if_cancelled()
        raise_if_cancelled()
    except (KeyboardInterrupt, Interrupted):
        switch.cancel()
        for thread, end in zip(threads, ends, strict=True):
            if thread.ident is None:
                end.wait(TICK)  # struck while it was started: then it ends at once, or never begins
                break
            end.wait()
        raise
    return [outcomes[index] for index in range(len(items))]


def aside(work: Callable[[], R]) -> R:
    """``work`` in a thread of its own where this is the main one, the only one that a KeyboardInterrupt strikes: for
    what must not be left half done at any moment. The interrupt stops it by cancelling it instead.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    (outcome,) = fan_out((None,), lambda _: work(), limit=1)
    return outcome.unwrap()
