"""What systemd and the kernel say of a runner's unit, read in one round trip for all of a host's instances."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nixops.errors import Undecided
from nixops.transport.command import Command, Runner
from nixops.verify.tools import PREAMBLE

# What shapes a process' access, under systemd's names: a probe with the same values sees what the runner sees.
# Left out on purpose: RuntimeDirectory (systemd deletes it when the probe ends, under the runner's feet), what
# PID 1 reads for the unit (EnvironmentFile, LoadCredential), and what only bounds it (limits, cgroup, nice).
SANDBOX: Final = (
    "User",
    "Group",
    "DynamicUser",
    "SupplementaryGroups",
    "StateDirectory",
    "StateDirectoryMode",
    "CacheDirectory",
    "CacheDirectoryMode",
    "LogsDirectory",
    "LogsDirectoryMode",
    "RootDirectory",
    "RootImage",
    "BindPaths",
    "BindReadOnlyPaths",
    "TemporaryFileSystem",
    "ReadWritePaths",
    "ReadOnlyPaths",
    "InaccessiblePaths",
    "ExecPaths",
    "NoExecPaths",
    "PrivateTmp",
    "PrivateDevices",
    "PrivateUsers",
    "PrivateMounts",
    "PrivateNetwork",
    "PrivateIPC",
    "ProtectSystem",
    "ProtectHome",
    "ProtectProc",
    "ProcSubset",
    "ProtectKernelTunables",
    "ProtectKernelModules",
    "ProtectKernelLogs",
    "ProtectControlGroups",
    "ProtectClock",
    "ProtectHostname",
    "NoNewPrivileges",
    "CapabilityBoundingSet",
    "AmbientCapabilities",
    "RestrictNamespaces",
    "RestrictAddressFamilies",
    "RestrictSUIDSGID",
    "RestrictRealtime",
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "SystemCallFilter",
    "SystemCallArchitectures",
    "KeyringMode",
    "MountAPIVFS",
    "UMask",
)
STATE: Final = (
    "LoadState",
    "ActiveState",
    "SubState",
    "Result",
    "NRestarts",
    "MainPID",
    "ExecMainStartTimestampMonotonic",
    "ExecMainStatus",
    "Job",
    "InvocationID",
    "ControlGroup",
    "WorkingDirectory",
    "EnvironmentFiles",
)
LIMITS: Final = (
    "MemoryMax",
    "MemoryHigh",
    "MemorySwapMax",
    "CPUQuotaPerSecUSec",
    "CPUWeight",
    "IOWeight",
    "TasksMax",
    "Nice",
)

# Ticks of /proc/PID/stat in a second (USER_HZ, proc(5)); the same on every machine that NixOS runs on.
_TICKS: Final = 100

# Of the process' environment only PATH leaves the host: the rest may hold the runner's token. The shell reads what it
# can by itself: a host starts a program for each of the others.
#
# The clock is read first: a process has run for longer than it says, never for less. And it is the one that the kernel
# counts a process' start in; systemd's stands still while a host sleeps.
_FACTS: Final = r"""
properties=$1; shift
read -r uptime rest < /proc/uptime
out=$(systemctl show -p "$properties" -- "$@") || exit 3
printf '%s\n' "$out"
echo '@host'
echo "uptime=$uptime"
while read -r key value rest; do
    [ "$key" != MemTotal: ] || { echo "memory=$value"; break; }
done < /proc/meminfo
emit() {
    echo '@process'
    echo "pid=$pid"
    grep -E "[:,]${user:-root}(,|\$)" /etc/group | while IFS=: read -r name rest; do echo "member=$name"; done
    # `systemctl show` calls LoadCredential unprintable. A credential set in the unit's text stays there.
    systemctl cat -- "$1" 2> /dev/null | sed -n -e 's/^LoadCredential\(Encrypted\)\{0,1\}=/credential=/p' \
        -e 's/^\(Set\|Import\)Credential.*/credential=/p'
    echo "named=$(id -nG -- "${user:-root}" 2>/dev/null)"
    [ "$pid" != 0 ] && [ -r "/proc/$pid/status" ] || return 0
    # Until it executes the unit's program it is systemd's, with systemd's user and environment.
    stat=
    read -r stat < "/proc/$pid/stat"
    case $stat in '' | *' (('* | *' (systemd) '* | *' (systemd-executo) '*) return 0 ;; esac
    gids=' '
    while read -r key value; do
        case $key in
            Uid:) echo "Uid=$value" ;;
            Gid: | Groups:) for gid in $value; do case $gids in *" $gid "*) ;; *) gids="$gids$gid " ;; esac; done ;;
        esac
    done < "/proc/$pid/status"
    [ "$gids" = ' ' ] || getent group $gids | while IFS=: read -r name rest; do echo "group=$name"; done
    set -- ${stat##*) }
    echo "nice=${17-}"
    echo "started=${20-}"
    echo "path=$(tr '\0\n' '\n ' < "/proc/$pid/environ" | sed -n '/^PATH=/{s///p;q;}')"
    for file in memory.max memory.high memory.swap.max cpu.max cpu.weight io.weight pids.max; do
        [ -r "/sys/fs/cgroup$cgroup/$file" ] || continue
        text=
        while read -r line; do text="$text$line "; done < "/sys/fs/cgroup$cgroup/$file"
        echo "cgroup=$file $text"
    done
    return 0
}
pid=0 user='' cgroup=''
printf '%s\n\n' "$out" | while IFS= read -r line; do
    case $line in
        MainPID=*) pid=${line#*=} ;;
        User=*) user=${line#*=} ;;
        ControlGroup=*) cgroup=${line#*=} ;;
        '') emit "$1"; shift; pid=0 user='' cgroup='' ;;
    esac
