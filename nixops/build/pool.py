"""The pool: every builder that the inventory names, whichever way, and the ways to ask it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nixops.build.model import PoolBuilder, Probe
from nixops.build.probe import NOT_WAITED_FOR, Connector, any_usable, probe_all
from nixops.build.quarantine import Quarantine
from nixops.build.rank import rank
from nixops.errors import NixopsError, UsageError
from nixops.inventory.building import Ec2Pool
from nixops.inventory.load import Loaded
from nixops.inventory.model import Host
from nixops.transport.target import SshTarget
from nixops.values import HostName, System

# A builder that needed this share of the deadline to fail is not waited for again for a while.
_SLOW = 0.5
_MIB = 1 << 20

FindEc2 = Callable[[Ec2Pool], tuple[PoolBuilder, ...]]


def pool_of(
    loaded: Loaded,
    *,
    machines: Path | None = None,
    ec2: FindEc2 | None = None,
    on_fault: Callable[[NixopsError], None] | None = None,
) -> tuple[PoolBuilder, ...]:
    """The inventory's hosts with ``builder:``, then ``build.machines``, then ``build.ec2``; each name once.

    A line of the machines file (or an instance) that names a host of the inventory, or its address and port, is that
    host: reached as the inventory says, with its pinned key. If that host has ``builder:``, the line says nothing new.

    :param machines: another machines file than ``build.machines``; relative to the working directory.
    :param ec2: finds the builders of ``build.ec2``; by default through boto3, which only then is loaded.
    :param on_fault: is told when EC2 cannot be asked; the others are then the pool. Without it, that is raised.
    :raises UsageError: the machines file is not there, or holds what is no builder (with its position).
    """
    build = loaded.inventory.build
    found: dict[HostName, PoolBuilder] = {}
    for name, host in loaded.inventory.hosts.items():
        if host.builder is not None:
            found[name] = _of_host(loaded, name, host)
    if machines is None and build.machines is not None:
        # vault.files has the rule for paths of the inventory, and nothing heavy.
        from nixops.vault.files import expanded

        machines = expanded(loaded.base, build.machines)
    if machines is not None:
        from nixops.inventory.machines import read_machines

        _join(found, read_machines(machines), loaded)
    if build.ec2 is not None:
        try:
            _join(found, (ec2 or _boto3)(build.ec2), loaded)
        except UsageError:
            raise
        except NixopsError as error:
            if on_fault is None:
                raise
            on_fault(error)
    return tuple(found.values())


def _boto3(settings: Ec2Pool) -> tuple[PoolBuilder, ...]:
    from nixops.inventory.ec2 import discover_ec2

    return discover_ec2(settings)


def _of_host(loaded: Loaded, name: HostName, host: Host) -> PoolBuilder:
    builder = host.builder
    assert builder is not None  # the caller saw to it
    return PoolBuilder(
        target=SshTarget.from_inventory(name, host, loaded.base),
        systems=builder.systems or (host.system,),
        max_jobs=builder.max_jobs,
        speed_factor=builder.speed_factor,
        features=frozenset(map(str, builder.features)),
        mandatory_features=frozenset(map(str, builder.mandatory_features)),
        excluded=None if host.host_key else f"no host key is pinned (invoke trust {name})",
    )


def _join(found: dict[HostName, PoolBuilder], more: Iterable[PoolBuilder], loaded: Loaded) -> None:
    """Add ``more``, each under a name of its own; what the inventory knows already is not added again."""
    hosts = loaded.inventory.hosts
    places = {(str(host.address).lower(), host.port): name for name, host in hosts.items()}
    for builder in more:
        target = builder.target
        known = places.get((str(target.address).lower(), target.port))
        if known is None and str(target.address) == str(target.name) and target.name in hosts:
            known = target.name
        if known is None:
            name = _free_name(target.name, {*found, *hosts})
            found[name] = replace(builder, target=replace(target, name=name))
            continue
        if known in found:
            continue
        ours = SshTarget.from_inventory(known, hosts[known], loaded.base)
        if target.identity_file is not None:
            ours = replace(ours, identity_file=target.identity_file)
        keys = ours.host_keys or target.host_keys
        found[known] = replace(
            builder, target=replace(ours, host_keys=keys), excluded=None if keys else builder.excluded
        )


def _free_name(name: HostName, taken: Collection[HostName]) -> HostName:
    number, free = 1, name
    # ssh takes no notice of case where it looks for a host's key.
    folded = {other.lower() for other in taken}
    while free.lower() in folded:
        number += 1
        free = HostName(f"{name[: 62 - len(str(number))]}-{number}")
    return free


@dataclass
class Pool:
    """The pool of one task: asked once for all systems, and again where a builder was lost.

    :param deadline: seconds for a probe of all builders together (``build.probe_timeout``).
    :param min_free: MiB that a builder's store must have free (``build.min_free``).
    """

    builders: Sequence[PoolBuilder]
    ssh: Connector
    quarantine: Quarantine
    deadline: float = 5.0
    min_free: int = 1024
    _asked: dict[HostName, Probe] = field(default_factory=dict)
    _asking: threading.Lock = field(default_factory=threading.Lock)

    def probe(
        self,
        systems: Collection[System] | None = None,
        *,
        on_probe: Callable[[Probe], None] | None = None,
        everybody: bool = False,
    ) -> tuple[Probe, ...]:
        """Ask every builder of these systems now; the answers are kept for :meth:`candidates`.

        Those that are left out are asked too, but only waited for where a system has no other that can be used. One
        that failed slowly is left out from now on, so that not every build waits for it.

        :param everybody: wait for each of them up to the deadline, to show them all.
        """
        wanted = set(systems) if systems is not None else {s for b in self.builders for s in b.systems}
        builders = [builder for builder in self.builders if wanted & set(builder.systems)]

        def enough(probes: Collection[Probe]) -> bool:
            if everybody:
                return False
            there = {s for b in builders for s in b.systems} & wanted
            return all(any(p.usable and s in p.builder.systems for p in probes) for s in there)

        with self._asking:
            return self._ask(builders, enough, on_probe)

    def candidates(
        self, system: System, required: frozenset[str] = frozenset()
    ) -> Callable[[frozenset[HostName]], tuple[Probe, ...]]:
        """For :func:`nixops.build.failover.with_failover`: the answers of this system's builders.

        The first call takes those of :meth:`probe` where there are; each later one asks again, since a builder has
        just been lost, and perhaps others with it.
        """
        first = True

        def enough(probes: Collection[Probe]) -> bool:
            return any(p.usable and p.builder.takes(system, required) for p in probes)

        def ask(excluded: frozenset[HostName]) -> tuple[Probe, ...]:
            nonlocal first
            wanted = [b for b in self.builders if system in b.systems and b.name not in excluded]
            with self._asking:
                known = {b.name: self._asked[b.name] for b in wanted if first and b.name in self._asked}
                first = False
                if not enough(known.values()):
                    missing = [builder for builder in wanted if builder.name not in known]
                    known.update({probe.builder.name: probe for probe in self._ask(missing, enough, None)})
            return tuple(known.get(b.name) or self._left_out(b) for b in wanted)

        return ask

    def order(
        self, system: System, required: frozenset[str] = frozenset(), held: Mapping[HostName, float] | None = None
    ) -> Callable[[Sequence[Probe]], tuple[Probe, ...]]:
        """For :func:`nixops.build.failover.with_failover`: :func:`nixops.build.rank.rank`, those left out last."""
        last = self.quarantine.names()
        return lambda probes: rank(probes, system, required, held or {}, last=last)

    def left_out(self) -> dict[HostName, str]:
        """The builders that are chosen last for a while, since they failed, each with its reason."""
        reasons = {builder.name: self.quarantine.reason(builder.name) for builder in self.builders}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def again(self, probe: Probe) -> Probe:
        """One builder, asked again."""
        (declared,) = (builder for builder in self.builders if builder.name == probe.builder.name)
        with self._asking:
            return self._ask([declared], any_usable, None)[0]

    def _ask(
        self,
        builders: Sequence[PoolBuilder],
        enough: Callable[[Collection[Probe]], bool],
        on_probe: Callable[[Probe], None] | None,
    ) -> tuple[Probe, ...]:
        last = self.quarantine.names()
        probes = probe_all(
            builders,
            self.ssh,
            deadline=self.deadline,
            min_free=self.min_free * _MIB,
            last=last,
            enough=enough,
            on_probe=on_probe,
        )
        found = []
        for probe in probes:
            if probe.reason == NOT_WAITED_FOR:
                found.append(self._left_out(probe.builder))
                continue
            found.append(probe)
            self._asked[probe.builder.name] = probe
            if not probe.usable and probe.seconds >= self.deadline * _SLOW and probe.builder.name not in last:
                self.quarantine.add(probe.builder.name, probe.reason or "")
        return tuple(found)

    def _left_out(self, builder: PoolBuilder) -> Probe:
        return Probe(builder, self.quarantine.reason(builder.name) or NOT_WAITED_FOR)
