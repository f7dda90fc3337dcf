"""Closures: what is in them, and what the change from one to another means to a reader."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nixops.errors import HostFault
from nixops.transport.command import Command, Result, Runner
from nixops.values import StorePath

# Where a store path's name ends and its version begins: Nix's own rule (a dash before what is no letter).
_VERSION = re.compile(r"-(?=[^A-Za-z])")
_OUTPUTS = ("bin", "dev", "doc", "info", "lib", "man", "debug", "out", "static")
# A change of size below this is no news, bytes (as in ``nix store diff-closures``).
NEWSWORTHY = 8 * 1024
# Paths on one command line; 211 characters each at most, well below the 2 MiB that Linux takes.
BATCH = 1000


@dataclass(frozen=True)
class PathInfo:
    """What the store knows of a path. ``nar_size`` is bytes."""

    path: StorePath
    nar_size: int
    references: tuple[StorePath, ...] = ()
    signatures: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClosureDiff:
    """The difference of two closures, one line a name.

    :ivar added: ``nodejs: 22.1.0, +48.2 MiB``
    :ivar removed: ``python3: 3.11.9, -110.0 MiB``
    :ivar changed: ``nix: 2.18.1 → 2.24.9, +1.2 MiB``
    :ivar rebuilt: how many paths differ in nothing but their hash.
    :ivar size_delta: bytes, positive for growth.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    rebuilt: int = 0
    size_delta: int = 0

    @property
    def empty(self) -> bool:
        return not (self.added or self.removed or self.changed or self.rebuilt)

    def lines(self) -> tuple[str, ...]:
        """All of it, marked ``+``, ``-`` and ``~``, with the sum at the end; nothing when nothing changed."""
        if self.empty:
            return ()
        body = [
            *(f"+ {line}" for line in self.added),
            *(f"- {line}" for line in self.removed),
            *(f"~ {line}" for line in self.changed),
        ]
        if self.rebuilt:
            body.append(f"~ {self.rebuilt} path{'s' if self.rebuilt > 1 else ''} rebuilt with no change of version")
        return (*body, f"closure size {signed_size(self.size_delta)}")


def closure_diff(before: Sequence[PathInfo], after: Sequence[PathInfo]) -> ClosureDiff:
    """What changes from ``before`` to ``after``. Pure."""
    old, new = _by_name(before), _by_name(after)
    added, removed, changed = [], [], []
    rebuilt = 0
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name, {}), new.get(name, {})
        gone, come = _paths(was) - _paths(now), _paths(now) - _paths(was)
        if not gone and not come:
            continue
        delta = _size(now.values()) - _size(was.values())
        size = f", {signed_size(delta)}" if abs(delta) >= NEWSWORTHY else ""
        if not was:
            added.append(f"{name}: {_versions(now)}{size}")
        elif not now:
            removed.append(f"{name}: {_versions(was)}{size}")
        elif was.keys() != now.keys():
            changed.append(f"{name}: {_versions(was)} → {_versions(now)}{size}")
        elif size:
            changed.append(f"{name}: {_versions(now)}{size}")
        else:
            rebuilt += max(len(gone), len(come))
    total = sum(i.nar_size for i in after) - sum(i.nar_size for i in before)
    return ClosureDiff(tuple(added), tuple(removed), tuple(changed), rebuilt, total)


def split_name(name: str) -> tuple[str, str]:
    """``("openssl", "3.0.13")`` of ``openssl-3.0.13-bin``: name and version, without the output's name."""
    for output in _OUTPUTS:
        name = name.removesuffix(f"-{output}")
    parts = _VERSION.split(name, maxsplit=1)
    return (parts[0], parts[1]) if len(parts) == 2 and parts[0] else (name, "")


def signed_size(size: int) -> str:
    """``+1.2 MiB`` of a number of bytes."""
    sign, amount = ("-" if size < 0 else "+"), float(abs(size))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{sign}{amount:.0f} {unit}" if unit == "B" else f"{sign}{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError  # the loop ends with GiB


def requisites(runner: Runner, path: StorePath) -> tuple[PathInfo, ...]:
    """The closure of ``path`` with sizes, as the store on the runner's machine knows it, references first.

    Asks ``nix-store``, which needs no experimental feature. References and signatures are not filled in.

    :raises HostFault: the path is not there, or there is no nix.
    """
    paths = [StorePath(line) for line in _query(runner, "-qR", [path])]
    sizes: list[int] = []
    for start in range(0, len(paths), BATCH):
        sizes += [int(line) for line in _query(runner, "-q", paths[start : start + BATCH], "--size")]
    return tuple(PathInfo(p, size) for p, size in zip(paths, sizes, strict=True))


def store_failed(result: Result, what: str) -> HostFault:
    """The error of a ``nix-store`` that ended with another code than 0."""
    hint = "is nix on the login's PATH there?" if result.code == 127 else None
    return HostFault(f"{result.host} could not {what}", hint=hint, detail=result.tail(8))


def _query(runner: Runner, operation: str, paths: Sequence[StorePath], *options: str) -> list[str]:
    result = runner.run(Command.of("nix-store", operation, *options, *paths, timeout=120.0))
    if not result.ok:
        raise store_failed(result, f"tell what {paths[0]} consists of")
    return result.out.split()


def _by_name(infos: Iterable[PathInfo]) -> dict[str, dict[str, list[PathInfo]]]:
    named: dict[str, dict[str, list[PathInfo]]] = defaultdict(lambda: defaultdict(list))
    for info in infos:
        name, version = split_name(info.path.name)
        named[name][version].append(info)
    return named


def _paths(by_version: dict[str, list[PathInfo]]) -> set[StorePath]:
    return {info.path for infos in by_version.values() for info in infos}


def _versions(by_version: dict[str, list[PathInfo]]) -> str:
    return ", ".join(version or "(no version)" for version in sorted(by_version))


def _size(groups: Iterable[list[PathInfo]]) -> int:
    return sum(info.nar_size for group in groups for info in group)
