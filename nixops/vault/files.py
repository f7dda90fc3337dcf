"""Reading a secret from a file of the operator's: only from one that nobody else can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nixops.errors import SecretUnavailable, UsageError

MAX_BYTES = 1 << 20


def read_private_file(path: Path) -> str:
    """The text of ``path``, less one newline at its end.

    It must be a regular file (a symbolic link to one is), owned by the user, with no permission for group and
    others. What is checked is what is read: the checks are made on the open file.

    :raises SecretUnavailable: it is not, cannot be read, is larger than 1 MiB, or is no UTF-8 text.
    """
    try:
        # Not blocking: opening a FIFO that nobody writes to would hang for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _require_private(path, os.fstat(descriptor))
            data = _read(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        hint = "create it with mode 0600" if isinstance(error, FileNotFoundError) else None
        raise SecretUnavailable(f"the secret file {path} cannot be read: {error.strerror}", hint=hint) from None
    return text_of(data, f"the secret file {path}")


def expanded(base: Path, text: str) -> Path:
    """The path ``text`` of the inventory: ``~`` is a home directory, a relative one starts at ``base``.

    :raises UsageError: it names the home of a user that is not there.
    """
    try:
        return base / Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"the path {text} names the home of a user that is not there") from None


def _require_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SecretUnavailable(f"the secret file {path} is not a regular file")
    if status.st_uid != os.geteuid():
        raise SecretUnavailable(
            f"the secret file {path} belongs to user id {status.st_uid}, not to you ({os.geteuid()})",
            hint=f"make a copy of your own, and chmod 600 {path}",
        )
    if status.st_mode & 0o077:
        raise SecretUnavailable(
            f"the secret file {path} has mode {stat.S_IMODE(status.st_mode):04o}: others may read it",
            hint=f"chmod 600 {path}, and consider the secret known if others use this machine",
        )


def _read(descriptor: int) -> bytes:
    data = b""
    while len(data) <= MAX_BYTES and (piece := os.read(descriptor, MAX_BYTES + 1 - len(data))):
        data += piece
    return data


def text_of(data: bytes, what: str) -> str:
    """``data`` as text, less one newline at its end.

    :raises SecretUnavailable: it is empty, larger than 1 MiB, or no UTF-8 text; never quotes the data.
    """
    if len(data) > MAX_BYTES:
        raise SecretUnavailable(f"{what} gives more than 1 MiB, which is no secret")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    else:
        text = text.removesuffix("\n").removesuffix("\r")
        if not text:
            raise SecretUnavailable(f"{what} is empty")
    if not text or "\0" in text:
        raise SecretUnavailable(f"{what} gives no UTF-8 text")
    return text
