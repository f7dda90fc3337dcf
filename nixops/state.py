"""Where nixops keeps what outlives a command on the operator's machine: journals, claims, records of builds."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from pathlib import Path

from nixops.errors import HostFault, UsageError


def state_directory(environ: Mapping[str, str]) -> Path:
    """``$XDG_STATE_HOME/nixops``, by default below ``~/.local/state``. Not made here.

    :raises UsageError: there is neither that nor a home directory.
    """
    base = Path(environ.get("XDG_STATE_HOME", ""))
    if not base.is_absolute():
        # A relative one means nothing (XDG), and would be another place in each directory a task is called from.
        home = Path(environ.get("HOME", ""))
        if not home.is_absolute():
            try:
                home = Path(pwd.getpwuid(os.getuid()).pw_dir)
            except KeyError:
                raise UsageError(
                    "where state is kept is not known: there is neither HOME nor a password entry",
                    hint="set XDG_STATE_HOME to a directory, absolute",
                ) from None
        base = home / ".local/state"
    return base / "nixops"


def private_directory(path: Path) -> Path:
    """``path``, made with mode 0700 where it is not there, and so are those above it, whatever the umask is.

    :raises HostFault: it cannot be made.
    """
    try:
        # Told to make the parents too, mkdir gives them what the umask leaves, which may be everybody's.
        for each in (*reversed(path.parents), path):
            if not each.exists():
                each.mkdir(mode=0o700, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise HostFault(
            f"the directory {path} cannot be made: {error.strerror}", hint="set XDG_STATE_HOME to one that can"
        ) from None
    return path
