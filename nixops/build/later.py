"""Work that is begun now and whose value is wanted later: what a build can ask at once, it asks at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Generic, TypeVar

from nixops.transport.exec import TICK, raise_if_cancelled

T = TypeVar("T")


class Later(Generic[T]):
    """``work`` in a thread of its own, begun when this is made, under the caller's cancellation.

    Whoever makes one inside :func:`nixops.transport.exec.cancellable` can throw that switch and :meth:`join` it.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._value: list[T] = []
        self._error: Exception | None = None
        self._ended = threading.Event()
        threading.Thread(target=copy_context().run, args=(self._run,), name="nixops-later", daemon=True).start()

    def _run(self) -> None:
        try:
            self._value.append(self._work())
        except Exception as error:  # noqa: BLE001 - raised where the value is asked for
            self._error = error
        finally:
            self._ended.set()

    def value(self) -> T:
        """What ``work`` returned, waited for; raises what it raised.

        :raises Interrupted: the caller has been cancelled while it waited.
        """
        while not self._ended.wait(TICK):
            raise_if_cancelled()
        if self._error is not None:
            raise self._error
        return self._value[0]

    def join(self, seconds: float) -> None:
        """Wait until it has ended, at most this long."""
        self._ended.wait(seconds)
