"""The pool for people and for programs: rows of a table, and a document. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from nixops.build.model import Probe
from nixops.values import HostName

SCHEMA = "nixops/pool/1"
HEADER = (
    "builder",
    "source",
    "systems",
    "reachable",
    "key",
    "Nix",
    "cores",
    "load",
    "free",
    "features",
    "building now",
    "why excluded",
)


def pool_rows(
    probes: Sequence[Probe], left_out: Mapping[HostName, str] = MappingProxyType({})
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The header, and one row for each builder.

    :param left_out: why some that answered are chosen last for a while (:meth:`nixops.build.pool.Pool.left_out`).
    """
    return HEADER, [_row(probe, left_out.get(probe.builder.name)) for probe in probes]


def _row(probe: Probe, left_out: str | None) -> tuple[str, ...]:
    builder = probe.builder
    features = sorted(builder.features) + [f"{feature} (mandatory)" for feature in sorted(builder.mandatory_features)]
    using = f" ({probe.claims} ours)" if probe.claims else ""
    return (
        str(builder.name),
        builder.source,
        ", ".join(builder.systems) or "-",
        {True: "yes", False: "no", None: "-"}[reachable(probe)],
        "pinned" if builder.target.host_keys else "not pinned",
        ".".join(map(str, probe.nix)) if probe.nix else "-",
        _text(probe.cores),
        "-" if probe.load is None else f"{probe.load:.2f}",
        human(probe.free),
        ", ".join(features) or "-",
        f"{_text(probe.building)} of {builder.max_jobs}{using}",
        probe.reason or left_out or "-",
    )


def reachable(probe: Probe) -> bool | None:
    """Whether it answered; None for one that was not asked. An answer is there even where its reason excludes it."""
    if probe.builder.excluded is not None:
        return None
    return probe.usable or any(v is not None for v in (probe.nix, probe.cores, probe.free))


def human(size: int | None) -> str:
    """A size in the largest binary unit that leaves at least 1: ``12.3 GiB``."""
    if size is None:
        return "-"
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def _text(value: int | None) -> str:
    return "-" if value is None else str(value)


def pool_document(probes: Sequence[Probe], left_out: Mapping[HostName, str] = MappingProxyType({})) -> dict[str, Any]:
    """Schema ``nixops/pool/1``. Sizes are bytes, times are seconds; what was not found out is null.

    :param left_out: as in :func:`pool_rows`.
    """
    return {"schema": SCHEMA, "builders": [_entry(probe, left_out.get(probe.builder.name)) for probe in probes]}


def _entry(probe: Probe, left_out: str | None) -> dict[str, Any]:
    builder = probe.builder
    return {
        "builder": str(builder.name),
        "source": builder.source,
        "address": str(builder.target.address),
        "port": builder.target.port,
        "user": builder.target.user,
        "systems": [str(system) for system in builder.systems],
        "max_jobs": builder.max_jobs,
        "speed_factor": builder.speed_factor,
        "features": sorted(builder.features),
        "mandatory_features": sorted(builder.mandatory_features),
        "key_pinned": bool(builder.target.host_keys),
        "usable": probe.usable,
        "reachable": reachable(probe),
        "reason": probe.reason,
        "left_out": left_out,
        "nix": ".".join(map(str, probe.nix)) if probe.nix else None,
        "cores": probe.cores,
        "load": probe.load,
        "free": probe.free,
        "building": probe.building,
        "claims": probe.claims,
        "seconds": round(probe.seconds, 3),
    }
