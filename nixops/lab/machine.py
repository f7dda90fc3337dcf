"""What the lab needs of this machine: programs, locks, mounts, control groups, and small files that survive a crash."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nixops.errors import HostFault
from nixops.transport.command import Command, Result, Runner

# Programs and the Debian packages that bring them.
PROGRAMS: Mapping[str, str] = {
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "ssh-keygen": "openssh-client",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "setsid": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
    "chroot": "coreutils",
}


def require_machine() -> None:
    """Check that this machine can carry a lab.

    :raises HostFault: not root, or a program is missing (the hint names the packages).
    """
    if os.geteuid() != 0:
        raise HostFault("the lab boots real hosts, and that needs root", hint="run this as root")
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        raise HostFault(
            f"programs that the lab needs are not installed: {', '.join(missing)}",
            hint=f"apt-get install {' '.join(missing)}",
        )


def run(
    runner: Runner,
    *argv: str | Path,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 60.0,
) -> Result:
    """Run a program to its end.

    :raises CommandFailed: it ended with another code than 0.
    """
    return runner.run(Command.of(*argv, stdin=stdin, env=dict(env or {}), timeout=timeout)).check()


# -- files ----------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive ``flock`` on ``path``. The kernel gives it up with the process, however that ends."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value``, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The value in ``path``, or ``None`` where there is no readable one: a killed process may have left anything."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# -- processes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessId:
    """A process for as long as this machine runs: its number, and when it started (clock ticks since boot)."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        return identify(self.pid) == self


def identify(pid: int) -> ProcessId | None:
    """The identity of a living process; ``None`` when there is none of that number, or only its zombie."""
    try:
        # The name in parentheses may hold anything, so count from its end (proc_pid_stat(5)).
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else ProcessId(pid, int(fields[19]))


def this_process() -> ProcessId:
    """The identity of the calling process."""
    found = identify(os.getpid())
    assert found is not None  # a process that asks is alive
    return found


# -- mounts ---------------------------------------------------------------------------------------------------


def mounts_below(path: Path, mountinfo: str | None = None) -> list[Path]:
    """The mount points at and below ``path``, the one mounted last first.

    :param mountinfo: the text of ``/proc/self/mountinfo``, for tests.
    """
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8") if mountinfo is None else mountinfo
    points = [Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split()[4])) for line in text.splitlines()]
    return [point for point in reversed(points) if point == path or path in point.parents]


def unmount_below(runner: Runner, path: Path) -> None:
    """Unmount everything at and below ``path``.

    :raises CommandFailed: something there is still in use after five seconds.
    """
    deadline = time.monotonic() + 5.0
    while points := mounts_below(path):
        result = runner.run(Command.of("umount", *points, timeout=60.0))
        if not result.ok and time.monotonic() > deadline:
            result.check(f"{points[0]} cannot be unmounted", hint="find out what uses it: fuser -vm " + str(points[0]))
        if not result.ok:
            time.sleep(0.1)


# -- control groups -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ControlGroup:
    """A control group of ours: the one id of "every process of this host" that the kernel itself keeps.

    A host needs one of its own for another reason too: systemd-nspawn puts its container into ``payload`` below
    the group it is started in, so that two started from one group would share their system.slice, and stopping
    a unit in one would reach into the other.

    :param name: the path below the hierarchies' roots, such as ``nixops-lab/lab/nix-cache02``.
    """

    name: str

    @property
    def directories(self) -> tuple[Path, ...]:
        return tuple(root / self.name for root in hierarchies())

    def create(self) -> None:
        """Make it in every hierarchy that systemd-nspawn uses, with what controllers there are."""
        for root in hierarchies():
            for attempt in range(10):
                try:
                    self._create_in(root)
                    break
                except FileNotFoundError:
                    # Another lab went down at this moment, and took the common parent with it as it looked empty.
                    if attempt == 9:
                        raise

    def _create_in(self, root: Path) -> None:
        directory = root
        for part in Path(self.name).parts:
            _delegate(directory)
            directory = directory / part
            directory.mkdir(exist_ok=True)

    def pids(self) -> list[int]:
        """The processes in it and below, as numbers of this machine."""
        found: set[int] = set()
        for directory in self.directories:
            for group, _, _ in os.walk(directory):  # which passes over what goes away while it walks
                found.update(_members(Path(group)))
        return sorted(found)

    def destroy(self, timeout: float = 20.0) -> None:
        """End every process in it, by SIGKILL, and remove it, and those above it that became empty.

        Once it is gone nothing can come into it, so what was just being started does not start.

        :raises HostFault: some processes are still there after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while [directory for directory in self.directories if not _prune(directory)]:
            for pid in self.pids():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if time.monotonic() > deadline:
                raise HostFault(f"processes of {self.name} do not end: {self.pids()}", hint="look at them with ps")
            time.sleep(0.02)
        for directory in self.directories:
            for parent in directory.parents[: len(Path(self.name).parts) - 1]:
                try:
                    parent.rmdir()
                except OSError:
                    break


def hierarchies(mountinfo: str | None = None) -> tuple[Path, ...]:
    """Where systemd-nspawn keeps track of processes: the unified hierarchy, and systemd's own of version 1.

    :param mountinfo: the text of ``/proc/self/mountinfo``, for tests.
    :raises HostFault: there is no unified hierarchy, which the hosts' systemd needs.
    """
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8") if mountinfo is None else mountinfo
    unified: list[Path] = []
    named: list[Path] = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split()[:3]
        if kind == "cgroup2":
            unified.append(Path(left.split()[4]))
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            named.append(Path(left.split()[4]))
    if not unified:
        raise HostFault(
            "no cgroup2 file system is mounted, and the lab's hosts need one",
            hint="mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
        )
    return (unified[0], *named[:1])


def _delegate(directory: Path) -> None:
    """Let groups below ``directory`` have limits, as far as the machine has controllers for that."""
    try:
        controllers = (directory / "cgroup.controllers").read_text(encoding="ascii").split()
    except OSError:
        return
    for controller in controllers:
        try:
            (directory / "cgroup.subtree_control").write_text(f"+{controller}", encoding="ascii")
        except OSError:
            continue  # taken by version 1, or not ours to give: then limits are shown and not enforced


def _prune(directory: Path) -> bool:
    """Remove ``directory`` and all groups below it; false when one is not empty yet."""
    for group, _, _ in os.walk(directory, topdown=False):
        try:
            Path(group).rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return False
    return True


def leader(group: ControlGroup) -> int | None:
    """The init of the container whose processes are in ``group``: the one that is number 1 in its own namespace."""
    return next((pid for pid in _candidates(group) if _namespaced(pid)[1:][-1:] == ["1"]), None)


def _candidates(group: ControlGroup) -> Iterator[int]:
    # Where systemd-nspawn puts a container, and systemd itself in it, before the walk through all that runs there.
    for directory in group.directories:
        for scope in directory.glob("boot-*/payload/init.scope"):
            yield from _members(scope)
    yield from group.pids()


def _members(group: Path) -> list[int]:
    try:
        text = (group / "cgroup.procs").read_text(encoding="ascii")
    except OSError:
        return []
    return sorted({int(line) for line in text.split()} - {0})


def _namespaced(pid: int) -> Sequence[str]:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    if re.search(r"^State:\s+[ZX]", status, re.MULTILINE):
        return []
    found = re.search(r"^NSpid:\s+(.*)$", status, re.MULTILINE)
    return found[1].split() if found else []
