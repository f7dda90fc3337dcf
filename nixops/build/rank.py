"""Which builder gets the next build. Pure: answers in, an order out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from nixops.build.model import Probe
from nixops.values import HostName, System

# A builder that holds this share of the closure has little to fetch: better than a faster one that has all to.
MOST = 0.5
# A load of this many times the cores is a machine with no time, whatever its free jobs say.
OVERLOADED = 1.5
# What an unknown load counts as: neither idle nor busy.
_UNKNOWN_LOAD = 0.5


def rank(
    probes: Sequence[Probe],
    system: System,
    required_features: frozenset[str] = frozenset(),
    held: Mapping[HostName, float] = MappingProxyType({}),
    *,
    last: Collection[HostName] = (),
) -> tuple[Probe, ...]:
    """The builders that may do it, the best first; those that may not are left out.

    In this order: not in ``last``; has a free job and is not overloaded; holds most of the closure; the larger product
    of speed factor, share of free jobs and idle cores; the more free space; the name, so that the order is the same
    each time. One that is full still comes: its daemon queues what it gets, and there may be no other.

    :param required_features: what the derivation asks for, by Nix's own rules (:meth:`PoolBuilder.takes`).
    :param held: how much of the closure each builder's store has, 0 to 1; one that is not named has none of it.
    :param last: builders to be used only when there is no other, as they have failed a while ago.
    """
    fit = [probe for probe in probes if probe.usable and probe.builder.takes(system, required_features)]

    def key(probe: Probe) -> tuple[bool, bool, bool, float, int, str]:
        name = probe.builder.name
        return (
            name in last,
            busy(probe),
            held.get(name, 0.0) < MOST,
            -score(probe),
            -(probe.free or 0),
            str(name),
        )

    return tuple(sorted(fit, key=key))


def free_jobs(probe: Probe) -> int:
    """How many builds more it takes at once: less those that run, whoever's, and those that we have promised it."""
    return max(0, probe.builder.max_jobs - (probe.building or 0) - probe.claims)


def busy(probe: Probe) -> bool:
    """Whether a build would have to wait for others there."""
    return free_jobs(probe) == 0 or _load(probe) >= OVERLOADED


def score(probe: Probe) -> float:
    """How fast it would build now, compared with others: speed factor × share of free jobs × idle cores."""
    share = free_jobs(probe) / probe.builder.max_jobs
    idle = 1.0 / (1.0 + _load(probe))
    return probe.builder.speed_factor * share * idle


def _load(probe: Probe) -> float:
    """The load of each core."""
    return _UNKNOWN_LOAD if probe.load is None else probe.load / max(1, probe.cores or 1)
