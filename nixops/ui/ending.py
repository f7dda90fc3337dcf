"""How a task ends, whatever ends it: what its error says, and what TERM and HUP do."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nixops.errors import Defect, Interrupted, NixopsError
from nixops.secret import Redactor


def told(caught: BaseException, redactor: Redactor) -> NixopsError:
    """What leaves a task: an error of ours, with the secrets in its texts replaced."""
    error = caught if isinstance(caught, NixopsError) else Interrupted("interrupted")
    if isinstance(caught, Exception) and not isinstance(caught, NixopsError):
        error = Defect.of(caught)
    error.message = redactor.clean(error.message)
    error.hint = redactor.clean(error.hint) if error.hint else None
    error.detail = redactor.clean(error.detail) if error.detail else None
    return error


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """TERM and HUP end a task as Ctrl-C does: after taking back what was begun."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
