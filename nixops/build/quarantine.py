"""Builders that failed a while ago, and until when they are left out: a small file of the operator's."""

from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nixops.errors import HostFault, printable
from nixops.state import private_directory, state_directory
from nixops.values import HostName

# A reason is a line; more of it is somebody's log.
_LONGEST = 400


@dataclass(frozen=True)
class _Entry:
    """``until`` is a Unix time: the file is read by later processes, also after a reboot."""

    reason: str
    until: float


class Quarantine:
    """Which builders are left out.

    :param file: JSON; a file that cannot be read counts as empty, and that is said.
    :param seconds: how long a builder is left out; 0 never leaves one out.
    :param say: is told, in a line, of a file that cannot be read or written: no reason to fail a build.
    :param clock: Unix time.
    """

    def __init__(
        self,
        file: Path,
        seconds: float,
        *,
        say: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = file
        self._seconds = seconds
        self._say = say
        self._clock = clock

    @classmethod
    def of(
        cls, environ: Mapping[str, str], seconds: float, *, say: Callable[[str], None] = lambda _: None
    ) -> Quarantine:
        """In the operator's state directory."""
        return cls(state_directory(environ) / "quarantine.json", seconds, say=say)

    def add(self, name: HostName, reason: str) -> None:
        """Leave a builder out from now on, for :attr:`seconds`; a newer reason replaces an older one."""
        if self._seconds <= 0:
            return
        entry = _Entry(printable(reason.splitlines()[0] if reason else "")[:_LONGEST], self._clock() + self._seconds)
        self._change(lambda entries: {**entries, str(name): entry})

    def clear(self, name: HostName) -> None:
        """Use it again: it has just done its work."""
        if str(name) in self._read():
            self._change(lambda entries: {key: entry for key, entry in entries.items() if key != name})

    def names(self) -> frozenset[HostName]:
        """Every builder that is left out now."""
        return frozenset(HostName(name) for name in self._now(self._read()))

    def reason(self, name: HostName) -> str | None:
        """Why the builder is left out, and until when; ``None`` when it is not."""
        entry = self._now(self._read()).get(str(name))
        if entry is None:
            return None
        left = max(1, math.ceil(entry.until - self._clock()))
        when = time.strftime("%H:%M:%S", time.localtime(entry.until))
        return f"taken last until {when} (another {left} s), since it failed: {entry.reason}"

    def _now(self, entries: Mapping[str, _Entry]) -> dict[str, _Entry]:
        now = self._clock()
        # One from further ahead than we ever write comes of a clock that was wrong.
        return {name: e for name, e in entries.items() if now < e.until <= now + max(self._seconds, 1.0)}

    def _change(self, change: Callable[[dict[str, _Entry]], dict[str, _Entry]]) -> None:
        """Write what ``change`` makes of the entries, while no other process changes them."""
        try:
            private_directory(self._file.parent)
            lock = os.open(self._file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)  # held by each for the time of one small write
                self._write(change(self._now(self._read())))
            finally:
                os.close(lock)
        except (OSError, HostFault) as error:
            self._say(f"which builders failed is not kept: {error}")

    def _write(self, entries: Mapping[str, _Entry]) -> None:
        document = {name: {"reason": e.reason, "until": e.until} for name, e in sorted(entries.items())}
        descriptor, temporary = tempfile.mkstemp(prefix=".quarantine-", dir=self._file.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"schema": "nixops/quarantine/1", "builders": document}, file)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self._file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _read(self) -> dict[str, _Entry]:
        try:
            text = self._file.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._say(f"{self._file} cannot be read ({error.strerror}): no builder is left out")
            return {}
        try:
            return {
                str(HostName(name)): _Entry(str(entry["reason"]), float(entry["until"]))
                for name, entry in json.loads(text)["builders"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._say(f"{self._file} does not hold what we write: no builder is left out")
            return {}
