"""One graph over the whole pool, by Nix's own distributed builds: what is more than one builder's work.

Nix schedules; we tell it which machines there are. Only those that have just answered are named, since a dead one
would stall it, and where one dies in the middle the build goes on with the others: what is built stays built.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nixops.build.evaluate import without_credentials
from nixops.build.machines import StoreFacts, Worker, machine_uri, machines_file, store_facts, unfit
from nixops.build.model import Probe
from nixops.build.watch import Watch
from nixops.errors import (
    BuildFailed,
    CommandTimeout,
    ConnectionLost,
    HostFault,
    NixopsError,
    NoBuilder,
    Unreachable,
    UsageError,
)
from nixops.nix.log import explain, full_disk
from nixops.nix.verbs import Nix
from nixops.transport.command import Command
from nixops.values import AttrPath, FlakeRef, HostName, StorePath, System

if TYPE_CHECKING:
    from nixops.build.session import BuildSession

SCHEMA: Final = "nixops/build/1"
HEADER: Final = ("system", "built by", "store path")
Say = Callable[[str], None]

# How often a build is begun again because of a builder that was lost and answers again at once.
_AGAIN: Final = 2
_WAYS: Final = {
    Worker.DAEMON: "it logs in as root of this machine, with build.ssh_key or the host's ssh.identity_file: no agent "
    "and no ssh configuration of yours reaches it"
}


@dataclass(frozen=True)
class Output:
    """One derivation that was asked for. ``outputs`` are its paths in this machine's store, by name.

    :ivar builder: who built it now; None where it was there already.
    """

    drv: StorePath
    outputs: Mapping[str, StorePath]
    builder: str | None
    system: System | None = None

    @property
    def path(self) -> StorePath:
        """``out``, or the first there is."""
        return self.outputs.get("out") or next(iter(self.outputs.values()))


@dataclass(frozen=True)
class LeftOut:
    """A builder that took no part, or not to the end, and why."""

    builder: str
    reason: str


@dataclass(frozen=True)
class Distributed:
    """What came of it.

    :ivar builders: how many derivations each builder was given.
    """

    flake: str
    attribute: str
    outputs: tuple[Output, ...]
    builders: Mapping[str, int]
    left_out: tuple[LeftOut, ...]
    seconds: float

    def rows(self) -> list[tuple[str, ...]]:
        """Rows for :data:`HEADER`."""
        return [(output.system or "-", output.builder or "was there", output.path) for output in self.outputs]

    def document(self) -> dict[str, Any]:
        """The JSON document, schema ``nixops/build/1``. Times are seconds."""
        return {
            "schema": SCHEMA,
            "flake": self.flake,
            "attribute": self.attribute,
            "distributed": True,
            "outputs": [
                {
                    "system": output.system,
                    "builder": output.builder,
                    "drv": str(output.drv),
                    "store_path": str(output.path),
                    "outputs": {name: str(path) for name, path in output.outputs.items()},
                }
                for output in self.outputs
            ],
            "builders": [{"builder": name, "derivations": n} for name, n in sorted(self.builders.items())],
            "tried": [{"builder": out.builder, "reason": out.reason} for out in self.left_out],
            "seconds": round(self.seconds, 3),
        }


def build_distributed(
    flake: FlakeRef,
    attribute: AttrPath,
    session: BuildSession,
    *,
    systems: Sequence[System] = (),
    local_jobs: int = 0,
    timeout: float | None = None,
    out_link: Path | None = None,
    on_event: Say = lambda _: None,
) -> Distributed:
    """Build an attribute and all that it needs on every builder of the pool; the result comes into this store.

    :param systems: what ``{system}`` in the attribute stands for, each; left out, this machine's. Without ``{system}``
        at most one, whose packages are meant.
    :param local_jobs: how many derivations this machine may build itself.
    :param timeout: seconds for all of it; by default ``build.build_timeout``.
    :param out_link: a link to the result, which keeps it from garbage collection.
    :param on_event: is told progress in words, and each builder that is left out.
    :raises NoBuilder: no builder can be used, or none fits a derivation of the graph.
    :raises BuildFailed: the evaluation or a derivation failed.
    :raises HostFault: this machine's nix does not let us name machines, or a disk is full.
    :raises UsageError: several systems, and no ``{system}`` in the attribute.
    """
    begin = time.monotonic()
    work = _Work(session, _options(flake, attribute, systems, out_link), flake, attribute, local_jobs, on_event)
    facts = store_facts(session.local)
    if facts.trusted is False:
        raise _untrusted()
    deadline = begin + (session.settings.build_timeout if timeout is None else timeout)
    work.choose(facts)
    while True:
        error = work.attempt(facts, deadline - time.monotonic())
        if error is None:
            break
        work.without(error, facts)
    outputs = work.outputs(systems)
    return Distributed(
        without_credentials(flake),
        str(attribute),
        outputs,
        dict(work.built),
        tuple(LeftOut(name, reason) for name, reason in work.left_out.items()),
        time.monotonic() - begin,
    )


def this_system() -> System:
    """The system of this machine, as Nix calls it."""
    machine = {"arm64": "aarch64"}.get(os.uname().machine, os.uname().machine)
    return System(f"{machine}-{sys.platform}")


def _options(flake: FlakeRef, attribute: AttrPath, systems: Sequence[System], out_link: Path | None) -> tuple[str, ...]:
    """Nix's options and installables."""
    link = ("--out-link", str(out_link)) if out_link is not None else ("--no-link",)
    if "{system}" in attribute:
        wanted = tuple(systems) or (this_system(),)
        return (*link, "--", *(f"{flake}#{attribute.replace('{system}', system)}" for system in wanted))
    if len(systems) > 1:
        raise UsageError(
            f"{attribute} is one attribute, and {len(systems)} systems are asked for",
            hint=f"say where the system stands in it: --attr 'packages.{{system}}.{attribute}'",
        )
    system = ("--system", str(systems[0])) if systems else ()
    return (*link, *system, "--", f"{flake}#{attribute}")


