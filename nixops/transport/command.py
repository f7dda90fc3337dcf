"""A command as a value, and the one seam through which commands have effects.

Arguments stay a list until the last moment; :meth:`Command.shell_line` is the only place that quotes them.
Secrets and scripts travel on stdin, never in ``argv`` or ``env``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from nixops.errors import CommandFailed, printable
from nixops.secret import Secret


@dataclass(frozen=True)
class Command:
    """What to run.

    :param argv: program and arguments, unquoted.
    :param stdin: what the program reads; a :class:`Secret` is not shown in any error or log.
    :param env: additional variables for the program; must hold no secret (they end in ``env`` arguments).
    :param timeout: seconds after which it is stopped, or ``None`` for no bound of its own.
    :param root: run as root, through sudo where the login is not root. Local runners refuse it when not root.
    :param cwd: working directory (local commands only).
    :param title: what to call it in an error or in progress; defaults to the program's name.
    """

    argv: tuple[str, ...]
    stdin: str | bytes | Secret | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = 60.0
    root: bool = False
    cwd: Path | None = None
    title: str | None = None

    def __post_init__(self) -> None:
        if not self.argv or not self.argv[0] or any("\0" in a for a in self.argv):
            raise ValueError("a command needs a program and no NUL bytes")

    @classmethod
    def of(cls, *argv: str | Path, **options: object) -> Command:
        """``Command.of("nix", "build", path, timeout=600)``."""
        return replace(cls(tuple(str(a) for a in argv)), **options)  # type: ignore[arg-type]

    @classmethod
    def script(cls, text: str, *args: str, **options: object) -> Command:
        """A POSIX-sh script that is sent on stdin; ``args`` are its ``$1``… and are quoted once like any other."""
        return cls.of("sh", "-s", "--", *args, stdin=text, **options)

    @property
    def stdin_bytes(self) -> bytes:
        """What goes to stdin, as bytes; empty when there is none."""
        value = self.stdin.reveal() if isinstance(self.stdin, Secret) else self.stdin
        if value is None:
            return b""
        return value.encode() if isinstance(value, str) else value

    @property
    def name(self) -> str:
        """A short name for errors and progress."""
        return self.title or Path(self.argv[0]).name

    def shell_line(self) -> str:
        """The one line a remote shell parses back into exactly ``argv`` with ``env`` set. The only quoting place."""
        prefix = ["env", *(f"{k}={v}" for k, v in self.env.items())] if self.env else []
        return " ".join(_quoted(word) for word in [*prefix, *self.argv])


def _quoted(word: str) -> str:
    # To fish a backslash between single quotes may be an escape; between double quotes "\\\\" is one in every shell.
    return shlex.quote(word).replace("\\", "'\"\\\\\"'")


@dataclass(frozen=True)
class Result:
    """What came of a command. ``code`` is its exit status, negative for a signal; times are seconds."""

    command: Command
    code: int
    stdout: bytes
    stderr: bytes
    seconds: float = 0.0
    host: str = "localhost"

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def out(self) -> str:
        """stdout as text; bytes that are not UTF-8 become U+FFFD."""
        return self.stdout.decode(errors="replace")

    @property
    def err(self) -> str:
        """stderr as text; bytes that are not UTF-8 become U+FFFD."""
        return self.stderr.decode(errors="replace")

    def tail(self, lines: int = 20) -> str:
        """The last lines of stderr (or of stdout where stderr is empty), fit to print."""
        text = self.err.strip() or self.out.strip()
        return printable("\n".join(text.splitlines()[-lines:]))

    def check(self, message: str | None = None, hint: str | None = None) -> Result:
        """This result if the command ended with 0.

        :raises CommandFailed: otherwise, with the end of what it printed.
        """
        if self.ok:
            return self
        text = message or f"{self.command.name} failed on {self.host} with exit code {self.code}"
        raise CommandFailed(text, hint=hint, detail=self.tail())


LineSink = Callable[[str], None]


class Runner(Protocol):
    """The seam: something that runs commands on one machine.

    ``run`` returns whatever the exit code is; it raises :class:`nixops.errors.Unreachable` (or a subclass) when
    the machine cannot be asked, :class:`nixops.errors.CommandTimeout` when the command's own time is up, and it
    stops what it started when it is interrupted.
    """

    @property
    def host(self) -> str:
        """The machine's name in the inventory, or ``localhost``."""
        ...

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        """Run ``command``; ``on_line`` gets each line of stderr as it comes."""
        ...
