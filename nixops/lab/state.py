"""What there is of labs on this machine, in files: enough for any later process to take down what a killed one left.

``/run/nixops-lab/<lab>/lab.json`` is written before the first effect. What it does not say, names do: control groups,
namespaces, links and mounts all carry the lab's name or mark.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nixops.errors import HostFault, NixopsError, UsageError
from nixops.lab.machine import ControlGroup, ProcessId, locked, read_json, unmount_below, write_json
from nixops.lab.network import Network, remove_network
from nixops.transport.command import Runner

DIRECTORY = Path("/run/nixops-lab")
CONTROL_GROUP = "nixops-lab"
INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
# At the usual 128, systemd runs out from about ten hosts on, and logins then hang for two minutes.
INOTIFY_NEEDED = 8192

Shape = Literal["plain", "awkward"]


@dataclass(frozen=True)
class HostSpec:
    """A host to be.

    :param name: its host name, as the inventory has it.
    :param shape: ``plain`` (root logs in, Debian's paths) or ``awkward`` (see :mod:`nixops.lab.awkward`).
    :param disk_mib: size of its disk, MiB. It is memory that is taken only as the disk fills.
    """

    name: str
    shape: Shape = "plain"
    disk_mib: int = 4096

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,38}[a-zA-Z0-9])?", self.name):
            raise UsageError(f"{self.name!r} is no name for a lab host (letters, digits and dashes, at most 40)")
        if self.shape not in ("plain", "awkward"):
            raise UsageError(f"{self.shape!r} is no shape of a lab host", hint="plain or awkward")


@dataclass(frozen=True)
class LabState:
    """A lab as its file has it.

    :param owner: the process that takes it down when it ends; ``None`` for one that stays until it is taken down.
    """

    name: str
    subnet: ipaddress.IPv4Network
    tree: Path
    hosts: tuple[HostSpec, ...]
    owner: ProcessId | None
    boot: str

    @property
    def network(self) -> Network:
        return Network(self.name, self.subnet)

    def save(self, directory: Path) -> None:
        write_json(
            directory / self.name / "lab.json",
            {
                "name": self.name,
                "subnet": str(self.subnet),
                "tree": str(self.tree),
                "hosts": [asdict(host) for host in self.hosts],
                "owner": asdict(self.owner) if self.owner else None,
                "boot": self.boot,
            },
        )


def check_name(name: str) -> str:
    """``name`` if it can name a lab.

    :raises UsageError: otherwise.
    """
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?", name):
        raise UsageError(f"{name!r} is no name for a lab", hint="lower-case letters, digits and dashes, at most 20")
    return name


def this_boot() -> str:
    """The id of this machine's present boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def load_state(directory: Path, name: str) -> LabState | None:
    """The lab of that name, or ``None``: there is none, or what a killed process wrote cannot be read."""
    raw = read_json(directory / name / "lab.json")
    try:
        return LabState(
            name=raw["name"],
            subnet=ipaddress.IPv4Network(raw["subnet"]),
            tree=Path(raw["tree"]),
            hosts=tuple(HostSpec(**host) for host in raw["hosts"]),
            owner=ProcessId(**raw["owner"]) if raw["owner"] else None,
            boot=raw["boot"],
        )
    except (TypeError, KeyError, ValueError, NixopsError):
        return None


def labs(directory: Path) -> list[str]:
    """The names of all labs that left a directory."""
    return sorted(path.parent.name for path in directory.glob("*/lab.json"))


def in_use(state: LabState | None) -> bool:
    """Whether a living process still owns this lab."""
    return bool(state and state.owner and state.boot == this_boot() and state.owner.alive)


def orphaned(state: LabState | None) -> bool:
    """Whether it belonged to a process that ended without taking it down, or to an earlier boot."""
    return state is not None and (state.boot != this_boot() or (state.owner is not None and not state.owner.alive))


def host_group(lab: str, host: str) -> ControlGroup:
    """The control group of a host: all its processes, and the kernel's own word on which they are."""
    return ControlGroup(f"{CONTROL_GROUP}/{lab}/{host}")


def remove(runner: Runner, directory: Path, name: str) -> None:
    """Take down whatever there is of the lab ``name``; it need not be whole, nor its file readable. Idempotent.

    :raises HostFault: something of it could not be removed; the rest was.
    """
    group = ControlGroup(f"{CONTROL_GROUP}/{name}")
    problems: list[str] = []
    steps: tuple[Callable[[], None], ...] = (
        group.destroy,  # first, so that nothing starts any more while the rest goes
        lambda: remove_network(runner, name),
        lambda: unmount_below(runner, directory / name),
        lambda: _remove_traces(directory / name, name),
        lambda: release_inotify(directory, name),
    )
    with locked(directory / "remove.lock"):  # a finaliser may come while a fixture is at it
        for step in steps:
            try:
                step()
            except (NixopsError, OSError) as error:
                problems.append(str(error))
    if problems:
        raise HostFault(
            f"not everything of the lab {name} could be removed",
            hint=f"see to it, and run again: invoke lab.down --name {name}",
            detail="\n".join(problems),
        )


def _remove_traces(lab: Path, name: str) -> None:
    """The directory, and what systemd-nspawn leaves when it is killed."""
    for left in Path("/run/systemd/nspawn/propagate").glob(f"{machine_name(name, '*')}"):
        shutil.rmtree(left, ignore_errors=True)
    if lab.exists():
        shutil.rmtree(lab)


def machine_name(lab: str, host: str) -> str:
    """A host's name for systemd-nspawn, which is one for all of this machine."""
    return f"{lab}.{host}"


# -- the one setting of the machine that is changed -------------------------------------------------------------


def hold_inotify(directory: Path, name: str, setting: Path = INOTIFY, record: Path = DIRECTORY) -> None:
    """Raise the machine's limit of inotify instances for as long as some lab is up; the first to come notes what
    it was.

    :param record: where that is noted. The setting is the machine's, so there is one such place whatever directory
        the labs are in: otherwise a lab of another directory would take it from those that still need it.
    """
    lab = str(directory / name)
    with locked(record / "machine.lock"):
        noted = read_json(record / "machine.json") or {}
        current = int(setting.read_text(encoding="ascii"))
        users = [user for user in noted.get("users", []) if user != lab and Path(user).is_dir()]
        former = noted["former"] if users else current
        if noted and not users and current == noted.get("set"):
            former = noted["former"]  # every earlier user was killed, and nobody has put it back
        wanted = max(current, INOTIFY_NEEDED)
        write_json(record / "machine.json", {"former": former, "set": wanted, "users": [*users, lab]})
        setting.write_text(str(wanted), encoding="ascii")


def release_inotify(directory: Path, name: str, setting: Path = INOTIFY, record: Path = DIRECTORY) -> None:
    """The last lab to go puts the limit back to what it was, unless somebody else has changed it since."""
    lab = str(directory / name)
    with locked(record / "machine.lock"):
        noted = read_json(record / "machine.json")
        if not noted:
            return
        users = [user for user in noted["users"] if user != lab and Path(user).is_dir()]
        if users:
            write_json(record / "machine.json", {**noted, "users": users})
            return
        if int(setting.read_text(encoding="ascii")) == noted["set"]:
            setting.write_text(str(noted["former"]), encoding="ascii")
        (record / "machine.json").unlink()


def taken_subnets(directory: Path, names: Sequence[str]) -> list[ipaddress.IPv4Network]:
    """The subnets that other labs have chosen, though their bridges may not be there yet."""
    return [state.subnet for name in names if (state := load_state(directory, name)) is not None]
