"""Temporary directories that other programs are told of by name, and that outlive no kill for long.

A guard, which is there before the directory is, removes it when its process is gone, killed or not. A directory is
locked as long as its process lives: one that nobody locks was left where the guard was killed too, or the power went,
and goes when the next one is made.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nixops.errors import HostFault
from nixops.transport.guard import Guard

# What Nix and ssh take in a path without quoting.
_PLAIN = re.compile(r"[A-Za-z0-9/._~+,=@:-]+")
# How many hexadecimal digits stand at the end of a name.
_RANDOM = 8


class Scratch:
    """A new directory of mode 0700, gone with :meth:`remove` or at the end of this process, however that comes.

    :param prefix: of its name; left-overs with the same prefix are removed.
    :param runtime: prefer ``$XDG_RUNTIME_DIR``, for small files.
    :param parent: where to make it, instead.
    :ivar guard: what it adds to it is killed when the directory goes.
    :raises HostFault: there is no place for it.
    """

    def __init__(self, prefix: str, *, runtime: bool = False, parent: Path | None = None) -> None:
        if parent is not None and not _PLAIN.fullmatch(str(parent)):
            raise HostFault(f"{parent} is no directory with a plain name", hint="take a path without white space")
        parent = _parent(runtime=runtime) if parent is None else parent
        _sweep(parent, prefix)
        try:
            self.guard = Guard()
        except OSError as error:
            raise HostFault(f"sh cannot be run on this machine: {error.strerror}") from None
        try:
            self.path, lock = _made(parent, prefix, self.guard)
        except OSError as error:
            self.guard.close()
            raise HostFault(f"no directory can be made in {parent}: {error.strerror}", hint="set TMPDIR") from None
        # Also runs at the end of the interpreter, if an interrupt keeps the caller from it.
        self._gone = weakref.finalize(self, _remove, self.path, lock, self.guard)

    def remove(self) -> None:
        """Remove it with all that is in it. May be called twice."""
        self._gone()


@contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A :class:`Scratch` for the time of a ``with`` block."""
    made = Scratch(prefix)
    try:
        yield made.path
    finally:
        made.remove()


def _parent(*, runtime: bool) -> Path:
    candidates = (os.environ.get("XDG_RUNTIME_DIR", "") if runtime else "", tempfile.gettempdir(), "/tmp")
    for candidate in candidates:
        if (
            candidate
            and nobody_elses(Path(candidate))
            and os.access(candidate, os.W_OK)
            and _PLAIN.fullmatch(candidate)
        ):
            return Path(candidate).resolve()
    raise HostFault(
        "there is no temporary directory with a plain name", hint="set TMPDIR to a path without white space"
    )


def nobody_elses(directory: Path) -> bool:
    """Whether what we make in ``directory`` stays what we made: its owner, or anybody where it is not sticky, could put
    another in its place. After ``su`` or ``sudo``, ``XDG_RUNTIME_DIR`` and ``TMPDIR`` may still be another user's.
    """
    try:
        about = directory.stat()
    except OSError:
        return False
    guarded = not about.st_mode & stat.S_IWOTH or about.st_mode & stat.S_ISVTX
    return stat.S_ISDIR(about.st_mode) and about.st_uid in (0, os.geteuid()) and bool(guarded)


def _made(parent: Path, prefix: str, guard: Guard) -> tuple[Path, int]:
    while True:
        path = parent / f"{prefix}{secrets.token_hex(_RANDOM // 2)}"
        # Before it is there: a process that is killed in between leaves nothing either.
        guard.remove_in_the_end(path)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            guard.remove_in_the_end(None)  # it is another's
            continue
        # Another process may take it for a left-over before it is locked.
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if _locked(lock) and path.is_dir():
            return path, lock
        os.close(lock)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(parent: Path, prefix: str) -> None:
    for path in parent.glob(prefix + "?" * _RANDOM):
        try:
            found = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # gone, or somebody else's
        try:
            ours = os.fstat(found).st_uid == os.geteuid()
            if ours and _locked(found):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(found)


def _remove(path: Path, lock: int, guard: Guard) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
    guard.close()
