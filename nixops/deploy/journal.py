"""The operator's own journal: what a deploy was about to change, written down before it does.

One file per deploy below ``$XDG_STATE_HOME/nixops/deploys`` (0600 in a 0700 directory), one JSON object a line,
each fsynced. It holds what an undo needs and never a secret: versions, ids and accessors, not values. A file
without an outcome whose process is gone is a deploy that was killed; the next command says so and undoes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nixops import state
from nixops.errors import HostFault

Json = Mapping[str, Any]
KEEP: Final = 200


def state_directory(environ: Mapping[str, str]) -> Path:
    """Where the journals are: in the operator's state directory.

    :raises UsageError: there is none, nor a home directory to have it in.
    """
    return state.state_directory(environ) / "deploys"


def _started(pid: int) -> str | None:
    """The process's start time as the kernel counts it, so that a reused pid is not taken for the same process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None


@dataclass(frozen=True)
class Entry:
    """What a journal of an earlier deploy says.

    :ivar effects: those that have not been taken back yet, each with its ``number``.
    """

    id: str
    host: str
    runner: str
    since: str
    pid: int
    started: str | None
    effects: tuple[Json, ...]
    outcome: str | None
    file: Path

    @property
    def running(self) -> bool:
        """Its process still lives."""
        return self.outcome is None and self.started is not None and _started(self.pid) == self.started


class Journal:
    """The journal of one deploy, append-only.

    :raises HostFault: it cannot be written: better to stop than to change things unrecorded. So do its methods.
    """

    def __init__(self, directory: Path, *, host: str, runner: str) -> None:
        self.id = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + "-" + secrets.token_hex(4)
        self.file = directory / f"{self.id}.jsonl"
        self._effects: list[Json] = []
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritable(self.file, error) from None
        self._torn = False
        try:
            self._append(
                {"event": "begin", "host": host, "runner": runner, "pid": os.getpid(), "started": _started(os.getpid())}
            )
        except HostFault:
            os.close(self._fd)
            self.file.unlink(missing_ok=True)
            raise

    @property
    def effects(self) -> tuple[Json, ...]:
        """What was recorded so far, for the undo of a deploy that fails while we look."""
        return tuple(self._effects)

    def effect(self, kind: str, **undo: Any) -> None:
        """Record, before it is done, a change and what would undo it. ``undo`` must be JSON and hold no secret.

        Where the file does not take it, :attr:`effects` has it all the same, for the undo that follows: some can only
        be named once they are done.
        """
        self._effects.append({"kind": kind, **undo})
        self._append({"event": "effect", "kind": kind, **undo})

    def settled(self, number: int) -> None:
        """Record that the effect with this number, counted from 0, was taken back and needs no further try."""
        self._append({"event": "settled", "effect": number})

    def step(self, name: str, seconds: float) -> None:
        """Record a finished step and how long it took, in seconds."""
        self._append({"event": "step", "name": name, "seconds": round(seconds, 3)})

    def outcome(self, outcome: str) -> None:
        """Record the end and close the file. Nothing can be added afterwards."""
        if self._fd >= 0:
            fd = self._fd
            try:
                self._append({"event": "outcome", "outcome": outcome})
            finally:
                self._fd = -1
                os.close(fd)

    def _append(self, record: Json) -> None:
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **record})
        # What a full disk cut off is a line of its own: it must not take the next one with it.
        rest = b"\n" * self._torn + line.encode() + b"\n"
        self._torn = True
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError as error:
            raise _unwritable(self.file, error) from None
        self._torn = False


def read(file: Path) -> Entry | None:
    """One journal; ``None`` when it holds nothing usable (killed before its first line was written)."""
    records: list[dict[str, Any]] = []
    try:
        for line in file.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line a kill cut off; what it announced was not done
            if isinstance(record, dict):
                records.append(record)
    except OSError:
        return None
    if not records or records[0].get("event") != "begin":
        return None
    begin = records[0]
    effects = ({**r, "number": n} for n, r in enumerate(r for r in records if r.get("event") == "effect"))
    settled = {r.get("effect") for r in records if r.get("event") == "settled"}
    return Entry(
        id=file.stem,
        host=str(begin.get("host")),
        runner=str(begin.get("runner")),
        since=str(begin.get("time")),
        pid=int(begin.get("pid") or 0),
        started=begin.get("started"),
        effects=tuple(e for e in effects if e["number"] not in settled),
        outcome=next((str(r["outcome"]) for r in records if r.get("event") == "outcome"), None),
        file=file,
    )


def entries(directory: Path) -> Iterator[Entry]:
    """All journals, the oldest first."""
    for file in sorted(directory.glob("*.jsonl")):
        entry = read(file)
        if entry is not None:
            yield entry


def unfinished(directory: Path, host: str) -> tuple[Entry, ...]:
    """Deploys to ``host`` that were killed before they wrote an outcome."""
    return tuple(e for e in entries(directory) if e.host == host and e.outcome is None and not e.running)


def close(entry: Entry, outcome: str) -> None:
    """Write the outcome of a killed deploy into its journal, once its effects are undone or found to stand."""
    _add(entry, {"event": "outcome", "outcome": outcome, "by": os.getpid()})


def settle(entry: Entry, number: int) -> None:
    """Write into a killed deploy's journal that this effect of it needs no further try."""
    _add(entry, {"event": "settled", "effect": number})


def _add(entry: Entry, record: Json) -> None:
    try:
        with entry.file.open("a") as stream:
            # A kill may have cut the last line off: begin on a new one.
            stream.write("\n" + json.dumps(record) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise _unwritable(entry.file, error) from None


def _unwritable(file: Path, error: OSError) -> HostFault:
    return HostFault(
        f"the journal {file} cannot be written: {error.strerror}",
        hint="give its disk room, or set XDG_STATE_HOME to a directory that can be written",
    )


def prune(directory: Path) -> None:
    """Keep the newest :data:`KEEP` finished journals."""
    finished = [e for e in entries(directory) if e.outcome is not None]
    for entry in finished[:-KEEP]:
        # The deploy is done; tidying up is not worth failing it.
        with contextlib.suppress(OSError):
            entry.file.unlink(missing_ok=True)
