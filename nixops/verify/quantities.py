"""systemd's limits: what the inventory writes, what ``systemctl show`` prints, what the kernel holds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from nixops.verify.unit import UnitFacts

INFINITY: Final = math.inf
# "[not set]" and the like: equal to no limit anybody can write.
UNKNOWN: Final = float("nan")
_SIZES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SPANS: Final = {
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
    "w": 604800.0,
    "month": 2629800.0,
    "y": 31557600.0,
}


def size(text: str, memory: int) -> float:
    """Bytes of ``16G``, ``50%`` (of ``memory`` bytes), ``1073741824`` or ``infinity`` (:data:`INFINITY`)."""
    if text in ("infinity", "max"):
        return INFINITY
    if match := re.fullmatch(r"([0-9]+)%", text):
        return memory * int(match.group(1)) / 100
    if match := re.fullmatch(r"([0-9]+)([KMGT]?)", text):
        return float(int(match.group(1)) * _SIZES[match.group(2)])
    return UNKNOWN


def timespan(text: str) -> float:
    """Seconds of systemd's ``1min 20s``, ``1.5s`` or ``infinity`` (:data:`INFINITY`)."""
    if text == "infinity":
        return INFINITY
    parts = text.split()
    matches = [re.fullmatch(r"([0-9]+(?:[.][0-9]+)?)(us|ms|s|min|h|d|w|month|y)", part) for part in parts]
    if not parts or not all(matches):
        return UNKNOWN
    return sum(float(m.group(1)) * _SPANS[m.group(2)] for m in matches if m)


def number(text: str) -> float:
    """A plain number, or :data:`UNKNOWN`."""
    return float(text) if re.fullmatch(r"-?[0-9]+", text) else UNKNOWN


def _quota(text: str) -> float:
    """CPUs of the kernel's ``400000 100000``."""
    quota, _, period = text.strip().partition(" ")
    if quota == "max":
        return INFINITY
    return float(quota) / float(period) if quota.isdigit() and period.strip().isdigit() else UNKNOWN


@dataclass(frozen=True)
class _Limit:
    """One limit: systemd's property, the kernel's file, how to read each, and how far they may be apart."""

    shown: str
    file: str | None
    read_shown: Callable[[str], float]
    read_file: Callable[[str], float]
    slack: float = 0.0


def _bytes(text: str) -> float:
    return size(text.strip(), 0)


def _last(text: str) -> float:
    """``default 100`` of io.weight, or a plain number."""
    return number(text.split()[-1]) if text.split() else UNKNOWN


# The kernel rounds bytes down to pages, of at most 64 KiB.
_PAGE: Final = 65536.0
_LIMITS: Final = {
    "MemoryMax": _Limit("MemoryMax", "memory.max", _bytes, _bytes, _PAGE),
    "MemoryHigh": _Limit("MemoryHigh", "memory.high", _bytes, _bytes, _PAGE),
    "MemorySwapMax": _Limit("MemorySwapMax", "memory.swap.max", _bytes, _bytes, _PAGE),
    "CPUQuota": _Limit("CPUQuotaPerSecUSec", "cpu.max", timespan, _quota, 0.001),
    "CPUWeight": _Limit("CPUWeight", "cpu.weight", number, _last),
    "IOWeight": _Limit("IOWeight", "io.weight", number, _last),
    "TasksMax": _Limit("TasksMax", "pids.max", number, _last),
    "Nice": _Limit("Nice", None, number, number),
}


@dataclass(frozen=True)
class LimitMismatch:
    """A limit that is not in force, in words."""

    name: str
    expected: str
    found: str


def mismatches(given: Mapping[str, str | int], facts: UnitFacts) -> list[LimitMismatch]:
    """Each limit of ``given`` (the inventory's spelling) that the host does not have in force."""
    wrong: list[LimitMismatch] = []
    for name, value in given.items():
        limit = _LIMITS[name]
        text = str(value)
        if name == "CPUQuota":
            wanted = int(text.rstrip("%")) / 100
        elif name.startswith("Memory"):
            wanted = size(text, facts.memory)
        else:
            wanted = float(text)
        # A percentage is of what systemd takes for the machine's memory, which may be a little less or more.
        slack = max(limit.slack, wanted * 0.02) if name.startswith("Memory") and text.endswith("%") else limit.slack
        shown = facts.get(limit.shown)
        if not _equal(limit.read_shown(shown), wanted, slack):
            wrong.append(LimitMismatch(name, text, shown or "not set"))
            continue
        process = facts.process
        if name == "Nice":
            if process is not None and process.nice != wanted:
                wrong.append(LimitMismatch(name, text, f"{process.nice} on the process"))
        elif process is not None and limit.file is not None and limit.file in process.cgroup:
            held = process.cgroup[limit.file]
            if not _equal(limit.read_file(held), wanted, slack):
                wrong.append(LimitMismatch(name, text, f"{held.strip()} in the kernel's {limit.file}"))
    return wrong


def _equal(found: float, wanted: float, slack: float) -> bool:
    return found == wanted or abs(found - wanted) <= slack
