"""Asking the operator: yes or no, at a terminal."""

from __future__ import annotations

import sys


def answered_yes(question: str) -> bool:
    """Ask on stderr, read the answer from stdin; anything but y or yes is no.

    Ctrl-C ends the line before it goes on as the interrupt it is, so that what is said next stands on its own.
    """
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise
    if not line.endswith("\n"):
        print(file=sys.stderr)
    return line.strip().lower() in ("y", "yes")
