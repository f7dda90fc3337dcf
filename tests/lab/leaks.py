"""Finding secrets where they must not be: in processes while a task runs, and afterwards wherever bytes are kept.

Each detector gives back findings in words; what may hold a secret is left out by those who call, by name.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import stat
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from nixops.lab.host import LabHost
from tests.lab.starts import ProgramStarts

# A sweep over /proc takes a few milliseconds; between two of them the machine's other work goes on. Where the kernel
# tells of every program that starts, sweeps are only for processes that change their own arguments.
PAUSE = 0.015
PAUSE_WHEN_TOLD = 0.04
FILE_LIMIT = 32 * 1024 * 1024
# What a builder has once it has been looked at in the middle of a push, and the text of a program that waits for that;
# not for ever, since nobody would end it where the hunt has failed.
LOOKED = "/run/hunt-looked"
UNTIL_LOOKED = f"i=0; until [ -e {LOOKED} ] || [ $i -ge 600 ]; do sleep 0.1; i=$((i + 1)); done"
_TELLTALE = r"""
mkdir -p "$out/bin"
cat >"$out/bin/copy-to" <<'EOF'
#!/bin/sh
@pause@
cat "$REGISTRY_AUTH_FILE" >&2
sed 's/.*"auth": "\([^"]*\)".*/\1/' "$REGISTRY_AUTH_FILE" | base64 -d >&2
printf '\n\033]0;a title for the terminal\007unauthorized\n' >&2
exit 1
EOF
chmod 755 "$out/bin/copy-to"
"""


def telltale(pause: str = ":") -> str:
    """The lab's image `refused`, with a program as bad as can be: it tells its login to everybody and fails.

    :param pause: what it does before.
    """
    return _TELLTALE.replace("@pause@", pause)


class Needles:
    """Known secrets in the forms that they might take on their way: as they are, base64 at any alignment, hex."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        self._forms: dict[bytes, str] = {}
        for name, value in secrets.items():
            assert len(value) >= 8, f"{name} is too short to be looked for"
            raw = value.encode()
            for form in (raw, raw.hex().encode(), *_base64(raw)):
                self._forms[form] = name

    def within(self, data: bytes) -> set[str]:
        """The names of the secrets that ``data`` holds."""
        return {name for form, name in self._forms.items() if form in data}


def _base64(raw: bytes) -> Iterator[bytes]:
    for lead in range(3):
        encoded = base64.b64encode(b"\0" * lead + raw).rstrip(b"=")
        # The characters at both ends depend on the neighbours too.
        inner = encoded[(0, 2, 3)[lead] : len(encoded) - 1]
        yield inner
        yield inner.translate(bytes.maketrans(b"+/", b"-_"))


def credentials_in(audit: Path) -> dict[str, str]:
    """Every credential that OpenBao was given or gave out, by its raw audit log: tokens, wrapped ones, secret ids."""
    found: dict[str, str] = {}

    def walk(value: object, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key in ("client_token", "token", "secret_id") and isinstance(inner, str) and len(inner) >= 8:
                    found.setdefault(inner, f"{key} of {path}")
                else:
                    walk(inner, path)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, path)

    for line in audit.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        walk(record, record.get("request", {}).get("path", "?"))
    return {f"{what} [{value[:4]}…]": value for value, what in found.items()}


# -- while it runs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A process as it was at one moment: its control group, its arguments, its environment (NUL between each)."""

    group: str
    arguments: bytes
    environment: bytes

    @property
    def variables(self) -> tuple[bytes, ...]:
        return tuple(self.environment.split(b"\0"))


@dataclass
class Watch:
    """Records what every process of this machine shows to others, lab hosts' processes too, and short-lived files.

    :param directory: where the watched task keeps its temporary files.
    :param processes: whether to look at processes too; where several directories are watched, one watch does.
    :ivar longest: between two sweeps over all processes, seconds.
    """

    directory: Path
    processes: bool = True
    seen: set[Seen] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)
    sweeps: int = 0
    longest: float = 0.0

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        work = (self._temporary, self._processes) if self.processes else (self._temporary,)
        self._threads = [threading.Thread(target=each, daemon=True) for each in work]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _processes(self) -> None:
        # An environment changes with exec alone, which nearly always changes the arguments too; so it is read
        # for each pair of process and arguments, and a second time in case the first came too early.
        known: dict[tuple[str, bytes], int] = {}

        def sweep() -> None:
            for pid in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - a hundred thousand Path objects a run
                arguments = _read(f"/proc/{pid}/cmdline")
                if arguments and known.get((pid, arguments), 0) < 2:
                    known[pid, arguments] = known.get((pid, arguments), 0) + 1
                    self._look(pid)

        # Whether the kernel tells of programs may take it seconds to say: what runs already is seen before that.
        sweep()
        with ExitStack() as stack:
            try:
                starts = stack.enter_context(ProgramStarts())
            except OSError:
                starts = None
            last = time.monotonic()
            while not self._stop.is_set():
                sweep()
                self.sweeps += 1
                self.longest = max(self.longest, time.monotonic() - last)
                last = time.monotonic()
                if starts is None:
                    self._stop.wait(PAUSE)
                    continue
                try:
                    for number in starts.within(PAUSE_WHEN_TOLD):
                        self._look(str(number))
                except OSError:
                    continue  # more started at once than could be kept: a sweep sees those that are still there

    def _look(self, pid: str) -> None:
        # The group first: it tells whose the rest is, and a process may end in between.
        group = _read(f"/proc/{pid}/cgroup").decode(errors="replace")
        arguments = _read(f"/proc/{pid}/cmdline")
        if group and arguments:
            self.seen.add(Seen(group, arguments, _read(f"/proc/{pid}/environ")))

    def _temporary(self) -> None:
        known: set[tuple[str, int, int]] = set()
        while not self._stop.is_set():
            for path in _below(self.directory):
                try:
                    about = os.lstat(path)
                except OSError:
                    continue  # gone already
                key = (path, about.st_size, about.st_mtime_ns)
                if key not in known and (content := _content(path)) is not None:
                    known.add(key)
                    self.files[f"{path} ({len(known)})"] = content
            self._stop.wait(PAUSE)

    def leaks(self, needles: Needles, allowed: Callable[[Seen], Seen]) -> list[str]:
        """Secrets in arguments, environments and temporary files.

        :param allowed: takes out of what a process shows what it may show.
        """
        found = []
        for seen in self.seen.copy():
            judged = allowed(seen)
            for what, data in (("arguments", judged.arguments), ("environment", judged.environment)):
                found += [
                    f"{name} in the {what} of {seen.arguments.replace(bytes(1), b' ')[:300]!r} in {seen.group.strip()}"
                    for name in needles.within(data)
                ]
        return found + leaks_in(self.files.copy().items(), needles)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - see above
            return file.read()
    except OSError:
        return b""  # it has ended


