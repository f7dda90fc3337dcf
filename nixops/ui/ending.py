"""How a task ends, whatever ends it: what its error says, and what TERM and HUP do."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from nixops.errors import Defect, Interrupted, NixopsError
from nixops.secret import Redactor

# Commands that an error may tell to run, and that read the inventory.
_COMMANDS: Final = re.compile(r"\binvoke (?:trust [A-Za-z0-9-]+|build\.pool)(?! --)")
_DEFAULT: Final = "inventory/hosts.yml"


def told(caught: BaseException, redactor: Redactor, inventory: str = _DEFAULT) -> NixopsError:
    """What leaves a task: an error of ours, with the secrets in its texts replaced.

    :param inventory: as the task was given it; commands that the error tells to run get it too, so that they work.
    """

    def fit(text: str | None) -> str | None:
        if not text:
            return None
        if inventory != _DEFAULT:
            text = _COMMANDS.sub(lambda found: f"{found[0]} --inventory {shlex.quote(inventory)}", text)
        return redactor.clean(text)

    error = caught if isinstance(caught, NixopsError) else Interrupted("interrupted")
    if isinstance(caught, Exception) and not isinstance(caught, NixopsError):
        error = Defect.of(caught)
    error.message = fit(error.message) or ""
    error.hint = fit(error.hint)
    error.detail = fit(error.detail)
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
