"""Evaluating an image: one ``nix eval`` for each system, and one question about the flake itself.

Only names and paths come out of it; the derivation is in this machine's store afterwards, ready to be built in
another's.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from nixops.build.model import Evaluated, ImageSpec, Shape
from nixops.errors import BuildFailed, UsageError, printable
from nixops.nix.log import plain
from nixops.nix.verbs import Nix
from nixops.transport.command import Command, Runner
from nixops.values import AttrPath, FlakeRef, StorePath, System

# What is built is `copyTo` where there is one: the image is part of its closure. The context is discarded so that
# nothing is built for the answer; the derivation itself has been written by then. A derivation's features may be a
# list or, as its environment has them, one text.
_APPLY: Final = """\
x: let
  plain = builtins.unsafeDiscardStringContext;
  given = v: if builtins.isList v then v else builtins.filter builtins.isString (builtins.split "[[:space:]]+" v);
  features = d: given (d.requiredSystemFeatures or [ ]);
  pushed = @images@ && x ? copyTo;
  built = if pushed then x.copyTo else x;
in
if !builtins.isAttrs x then { kind = builtins.typeOf x; }
else if !(built ? drvPath) then { kind = "set"; }
else {
  kind = "derivation";
  drv = plain built.drvPath;
  out = plain (built.outPath or "");
  system = built.system or "";
  copyTo = pushed;
  features = features built ++ (if pushed then features x else [ ]);
  program = built.meta.mainProgram or "";
}"""

_LOST_ATTRIBUTE: Final = re.compile(r"does not provide attribute|attribute '[^']*' (?:missing|not found)")
_PROGRAM: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,200}")
# A user's name alone, as in git+ssh://git@host, is no credential; before https it is a token.
_SECRETIVE: Final = re.compile(
    r"(?:(?<=https:)|(?<=http:))//[^/@?#]*@|//[^/@?#:]*:[^/@?#]*@"
    r"|(?<=[?&])([A-Za-z_]*(?:token|password|secret|key))=[^&#]*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FlakeFacts:
    """What Nix says of the flake.

    :ivar reference: what to evaluate: locked to the revision, so that every system is evaluated from the same, or
        the reference as it was given where it is a directory here.
    :ivar url: how a record names it, without any credential.
    :ivar revision: the git (or other) revision; None for a dirty tree and for what is under no version control.
    :ivar dirty: the tree has changes that no revision has.
    """

    reference: FlakeRef
    url: str
    revision: str | None
    dirty: bool


def flake_facts(local: Runner, flake: FlakeRef, *, timeout: float = 300.0) -> FlakeFacts:
    """Ask Nix for the flake's revision.

    :raises BuildFailed: there is no such flake, or it cannot be fetched; ``detail`` is the end of Nix's error.
    """
    command = Command.of(
        *("nix", "--extra-experimental-features", "nix-command flakes", "flake", "metadata", "--json"),
        *("--no-write-lock-file", "--", flake),
        timeout=timeout,
        title="nix flake metadata",
    )
    result = local.run(command)
    if not result.ok:
        raise BuildFailed(f"{without_credentials(flake)} is no flake that Nix can read", detail=plain(result.tail()))
    try:
        document: dict[str, Any] = json.loads(result.out)
        locked = document.get("locked") or {}
        revision = document.get("revision") or locked.get("rev")
        url = str(document.get("url") or document.get("lockedUrl") or document["resolvedUrl"])
    except (ValueError, KeyError, AttributeError, TypeError):
        raise BuildFailed("nix flake metadata printed something unknown", detail=printable(result.out[:400])) from None
    versioned = locked.get("type") in ("git", "hg", "mercurial")
    return FlakeFacts(
        reference=flake if flake.is_path else _reference(url, flake),
        url=without_credentials(url),
        revision=str(revision) if revision else None,
        dirty=versioned and not revision,
    )


def _reference(url: str, flake: FlakeRef) -> FlakeRef:
    try:
        return FlakeRef(url)
    except ValueError:
        return flake  # locked in a way of which the grammar takes a narrower view than Nix: evaluate it as given


def without_credentials(text: str) -> str:
    """A flake reference without a user, password or token in it."""
    return _SECRETIVE.sub(lambda found: f"{found[1]}=***" if found[1] else "//***@", text)


def apply_function(copy_to: bool) -> str:
    """The Nix function that is applied to the attribute; ``copy_to``: build its ``copyTo`` where it has one."""
    return _APPLY.replace("@images@", "true" if copy_to else "false")


def candidates(attribute: AttrPath, system: System) -> tuple[AttrPath, ...]:
    """Where an attribute is looked for, the first that exists: as it is with ``{system}`` filled in, or else below
    ``packages`` and ``legacyPackages`` as ``nix build`` does.
    """
    if "{system}" in attribute:
        return (AttrPath(attribute.replace("{system}", system)),)
    return tuple(AttrPath(f"{prefix}.{system}.{attribute}") for prefix in ("packages", "legacyPackages"))


def evaluate_image(
    nix: Nix, spec: ImageSpec, system: System, facts: FlakeFacts | None = None, *, timeout: float = 600.0
) -> Evaluated:
    """One system's image, evaluated and not built.

    :param facts: of the flake; without, the reference is evaluated as it is given.
    :raises UsageError: the attribute is not there, is no derivation, or is one for another system.
    :raises BuildFailed: the evaluation failed; ``detail`` is the end of Nix's error.
    """
    flake = facts.reference if facts is not None else spec.flake
    tried = candidates(spec.attribute, system)
    said: BuildFailed | None = None
    for attribute in tried:
        installable = f"{flake}#{attribute}"
        try:
            answer = nix.eval_json(installable, apply=apply_function(spec.copy_to), timeout=timeout)
        except BuildFailed as error:
            if not _absent(error, attribute):
                raise
            said = said or error
            continue
        return _evaluated(answer, system, installable, attribute)
    meant = re.search(r"Did you mean (.*)\?", str(said))
    raise UsageError(
        f"{without_credentials(spec.flake)} has no {' and no '.join(tried)}",
        hint=f"did you mean {meant[1]}?" if meant else "nix flake show tells what it has; {system} may stand in --attr",
    )


def _absent(error: BuildFailed, attribute: AttrPath) -> bool:
    """Whether the attribute itself is not there, as opposed to one that the image's own expression lacks."""
    said = f"{error.message}\n{error.detail or ''}"
    return f"'{attribute}'" in said and _LOST_ATTRIBUTE.search(said) is not None


