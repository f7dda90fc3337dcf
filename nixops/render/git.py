"""Git, as far as a checkout with rendered files needs it. Everything else in the checkout stays as it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from nixops.errors import CommandFailed, UsageError
from nixops.transport.command import Command, Result, Runner

TIMEOUT = 120.0


def git(root: Path, runner: Runner, *args: str, stdin: str | None = None, literal: bool = True) -> Result:
    """Run git in ``root``; paths in ``args`` are taken literally. The result may be a failure.

    :raises UsageError: git refuses the checkout because it belongs to another user.
    """
    # English, because messages are looked at; and no lock is taken only to refresh the index.
    env = {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    mode = ["--literal-pathspecs"] if literal else []
    result = runner.run(Command.of("git", "-C", root, *mode, *args, stdin=stdin, env=env, timeout=TIMEOUT))
    if not result.ok and "dubious ownership" in result.err:
        raise UsageError(
            f"git refuses {root}: it belongs to another user",
            hint=f"run as its owner, or: git config --global --add safe.directory {root}",
        )
    return result


def checked(result: Result, what: str) -> Result:
    """``result``, if git did it.

    :raises CommandFailed: it did not; with what git says.
    """
    return result.check(f"git could not {what}")


def toplevel(root: Path, runner: Runner) -> Path | None:
    """The top of the checkout that ``root`` is in; ``None`` when it is in none (nor has a ``.git`` above it).

    :raises UsageError: it belongs to another user.
    :raises HostFault: there is a checkout and no git.
    """
    if not any((parent / ".git").exists() for parent in (root.resolve(), *root.resolve().parents)):
        return None
    result = git(root, runner, "rev-parse", "--show-toplevel")
    if not result.ok:
        if "not a git repository" in result.err:
            return None
        raise CommandFailed(f"git cannot read the checkout {root}", detail=result.tail())
    return Path(result.out.removesuffix("\n"))


def _listed(result: Result) -> list[str]:
    return [entry for entry in result.out.split("\0") if entry]


def tracked(root: Path, paths: Iterable[PurePosixPath], runner: Runner) -> set[str]:
    """Those of ``paths`` that the index knows, with content or only by intent."""
    wanted = [str(p) for p in paths]
    if not wanted:
        return set()
    return set(_listed(checked(git(root, runner, "ls-files", "-z", "--", *wanted), "list its files")))


def status(root: Path, paths: Iterable[PurePosixPath], runner: Runner) -> dict[str, str]:
    """git's two-letter status of those of ``paths`` that differ from the last commit."""
    wanted = [str(p) for p in paths]
    if not wanted:
        return {}
    prefix = checked(git(root, runner, "rev-parse", "--show-prefix"), "tell where it is").out.removesuffix("\n")
    result = git(root, runner, "status", "--porcelain=v1", "-z", "--no-renames", "--untracked-files=all", "--", *wanted)
    return {entry[3:].removeprefix(prefix): entry[:2] for entry in _listed(checked(result, "tell its status"))}


def intended(root: Path, paths: Iterable[PurePosixPath], runner: Runner) -> set[str]:
    """Those of ``paths`` that the index knows only by intent: new, with nothing staged."""
    return {path for path, code in status(root, paths, runner).items() if code == " A"}


def refuse_ignored(root: Path, paths: Iterable[PurePosixPath], runner: Runner) -> None:
    """
    :raises UsageError: .gitignore hides one of ``paths``, so that the flake would not see it.
    """
    wanted = [str(p) for p in paths]
    if not wanted:
        return
    # check-ignore knows no literal pathspecs (git 2.39); our paths hold nothing that git would read into them.
    names = "\0".join(wanted) + "\0"
    result = git(root, runner, "check-ignore", "--no-index", "-z", "--stdin", stdin=names, literal=False)
    if result.code not in (0, 1):
        checked(result, "check what it ignores")
    if found := _listed(result):
        raise UsageError(
            f"git ignores {', '.join(found)}: the flake would not see it",
            hint="change .gitignore, or the inventory's config paths",
        )


def add_intent(root: Path, paths: Iterable[PurePosixPath], runner: Runner) -> None:
    """Make new files known without staging their content: a flake does not see untracked files."""
    if wanted := [str(p) for p in paths]:
        checked(git(root, runner, "add", "--intent-to-add", "--", *wanted), f"add {', '.join(wanted)}")


def drop_intent(root: Path, paths: Iterable[PurePosixPath], runner: Runner) -> None:
    """The reverse of :func:`add_intent`: those that are still known only by intent become unknown again."""
    if wanted := sorted(intended(root, paths, runner) | _missing_intended(root, paths, runner)):
        checked(
            git(root, runner, "rm", "--cached", "--quiet", "--force", "--ignore-unmatch", "--", *wanted),
            f"forget {', '.join(wanted)}",
        )


def _missing_intended(root: Path, paths: Iterable[PurePosixPath], runner: Runner) -> set[str]:
    """Known only by intent, and the file itself is gone: git's status then says " D" as for any other file."""
    gone = {p for p, code in status(root, paths, runner).items() if code in (" D", "AD")}
    found = set()
    for path in gone:
        if not git(root, runner, "cat-file", "-e", f"HEAD:./{path}").ok:
            found.add(path)
    return found
