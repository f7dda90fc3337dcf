"""Asking the user's flake whether the host really has what was rendered, also before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from nixops.errors import BuildFailed, HostFault, UsageError
from nixops.inventory.derived import filled_path
from nixops.inventory.model import Inventory
from nixops.render import git as checkout_git
from nixops.render.context import RunnerFacts
from nixops.render.expected import Expected, expectations, instance_path
from nixops.render.literal import Language, literal
from nixops.render.managed import FilePlan
from nixops.transport.command import Runner
from nixops.transport.scratch import scratch
from nixops.values import HostName, RunnerName, StorePath

_OVERLAY_MARK = ".nixops-overlay"


class Evaluator(Protocol):
    """The part of :class:`nixops.nix.verbs.Nix` that is needed here."""

    def eval_json(self, installable: str, *, apply: str | None = None, timeout: float = 300.0) -> Any:
        """The value of ``installable`` with the Nix function ``apply`` applied to it."""
        ...


@dataclass(frozen=True)
class FlakeAnswer:
    """What the flake says of the host.

    :ivar toplevel: the store path that its system evaluates to.
    :ivar installable: what to build for it.
    """

    toplevel: StorePath
    installable: str


# One evaluation for everything. Paths become text, since JSON would copy them into the store, and packages become
# their names. The toplevel is left alone where nobody imports our module: it would only cost time.
_QUESTION = """
c: let
  find = path: value:
    if path == [ ] then { found = true; inherit value; }
    else if builtins.isAttrs value && builtins.hasAttr (builtins.head path) value
    then find (builtins.tail path) value.${builtins.head path}
    else { found = false; value = null; };
  plain = value:
    if builtins.isPath value then toString value
    else if builtins.isFunction value then "a function"
    else if builtins.isList value then map plain value
    else if builtins.isAttrs value then
      if value ? outPath then value.name or (toString value) else builtins.mapAttrs (_: plain) value
    else value;
  get = path: let answer = find path c.config; in answer // { value = plain answer.value; };
  pkgs = c.pkgs or c.config._module.args.pkgs;
  imported = (find INSTANCE c.config).found;
  # Above mkForce, in case the flake uses that.
  as = revision: c.extendModules {
    modules = [ { system.configurationRevision = { _type = "override"; priority = 10; content = revision; }; } ];
  };
  system = if REVISION == null || !(c ? extendModules) then c else as REVISION;
