"""Our files beside the user's own: what would change, changing it in one go, and taking it back.

The user's files are never touched. A file at one of our paths without our header is the user's; a file of ours that
was edited by hand is drift. Both stay as they are unless they are adopted.
"""

from __future__ import annotations

import difflib
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any, Self

from nixops.errors import DriftError, HostFault, NixopsError, UsageError
from nixops.render import git
from nixops.render.header import read_header
from nixops.render.literal import Language
from nixops.render.parse import parse_check
from nixops.render.runner import RenderedFile
from nixops.transport.command import Runner


class FileStatus(StrEnum):
    """What is to be done about a file."""

    NEW = "new"
    CHANGED = "changed"
    UNCHANGED = "unchanged"
    DRIFT = "drift"
    ADOPTED = "adopted"
    REMOVED = "removed"


@dataclass(frozen=True)
class FilePlan:
    """One file as it is and as it should be.

    :ivar path: in the checkout.
    :ivar before: its text now, ``None`` when there is no such file.
    :ivar after: its text to be, ``None`` when it is to go.
    :ivar diff: unified; empty when nothing changes.
    """

    path: PurePosixPath
    status: FileStatus
    language: Language
    before: str | None
    after: str | None
    diff: str


# -- planning ---------------------------------------------------------------------------------------------------------


def plan_files(
    root: Path, files: Iterable[RenderedFile], *, adopt: bool, report_drift: bool = False
) -> tuple[FilePlan, ...]:
    """Compare what was rendered with the checkout at ``root``. Changes nothing.

    :param adopt: take over files that were edited by hand, or that are not ours.
    :param report_drift: give drift back as a plan of status ``drift``, instead of raising.
    :raises DriftError: a file of ours was edited by hand; ``detail`` is the diff to what would be written.
    :raises UsageError: a file is the user's own or another runner's, or its path leaves the checkout.
    """
    if not root.is_dir():
        raise UsageError(f"there is no checkout at {root}", hint="set config.flake in the inventory")
    plans = [plan for file in files for plan in _plan(root, file, adopt=adopt)]
    keep = {p.path for p in plans if p.after is not None}
    # A pattern of files to remove also finds those that stay.
    plans = [p for p in plans if p.after is not None or p.path not in keep]
    drift = [p for p in plans if p.status is FileStatus.DRIFT]
    if drift and not report_drift:
        raise DriftError(
            f"edited by hand since nixops wrote it: {', '.join(str(p.path) for p in drift)}",
            hint="move the change into the inventory or the template, or see the diff and pass --adopt",
            detail="\n".join(p.diff for p in drift),
        )
    return tuple(sorted(plans, key=lambda p: p.path))


def _plan(root: Path, file: RenderedFile, *, adopt: bool) -> list[FilePlan]:
    if file.text is None:
        return _plan_removal(root, file, adopt=adopt)
    before = _read(_located(root, file.path), file.path)

    def plan(status: FileStatus) -> list[FilePlan]:
        return [FilePlan(file.path, status, file.language, before, file.text, _diff(file.path, before, file.text))]

    if before is None:
        return plan(FileStatus.NEW)
    header = read_header(before)
    if header is not None and (header.host, header.runner) != (file.host, file.runner):
        raise UsageError(
            f"{file.path} is the file of runner {header.runner} on {header.host}",
            hint="use {host} and {runner} in config's paths",
        )
    if before == file.text:
        return plan(FileStatus.UNCHANGED)
    if header is None and not adopt:
        raise UsageError(
            f"{file.path} is there and is not a file of nixops",
            hint="move it away, render to another path (config in the inventory), or see the diff and pass --adopt",
            detail=_diff(file.path, before, file.text),
        )
    if header is not None and not header.edited:
        return plan(FileStatus.CHANGED)
    return plan(FileStatus.ADOPTED if adopt else FileStatus.DRIFT)


def _plan_removal(root: Path, file: RenderedFile, *, adopt: bool) -> list[FilePlan]:
    found = [PurePosixPath(p.relative_to(root).as_posix()) for p in root.glob(str(file.path)) if p.is_file()]
    plans = []
    for path in found:
        if "*" in str(file.path) and _behind_symlink(root, path):
            continue  # somebody else's arrangement; we never write there
        before = _read(_located(root, path), path)
        header = read_header(before) if before is not None else None
        if header is None or (header.host, header.runner) != (file.host, file.runner):
            continue
        status = FileStatus.DRIFT if header.edited and not adopt else FileStatus.REMOVED
        plans.append(FilePlan(path, status, file.language, before, None, _diff(path, before, None)))
    return plans


