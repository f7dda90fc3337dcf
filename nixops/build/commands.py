"""The tasks about building, from options to an exit code: `build-image`, `build`, `build.pool`, the cache's two."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nixops.build.request import ImageRequest, attribute_of, flake_of, image_spec, systems_of
from nixops.build.session import BuildSession
from nixops.errors import NixopsError, NoBuilder, UsageError
from nixops.inventory.load import load, locate
from nixops.secret import Redactor
from nixops.ui.ending import terminated_like_interrupted, told
from nixops.ui.report import Reporter
from nixops.values import System

if TYPE_CHECKING:
    from nixops.build.distributed import Distributed
    from nixops.build.image import Event, ImageResult
    from nixops.build.single import Single

_STYLES: Final = {"fault": "yellow", "log": "dim"}
INVENTORY: Final = "inventory/hosts.yml"


@dataclass(frozen=True)
class ImageOptions:
    """The command line of ``build-image``."""

    request: ImageRequest
    inventory: str = INVENTORY
    format: str = "text"


@dataclass(frozen=True)
class BuildOptions:
    """The command line of ``build``."""

    flake: str | None
    attr: str | None
    systems: str | None
    distributed: bool = False
    local_jobs: str = "0"
    out_link: str | None = None
    inventory: str = INVENTORY
    format: str = "text"


@dataclass(frozen=True)
class PoolOptions:
    """The command line of ``build.pool``."""

    system: str | None = None
    inventory: str = INVENTORY
    format: str = "text"


@dataclass(frozen=True)
class WarmOptions:
    """The command line of ``warm-cache`` and ``verify-cache``."""

    host: str | None = None
    group: str | None = None
    inventory: str = INVENTORY
    format: str = "text"


@contextmanager
def _task(inventory: str, format: str, schema: str) -> Iterator[tuple[BuildSession, Reporter]]:
    """The session of a task. Errors leave it with their secrets replaced, and in JSON mode as a document too."""
    if format not in ("text", "json"):
        raise UsageError(f"--format {format} is not known", hint="text or json")
    redactor = Redactor()
    reporter = Reporter(redactor)
    with terminated_like_interrupted():
        try:
            loaded = load(locate(inventory, Path.cwd()))
            with BuildSession(loaded, redactor, os.environ, say=reporter.warn) as session:
                yield session, reporter
        except (Exception, KeyboardInterrupt) as caught:
            if os.environ.get("NIXOPS_TRACEBACK") and not isinstance(caught, NixopsError):
                raise
            error = told(caught, redactor, inventory)
            if format == "json" and not reporter.documented:
                reporter.document(_dumps({"schema": schema, "error": str(error), "exit_code": int(error.exit_code)}))
            raise error from None


def _dumps(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2)


# -- images ---------------------------------------------------------------------------------------------------


def build_image(options: ImageOptions) -> None:
    """Build an image for each of its systems, push it where that was asked for, report.

    :raises NixopsError: of the class whose exit code says how it ended.
    """
    from nixops.build.image import SCHEMA

    with _task(options.inventory, options.format, SCHEMA) as (session, reporter):
        from nixops.build.image import build_image

        spec = image_spec(session.loaded, options.request, Path.cwd())
        result = build_image(spec, session, on_event=lambda event: _show_event(event, reporter))
        if options.format == "json":
            reporter.document(_dumps({**result.document(), "error": None, "exit_code": 0}))
        else:
            _show_image(result, reporter)


def _show_event(event: Event, reporter: Reporter) -> None:
    if event.kind == "fault":
        reporter.warn(str(event))
    else:
        reporter.say(f"  {event}", _STYLES.get(event.kind))


def _show_image(result: ImageResult, reporter: Reporter) -> None:
    rows = [
        (
            str(image.system),
            str(image.built.builder) if image.built else "in the registry already",
            str(image.out),
            image.pushed.digest if image.pushed else "-",
            f"{image.seconds:.1f}",
        )
        for image in result.images
    ]
    reporter.table("", ("system", "built on", "output", "digest", "seconds"), rows)
    destination = result.spec.destination
    if destination is None:
        reporter.result("Built, and not pushed (--push takes it to a registry). It stays on its builder for a day.")
    elif not result.uploaded:
        reporter.result(f"{destination} is {result.digest} already: nothing was uploaded.")
    else:
        reporter.result(f"{destination} is {result.digest}", "bold green")
    if result.provenance:
        reporter.result(f"Its provenance is attached: {result.provenance}")


# -- the pool, and anything else than images ------------------------------------------------------------------


def show_pool(options: PoolOptions) -> None:
    """Ask every builder at once and show the answers; ends well when at least one can be used.

    A builder that failed a while ago and answers now is used like any other from here on.

    :raises NoBuilder: there is none (of that system), or none can be used.
    """
    from nixops.build.show import SCHEMA, pool_document, pool_rows

    with _task(options.inventory, options.format, SCHEMA) as (session, reporter):
        wanted = systems_of(options.system, "--system") if options.system is not None else None
        builders = [b for b in session.builders if wanted is None or set(wanted) & set(b.systems)]
        if not builders:
            which = f" for {options.system}" if options.system else ""
            raise NoBuilder(
                f"{session.loaded.file}: the pool has no builder{which}",
                hint="give a host `builder: {}`, or name build.machines or build.ec2",
            )
        asked = session.pool.probe(wanted, everybody=True)
        probes = [replace(probe, claims=session.claims.count(probe.builder.name)) for probe in asked]
        for probe in probes:
            if probe.usable:  # somebody has looked: what kept it from being used is over
                session.quarantine.clear(probe.builder.name)
        left_out = session.pool.left_out()
        if options.format == "json":
            reporter.document(_dumps(pool_document(probes, left_out)))
        else:
            header, rows = pool_rows(probes, left_out)
            reporter.table("", header, rows)
        if not any(probe.usable for probe in probes):
            # The table has said why.
            raise NoBuilder("no builder can be used" if len(probes) > 1 else "the builder cannot be used")


def build(options: BuildOptions) -> None:
    """Build an attribute of a flake: on the best builder, or with Nix's own distributed build on all of them.

    :raises NixopsError: of the class whose exit code says how it ended.
    """
    from nixops.build.distributed import HEADER, SCHEMA

    with _task(options.inventory, options.format, SCHEMA) as (session, reporter):
        missing = [f for f, v in (("--flake REF", options.flake), ("--attr PATH", options.attr)) if v is None]
        if options.flake is None or options.attr is None:
            raise UsageError(f"what is to be built? {' and '.join(missing)} is missing", hint="--flake . --attr hello")
        flake, attribute = flake_of(options.flake, Path.cwd()), attribute_of(options.attr)
        systems = systems_of(options.systems) if options.systems is not None else ()
        if options.distributed:
            from nixops.build.distributed import build_distributed

            done: Distributed | Single = build_distributed(
                flake,
                attribute,
                session,
                systems=systems,
                local_jobs=_count(options.local_jobs),
                out_link=Path(options.out_link) if options.out_link else None,
                on_event=lambda line: reporter.say(f"  {line}", "dim"),
            )
        else:
            from nixops.build.single import build_single

            if options.out_link or options.local_jobs != "0":
                raise UsageError("--out-link and --local-jobs belong to --distributed: else nothing is built here")
            done = build_single(
                flake,
                attribute,
                systems or _only_system(session),
                session,
                on_event=lambda event: _show_event(event, reporter),
            )
        if options.format == "json":
            reporter.document(_dumps({**done.document(), "error": None, "exit_code": 0}))
        else:
            reporter.table("", HEADER, done.rows())


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"--local-jobs {text}: a number from 0")
    return int(text)


def _only_system(session: BuildSession) -> tuple[System, ...]:
    """The pool's system, where it has only one.

    :raises UsageError: it has none or several.
    """
    systems = tuple(dict.fromkeys(system for builder in session.builders for system in builder.systems))
    if len(systems) != 1:
        raise UsageError(
            "for which system?",
            hint=f"--systems, of: {', '.join(systems)}" if systems else "the pool has no builder: see docs/build.md",
        )
    return systems


# -- the binary cache -----------------------------------------------------------------------------------------


def warm_cache(options: WarmOptions) -> None:
    """Build the hosts' systems on the cache host, and prove that the cache serves all of them.

    :raises CacheIncomplete: it does not.
    """
    _cache(options, build=True)


def verify_cache(options: WarmOptions) -> None:
    """The proof alone: nothing is built.

    :raises CacheIncomplete: the cache does not serve all of the hosts' systems.
    """
    _cache(options, build=False)


def _cache(options: WarmOptions, *, build: bool) -> None:
    from nixops.build.proof import HEADER, SCHEMA

    with _task(options.inventory, options.format, SCHEMA) as (session, reporter):
        from nixops.build.warm import verify_cache, warm_cache, warm_targets

        hosts = warm_targets(session.loaded, options.host, options.group)
        work = warm_cache if build else verify_cache
        proof = work(session.loaded, hosts, session, lambda line: reporter.say(f"  {line}", "dim"))
        if options.format == "json":
            reporter.document(_dumps(proof.document()))
        else:
            reporter.table("", HEADER, proof.rows())
        proof.check()
        if options.format != "json":
            reporter.result(f"{proof.url} serves all of it, signed: {len(proof.asked)} paths", "bold green")