in {
  inherit imported;
  module = (find MODULE c.config).found;
  values = if imported then map get PATHS else [ ];
  packages = if imported then map (path: plain (find path pkgs).value) PACKAGES else [ ];
  toplevel = if imported then system.config.system.build.toplevel.outPath else null;
}
"""


def check_flake(
    nix: Evaluator,
    flake: Path,
    inventory: Inventory,
    host: HostName,
    runner: RunnerName,
    facts: RunnerFacts,
    *,
    git: bool = True,
    revision: str | None = None,
) -> FlakeAnswer:
    """Ask the flake for the host's system and for the instance with our values, in one evaluation.

    :param flake: the flake's directory: the checkout, or an :func:`overlay` of it.
    :param git: as Nix sees the checkout through git: what git does not know is not there. Without, the directory as
        it is, and the flake has no ``self.rev``.
    :param revision: what ``system.configurationRevision`` should be in the toplevel, whatever the flake says: shows
        whether two systems differ by it alone. The answer's ``installable`` is not that toplevel's.
    :raises UsageError: nobody imports the rendered module (the hint is the missing line), the flake's nixpkgs has no
        such module, or the flake has other values than ours; ``detail`` lists them.
    :raises BuildFailed: it does not evaluate.
    """
    if inventory.config is None:
        raise UsageError("the inventory names no flake", hint="add config: {flake: path/to/checkout}")
    expected = expectations(inventory, host, runner, facts)
    instance = instance_path(inventory, host, runner)
    module = filled_path(inventory.config, "runner_module", host, runner)
    attribute = inventory.config.attribute.replace("{host}", host)
    installable = f"{flake_reference(flake, git=git)}#{attribute}"
    answer = nix.eval_json(installable, apply=_question(instance, expected, revision))
    if not answer["module"]:
        raise UsageError(
            f"{host} has no option {'.'.join(instance[:2])}",
            hint="its nixpkgs is older than that module: update it, or choose the other module in the inventory",
        )
    if not answer["imported"]:
        raise UsageError(
            f"{host} does not import {module}: it has no {'.'.join(instance)}",
            hint=f"add this line to {_importer(flake, module, host)}: imports = [ ./{module.name} ];",
        )
    _compare(expected, answer, host, module)
    try:
        return FlakeAnswer(StorePath(answer["toplevel"]), f"{installable}.config.system.build.toplevel")
    except (TypeError, ValueError) as error:
        raise BuildFailed(f"{attribute}.config.system.build.toplevel is no store path: {error}") from error


def _question(instance: tuple[str, ...], expected: Iterable[Expected], revision: str | None) -> str:
    packages = [path.split(".") for e in expected if e.packages for path in e.value]
    return (
        _QUESTION.replace("INSTANCE", literal(instance, Language.NIX))
        .replace("MODULE", literal(instance[:2], Language.NIX))
        .replace("PATHS", literal([e.path for e in expected], Language.NIX))
        .replace("PACKAGES", literal(packages, Language.NIX))
        .replace("REVISION", literal(revision, Language.NIX))
    )


def _importer(flake: Path, module: PurePosixPath, host: str) -> str:
    """The file that most likely should import the module: one beside it, so that ``./`` is right."""
    for name in ("default.nix", "configuration.nix"):
        if (flake / module.parent / name).is_file():
            return str(module.parent / name)
    return f"a module of {host} in {module.parent}"


def _compare(expected: Iterable[Expected], answer: Mapping[str, Any], host: HostName, module: PurePosixPath) -> None:
    other = []
    for wanted, found in zip(expected, answer["values"], strict=True):
        value = answer["packages"] if wanted.packages else wanted.value
        if not found["found"] or not _same(value, found["value"]):
            shown = json.dumps(found["value"], ensure_ascii=False) if found["found"] else "nothing"
            other.append(f"{wanted.name}: wanted {json.dumps(value, ensure_ascii=False)}, found {shown}")
    if other:
        raise UsageError(
            f"{host}'s configuration has other values than {module}",
            hint="see that it is imported and that no other module sets these",
            detail="\n".join(other),
        )


def _same(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, list | tuple) and isinstance(found, list):
        return len(wanted) == len(found) and all(map(_same, wanted, found))
    if isinstance(wanted, bool) or isinstance(found, bool):
        return wanted is found
    return bool(wanted == found)


def flake_reference(flake: Path, *, git: bool) -> str:
    """How Nix is told of the flake in a directory: as git sees it where there is git, else as it is.

    :param git: look for a checkout above the directory; an overlay's own is found in any case.
    :raises UsageError: Nix has no safe way to write the directory's name. (Percent-encoded, Nix 2.8 does not find a
        ``path:``, and of a ``git+file:`` it silently takes what is committed.)
    """
    place = flake.resolve()
    if not re.fullmatch(r"[A-Za-z0-9/._~+,=@:-]+", str(place)):
        raise UsageError(
            f"a flake at {place} cannot be named to Nix",
            hint="move the checkout to a path of letters, digits and / . _ ~ + , = @ : -",
        )
    overlaid = next((p for p in (place, *place.parents) if (p.parent / _OVERLAY_MARK).is_file()), None)
    tops = [overlaid] if overlaid else [place, *place.parents] if git else []
    top = next((p for p in tops if (p / ".git").exists()), None)
    if top is None:
        return f"path:{place}"
    below = place.relative_to(top)
    return f"git+file://{top}" + (f"?dir={below}" if below.parts else "")


@contextmanager
def overlay(checkout: Path, files: Iterable[FilePlan], runner: Runner) -> Iterator[Path]:
    """A temporary copy of the checkout in which ``files`` are already what they will be; the checkout stays as it is.

    It holds what a flake of the checkout would see: the files that git tracks, as they are in the work tree (all
    files where there is no git). The flake in it is a ``path:`` one and has no ``self.rev``; one that lies below the
    top of its checkout may use files beside it, which only a git flake can, so that copy gets a git of its own, with
    nothing committed and so without ``self.rev`` too.

    :returns: the flake's directory in the copy, which is gone at the end.
    :raises HostFault: the copy cannot be made.
    """
    top = checkout_git.toplevel(checkout, runner)
    source = (top or checkout).resolve()
    with scratch("nixops-plan-") as directory:
        (directory / _OVERLAY_MARK).touch()
        copy = directory / "checkout"
        try:
            if top is None:
                shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns(".git"))
            else:
                _copy_tracked(source, copy, runner)
            flake = copy / checkout.resolve().relative_to(source)
            flake.mkdir(parents=True, exist_ok=True)
            for file in files:
                place = flake / file.path
                if file.after is None:
                    place.unlink(missing_ok=True)
                elif file.after != file.before or not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_text(file.after, encoding="utf-8", newline="")
            if flake != copy:
                _make_git(copy, runner)
        except (OSError, shutil.Error) as error:
            raise HostFault(f"a copy of the checkout {checkout} cannot be made: {error}") from error
        yield flake


def _copy_tracked(source: Path, copy: Path, runner: Runner) -> None:
    copy.mkdir()
    listed = checkout_git.checked(checkout_git.git(source, runner, "ls-files", "-z"), "list its files")
    for name in listed.out.split("\0"):
        original = source / name
        # A deleted file is not there, and a submodule is a directory, whose files a flake does not see.
        if name and (original.is_symlink() or original.is_file()):
            place = copy / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(original, place, follow_symlinks=False)


def _make_git(copy: Path, runner: Runner) -> None:
    nobody = ("-c", "user.name=nixops", "-c", "user.email=nixops@localhost", "-c", "commit.gpgsign=false")
    for args in (
        ("init", "-q"),
        (*nobody, "commit", "-q", "--no-verify", "--allow-empty", "-m", "-"),
        ("add", "-A", "-f"),
    ):
        checkout_git.checked(checkout_git.git(copy, runner, *args), "make a copy of the checkout")