def _behind_symlink(root: Path, path: PurePosixPath) -> bool:
    return any((root / part).is_symlink() for part in (path, *path.parents))


def _located(root: Path, path: PurePosixPath) -> Path:
    """Where ``path`` is. Nothing on the way to it may be a symbolic link: it could lead anywhere.

    :raises UsageError: it leaves the checkout, or is no place for a file.
    """
    if path.is_absolute() or not path.parts or any(p in ("..", ".git") for p in path.parts):
        raise UsageError(f"{path} is no path for a rendered file")
    place = root
    for i, part in enumerate(path.parts, 1):
        place = place / part
        so_far, last = PurePosixPath(*path.parts[:i]), i == len(path.parts)
        try:
            kind = stat.S_IFMT(place.lstat().st_mode)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UsageError(f"{path} is no path for a rendered file: {error.strerror}") from error
        if kind == stat.S_IFLNK:
            raise UsageError(f"{path}: {so_far} is a symbolic link", hint="rendered files go to real paths")
        if kind != (stat.S_IFREG if last else stat.S_IFDIR):
            raise UsageError(f"{path}: {so_far} is no {'file' if last else 'directory'}")
    return place


def _read(place: Path, path: PurePosixPath) -> str | None:
    try:
        return place.read_bytes().decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text, so it is no file of nixops", hint="move it away") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _diff(path: PurePosixPath, before: str | None, after: str | None) -> str:
    lines = difflib.unified_diff(
        (before or "").split("\n"),
        (after or "").split("\n"),
        "/dev/null" if before is None else f"a/{path}",
        "/dev/null" if after is None else f"b/{path}",
        lineterm="",
    )
    return "\n".join(lines)


# -- doing and undoing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileUndo:
    """What one file was.

    :ivar mode: permission bits of the file that was there.
    :ivar intent: the index did not know the path, and was told of it.
    :ivar forgotten: the index knew the path by intent only, and was told to forget it.
    :ivar directories: made for the file, from the outermost on.
    """

    path: str
    before: str | None
    after: str | None
    mode: int | None
    intent: bool
    forgotten: bool
    directories: tuple[str, ...]


