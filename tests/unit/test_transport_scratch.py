"""Temporary directories: private, gone at the end, also of a process that is killed, or else swept by the next."""

from __future__ import annotations

import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from nixops.errors import HostFault
from nixops.transport.agent import private_parent
from nixops.transport.scratch import Scratch, scratch

HOLDER = """
import sys
from nixops.transport.scratch import Scratch
made = Scratch("nixops-test-")
(made.path / "file").touch()
print(made.path, flush=True)
sys.stdin.readline()
"""

# Killed on the spot as soon as the directory is there.
KILLED_AT_ONCE = """
import os, pathlib, signal
from nixops.transport.scratch import Scratch
real = pathlib.Path.mkdir
def mkdir(path, **options):
    real(path, **options)
    print(path, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.mkdir = mkdir
Scratch("nixops-test-")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path


def holder() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def emptied(place: Path) -> bool:
    """Whether nothing is left there, in the ten seconds that a busy machine may take for it."""
    deadline = time.monotonic() + 10
    while list(place.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not list(place.iterdir())


def test_it_is_private_and_gone_at_the_end(place: Path) -> None:
    with scratch("nixops-test-") as directory:
        assert directory.parent == place and stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "file").touch()
    assert list(place.iterdir()) == []


def test_it_goes_with_a_process_that_is_killed(place: Path) -> None:
    killed, left = holder()
    assert (left / "file").exists()
    killed.kill()
    killed.communicate()
    assert emptied(place)


def test_it_goes_with_a_process_that_is_killed_while_it_makes_it(place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_AT_ONCE], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL and Path(done.stdout.strip()).parent == place
    assert emptied(place)


def test_what_the_killed_left_goes_and_what_a_living_one_uses_stays(place: Path) -> None:
    killed, left = holder()
    living, used = holder()
    other = place / "nixops-test-of-somebody"
    other.mkdir()
    try:
        children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
        assert len(children) == 1
        os.kill(int(children[0]), signal.SIGKILL)  # the guard: nobody is left to clear up
        killed.kill()
        killed.communicate()
        assert (left / "file").exists()
        with scratch("nixops-test-") as mine:
            assert set(place.iterdir()) == {mine, used, other}
    finally:
        living.communicate("end\n", timeout=60)
    assert set(place.iterdir()) == {other}


def test_a_name_that_would_need_quoting_is_not_chosen(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = place / "with space"
    spaced.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(spaced))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(spaced))
    made = Scratch("nixops-test-", runtime=True)
    assert " " not in str(made.path)
    made.remove()


@pytest.mark.parametrize("kind", ["Scratch", "private_parent"])
def test_a_place_where_others_can_put_something_in_its_stead_is_not_chosen(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root after `su`, XDG_RUNTIME_DIR is still the user's: who could have root run an ssh of his own."""
    place = Path(tempfile.mkdtemp(prefix="nixops-t-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    try:
        for mode, fit in ((0o700, True), (0o777, False), (0o1777, True)):
            place.chmod(mode)
            assert _chosen(kind).is_relative_to(place) == fit, oct(mode)
        place.chmod(0o700)
        if os.geteuid() == 0:  # nobody else can give a directory away
            os.chown(place, 65534, 65534)
            assert not _chosen(kind).is_relative_to(place)
    finally:
        place.rmdir()


def _chosen(kind: str) -> Path:
    if kind == "private_parent":
        return private_parent() or Path("/")
    made = Scratch("nixops-choice-", runtime=True)
    made.remove()
    return made.path


def test_a_place_that_takes_nothing_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(HostFault, match="No space left"):
        Scratch("nixops-test-")


def test_a_directory_that_another_process_sweeps_before_it_is_locked_is_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.mkdir
    swept: list[Path] = []

    def mkdir(path: Path, mode: int = 0o777) -> None:
        real(path, mode)
        if not swept:
            swept.append(path)
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    made = Scratch("nixops-swept-")
    assert made.path.is_dir() and made.path not in swept
    made.remove()


def test_a_directory_of_another_with_the_same_name_is_left_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(("00000000", "00000000", "11111111"))
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(names))
    first = Scratch("nixops-test-")
    second = Scratch("nixops-test-")
    assert first.path.is_dir() and second.path.name == "nixops-test-11111111"
    second.remove()
    assert set(place.iterdir()) == {first.path}
    first.remove()
