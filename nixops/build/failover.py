"""Doing a piece of work on the best builder, and on the next one when that builder, not the work, is at fault.

**An infrastructure fault** moves the work on, and leaves the builder out for a while:

* it is not reached: its name does not resolve, its port refuses, nobody answers in time, its key is another, it
  refuses the login (:class:`Unreachable` and all its kinds);
* it is lost in the middle: the connection, the machine, its nix-daemon (:class:`ConnectionLost`);
* it cannot do what every builder can: its disk is full, it opens no further session, it lacks a tool (a
  :class:`HostFault` that names the builder; one that names another machine, such as the operator's own, is no reason
  to try elsewhere);
* its Nix refuses the derivation for its system or its features: the inventory promises what it does not have;
* the time for the work is up, or a builder process was killed by a signal, **and** the builder, asked again, does
  not answer or cannot be used any more.

**A failure of the work** does not move it on, since every other builder would fail it the same way: a derivation or an
evaluation that fails, a build that is merely slow on a builder that answers, anything wrong on the operator's own
machine, a registry that refuses, an interrupt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from nixops.build.claims import Claims
from nixops.build.model import Probe, Tried
from nixops.build.probe import reason_of
from nixops.build.quarantine import Quarantine
from nixops.errors import BuildFailed, CommandTimeout, HostFault, NixopsError, NoBuilder, Unreachable
from nixops.values import HostName, System

T = TypeVar("T")

Candidates = Callable[[frozenset[HostName]], Sequence[Probe]]
Order = Callable[[Sequence[Probe]], Sequence[Probe]]

# Nix 2.8 to 2.2x in one sentence, from 2.30 on over several lines.
_UNFIT = re.compile(
    r"is required to build .* but I am a|platform mismatch|required system or feature not available", re.S
)
# How nixops.nix.log.explain shows a line of a derivation's log.
_LOGGED = re.compile(r"\S+> ")
# What may be the builder's death as well as the derivation's.
_KILLED = re.compile(r"failed due to signal|was killed by signal|interrupted by the user")


def infrastructure_fault(error: NixopsError, builder: HostName) -> bool:
    """Whether ``builder`` is at fault, as far as the error alone tells; see the module."""
    if isinstance(error, Unreachable):
        # What another level has given up already is not to be tried again by this one.
        return not isinstance(error, NoBuilder)
    if isinstance(error, HostFault):
        named = re.search(rf"(?<![\w.-]){re.escape(builder)}(?![\w-])", error.message)
        return named is not None and "on this machine" not in error.message
    return isinstance(error, BuildFailed) and _UNFIT.search(_nix_words(error)) is not None


def _nix_words(error: BuildFailed) -> str:
    """What Nix said of a failure, without the lines of the derivation's own log, which may quote anything."""
    lines = [error.message, *(error.detail or "").splitlines()]
    return "\n".join(line for line in lines if not _LOGGED.match(line))


def doubtful(error: NixopsError) -> bool:
    """Whether it takes another look at the builder to tell whose fault it is."""
    if isinstance(error, BuildFailed):
        return _KILLED.search(_nix_words(error)) is not None
    return isinstance(error, CommandTimeout)


def with_failover(
    candidates: Candidates,
    work: Callable[[Probe], T],
    *,
    system: System,
    order: Order,
    claims: Claims,
    quarantine: Quarantine,
    ask_again: Callable[[Probe], Probe] | None = None,
    on_chosen: Callable[[Probe], None] | None = None,
    on_tried: Callable[[Tried], None] | None = None,
) -> tuple[T, tuple[Tried, ...]]:
    """``work`` on one of the candidates: the first in order whose builder holds out.

    Each builder is tried once at most, and is claimed while it works. Choosing and claiming is one step, so that two
    builds at once do not choose the same free builder.

    :param candidates: probes every builder of ``system`` that is not in the given set; also those that cannot be used,
        for their reasons. It is called again after each fault, so that the next choice is by fresh answers.
    :param order: those that may do it, the best first, such as ``lambda probes: rank(probes, system, features, held)``.
    :param ask_again: probes one builder again; without it a doubtful failure is taken for the work's own.
    :param on_chosen: is told each builder before it begins.
    :param on_tried: is told each builder that was at fault, and why, as it happens.
    :returns: what ``work`` returned, and who was tried in vain before.
    :raises NoBuilder: none is left; ``detail`` has the reason of each.
    :raises NixopsError: whatever ``work`` raises that is no infrastructure fault, at once.
    """
    tried: list[Tried] = []
    excluded: set[HostName] = set()
    while True:
        probes = [probe for probe in candidates(frozenset(excluded)) if probe.builder.name not in excluded]

        def pick(count: Callable[[HostName], int], found: Sequence[Probe] = probes) -> tuple[HostName, Probe]:
            ordered = order([replace(probe, claims=count(probe.builder.name)) for probe in found])
            if not ordered:
                raise no_builder(system, found, tried)
            return ordered[0].builder.name, ordered[0]

        with claims.choose(pick) as chosen:
            if on_chosen is not None:
                on_chosen(chosen)
            try:
                value = work(chosen)
            except NixopsError as error:
                reason = _fault(error, chosen, ask_again)
                if reason is None:
                    raise
            else:
                quarantine.clear(chosen.builder.name)
                return value, tuple(tried)
        name = chosen.builder.name
        excluded.add(name)
        quarantine.add(name, reason)
        tried.append(Tried(str(name), system, reason))
        if on_tried is not None:
            on_tried(tried[-1])


def no_builder(system: System, probes: Sequence[Probe], tried: Sequence[Tried] = ()) -> NoBuilder:
    """The error of a system that nobody is left for, with the reason of each builder that was asked or tried."""
    lines = [f"{t.builder}: {t.reason}" for t in tried]
    for probe in probes:
        builder = probe.builder
        if probe.reason is not None:
            reason = probe.reason
        elif system not in builder.systems:
            reason = f"builds for {', '.join(builder.systems)} only"
        else:
            asked = ", ".join(sorted(builder.mandatory_features))
            having = ", ".join(sorted(builder.features | builder.mandatory_features)) or "none"
            reason = f"does not fit the derivation's features (it has {having}" + (
                f"; it takes only what asks for {asked})" if asked else ")"
            )
        lines.append(f"{builder.name}: {reason}")
    if not lines:
        return NoBuilder(
            f"no builder of the pool builds for {system}",
            hint=f"it takes a host with `system: {system}` and `builder: {{}}`, or one whose builder.systems names it",
        )
    return NoBuilder(
        f"no builder for {system} can be used", hint="invoke build.pool shows them all", detail="\n".join(lines)
    )


def _fault(error: NixopsError, chosen: Probe, ask_again: Callable[[Probe], Probe] | None) -> str | None:
    """Why the builder is at fault; None where it is the work."""
    if infrastructure_fault(error, chosen.builder.name):
        return reason_of(error)
    if doubtful(error) and ask_again is not None:
        probe = ask_again(chosen)
        if not probe.usable:
            return f"{reason_of(error)}; asked again: {probe.reason}"
    return None