@dataclass(frozen=True)
class FilesUndo:
    """Enough to take :func:`apply_files` back, also in another process."""

    files: tuple[FileUndo, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for a journal."""
        return {"files": [asdict(f) | {"directories": list(f.directories)} for f in self.files]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The reverse of :meth:`to_json`."""
        return cls(tuple(FileUndo(**{**f, "directories": tuple(f["directories"])}) for f in value["files"]))


def files_undo(root: Path, plans: Sequence[FilePlan], runner: Runner) -> FilesUndo:
    """Check that ``plans`` can be applied, and say what would take them back. Changes nothing.

    Every new text is parsed by the real tool of its language.

    :param runner: of this machine, for git and nix-instantiate.
    :raises TemplateError: something does not parse.
    :raises DriftError: a file was edited by hand, or has changed since it was planned.
    :raises UsageError: a path is no place for a file, or git ignores it.
    """
    for plan in plans:
        if plan.status is FileStatus.DRIFT or _read(_located(root, plan.path), plan.path) != plan.before:
            raise DriftError(
                f"{plan.path} was edited by hand"
                if plan.status is FileStatus.DRIFT
                else f"{plan.path} has just changed",
                hint="make a new plan",
                detail=plan.diff,
            )
    for plan in plans:
        if plan.after is not None and plan.after != plan.before:
            parse_check(plan.path, plan.after, plan.language, runner)
    known, intended = _index(root, plans, runner)
    return FilesUndo(tuple(_record(root, p, known, intended) for p in plans if _touches(p, known)))


def _index(root: Path, plans: Sequence[FilePlan], runner: Runner) -> tuple[set[str] | None, set[str]]:
    """The paths that git's index knows (``None`` without git), and those it knows by intent only."""
    if git.toplevel(root, runner) is None:
        return None, set()
    paths = [p.path for p in plans]
    known = git.tracked(root, paths, runner)
    git.refuse_ignored(root, [p.path for p in plans if p.after is not None and str(p.path) not in known], runner)
    return known, git.intended(root, paths, runner)


def _touches(plan: FilePlan, known: set[str] | None) -> bool:
    """An unchanged file is touched too where git does not know it: the flake would not see it."""
    return plan.after != plan.before or (known is not None and plan.after is not None and str(plan.path) not in known)


def _record(root: Path, plan: FilePlan, known: set[str] | None, intended: set[str]) -> FileUndo:
    place = root / plan.path
    missing = [p for p in reversed(plan.path.parents) if p.parts and not (root / p).exists()]
    return FileUndo(
        path=str(plan.path),
        before=plan.before,
        after=plan.after,
        mode=place.stat().st_mode & 0o777 if plan.before is not None else None,
        intent=known is not None and plan.after is not None and str(plan.path) not in known,
        forgotten=plan.after is None and str(plan.path) in intended,
        directories=tuple(str(p) for p in missing) if plan.after is not None else (),
    )


def apply_files(
    root: Path, plans: Sequence[FilePlan], runner: Runner, *, prepared: FilesUndo | None = None
) -> FilesUndo:
    """Make the checkout what ``plans`` say: all of it, or nothing.

    Each file is replaced atomically and keeps its permissions; files that are right are not touched.

    :param prepared: what :func:`files_undo` gave, if it was called (to note it down before anything changes).
    :returns: what :func:`undo_files` takes it back with.
    :raises HostFault: a file cannot be written; the others are back as they were.
    :raises NixopsError: see :func:`files_undo`.
    """
    undo = prepared if prepared is not None else files_undo(root, plans, runner)
    try:
        for file in undo.files:
            if file.after is None:
                _remove(root / file.path)
            elif file.after != file.before:
                _replace(root / file.path, file.after, file.mode if file.mode is not None else 0o644)
        git.add_intent(root, [PurePosixPath(f.path) for f in undo.files if f.intent], runner)
        if forgotten := [PurePosixPath(f.path) for f in undo.files if f.forgotten]:
            git.drop_intent(root, forgotten, runner)
    except BaseException as error:
        try:
            undo_files(root, undo, runner)
        except NixopsError as second:
            if isinstance(error, NixopsError):
                error.detail = f"{error.detail or ''}\nputting the files back failed too: {second}".strip()
        raise
    return undo


def undo_files(root: Path, undo: FilesUndo, runner: Runner) -> None:
    """Put the checkout back as it was, the index included. May be called twice, or after half an :func:`apply_files`.

    Each file is put back that can be.

    :raises DriftError: a file has been edited since; it is left as it is.
    :raises NixopsError: a file could not be put back, or git refused.
    """
    edited: list[str] = []
    problems: list[NixopsError] = []
    put_back = []
    for file in reversed(undo.files):
        try:
            if _undo_file(root, file):
                put_back.append(file)
            else:
                edited.append(file.path)
        except NixopsError as error:
            problems.append(error)
    intents = [PurePosixPath(f.path) for f in put_back if f.intent]
    forgotten = [PurePosixPath(f.path) for f in put_back if f.forgotten]
    if (intents or forgotten) and git.toplevel(root, runner) is not None:
        git.drop_intent(root, intents, runner)
        git.add_intent(root, forgotten, runner)
    if problems:
        problems[0].detail = "\n".join([problems[0].detail or "", *map(str, problems[1:])]).strip()
        raise problems[0]
    if edited:
        raise DriftError(f"edited since, and left as it is: {', '.join(edited)}", hint="look at it and decide")


def _undo_file(root: Path, file: FileUndo) -> bool:
    """Put one file back; false when it is neither what it was nor what we made of it."""
    path = PurePosixPath(file.path)
    place = _located(root, path)
    now = _read(place, path)
    if now not in (file.before, file.after):
        return False
    if file.before is None:
        _remove(place)
    elif now != file.before:
        _replace(place, file.before, file.mode if file.mode is not None else 0o644)
    for directory in reversed(file.directories):
        try:
            (root / directory).rmdir()
        except OSError:
            break  # never made, or somebody has put a file there
    return True


def _remove(place: Path) -> None:
    try:
        place.unlink(missing_ok=True)
    except OSError as error:
        raise HostFault(f"{place} cannot be removed: {error.strerror}") from error


def _replace(place: Path, text: str, mode: int) -> None:
    """Write a new file beside the old one and rename it over it: a reader sees one or the other, whole."""
    temporary: str | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=".nixops-")
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(temporary).replace(place)
        temporary = None
        directory = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise HostFault(f"{place} cannot be written: {error.strerror}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