done
echo '@end'
"""


@dataclass(frozen=True)
class ProcessFacts:
    """The unit's main process, once it executes the unit's program.

    :ivar path: its PATH, an entry each.
    :ivar cgroup: what the kernel enforces for its unit, by file name; absent files mean no such controller.
    :ivar started: seconds since the host started, when it did.
    """

    pid: int
    uid: int
    nice: int
    path: tuple[str, ...]
    cgroup: Mapping[str, str]
    started: float


@dataclass(frozen=True)
class UnitFacts:
    """One unit.

    :ivar properties: by systemd's name; a property printed on several lines has several values.
    :ivar process: its main process, ``None`` when there is none.
    :ivar credentials: its LoadCredential lines; an empty text for one that comes from elsewhere.
    :ivar groups: names of every group its user or its process is in.
    :ivar uptime: seconds since the host started, just before this was read.
    :ivar memory: the host's memory, bytes.
    """

    name: str
    properties: Mapping[str, tuple[str, ...]]
    process: ProcessFacts | None
    groups: frozenset[str]
    uptime: float
    memory: int
    credentials: tuple[str, ...] = ()

    def get(self, name: str) -> str:
        """The property's value, or an empty text."""
        return " ".join(self.properties.get(name, ()))

    def number(self, name: str) -> int:
        """A property that is a number; 0 when the host does not give one."""
        value = self.get(name)
        return int(value) if value.isdigit() else 0

    @property
    def exists(self) -> bool:
        return self.get("LoadState") == "loaded"

    @property
    def running(self) -> bool:
        return self.get("ActiveState") == "active" and self.get("SubState") == "running" and self.process is not None

    @property
    def age(self) -> float:
        """Seconds since its main process started; 0 where there is none."""
        return max(0.0, self.uptime - self.process.started) if self.process is not None else 0.0

    @property
    def state_directories(self) -> tuple[str, ...]:
        """The names below /var/lib that systemd keeps for it."""
        return tuple(self.get("StateDirectory").split())

    @property
    def credential_files(self) -> tuple[str, ...]:
        """Files that PID 1 reads secrets from for it: EnvironmentFile and LoadCredential."""
        files = [v.rsplit(" (", 1)[0].removeprefix("-") for v in self.properties.get("EnvironmentFiles", ())]
        files += [value.partition(":")[2] for value in self.credentials]
        return tuple(f for f in dict.fromkeys(files) if f.startswith("/"))


def read_units(transport: Runner, units: Sequence[str]) -> tuple[UnitFacts, ...]:
    """What the host says of each of ``units``, in their order. Needs root.

    :raises Undecided: the host has no systemd to ask, or the answer was cut off.
    """
    properties = ",".join((*STATE, *SANDBOX, *LIMITS))
    result = transport.run(
        Command.script(PREAMBLE + _FACTS, properties, *units, root=True, timeout=30.0, title="reading the unit")
    )
    if not result.ok or not result.out.rstrip().endswith("@end"):
        raise Undecided(
            f"systemd on {transport.host} could not be asked (exit code {result.code})",
            hint="systemctl show must work there as root",
            detail=result.tail(5),
        )
    shown, _, rest = result.out.partition("@host\n")
    blocks = re.split(r"\n\s*\n", shown.strip("\n"))
    head, *processes = rest.rsplit("@end", 1)[0].split("@process\n")
    about = dict(line.partition("=")[::2] for line in head.splitlines())
    if len(blocks) != len(units) or len(processes) != len(units):
        raise Undecided(f"{transport.host} described {len(blocks)} units where {len(units)} were asked about")
    try:
        uptime, memory = float(about["uptime"]), int(about["memory"]) * 1024
        return tuple(
            _unit(unit, block, process, uptime, memory)
            for unit, block, process in zip(units, blocks, processes, strict=True)
        )
    except (KeyError, ValueError, IndexError) as error:
        raise Undecided(f"{transport.host} described its units in a way that is not understood: {error}") from None


def _pairs(text: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        found[key] = (*found.get(key, ()), value)
    return found


def _unit(name: str, block: str, process: str, uptime: float, memory: int) -> UnitFacts:
    about = _pairs(process)
    groups = {g for key in ("member", "named", "group") for value in about.get(key, ()) for g in value.split()}
    main = None
    # A process may end while its files are read one after the other: then there is none.
    if "Uid" in about and about.get("nice", ("",))[0]:
        main = ProcessFacts(
            pid=int(about["pid"][0]),
            uid=int(about["Uid"][0].split()[1]),
            nice=int(about["nice"][0]),
            path=tuple(p for p in about["path"][0].split(":") if p),
            cgroup=dict(line.partition(" ")[::2] for line in about.get("cgroup", ())),
            started=int(about["started"][0]) / _TICKS,
        )
    return UnitFacts(name, _pairs(block), main, frozenset(groups), uptime, memory, about.get("credential", ()))
