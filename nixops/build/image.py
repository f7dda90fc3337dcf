"""An image from a flake to a tag: evaluated, built natively for each system, pushed from there, named at last.

What can be asked at once is asked at once: the flake, the builders and the registry. Every system is evaluated before
any is built, so that what is wrong with the flake is told before anybody works for an hour; then each is built and
pushed on a builder of its own, and goes on to the next builder where that one is at fault. The tag moves once all are
there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nixops.build.evaluate import FlakeFacts, evaluate_image, flake_facts
from nixops.build.failover import no_builder, with_failover
from nixops.build.gravest import unwrapped
from nixops.build.holding import held_by, inputs_of
from nixops.build.later import Later
from nixops.build.model import BuiltSystem, Evaluated, ImageSpec, PoolBuilder, Probe, PushedSystem, Tried
from nixops.build.onbuilder import build_on, push_from
from nixops.build.record import SystemImage, record_document, reserved
from nixops.errors import BuildFailed, ConnectionLost
from nixops.transport.exec import Cancellation, Deadline, cancellable, current_cancellation
from nixops.transport.fleet import fan_out
from nixops.values import HostName, ImageReference, StorePath, System

if TYPE_CHECKING:  # requests is only loaded where something is pushed
    from nixops.build.session import BuildSession
    from nixops.registry.manifest import Manifest

SCHEMA: Final = "nixops/image/1"
# What is still under way when all is done (a probe that nobody needs) has this long to end, seconds.
_PARTING: Final = 2.0
# So many builders are logged in to at once even if that may turn out to have been for nothing.
_FEW: Final = 8


@dataclass(frozen=True)
class Event:
    """Something that happened, for people.

    :ivar kind: ``step`` for what begins or is done, ``log`` for a line of a program, ``fault`` for what the reader
        should not miss.
    """

    kind: str
    text: str
    system: System | None = None

    def __str__(self) -> str:
        return f"{self.system}: {self.text}" if self.system else self.text


OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class ImageResult:
    """What came of it.

    :ivar digest: what the tag names; None where nothing was to be pushed.
    :ivar moved: whether the tag was moved; False where it named this already.
    :ivar provenance: the digest of the statement that was attached.
    """

    spec: ImageSpec
    facts: FlakeFacts
    images: tuple[SystemImage, ...]
    record: Path
    digest: str | None = None
    moved: bool = False
    provenance: str | None = None
    tried: tuple[Tried, ...] = ()
    seconds: float = 0.0

    @property
    def uploaded(self) -> bool:
        """Whether anything was sent to the registry."""
        return self.moved or self.provenance is not None or any(i.pushed and i.pushed.uploaded for i in self.images)

    def document(self) -> dict[str, Any]:
        """The JSON document ``nixops/image/1``."""
        destination = self.spec.destination
        return {
            "schema": SCHEMA,
            "reference": str(destination) if destination else None,
            "digest": self.digest,
            "index_digest": self.digest if len(self.images) > 1 else None,
            "moved": self.moved,
            "uploaded": self.uploaded,
            "revision": self.facts.revision,
            "dirty": self.facts.dirty,
            "provenance": self.provenance,
            "record": str(self.record),
            "seconds": round(self.seconds, 3),
            "images": [_entry(image) for image in self.images],
            "tried": [{"builder": t.builder, "system": str(t.system), "reason": t.reason} for t in self.tried],
        }


def _entry(image: SystemImage) -> dict[str, Any]:
    return {
        "system": str(image.system),
        "builder": str(image.built.builder) if image.built else None,
        "store_path": str(image.out),
        "digest": image.pushed.digest if image.pushed else None,
        "uploaded": image.pushed.uploaded if image.pushed else None,
        "seconds": round(image.seconds, 3),
    }


def build_image(spec: ImageSpec, session: BuildSession, *, on_event: OnEvent = lambda _: None) -> ImageResult:
    """Build ``spec`` for each of its systems, and push it where it has a destination.

    :param on_event: is told what happens, from several threads.
    :raises UsageError: the flake has no such image, or a system has no name among container platforms.
    :raises BuildFailed: it does not evaluate or build; ``detail`` is the end of the log.
    :raises NoBuilder: nobody is left to build a system; ``detail`` has the reason of each.
    :raises PushFailed: :raises RegistryError: the tag is where it was.
    """
    run = _Run(spec, session, on_event)
    switch = Cancellation(current_cancellation())
    try:
        with cancellable(switch):
            return run.result()
    finally:
        # A probe or a question that nobody waits for any more.
        switch.cancel()
        run.join()


@dataclass(frozen=True)
class _Known:
    """One system after evaluation.

    :ivar pushed: where the registry has it already; :ivar inputs: what it is made of, where it has not.
    """

    evaluated: Evaluated
    pushed: PushedSystem | None
    inputs: Later[tuple[StorePath, ...]] | None
    seconds: float


class _Run:
    def __init__(self, spec: ImageSpec, session: BuildSession, on_event: OnEvent) -> None:
        self._spec = spec
        self._session = session
        self._on_event = on_event
        self._began = time.monotonic()
        self._under_way: list[Later[Any]] = []
        self._tried: list[Tried] = []
        self._probes: Later[tuple[Probe, ...]] | None = None
        self._asked: Later[FlakeFacts] | None = None
        self._asking = threading.Lock()

    def join(self) -> None:
        end = Deadline(_PARTING)
        for each in self._under_way:
            each.join(end.left() or 0.0)

    def _begin(self, work: Callable[[], Any]) -> Later[Any]:
        self._under_way.append(Later(work))
        return self._under_way[-1]

    def result(self) -> ImageResult:
        spec, session = self._spec, self._session
        destination = spec.destination
        if destination is not None:
            self._check_platforms()
        if not spec.flake.is_path:
            self._facts()
        if destination is None or len(self._fit()) <= _FEW:
            self._probe()
        self._there: Later[Manifest | None] | None = (
            self._begin(lambda: self._current(destination)) if destination is not None else None
        )
        known = unwrapped(fan_out(spec.systems, self._evaluate, limit=len(spec.systems)))
        waiting = [one for one in known if one.pushed is None]
        self._told: set[HostName] = set()
        unwrapped(fan_out(waiting, self._somebody, limit=max(1, len(waiting))))
        made = {i.system: i for i in unwrapped(fan_out(waiting, self._make, limit=max(1, len(waiting))))}
        for one in known:
            if one.pushed is not None:
                out = one.evaluated.out
                assert out is not None  # by which the registry was asked
                made[one.evaluated.system] = SystemImage(one.evaluated, out, one.seconds, pushed=one.pushed)
        images = tuple(made[system] for system in spec.systems)
        digest, moved, provenance = None, False, None
        # All that may still fail on this machine comes before the tag moves.
        facts = self._facts().value()
        with reserved(session.state) as keep:
            if destination is not None:
                digest, moved, provenance = self._name(destination, images, fresh=bool(waiting))
            record = keep(record_document(spec, facts, images, digest=digest, moved=moved, tried=self._tried))
        return ImageResult(
            spec=spec,
            facts=facts,
            images=images,
            record=record,
            digest=digest,
            moved=moved,
            provenance=provenance,
            tried=tuple(self._tried),
            seconds=time.monotonic() - self._began,
        )

    def _facts(self) -> Later[FlakeFacts]:
        """What Nix says of the flake; asked once. Of a directory it is for the record alone, and can wait."""
        with self._asking:
            if self._asked is None:
                self._asked = self._begin(lambda: flake_facts(self._session.local, self._spec.flake))
            return self._asked

    def _fit(self) -> list[PoolBuilder]:
        return [b for b in self._session.builders if set(self._spec.systems) & set(b.systems)]

    def _probe(self) -> Later[tuple[Probe, ...]]:
        """The builders' answers; asked once. Where the registry may have everything, a large pool is not asked before
        the registry has said no: that many logins are more work than all the rest of such a run."""
        with self._asking:
            if self._probes is None:
                self._probes = self._begin(lambda: self._session.pool.probe(self._spec.systems))
            return self._probes

    # -- before anything is built -----------------------------------------------------------------------------

    def _check_platforms(self) -> None:
        from nixops.registry.index import platform_of

        for system in self._spec.systems:
            platform_of(system)

    def _current(self, destination: ImageReference) -> Manifest | None:
        return self._session.registry(destination.registry).manifest(destination.repository, destination.tag)

    def _evaluate(self, system: System) -> _Known:
        began = time.monotonic()
        spec = self._spec
        # A directory is evaluated as it is; another reference is locked first, so that every system has the same.
        facts = None if spec.flake.is_path else self._facts().value()
        evaluated = evaluate_image(self._session.nix(), spec, system, facts)
        self._facts()
        pushed = self._already(evaluated)
        inputs = None
        if pushed is None:
            self._probe()
            inputs = self._begin(lambda: self._inputs(evaluated))
        return _Known(evaluated, pushed, inputs, time.monotonic() - began)

    def _inputs(self, evaluated: Evaluated) -> tuple[StorePath, ...]:
        fit = [b for b in self._session.builders if b.takes(evaluated.system, evaluated.features)]
        return inputs_of(self._session.nix(), evaluated) if len(fit) > 1 else ()

    def _already(self, evaluated: Evaluated) -> PushedSystem | None:
        destination = self._spec.destination
        if destination is None or self._there is None:
            return None
        # A registry that lets nobody in is told of now, and not after the build.
        self._there.value()
        if evaluated.out is None:
            return None
        from nixops.build.publish import already_there, staging_reference

        staging = staging_reference(destination, evaluated.system, evaluated.out)
        client = self._session.registry(destination.registry)
        # In a thread of its own, as a request cannot be interrupted: whoever waits for it can.
        pushed: PushedSystem | None = self._begin(lambda: already_there(client, staging, evaluated.system)).value()
        if pushed is not None:
            self._say(evaluated.system, "step", f"the registry has it already ({pushed.digest[:19]}…)")
        return pushed

    # -- on the builders --------------------------------------------------------------------------------------

    def _somebody(self, known: _Known) -> None:
        """Make sure that there is a builder for a system before any system is built, and say who is not there.

        :raises NoBuilder: nobody can build it.
        """
        session, evaluated = self._session, known.evaluated
        self._probe().value()
        probes = session.pool.candidates(evaluated.system, evaluated.features)(frozenset())
        if not any(p.usable and p.builder.takes(evaluated.system, evaluated.features) for p in probes):
            raise no_builder(evaluated.system, probes)
        for probe in probes:
            with self._asking:
                news = not probe.usable and probe.builder.name not in self._told
                self._told.add(probe.builder.name)
            if news:
                self._tried.append(Tried(str(probe.builder.name), evaluated.system, probe.reason or ""))
                self._say(None, "fault", f"{probe.builder.name} is not used: {probe.reason}")

    def _make(self, known: _Known) -> SystemImage:
        began = time.monotonic()
        session, evaluated = self._session, known.evaluated
        system = evaluated.system
        inputs = known.inputs
        assert inputs is not None  # the registry does not have it
        held = held_by(evaluated, inputs.value, self._probe().value(), session.ssh.runner)

        def tried(fault: Tried) -> None:
            self._tried.append(fault)
            self._say(system, "fault", f"{fault.builder} is left out: {fault.reason}")

        (built, pushed), before = with_failover(
            session.pool.candidates(system, evaluated.features),
            lambda probe: self._on_or_drop(probe, evaluated),
            system=system,
            order=session.pool.order(system, evaluated.features, held),
            claims=session.claims,
            quarantine=session.quarantine,
            ask_again=session.pool.again,
            on_chosen=lambda probe: self._say(system, "step", _chosen(probe, held)),
            on_tried=tried,
        )
        built = replace(built, tried=before)
        return SystemImage(evaluated, built.out, known.seconds + time.monotonic() - began, built, pushed)

    def _on_or_drop(self, probe: Probe, evaluated: Evaluated) -> tuple[BuiltSystem, PushedSystem | None]:
        try:
            return self._on(probe, evaluated)
        except ConnectionLost:
            # What is left of a dead connection must not hold up anybody. Another fault, such as a full disk, leaves the
            # connection to the other system that is built there.
            self._session.ssh.drop(probe.builder.name)
            raise
        except BuildFailed as error:
            if len(self._spec.systems) > 1:  # another may have an hour to go
                self._say(evaluated.system, "fault", error.message)
            raise

    def _on(self, probe: Probe, evaluated: Evaluated) -> tuple[BuiltSystem, PushedSystem | None]:
        system, name = evaluated.system, probe.builder.name
        runner = self._session.ssh.runner(name)

        def line(text: str) -> None:
            self._say(system, "log", text)

        built = build_on(self._session, evaluated, probe, runner, line)
        self._say(system, "step", f"built on {name} ({built.system.seconds:.1f} s)")
        destination = self._spec.destination
        if destination is None:
            return built.system, None
        pushed = push_from(self._session, built, destination, runner, line)
        self._say(system, "step", f"pushed from {name} ({pushed.seconds:.1f} s)")
        return built.system, pushed

    # -- at last ----------------------------------------------------------------------------------------------

    def _name(
        self, destination: ImageReference, images: Sequence[SystemImage], *, fresh: bool
    ) -> tuple[str, bool, str | None]:
        """Let the tag name the images; the digest, whether it moved, and the provenance that was attached.

        :param fresh: ask again what the tag names: a build has taken its time since it was asked first.
        """
        from nixops.build.publish import move_tag, named_digest, prepare

        client = self._session.registry(destination.registry)
        pushed = [image.pushed for image in images if image.pushed is not None]
        assert self._there is not None and len(pushed) == len(images)  # fan_out's errors have been raised
        current = self._current(destination) if fresh else self._there.value()
        named = current if current is not None and current.digest == named_digest(pushed) else None
        moving = named is None
        if named is None:
            named = prepare(client, destination, pushed)
        provenance = None
        if self._spec.provenance:
            from nixops.build.provenance import attach_provenance

            provenance = attach_provenance(
                client, destination, named, self._spec, self._facts().value(), images, self._session.state
            )
        if moving:
            move_tag(client, destination, named)
            self._say(None, "step", f"{destination} is {named.digest}")
        else:
            self._say(None, "step", f"{destination} is {named.digest} already: nothing to push")
        return named.digest, moving, provenance

    def _say(self, system: System | None, kind: str, text: str) -> None:
        self._on_event(Event(kind, text, system))


def _chosen(probe: Probe, held: Mapping[HostName, float]) -> str:
    share = held.get(probe.builder.name)
    return f"on {probe.builder.name}" + (f" ({share:.0%} of what it needs is there already)" if share else "")
