"""Who of this operator's machine uses which builder now, so that two builds at once spread over the pool.

A claim is a file that its process holds locked. When the process ends, however it ends, the kernel takes the lock
away and the claim is gone; the file is swept by whoever counts next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from nixops.errors import HostFault
from nixops.state import private_directory, state_directory
from nixops.transport.exec import TICK, raise_if_cancelled
from nixops.values import HostName

T = TypeVar("T")


class Claims:
    """The claims of all processes of this operator on this machine.

    :param directory: where they are kept; ``Claims.of(environ)`` gives the usual place.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Claims:
        """In the operator's state directory."""
        return cls(state_directory(environ) / "claims")

    def count(self, name: HostName) -> int:
        """How many builds use the builder now, those of this process too."""
        with self._choosing():
            return self._count(name)

    @contextmanager
    def claim(self, name: HostName) -> Iterator[None]:
        """Use the builder for the time of the block."""
        with self.choose(lambda _count: (name, name)):
            yield

    @contextmanager
    def choose(self, pick: Callable[[Callable[[HostName], int]], tuple[HostName, T]]) -> Iterator[T]:
        """Choose a builder and claim it, in one: no other build chooses in between.

        :param pick: is given the count of claims, and returns the builder's name and what the block gets. It must be
            quick: all others wait. What it raises comes out of here, with nothing claimed.
        :raises HostFault: the directory cannot be written.
        """
        with self._choosing():
            name, chosen = pick(self._count)
            path, descriptor = self._new(name)
        try:
            yield chosen
        finally:
            # In this order: whoever counts in between sees either a lock or no file.
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)

    @contextmanager
    def _choosing(self) -> Iterator[None]:
        """The one lock under which claims are counted and made. Given back by the kernel if we die."""
        private_directory(self._directory)
        try:
            descriptor = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritable(self._directory, error) from None
        try:
            while not _lock(descriptor):
                raise_if_cancelled()
                time.sleep(TICK / 10)
            yield
        finally:
            os.close(descriptor)

    def _count(self, name: HostName) -> int:
        return sum(_held(path) for path in self._directory.glob(f"{name}.*.claim"))

    def _new(self, name: HostName) -> tuple[Path, int]:
        path = self._directory / f"{name}.{os.getpid()}-{os.urandom(6).hex()}.claim"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritable(self._directory, error) from None
        _lock(descriptor)  # nobody else opens it before the lock on the directory is given back
        return path, descriptor


def _held(path: Path) -> bool:
    """Whether a living process holds the claim; one that nobody holds is removed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False  # given back a moment ago
    try:
        if not _lock(descriptor):
            return True
        with contextlib.suppress(OSError):
            path.unlink()
        return False
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unwritable(directory: Path, error: OSError) -> HostFault:
    return HostFault(f"{directory} cannot be written: {error.strerror}", hint="make room, or set XDG_STATE_HOME")
