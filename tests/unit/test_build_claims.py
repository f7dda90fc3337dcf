"""Claims: two builds of one operator spread over the pool, and a claim dies with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nixops.build.claims import Claims
from nixops.errors import HostFault, Interrupted
from nixops.transport.exec import Cancellation, cancellable
from nixops.values import HostName

A, B = HostName("a"), HostName("a-b")

HOLD = """\
import sys, time
from pathlib import Path
from nixops.build.claims import Claims
from nixops.values import HostName
with Claims(Path(sys.argv[1])).claim(HostName("a")):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path / "claims")


def least(*names: HostName) -> Callable[[Callable[[HostName], int]], tuple[HostName, HostName]]:
    def pick(count: Callable[[HostName], int]) -> tuple[HostName, HostName]:
        chosen = min(names, key=lambda name: (count(name), name))
        return chosen, chosen

    return pick


def test_a_claim_counts_as_long_as_its_block_lasts(claims: Claims, tmp_path: Path) -> None:
    assert claims.count(A) == 0
    with claims.claim(A), claims.claim(A):
        assert claims.count(A) == 2
        # A name that another begins with is another builder.
        assert claims.count(B) == 0
    assert claims.count(A) == 0
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["lock"]


def test_a_claim_is_given_back_when_its_work_raises(claims: Claims) -> None:
    with pytest.raises(ZeroDivisionError), claims.claim(A):
        raise ZeroDivisionError
    assert claims.count(A) == 0


def test_a_killed_process_holds_no_claim(claims: Claims, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "claims")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert claims.count(A) == 1
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert claims.count(A) == 0
        # What it left is swept by whoever counts.
        assert list((tmp_path / "claims").glob("*.claim")) == []
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_program_that_a_build_starts_does_not_keep_its_claim(claims: Claims) -> None:
    with claims.claim(A):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        assert claims.count(A) == 0
    finally:
        child.kill()
        child.wait()


def test_choosing_and_claiming_is_one_step(claims: Claims) -> None:
    """Twelve builds at once on three builders: four each, though each looks before it claims."""
    names = (HostName("x"), HostName("y"), HostName("z"))
    chosen: list[HostName] = []
    together = threading.Barrier(13, timeout=20)

    def build() -> None:
        with claims.choose(least(*names)) as name:
            chosen.append(name)
            together.wait()

    threads = [threading.Thread(target=build) for _ in range(12)]
    for thread in threads:
        thread.start()
    together.wait()
    for thread in threads:
        thread.join()
    assert sorted(chosen) == sorted([*names] * 4)


def test_what_the_choice_raises_comes_out_with_nothing_claimed(claims: Claims, tmp_path: Path) -> None:
    def refuse(_count: Callable[[HostName], int]) -> tuple[HostName, None]:
        raise KeyError

    with pytest.raises(KeyError), claims.choose(refuse):
        pass
    assert list((tmp_path / "claims").glob("*.claim")) == []
    with claims.claim(A):
        assert claims.count(A) == 1


def test_waiting_for_another_choice_can_be_interrupted(claims: Claims) -> None:
    switch = Cancellation()
    entered, leave = threading.Event(), threading.Event()

    def slow(_count: Callable[[HostName], int]) -> tuple[HostName, None]:
        entered.set()
        leave.wait(20)
        return A, None

    def hold() -> None:
        with claims.choose(slow):
            pass

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(20)
    threading.Timer(0.1, switch.cancel).start()
    began = time.monotonic()
    with cancellable(switch), pytest.raises(Interrupted), claims.claim(A):
        pass
    leave.set()
    holder.join()
    assert time.monotonic() - began < 5


def test_a_directory_that_cannot_be_made_is_a_fault_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(HostFault, match="cannot be made: Not a directory"),
        Claims(tmp_path / "file" / "claims").claim(A),
    ):
        pass
