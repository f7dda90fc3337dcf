"""Files of a host as root sees them: names, owners and modes, never content."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nixops.errors import Undecided
from nixops.transport.command import Command, Runner
from nixops.verify.tools import PREAMBLE

_LIST: Final = r"""
depth=$1; shift
command -v find > /dev/null || exit 3
for path do
    [ -e "$path" ] || continue
    find -L "$path" -maxdepth "$depth" -printf '%D:%i\t%y\t%m\t%U\t%G\t%s\t%p\0' 2> /dev/null
done
printf '@end\0'
"""


@dataclass(frozen=True)
class Entry:
    """A file or directory, links followed.

    :ivar identity: ``device:inode``; :ivar kind: ``f``, ``d`` or another letter of find; :ivar size: bytes.
    """

    identity: str
    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    path: str


def list_files(transport: Runner, paths: Sequence[str], *, depth: int = 16) -> tuple[Entry, ...]:
    """``paths`` and what is below them, down to ``depth`` levels; what does not exist is left out.

    Each path comes once, though it is asked for twice. Needs root.

    :raises Undecided: the host has no find, or the list was cut off.
    """
    result = transport.run(
        Command.script(PREAMBLE + _LIST, str(depth), *paths, root=True, timeout=30.0, title="listing files")
    )
    *records, end = result.stdout.removesuffix(b"\0").split(b"\0")
    if not result.ok or end != b"@end":
        raise Undecided(
            f"files of {transport.host} could not be listed (exit code {result.code})",
            hint="find must be on the system's PATH",
            detail=result.tail(5),
        )
    entries: dict[str, Entry] = {}
    for record in records:
        identity, kind, mode, uid, gid, size, path = os.fsdecode(record).split("\t", 6)
        entries[path] = Entry(identity, kind, int(mode, 8), int(uid), int(gid), int(size), path)
    return tuple(entries.values())
