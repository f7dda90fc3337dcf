"""Which known name was probably meant: the end of every "unknown …" error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 12


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or ``None`` when none is close. Case and ``-``/``_`` count for little."""
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(_fold(candidate), candidate)
    # difflib's time grows with the square of the length, and a name this long was no slip of the finger.
    if len(name) > 200:
        return None
    matches = difflib.get_close_matches(_fold(name), folded, n=1, cutoff=0.6)
    return folded[matches[0]] if matches else None


def hint(name: str, known: Iterable[str], *, what: str = "known") -> str:
    """``did you mean address?``, or the names there are: ``known: cache, builders``.

    :param what: how the list is introduced when no name is close.
    """
    names = list(known)
    close = nearest(name, names)
    return f"did you mean {close}?" if close else f"{what}: {listing(names)}"


def listing(names: Iterable[str]) -> str:
    """The names in their order, cut short when there are very many; ``none`` when there are none."""
    every = list(names)
    more = f", and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more if every else "none"


def _fold(name: str) -> str:
    return name.casefold().replace("-", "_")
