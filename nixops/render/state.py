"""Which rendered files the checkout's last commit does not have, and committing them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from nixops.errors import UsageError
from nixops.render import git
from nixops.transport.command import Runner


def uncommitted(root: Path, paths: Iterable[PurePosixPath], runner: Runner) -> tuple[str, ...]:
    """Those of ``paths`` that differ from HEAD; none where there is no git.

    A host with ``system.autoUpgrade`` goes back to what its branch says at the next timer, so that what is deployed
    from an uncommitted file does not stay.
    """
    if git.toplevel(root, runner) is None:
        return ()
    return tuple(sorted(git.status(root, paths, runner)))


def commit_files(root: Path, paths: Iterable[PurePosixPath], message: str, runner: Runner) -> str | None:
    """Commit ``paths`` and nothing else; what else is staged stays staged.

    :returns: the new commit's id, or ``None`` when there was nothing to commit.
    :raises UsageError: the directory is no git checkout.
    :raises CommandFailed: git refuses: a hook, a missing identity, a merge in progress.
    """
    if git.toplevel(root, runner) is None:
        raise UsageError(f"{root} is no git checkout: there is nothing to commit to")
    wanted = list(paths)
    changed = git.status(root, wanted, runner)
    if not changed:
        return None
    # `git commit` takes only paths that the index knows.
    git.add_intent(root, [PurePosixPath(p) for p, code in changed.items() if code == "??"], runner)
    git.checked(
        git.git(root, runner, "commit", "--quiet", "--only", "--file=-", "--", *sorted(changed), stdin=message),
        f"commit {', '.join(sorted(changed))}",
    )
    return git.checked(git.git(root, runner, "rev-parse", "HEAD"), "name the commit").out.strip()
