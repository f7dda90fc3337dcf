"""One tree of exceptions. Each class owns the exit code that the command line ends with.

An error says what happened, to what, and what to do next: ``message`` names the first two, ``hint`` the third.
The text of an error may quote a server or a host, so it is cleaned of secrets by whoever prints it
(:mod:`nixops.secret`) and of terminal control characters here.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """The contract of every task (DESIGN: "Exit codes of every task")."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    ROLLED_BACK = 4
    CHECKS_FAILED = 5
    LEASED = 6
    UNKNOWN_STATE = 7
    INTERRUPTED = 130


def printable(text: str) -> str:
    """``text`` with terminal control characters made visible; newlines and tabs stay.

    Nothing from a host, a server or a file reaches a terminal raw: an escape sequence could rewrite what
    the operator reads.
    """
    return "".join(
        c if c in "\n\t" or (c.isprintable() and not "\u202a" <= c <= "\u202e") else f"\\x{ord(c):02x}"
        for c in text.replace("\r\n", "\n")
    )


@dataclass(frozen=True)
class Position:
    """A place in a file. ``line`` and ``column`` count from 1, as editors do."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class NixopsError(Exception):
    """Anything that is told to the user in one line. Never shown as a traceback.

    :param message: what happened, and to what; no trailing full stop.
    :param hint: what to do next.
    :param position: where in a file, when the cause stands in one.
    :param detail: further lines, such as the end of a build log.
    """

    exit_code = ExitCode.FAILED

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        position: Position | None = None,
        detail: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.position = position
        self.detail = detail

    def __str__(self) -> str:
        head = f"{self.position}: {self.message}" if self.position else self.message
        text = f"{head} ({self.hint})" if self.hint else head
        if self.detail:
            text += "\n" + self.detail.rstrip("\n")
        return printable(text)


# -- 1: failed, the host as it was ----------------------------------------------------------------------------


class CommandFailed(NixopsError):
    """A command ended with a code that was not expected."""


class CommandTimeout(NixopsError):
    """A command ran past its own time-out and was stopped."""


class BuildFailed(NixopsError):
    """A derivation failed to build, or an evaluation failed. ``detail`` is the end of its log."""


class ForgeError(NixopsError):
    """Forgejo refused, failed or did not answer."""


class VaultError(NixopsError):
    """OpenBao refused, failed or did not answer."""


class VaultSealed(VaultError):
    """OpenBao is sealed (503): nothing can be read or written until it is unsealed."""


class CheckAndSetLost(VaultError):
    """Somebody wrote the same KV entry at the same time; theirs stands."""


class RegistryError(NixopsError):
    """A registry refused, failed or did not answer; or it does not hold what was pushed to it."""


class PushFailed(NixopsError):
    """An image could not be pushed; the tag is where it was."""


class CacheIncomplete(NixopsError):
    """A binary cache lacks paths, or serves them without a signature by our key. ``detail`` lists them."""


class SecretUnavailable(NixopsError):
    """A secret that the inventory refers to cannot be read from where it says; nothing was changed."""

    exit_code = ExitCode.USAGE


class HostFault(NixopsError):
    """The host could not do what was asked, and is as it was: disk full, a missing tool, no permission."""


class Undecided(NixopsError):
    """A check could not be decided: a tool is missing, an answer was cut off. Never taken for a pass."""


class Declined(NixopsError):
    """The operator answered no."""


class Defect(NixopsError):
    """An exception that is no :class:`NixopsError`: a fault of ours, told in one line like any other."""

    @classmethod
    def of(cls, error: Exception) -> Defect:
        """Name the exception and where it came from; its traceback could hold the values of variables."""
        frames = traceback.extract_tb(error.__traceback__)
        where = f" in {frames[-1].name} (line {frames[-1].lineno})" if frames else ""
        return cls(
            f"a defect in nixops: {type(error).__name__}{where}: {str(error)[:500]}",
            hint="set NIXOPS_TRACEBACK=1 to see where, and report it",
        )


# -- 2: bad usage or inventory; nothing was changed -----------------------------------------------------------


class UsageError(NixopsError):
    """Bad command line, inventory, template or flake wiring. Raised before anything changes."""

    exit_code = ExitCode.USAGE


class InventoryError(UsageError):
    """The inventory is wrong; ``position`` says where."""


class TemplateError(UsageError):
    """A template is wrong: an undefined name, a syntax error, output the real tool does not parse."""


class DriftError(UsageError):
    """A file of ours was edited by hand. ``detail`` is the diff; ``--adopt`` takes it over."""


# -- 3: not reached -------------------------------------------------------------------------------------------


class Unreachable(NixopsError):
    """No connection to the host. ``message`` names the hop that failed: name, route, port, host key, key."""

    exit_code = ExitCode.UNREACHABLE


class ConnectionLost(Unreachable):
    """There was a connection, and it ended in the middle of a command."""


class LoginRefused(Unreachable):
    """The host answered and its key is right, but it did not let us in."""


class HostKeyUnknown(Unreachable):
    """The inventory pins no key for this host."""


class HostKeyChanged(Unreachable):
    """The host offers another key than the pinned one."""


class NoBuilder(Unreachable):
    """No builder of a system can be used. ``detail`` says why for each."""


# -- 4, 5, 6, 7 -----------------------------------------------------------------------------------------------


class RolledBack(NixopsError):
    """The new generation did not hold; the host was seen to be back on the old one."""

    exit_code = ExitCode.ROLLED_BACK


class ChecksFailed(NixopsError):
    """Checks that ran alone (``verify-runner``) found something."""

    exit_code = ExitCode.CHECKS_FAILED


class Leased(NixopsError):
    """Another deploy holds the host's lease."""

    exit_code = ExitCode.LEASED


class HostStateUnknown(NixopsError):
    """The roll-back failed, or the host cannot be asked what it runs. Act now."""

    exit_code = ExitCode.UNKNOWN_STATE


class Interrupted(NixopsError):
    """The operator interrupted; what was started has been stopped."""

    exit_code = ExitCode.INTERRUPTED