def _evaluated(answer: Any, system: System, installable: str, attribute: AttrPath) -> Evaluated:
    kind = answer.get("kind")
    if kind != "derivation":
        raise UsageError(
            f"{attribute} is no derivation but a {kind}", hint="name one image: an attribute that nix build takes"
        )
    if answer["system"] != system:
        raise UsageError(
            f"{attribute} is built on {answer['system'] or 'an unknown system'}, not on {system}",
            hint="each system's image is built natively: take its packages from nixpkgs.legacyPackages.<system>",
        )
    program = answer["program"] if answer["copyTo"] else ""
    if program and not (isinstance(program, str) and _PROGRAM.fullmatch(program)):
        raise UsageError(f"{attribute}.copyTo.meta.mainProgram is no name of a program: {program!r}")
    drv = _path(answer["drv"])
    if drv is None or not drv.endswith(".drv"):
        raise UsageError(
            f"{attribute} says of itself that it is a derivation, and its drvPath is {answer['drv']!r}",
            hint="name one image: an attribute that nix build takes",
        )
    return Evaluated(
        system=system,
        installable=installable,
        drv=drv,
        out=_path(answer["out"]),
        shape=Shape.COPY_TO if answer["copyTo"] else Shape.UNKNOWN,
        features=frozenset(str(feature) for feature in answer["features"] if feature),
        program=program or None,
    )


def _path(text: str) -> StorePath | None:
    """A store path; for anything else, such as the placeholder of a content-addressed derivation's output, None."""
    try:
        return StorePath(text)
    except ValueError:
        return None
