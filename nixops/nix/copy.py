"""Copying a closure to a host whose login Nix does not trust.

The daemon takes unsigned paths from trusted users only (``require-sigs``). Root on the host may import them, so
what is missing goes as one stream from ``nix-store --export`` here to root's ``nix-store --import`` there.
``nix-store`` needs no experimental feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nixops.errors import CommandFailed, HostFault
from nixops.nix.closure import BATCH, store_failed
from nixops.nix.log import full_disk
from nixops.transport.command import Command, LineSink, Runner
from nixops.transport.exec import StreamRunner, pipe
from nixops.values import StorePath


@dataclass(frozen=True)
class Imported:
    """What was sent: the paths that the host did not have, references first. Empty when it had them all."""

    paths: tuple[StorePath, ...]


def import_closure(
    local: StreamRunner,
    remote: StreamRunner,
    paths: Sequence[StorePath],
    *,
    timeout: float = 3600.0,
    on_line: LineSink | None = None,
) -> Imported:
    """Bring the closures of ``paths`` from this machine's store into the host's, through root's hands there.

    Only what is missing travels; nothing is held in memory.

    :param timeout: seconds for each batch of paths that is sent.
    :param on_line: gets one line a batch.
    :raises HostFault: the host's disk is full, or it has no nix.
    :raises CommandFailed: exporting or importing failed otherwise.
    :raises Unreachable: or a subclass, as the remote runner does.
    """
    closure = _closure(local, paths)
    missing = missing_paths(remote, closure)
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        if on_line is not None:
            on_line(f"sending {len(batch)} of {len(missing)} paths to {remote.host}")
        _send(local, remote, batch, timeout)
    left = missing_paths(remote, missing)
    if left:
        raise CommandFailed(f"{remote.host} took the import, but does not have {left[0]}")
    return Imported(missing)


def missing_paths(remote: Runner, paths: Sequence[StorePath]) -> tuple[StorePath, ...]:
    """Those of ``paths`` that the host's store does not have, in the same order."""
    invalid: set[str] = set()
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        result = remote.run(Command.of("nix-store", "--check-validity", "--print-invalid", *batch, timeout=120.0))
        if not result.ok:
            raise store_failed(result, "tell which paths its store has")
        invalid.update(result.out.split())
    return tuple(path for path in paths if path in invalid)


def _closure(local: Runner, paths: Sequence[StorePath]) -> tuple[StorePath, ...]:
    result = local.run(Command.of("nix-store", "-qR", *paths, timeout=120.0))
    if not result.ok:
        raise store_failed(result, "tell what is to be copied")
    # References come before what refers to them, which is the order that an import needs.
    return tuple(StorePath(line) for line in result.out.split())


def _send(local: StreamRunner, remote: StreamRunner, batch: Sequence[StorePath], timeout: float) -> None:
    export = Command.of("nix-store", "--export", *batch, timeout=timeout)
    take = Command.of("nix-store", "--import", root=True, timeout=timeout, title="nix-store --import")
    try:
        pipe(local, export, remote, take)
    except CommandFailed as error:
        if full_disk(error.detail or ""):
            raise HostFault(
                f"the disk of {remote.host} is full: nothing was imported",
                hint=f"make room on {remote.host} (nix-collect-garbage, or a larger disk)",
                detail=error.detail,
            ) from None
        raise