@dataclass
class _Work:
    """The state of one distributed build over its attempts."""

    session: BuildSession
    options: tuple[str, ...]
    flake: FlakeRef
    attribute: AttrPath
    local_jobs: int
    say: Say
    probes: tuple[Probe, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    built: dict[str, int] = field(default_factory=dict)
    makers: dict[str, str] = field(default_factory=dict)
    answer: Any = None
    again: int = 0
    watch: Watch | None = None

    @property
    def what(self) -> str:
        return f"building {without_credentials(self.flake)}#{self.attribute}"

    def choose(self, facts: StoreFacts) -> None:
        """Ask every builder, and take those that can be used. One that was used until now has failed.

        :raises NoBuilder: none can.
        """
        before = self._names()
        version = Nix(self.session.local).version()
        usable = []
        for probe in self.session.pool.probe():
            name = str(probe.builder.name)
            reason = self.left_out.get(name) or probe.reason or unfit(probe.builder, facts.worker, version)
            if reason is None:
                usable.append(probe)
            elif name not in self.left_out:
                self._leave_out(name, reason, failed=name in before)
        self.probes = tuple(usable)
        if not self.probes and not self.local_jobs:
            raise self._none("no builder of the pool can be used")

    def attempt(self, facts: StoreFacts, seconds: float) -> NixopsError | None:
        """Run nix once; its error, if any, is not raised yet."""
        names = {machine_uri(probe.builder, facts.worker): probe.builder.name for probe in self.probes}
        self.watch = watch = Watch(names, self.say)
        key = self.session.settings.ssh_key if facts.worker is Worker.DAEMON else None
        identity = self.session.resolve(key) if key is not None else None
        with machines_file(self.probes, facts.worker, identity) as machines:
            command = Command.of(
                *("nix", "--extra-experimental-features", "nix-command flakes", "build"),
                *("--log-format", "internal-json", "--json", "--no-write-lock-file"),
                *("--builders", f"@{machines}", "--max-jobs", str(self.local_jobs), *self.options),
                # A daemon's ssh gets none of it; it does no harm there.
                env=self.session.ssh.nix_env(),
                timeout=max(1.0, seconds),
                title="nix build",
            )
            try:
                result = self.session.local.run(command, watch.feed)
            except CommandTimeout as error:
                # Its detail is the end of stderr, which is JSON here.
                raise CommandTimeout(error.message, hint=error.hint, detail="\n".join(watch.log.said)) from None
        self.makers.update(watch.builders)
        for name, number in watch.counts().items():
            self.built[name] = self.built.get(name, 0) + number
        if not result.ok:
            return explain(watch.log, self.what, ", ".join(sorted(watch.counts())) or self.session.local.host)
        try:
            self.answer = json.loads(result.out)
        except ValueError:
            raise BuildFailed("nix build printed something that is not JSON", detail=result.out[:400]) from None
        return None

    def without(self, error: NixopsError, facts: StoreFacts) -> None:
        """Leave out the builder that ``error`` is the fault of, so that another attempt makes sense.

        :raises NixopsError: it is no builder's fault, or nobody is left.
        """
        assert self.watch is not None  # an attempt came before
        if self.watch.restricted:
            raise _untrusted()
        reported = self.watch.reported()
        if reported is not None and not reported.stopped and not reported.killed:
            worst = explain(self.watch.log, self.what, reported.builder)
            if not (isinstance(worst, HostFault) and full_disk(str(worst))) or reported.builder not in self._names():
                raise worst
            self._leave_out(reported.builder, worst.message, failed=True)
            self.choose(facts)
            return
        before = self._names()
        self.choose(facts)
        unreached = self.watch.unreached()
        # Nix connects for each derivation: a machine that it did reach was lost since.
        gone = tuple(name for name in unreached if name in self.watch.counts())
        for name, why in unreached.items():
            if name in self._names() and name not in gone:
                # It answers us, so it is the way that differs: a daemon logs in as root, and with another key.
                self._leave_out(name, f"{facts.worker.value} cannot connect to it: {why}", failed=False)
                self.probes = tuple(probe for probe in self.probes if probe.builder.name != name)
        if not self.probes and not self.local_jobs:
            raise self._none(f"no builder of the pool can be used by {facts.worker.value}", _WAYS.get(facts.worker))
        if before - self._names():
            return
        need = self.watch.unfit()
        if need is not None and not gone:
            raise self._none(f"no builder can be used for ({need}), which {self.attribute} needs")
        lost = self.watch.broken_off() or ((reported.builder,) if reported and reported.stopped else gone)
        if not lost and not isinstance(error, Unreachable):
            raise error
        whom = ", ".join(lost) or "a builder"
        if self.again >= _AGAIN:
            raise ConnectionLost(
                f"{whom} was lost during {self.what} {self.again + 1} times, and answers when it is asked",
                hint="look at its journal: does its nix-daemon crash, or run out of memory?",
                detail=error.detail,
            )
        self.again += 1
        self.say(f"{whom} was lost in the middle, and answers again: once more")

    def outputs(self, systems: Sequence[System]) -> tuple[Output, ...]:
        """What nix printed, as values."""
        try:
            found = [
                Output(
                    StorePath(_whole(entry["drvPath"])),
                    {name: StorePath(_whole(path)) for name, path in entry["outputs"].items() if path},
                    self.makers.get(_whole(entry["drvPath"])),
                )
                for entry in self.answer
            ]
            if not found or not all(output.outputs for output in found):
                raise ValueError("nothing was built")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            detail = json.dumps(self.answer)[:400]
            raise BuildFailed(f"nix build printed something unknown: {error}", detail=detail) from None
        wanted = tuple(systems) or (this_system(),)
        if len(found) == 1 and len(wanted) == 1:
            return (Output(found[0].drv, found[0].outputs, found[0].builder, wanted[0]),)
        known = Nix(self.session.local)
        return tuple(
            Output(output.drv, output.outputs, output.builder, known.derivation(output.drv)[output.drv].system)
            for output in found
        )

    def _names(self) -> set[str]:
        return {str(probe.builder.name) for probe in self.probes}

    def _leave_out(self, name: str, reason: str, *, failed: bool) -> None:
        self.left_out[name] = reason
        if failed:
            self.session.quarantine.add(HostName(name), reason)
        self.say(f"{name} is left out: {reason}")

    def _none(self, message: str, hint: str | None = None) -> NoBuilder:
        lines = [f"{name}: {reason}" for name, reason in self.left_out.items()]
        for probe in self.probes:
            builder = probe.builder
            features = ", ".join(sorted(builder.features | builder.mandatory_features)) or "none"
            lines.append(f"{builder.name}: builds {', '.join(builder.systems)}; features: {features}")
        return NoBuilder(message, hint=hint or "invoke build.pool shows them all", detail="\n".join(lines) or None)


def _whole(path: str) -> str:
    """From Nix 2.33 on, paths come without their directory."""
    return path if path.startswith("/") else f"/nix/store/{path}"


def _untrusted() -> HostFault:
    return HostFault(
        "the nix daemon of this machine does not let this user name the machines to build on",
        hint="have yourself added to its trusted-users, run this as root, or build without --distributed",
    )
