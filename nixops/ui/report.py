"""Progress and results: rich at a terminal, plain lines elsewhere; progress to stderr, results to stdout."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO, cast

from nixops.errors import HostFault, printable
from nixops.secret import Redactor

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Step:
    """A finished step of a task and how long it took, in seconds."""

    name: str
    seconds: float


class _Lasting:
    """A stream whose reader may go away in the middle: a closed terminal, a pipe into ``head``.

    What nobody reads is dropped. A deploy must neither stop half-way because of it nor end with another exit code.
    Other faults of stdout, such as a full disk, are a :class:`HostFault`; progress is worth none.
    """

    def __init__(self, stream: TextIO, *, progress: bool) -> None:
        self._stream = stream
        self._progress = progress

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._gone(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._gone(error)

    def _gone(self, error: OSError) -> None:
        lost = not self._progress and error.errno not in (errno.EPIPE, errno.EIO)
        # The interpreter flushes it once more at its end, and would end with an error of its own.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if lost:
            raise HostFault(
                f"stdout cannot be written: {error.strerror}", hint="what it holds is not complete"
            ) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@dataclass
class Reporter:
    """Says what happens. Every text is cleaned of secrets and control characters here, at the one way out.

    :param quiet: say nothing of progress (results still go to stdout).
    """

    redactor: Redactor
    quiet: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)
    steps: list[Step] = field(default_factory=list)
    documented: bool = False
    _writing: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self.stdout = cast("TextIO", _Lasting(self.stdout, progress=False))
        self.stderr = cast("TextIO", _Lasting(self.stderr, progress=True))

    def _clean(self, text: str) -> str:
        return printable(self.redactor.clean(text))

    def _console(self, stream: TextIO) -> Console:
        from rich.console import Console

        terminal = stream.isatty()
        return Console(
            file=stream,
            highlight=False,
            markup=False,
            soft_wrap=True,
            no_color=None if terminal else True,
            width=None if terminal else 200,
        )

    def say(self, text: str, style: str | None = None) -> None:
        """A line of progress, on stderr."""
        if not self.quiet:
            self._print(self.stderr, self._clean(text), style)

    def warn(self, text: str) -> None:
        """A line the reader should not miss, on stderr, also when quiet."""
        self._print(self.stderr, "warning: " + self._clean(text), "yellow")

    def document(self, text: str) -> None:
        """The one JSON document of a task, on stdout."""
        self.documented = True
        self.result(text)

    def result(self, text: str = "", style: str | None = None) -> None:
        """A line of the result, on stdout."""
        self._print(self.stdout, self._clean(text), style)

    def _print(self, stream: TextIO, text: str, style: str | None) -> None:
        if style and stream.isatty():
            self._console(stream).print(text, style=style)
        else:
            # Lines of several threads: each is written at once.
            with self._writing:
                stream.write(text + "\n")
                stream.flush()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step: named when it begins, with its time when it ends, marked when it fails."""
        begin = time.monotonic()
        show = not self.quiet and self.stderr.isatty()
        status = self._console(self.stderr).status(self._clean(name)) if show else contextlib.nullcontext()
        try:
            with status:
                yield
        except BaseException:
            self.say(f"  ✗ {name} ({time.monotonic() - begin:.1f} s)", "red")
            raise
        seconds = time.monotonic() - begin
        self.steps.append(Step(name, seconds))
        self.say(f"  ✓ {name} ({seconds:.1f} s)", "green")

    def diff(self, text: str) -> None:
        """A unified diff, on stdout, coloured at a terminal."""
        styles = {"+": "green", "-": "red", "@": "cyan"}
        for line in self._clean(text).splitlines():
            self._print(self.stdout, "    " + line, styles.get(line[:1]))

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table of results on stdout: drawn at a terminal, aligned text elsewhere. One that is wider than the
        terminal is a block of lines for each row: cells broken in the middle can neither be read nor copied.
        """
        cleaned = [[self._clean(cell) for cell in row] for row in rows]
        if self.stdout.isatty():
            from rich.table import Table
            from rich.text import Text

            console = self._console(self.stdout)
            widths = [max(len(cell) for cell in column) for column in zip(header, *cleaned, strict=True)]
            if sum(widths) + 3 * len(widths) + 1 > console.width:
                self._blocks(title, header, cleaned)
                return

            table = Table(title=title or None, title_justify="left")
            for name in header:
                table.add_column(name, overflow="fold")
            for row in cleaned:
                table.add_row(*(Text(cell) for cell in row))
            console.print(table)
            return
        if title:
            print(title, file=self.stdout)
        widths = [max(len(cell) for cell in column) for column in zip(header, *cleaned, strict=True)]
        for row in [list(header), *cleaned]:
            print(
                "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip(),
                file=self.stdout,
                flush=True,
            )

    def _blocks(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Each row as its first cell, and below it every other that says something, with its name."""
        if title:
            self._print(self.stdout, title, "bold")
        width = max(len(name) for name in header[1:]) if len(header) > 1 else 0
        for first, *cells in rows:
            self._print(self.stdout, first, "bold")
            for name, cell in zip(header[1:], cells, strict=True):
                if cell not in ("", "-"):
                    self._print(self.stdout, f"  {name.ljust(width)}  {cell}", None)