def _below(directory: Path, leave_out: Iterable[Path] = ()) -> Iterator[str]:
    """The files below a directory; what is left out is not even entered, since it may be all that tests ever made."""
    left = {str(each) for each in leave_out}
    if any(str(each) in left for each in (directory, *directory.parents)):
        return
    for root, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if f"{root}/{name}" not in left]
        yield from (path for name in files if (path := f"{root}/{name}") not in left)


def _content(path: str, since: float = 0.0) -> bytes | None:
    """A regular file that is not too long to be looked through; None for anything else, and for what is gone."""
    try:
        about = os.lstat(path)
        if not stat.S_ISREG(about.st_mode) or about.st_mtime < since or about.st_size >= FILE_LIMIT:
            return None
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - see above
            return file.read()
    except OSError:
        return None


class Recorders:
    """Stand before programs on a PATH: each writes its arguments and environment down and becomes the real program.

    Many programs are gone before a sweep over /proc comes by; these are seen every time.

    :param directory: for the recorders and what they record.
    """

    def __init__(self, directory: Path, programs: Iterable[str]) -> None:
        self.records = directory / "records"
        self.records.mkdir(parents=True)
        self.directory = directory / "bin"
        self.directory.mkdir()
        for program in programs:
            real = shutil.which(program)
            assert real, f"{program} is not installed"
            recorder = self.directory / program
            recorder.write_text(
                f"#!/bin/sh\ncat /proc/$$/environ >{self.records}/{program}.$$.environment\n"
                f'printf "%s\\0" "$@" >{self.records}/{program}.$$.arguments\nexec {real} "$@"\n'
            )
            recorder.chmod(0o755)

    def path(self, path: str) -> str:
        """``path`` with the recorders before it."""
        return f"{self.directory}:{path}"

    def seen(self) -> Iterator[tuple[str, bytes]]:
        """What they recorded, named ``PROGRAM.PID.environment`` and ``….arguments``."""
        for file in sorted(self.records.iterdir()):
            yield file.name, file.read_bytes()


# -- afterwards -----------------------------------------------------------------------------------------------------


def leaks_in(texts: Iterable[tuple[str, bytes]], needles: Needles) -> list[str]:
    """Secrets in named pieces of data."""
    return [f"{name} in {place}" for place, data in texts for name in sorted(needles.within(data))]


def files_below(directory: Path, *, leave_out: Iterable[Path] = (), since: float = 0.0) -> Iterator[tuple[str, bytes]]:
    """The regular files below a directory of this machine, links not followed.

    :param since: only those changed at or after this time (seconds since the epoch).
    """
    for path in _below(directory, leave_out):
        if (content := _content(path, since)) is not None:
            yield path, content


def memory_files(host: LabHost, *directories: str) -> Iterator[tuple[str, bytes]]:
    """The files of a host that are not on its disk: below /run, /tmp and the like."""
    argv = ("tar", "-C", "/", "--warning=none", "--ignore-failed-read", "-cf", "-", *directories)
    archive = host.exec(*argv, check=False).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            if file is not None:
                yield f"/{member.name}", file.read()


def journal_entries(host: LabHost) -> list[dict[str, bytes]]:
    """The host's whole journal, each entry by its fields."""
    data = host.exec("journalctl", "--quiet", "--all", "--output=export", timeout=120).stdout
    entries: list[dict[str, bytes]] = []
    entry: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        end = data.index(b"\n", at)
        line = data[at:end]
        at = end + 1
        if not line:
            entries.append(entry)
            entry = {}
        elif b"=" in line:
            name, _, value = line.partition(b"=")
            entry[name.decode()] = value
        else:  # a field with line breaks or other bytes in it: its size, as 64 bits, comes first
            size = int.from_bytes(data[at : at + 8], "little")
            entry[line.decode()] = data[at + 8 : at + 8 + size]
            at += 8 + size + 1
    return [*entries, entry] if entry else entries
