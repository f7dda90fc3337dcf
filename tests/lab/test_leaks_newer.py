"""The leak hunt with the newer module, on a plain host; and its negative control."""

from __future__ import annotations

import base64
import subprocess
import threading
from pathlib import Path
from subprocess import PIPE

import pytest

from nixops.inventory.model import RunnerModule
from nixops.lab.setting import Invoked
from tests.lab.deploying import setting_for
from tests.lab.hunting import Hunt, audit_of, hunt_through_deploys
from tests.lab.leaks import leaks_in
from tests.lab.reaching import eventually
from tests.lab.starts import ProgramStarts


def test_no_credential_of_the_newer_module_is_anywhere_but_where_it_has_to_be(tmp_path: Path) -> None:
    """Proves that no argument list, environment, file, output, journal, state, commit or store path on either side
    ever held a credential, through deploys that fail and that hold, and that what is meant to hold one is closed."""
    hunt_through_deploys(tmp_path, RunnerModule.FORGEJO, "plain")


def test_each_detector_finds_what_is_planted(tmp_path: Path) -> None:
    """The negative control: a secret in an argument list, an environment, files, git, store, journal and outputs."""
    with (
        setting_for(tmp_path, "hunt-plant", audit=audit_of(tmp_path)) as setting,
        Hunt(tmp_path, setting) as hunt,
    ):
        planted = setting.bao.api("POST", "auth/token/create", {"policies": ["default"]})["auth"]["client_token"]
        needles = hunt.needles()
        assert needles.within(b"..." + planted.encode() + b"...") == {
            f"client_token of auth/token/create [{planted[:4]}…]"
        }

        passing = hunt.temporary / "passing"
        expected = ("arguments of b'sh -c read", "environment of b'sh -c read", "on-the-host", str(passing))

        def missing() -> list[str]:
            leaks = hunt.watch.leaks(needles, hunt.allowed)
            return [what for what in expected if not any(what in leak for leak in leaks)]

        with hunt.watch:
            passing.write_text(planted)
            there = ("sh", "-c", "until [ -e /run/looked ]; do sleep 0.1; done", "sh", f"on-the-host={planted}")
            on_host = threading.Thread(target=setting.host.exec, args=there)
            on_host.start()
            with (
                subprocess.Popen(["sh", "-c", "read -r line", "sh", f"--token={planted}"], stdin=PIPE) as one,
                subprocess.Popen(["sh", "-c", "read -r line"], stdin=PIPE, env={"TOKEN": planted}) as two,
            ):
                # Each stays until it has been looked at, however long a sweep takes here.
                eventually(lambda: not missing())
                for process in (one, two):
                    assert process.stdin is not None
                    process.stdin.close()
            passing.unlink()
            setting.host.exec("touch", "/run/looked")
            on_host.join()
            # What the task starts inherits a variable that nobody said is a secret: these processes are seen too.
            plan = setting.invoke("deploy-runner", "--plan", environ={**hunt.environ, "NOT_NAMED_ANYWHERE": planted})
            assert plan.code == 0, plan
        recorded = leaks_in(hunt.recorders.seen(), needles)
        for program in ("git", "nix", "nix-store"):
            assert any(f"in {program}." in leak and "environment" in leak for leak in recorded), (program, recorded)
        assert missing() == []

        hunt.runs.append(Invoked(0, "{}", f"it is {planted}"))
        (setting.directory / "state" / "noted").write_text(f"encoded: {_encoded(planted)}")
        (setting.repo.path / "kept.txt").write_text(planted)
        setting.repo.git("add", "kept.txt")
        setting.repo.git("commit", "-q", "-m", "Planted", "--", "kept.txt")
        setting.repo.git("rm", "-q", "kept.txt")
        host = setting.host
        host.exec("sh", "-c", "mkdir -p /var/lib/nixops; cat >/var/lib/nixops/planted", stdin=planted.encode())
        host.exec("sh", "-c", "cat >/run/nixops-planted", stdin=planted.encode())
        host.exec("sh", "-c", "cat >/tmp/planted; nix-store --add /tmp/planted", stdin=planted.encode())
        host.exec("systemd-cat", "-t", "planted", "sh", "-c", "cat", stdin=f"a line with {planted}\n".encode())
        host.exec("journalctl", "--sync")
        for place, words in (
            (hunt.said(), "stderr of run 0"),
            (hunt.operators_files(), "/state/noted"),
            (hunt.operators_files(), "git objects"),
            (hunt.host_disk(), "/var/lib/nixops/planted"),
            (hunt.host_disk(), "/nix/store/"),
            (hunt.host_memory(), "/run/nixops-planted"),
            (hunt.host_memory(), "/tmp/planted"),
            (hunt.host_journal(), "MESSAGE of journal entry"),
        ):
            found = leaks_in(place, needles)
            assert any(words in leak for leak in found), (words, found)


def test_a_watch_is_told_of_programs_that_start_between_its_sweeps() -> None:
    """Proves that the kernel tells of each program as it starts, on this machine's own side: those that run for less
    than the pause between two sweeps are seen too."""
    try:
        listening = ProgramStarts()
    except OSError as error:
        pytest.skip(f"hunts sweep more often on this machine: {error}")
    with listening as starts:
        began = [subprocess.Popen(["sleep", "0.01"]) for _ in range(5)]
        told = set(starts.within(0.5))
    assert told >= {process.pid for process in began}
    assert [process.wait() for process in began] == [0] * 5


def _encoded(value: str) -> str:
    return base64.b64encode(f"user:{value}".encode()).decode()
