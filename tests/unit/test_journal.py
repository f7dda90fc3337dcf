"""The operator's journal: written before the effect, readable after a kill, and free of secrets by its types."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nixops.deploy import journal as journals
from nixops.deploy.journal import Journal
from nixops.errors import HostFault
from nixops.secret import Secret


def test_an_effect_is_on_disk_before_the_call_returns(tmp_path: Path) -> None:
    journal = Journal(tmp_path, host="h", runner="r")
    journal.effect("kv", path="a/b", from_version=1)
    lines = [json.loads(line) for line in journal.file.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["begin", "effect"] and lines[1]["path"] == "a/b"
    assert journal.effects == ({"kind": "kv", "path": "a/b", "from_version": 1},)


def test_only_the_operator_can_read_it(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "deploys"
    file = Journal(directory, host="h", runner="r").file
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_secret_cannot_be_written_into_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path, host="h", runner="r")
    with pytest.raises(TypeError):
        journal.effect("kv", token=Secret("very-secret"))
    assert "very-secret" not in journal.file.read_text()


def test_a_deploy_that_is_killed_is_found_by_the_next_and_a_living_one_is_not(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from nixops.deploy.journal import Journal\n"
        "j = Journal(Path(sys.argv[1]), host='h', runner='r'); j.effect('kv', path='p', from_version=0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    living = Journal(tmp_path, host="h", runner="r")
    found = journals.unfinished(tmp_path, "h")
    assert [e.id for e in found] != [living.id] and len(found) == 1 and found[0].effects[0]["path"] == "p"
    assert journals.unfinished(tmp_path, "other") == ()
    journals.close(found[0], "taken-back")
    assert journals.unfinished(tmp_path, "h") == ()


def test_a_line_cut_off_by_a_kill_does_not_hide_the_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path, host="h", runner="r")
    journal.effect("kv", path="p", from_version=3)
    with journal.file.open("a") as stream:
        stream.write('{"event": "eff')
    entry = journals.read(journal.file)
    assert entry is not None and len(entry.effects) == 1
    journals.close(entry, "taken-back")
    after = journals.read(journal.file)
    assert after is not None and after.outcome == "taken-back"


def test_an_effect_that_was_taken_back_is_not_found_again(tmp_path: Path) -> None:
    """A second try of the others must not touch what a later deploy has made in the meantime."""
    journal = Journal(tmp_path, host="h", runner="r")
    for name in ("a", "b", "c"):
        journal.effect("kv", path=name, from_version=0)
    journal.settled(2)
    entry = journals.read(journal.file)
    assert entry is not None and [(e["number"], e["path"]) for e in entry.effects] == [(0, "a"), (1, "b")]
    journals.settle(entry, 0)
    entry = journals.read(journal.file)
    assert entry is not None and [(e["number"], e["path"]) for e in entry.effects] == [(1, "b")]


def test_a_file_of_something_else_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("not json\n[1]\n")
    assert list(journals.entries(tmp_path)) == []


def test_an_unwritable_directory_stops_before_anything_changes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostFault, match="journal"):
        Journal(tmp_path / "file" / "deploys", host="h", runner="r")


def test_the_state_directory_follows_xdg(tmp_path: Path) -> None:
    assert journals.state_directory({"XDG_STATE_HOME": str(tmp_path)}) == tmp_path / "nixops/deploys"
    assert journals.state_directory({"HOME": "/h"}) == Path("/h/.local/state/nixops/deploys")
    assert os.sep in str(journals.state_directory({}))


def test_old_finished_journals_are_removed_and_unfinished_ones_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "KEEP", 2)
    for _ in range(4):
        Journal(tmp_path, host="h", runner="r").outcome("committed")
    Journal(tmp_path, host="h", runner="r")
    journals.prune(tmp_path)
    assert sorted(e.outcome or "none" for e in journals.entries(tmp_path)) == ["committed", "committed", "none"]


FULL = """
import resource, sys
from pathlib import Path
from nixops.deploy import journal as journals
from nixops.deploy.journal import Journal
from nixops.errors import HostFault

def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

directory = Path(sys.argv[1])
journal = Journal(directory, host="h", runner="r")
journal.effect("kv", path="first", from_version=1)
full = journal.file.stat().st_size + 20
room(full)
for write in (
    lambda: journal.effect("kv", path="second", from_version=2),
    lambda: journal.settled(0),
    lambda: journals.settle(journals.read(journal.file), 0),
    lambda: Journal(directory, host="h", runner="r" * full),
):
    try:
        write()
    except HostFault as fault:
        assert "cannot be written" in str(fault), fault
    else:
        raise SystemExit("a full disk was not noticed")
assert [e["path"] for e in journal.effects] == ["first", "second"]
room(resource.RLIM_INFINITY)
journal.settled(0)
journal.outcome("taken-back")
"""


def test_a_full_disk_is_named_and_hides_neither_what_was_done_nor_what_is_written_after_it(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: it cuts a line off in the middle, as a full one does."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.iterdir()
    entry = journals.read(file)
    assert entry is not None and entry.outcome == "taken-back" and entry.effects == ()


@pytest.mark.parametrize("environ", [{"XDG_STATE_HOME": "state"}, {"HOME": "home"}, {}])
def test_where_it_is_does_not_depend_on_the_working_directory(environ: dict[str, str]) -> None:
    assert journals.state_directory(environ).is_absolute()
    assert journals.state_directory({**environ, "HOME": "/h"}) == Path("/h/.local/state/nixops/deploys")
