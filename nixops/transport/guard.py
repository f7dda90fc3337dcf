"""A shell on this machine that clears up behind us when we are gone, however that comes."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

# Reads lines from stdin: "add GROUP", "del GROUP", "dir PATH" (an empty one: none). At its end, which is ours, it kills
# the groups and removes the directory.
_GUARD = """\
directory= groups=' '
while read -r verb what; do
  case $verb in
    add) groups="$groups$what " ;;
    del) case $groups in *" $what "*) groups="${groups%%" $what "*} ${groups#*" $what "}" ;; esac ;;
    dir) directory=$what ;;
  esac
done
for group in $groups; do kill -s KILL -- "-$group"; done
# What was killed may have been about to put something there.
[ -z "$directory" ] || rm -rf -- "$directory" || { sleep 1; rm -rf -- "$directory"; }
"""


class Guard:
    """Kills process groups and removes a directory at our end: of :meth:`close`, or of this process.

    :raises OSError: no shell can be run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            ["sh", "-c", _GUARD, "nixops-guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )

    def add(self, group: int) -> None:
        """Watch over a process group."""
        self._tell(f"add {group}")

    def release(self, group: int) -> None:
        """A process group has ended: its number may soon be another's."""
        self._tell(f"del {group}")

    def remove_in_the_end(self, directory: Path | None) -> None:
        """The one directory that goes at our end; it need not be there yet.

        :param directory: its path without white space, or ``None``: none.
        """
        self._tell(f"dir {directory or ''}")

    def close(self) -> None:
        """Let it do its work and end. May be called twice."""
        assert self._process.stdin is not None  # opened as a pipe above
        with self._lock:
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None  # opened as a pipe above
        with self._lock:
            try:
                self._process.stdin.write(f"{line}\n".encode())
            except (BrokenPipeError, ValueError):
                pass  # somebody killed it; what it guards ends by its own means, only later
