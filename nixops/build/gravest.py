"""Of several things done at once: all the values, or the one error that says most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from nixops.errors import ExitCode, NixopsError
from nixops.transport.fleet import Outcome

_SEVERITY: Final = (ExitCode.INTERRUPTED, ExitCode.USAGE, ExitCode.FAILED, ExitCode.UNREACHABLE)


T = TypeVar("T")
R = TypeVar("R")


def unwrapped(outcomes: Sequence[Outcome[T, R]]) -> list[R]:
    """The values; or the gravest of the errors, with the others in its detail."""
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    if not errors:
        return [outcome.unwrap() for outcome in outcomes]
    defects = [error for error in errors if not isinstance(error, NixopsError)]
    if defects:
        raise defects[0]
    ours = sorted(
        (error for error in errors if isinstance(error, NixopsError)),
        key=lambda error: _SEVERITY.index(error.exit_code) if error.exit_code in _SEVERITY else len(_SEVERITY),
    )
    gravest, *others = ours
    if others:
        also = [f"also: {error}" for error in others if str(error) != str(gravest)]
        gravest.detail = "\n".join([gravest.detail or "", *also]).strip() or None
    raise gravest
