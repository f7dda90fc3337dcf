"""Builders that failed are left out for a while, by a small file that nothing can make fail a build."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nixops.build.quarantine import Quarantine
from nixops.values import HostName

A, B = HostName("a"), HostName("b")


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "quarantine.json"


def test_a_builder_is_left_out_with_its_reason_until_the_time_is_up(file: Path, clock: Clock) -> None:
    quarantine = Quarantine(file, 300, clock=clock)
    assert quarantine.reason(A) is None
    quarantine.add(A, "connection refused\nand a log")
    reason = quarantine.reason(A)
    assert reason is not None
    assert reason.startswith("taken last until ") and reason.endswith(
        "(another 300 s), since it failed: connection refused"
    )
    assert (quarantine.names(), quarantine.reason(B)) == (frozenset({A}), None)
    clock.now += 299.5
    assert quarantine.names() == {A}
    clock.now += 0.5
    assert (quarantine.names(), quarantine.reason(A)) == (frozenset(), None)


def test_another_process_sees_it_and_a_success_clears_it(file: Path, clock: Clock) -> None:
    Quarantine(file, 300, clock=clock).add(A, "lost")
    Quarantine(file, 300, clock=clock).add(B, "lost")
    other = Quarantine(file, 300, clock=clock)
    assert other.names() == {A, B}
    other.clear(A)
    assert Quarantine(file, 300, clock=clock).names() == {B}


def test_zero_seconds_leave_nobody_out(file: Path) -> None:
    quarantine = Quarantine(file, 0)
    quarantine.add(A, "lost")
    assert quarantine.names() == frozenset()
    assert not file.exists()


def test_a_clock_that_was_ahead_leaves_nobody_out_for_years(file: Path, clock: Clock) -> None:
    clock.now += 10**8
    Quarantine(file, 300, clock=clock).add(A, "lost")
    clock.now -= 10**8
    assert Quarantine(file, 300, clock=clock).names() == frozenset()


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff\xfe", b'{"builders": {"-x": {"reason": "r", "until": 1}}}', b'{"builders": 3}']
)
def test_a_file_that_is_not_ours_counts_as_empty_and_that_is_said(file: Path, clock: Clock, text: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(text)
    said: list[str] = []
    quarantine = Quarantine(file, 300, say=said.append, clock=clock)
    assert quarantine.names() == frozenset()
    assert said and "does not hold what we write" in said[0]
    quarantine.add(A, "lost")
    assert quarantine.names() == {A}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.recursive(st.none() | st.floats() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)))
def test_whatever_json_is_in_the_file_no_build_fails_by_it(tmp_path: Path, content: object) -> None:
    file = tmp_path / "q.json"
    file.write_text(json.dumps({"builders": content}), encoding="utf-8")
    assert Quarantine(file, 300).names() <= {A}


def test_a_place_that_cannot_be_written_is_said_and_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    quarantine = Quarantine(tmp_path / "file" / "q.json", 300, say=said.append)
    quarantine.add(A, "lost")
    assert quarantine.names() == frozenset()
    assert any("which builders failed is not kept" in line for line in said)


def test_many_at_once_lose_no_entry(file: Path) -> None:
    quarantine = Quarantine(file, 300)
    threads = [threading.Thread(target=quarantine.add, args=(HostName(f"b{n}"), f"reason {n}")) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert quarantine.names() == {HostName(f"b{n}") for n in range(24)}
    assert sorted(path.name for path in file.parent.iterdir()) == ["quarantine.json", "quarantine.lock"]


def test_a_reason_cannot_bring_control_characters_or_a_page(file: Path, clock: Clock) -> None:
    quarantine = Quarantine(file, 300, clock=clock)
    quarantine.add(A, "\x1b[2J" + "x" * 5000)
    reason = quarantine.reason(A)
    assert reason is not None and "\x1b" not in reason and len(reason) < 600
