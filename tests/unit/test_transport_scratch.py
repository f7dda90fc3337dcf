"""Temporary directories: private, gone at the end, and swept when their process was killed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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


def test_it_is_private_and_gone_at_the_end(place: Path) -> None:
    with scratch("nixops-test-") as directory:
        assert directory.parent == place and stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "file").touch()
    assert list(place.iterdir()) == []


def test_what_a_killed_process_left_goes_and_what_a_living_one_uses_stays(place: Path) -> None:
    killed, left = holder()
    living, used = holder()
    other = place / "nixops-test-of-somebody"
    other.mkdir()
    try:
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
    def full(**_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(HostFault, match="No space left"):
        Scratch("nixops-test-")


def test_a_directory_that_another_process_sweeps_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    real = tempfile.mkdtemp
    swept: list[str] = []

    def mkdtemp(*args: Any, **options: Any) -> str:
        path: str = real(*args, **options)
        if not swept:
            swept.append(path)
            Path(path).rmdir()
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    made = Scratch("nixops-swept-")
    assert made.path.is_dir() and str(made.path) not in swept
    made.remove()
