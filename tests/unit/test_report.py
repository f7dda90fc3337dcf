"""The reporter: what it says, and that a reader who goes away stops nothing."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest

from nixops.errors import HostFault
from nixops.secret import Redactor, Secret
from nixops.ui.report import Reporter

TASK = """
import sys
from nixops.secret import Redactor
from nixops.ui.report import Reporter
reporter = Reporter(Redactor())
sys.stdin.readline()
for _ in range(3):
    reporter.{call}
raise SystemExit(4)
"""


@pytest.mark.parametrize("call", ["result('x' * 70000)", "say('x' * 70000)", "table('t', ('a',), [('b',)])"])
def test_a_reader_that_goes_away_changes_no_exit_code(call: str) -> None:
    """The pipes of both streams are closed before anything is written."""
    process = subprocess.Popen(
        [sys.executable, "-c", TASK.format(call=call)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 4


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device", f"{len(text)} characters")


def test_a_result_that_cannot_be_written_to_a_full_disk_is_an_error() -> None:
    with pytest.raises(HostFault, match="No space left"):
        Reporter(Redactor(), stdout=Full()).result("the result")


def test_progress_that_cannot_be_written_is_dropped() -> None:
    out = io.StringIO()
    reporter = Reporter(Redactor(), stdout=out, stderr=Full())
    with reporter.step("a step"):
        reporter.warn("a warning")
    reporter.result("the result")
    assert out.getvalue() == "the result\n" and [s.name for s in reporter.steps] == ["a step"]


def test_secrets_and_escape_sequences_are_not_shown() -> None:
    out = io.StringIO()
    Reporter(Redactor([Secret("hunter2-hunter2")]), stdout=out).result("it is hunter2-hunter2 \x1b[2J")
    assert out.getvalue() == "it is *** \\x1b[2J\n"


class Terminal(io.StringIO):
    """A terminal, for all that a reporter can tell."""

    def isatty(self) -> bool:
        return True


def test_a_table_that_is_wider_than_the_terminal_is_blocks_that_can_be_read_and_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = "/nix/store/6wss3sqghh0p7r32ar5q531c9pj4s98z-copy-to"
    digest = "sha256:" + "0123456789abcdef" * 4
    terminal = Terminal()
    reporter = Reporter(Redactor(), stdout=terminal)
    reporter.table("", ("system", "output", "digest", "why"), [("x86_64-linux", path, digest, "-")])
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in terminal.getvalue().splitlines()]
    assert lines == ["x86_64-linux", f"  output  {path}", f"  digest  {digest}"]


def test_a_table_that_fits_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    Reporter(Redactor(), stdout=terminal).table("", ("a", "b"), [("one", "two")])
    assert "│ one │ two │" in re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
