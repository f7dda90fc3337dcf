"""Importing a closure: what is sent, in which order, and what its failures mean. The real thing is in tests/lab."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from nixops.errors import CommandFailed, HostFault
from nixops.nix import copy
from nixops.nix.copy import import_closure
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.exec import ChunkSink
from nixops.values import StorePath

PATHS = [StorePath(f"/nix/store/{c * 32}-{c}") for c in "abcdfg"]


class Store:
    """A store in memory that speaks nix-store: ``-qR``, ``--check-validity``, ``--export``, ``--import``."""

    def __init__(self, host: str, valid: Iterable[StorePath], fault: str = "") -> None:
        self.host = host
        self.valid = list(valid)
        self.fault = fault
        self.imports: list[list[str]] = []

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        return self.stream(command, on_line=on_line)

    def stream(
        self,
        command: Command,
        *,
        stdin: Iterable[bytes] | None = None,
        stdout: ChunkSink | None = None,
        on_line: LineSink | None = None,
    ) -> Result:
        program, operation, *rest = command.argv
        assert (program, on_line) == ("nix-store", None)
        if operation == "-qR":
            return self._answer(command, "\n".join(PATHS))
        if operation == "--check-validity":
            return self._answer(command, "\n".join(path for path in rest[1:] if path not in self.valid))
        if operation == "--export":
            assert stdout is not None
            for path in rest:
                stdout(f"{path}\n".encode())
            return self._answer(command, "")
        assert operation == "--import"
        assert command.root
        assert stdin is not None
        taken = b"".join(stdin).decode().split()
        if self.fault:
            return Result(command, 1, b"", self.fault.encode(), host=self.host)
        self.imports.append(taken)
        self.valid += [StorePath(path) for path in taken]
        return self._answer(command, "")

    def _answer(self, command: Command, text: str) -> Result:
        return Result(command, 0, text.encode(), b"", host=self.host)


def test_only_what_is_missing_is_sent_references_first() -> None:
    here, there = Store("localhost", PATHS), Store("gunter", PATHS[1:3])
    sent = import_closure(here, there, [PATHS[-1]])
    assert sent.paths == (PATHS[0], *PATHS[3:])
    assert there.imports == [[PATHS[0], *PATHS[3:]]]


def test_a_closure_that_is_there_already_sends_nothing() -> None:
    here, there = Store("localhost", PATHS), Store("gunter", PATHS)
    assert import_closure(here, there, [PATHS[-1]]).paths == ()
    assert there.imports == []


def test_a_long_list_goes_in_batches_that_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "BATCH", 4)
    here, there = Store("localhost", PATHS), Store("gunter", [])
    lines: list[str] = []
    import_closure(here, there, [PATHS[-1]], on_line=lines.append)
    assert there.imports == [PATHS[:4], PATHS[4:]]
    assert lines == ["sending 4 of 6 paths to gunter", "sending 2 of 6 paths to gunter"]


def test_a_full_disk_there_is_the_hosts_fault() -> None:
    here, there = Store("localhost", PATHS), Store("gunter", [], "error: writing to file: No space left on device")
    with pytest.raises(HostFault, match="the disk of gunter is full"):
        import_closure(here, there, [PATHS[-1]])


def test_another_failure_there_is_told_with_its_words() -> None:
    here, there = Store("localhost", PATHS), Store("gunter", [], "error: input does not look like a Nix store export")
    with pytest.raises(CommandFailed, match="does not look like"):
        import_closure(here, there, [PATHS[-1]])
