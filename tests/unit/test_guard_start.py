"""The scripts that start, fence off and prune deploys, run by the real shell in a temporary directory."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from nixops.deploy import guard

PARAMS = b"id='x'\nroot=''\n"
GUARD = b"echo unknown\n"


@dataclass
class Starts:
    """Runs the scripts with their directories moved below ``root``; ``systemd-run`` notes the units it is asked for."""

    root: Path

    @property
    def deploys(self) -> Path:
        return self.root / "deploys"

    @property
    def units(self) -> list[str]:
        file = self.root / "units"
        return file.read_text().split() if file.exists() else []

    @property
    def roots(self) -> list[str]:
        return sorted(p.name for p in (self.root / "gcroots").iterdir())

    def sh(self, script: str, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        script = script.replace(guard.DEPLOYS, str(self.deploys)).replace(
            "/nix/var/nix/gcroots", str(self.root / "gcroots")
        )
        env = {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"}
        return subprocess.run(
            ["sh", "-c", script, "sh", *args], input=stdin, env=env, capture_output=True, timeout=60, check=False
        )

    def start(self, id: str, *, sent: bytes = GUARD + PARAMS) -> subprocess.CompletedProcess[bytes]:
        old, new, tools = (str(self.root / name) for name in ("old", "new", "bin"))
        return self.sh(guard._START, id, old, new, tools, str(len(GUARD)), str(len(PARAMS)), stdin=sent)

    def state(self, id: str) -> str:
        return (self.deploys / id / "state").read_text().strip()

    def refuse(self, *units: str) -> None:
        """systemd takes none of these units."""
        words = " | ".join(f"*{unit}*" for unit in units) or "''"
        self.program("systemd-run", f'case "$*" in {words}) exit 1 ;; esac\nfor w; do case $w in --unit=*) ')
        program = self.root / "bin/systemd-run"
        program.write_text(program.read_text() + f"echo ${{w#--unit=}} >>{self.root}/units ;; esac; done\n")

    def program(self, name: str, body: str) -> None:
        file = self.root / "bin" / name
        file.write_text(f"#!/bin/sh\n{body}")
        file.chmod(0o755)


@pytest.fixture
def starts(tmp_path: Path) -> Starts:
    made = Starts(tmp_path)
    for place in ("bin", "gcroots", "new/bin"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "bin/sh").symlink_to("/bin/sh")
    (tmp_path / "new/bin/switch-to-configuration").touch(mode=0o755)
    made.refuse()
    return made


def test_the_watchdog_is_started_before_the_guard(starts: Starts) -> None:
    done = starts.start("x")
    assert done.returncode == 0, done.stderr
    assert starts.units == ["nixops-watchdog-x", "nixops-guard-x"] and starts.state("x") == "prepared"
    assert starts.roots == ["nixops-x-new", "nixops-x-old"]
    assert (starts.deploys / "x/params").read_text() == PARAMS.decode() + "loader='unknown'\n"
    assert (starts.deploys / "x/params").stat().st_mode & 0o777 == 0o600
    assert (starts.deploys / "x").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("sent", [b"", GUARD[:5], GUARD, GUARD + PARAMS[:-3]])
def test_a_start_that_was_cut_off_begins_nothing_and_leaves_nothing(starts: Starts, sent: bytes) -> None:
    assert starts.start("x", sent=sent).returncode == guard.NOTHING_BEGAN
    assert starts.units == [] == starts.roots and list(starts.deploys.iterdir()) == []


def test_a_toplevel_that_was_collected_meanwhile_is_not_activated(starts: Starts) -> None:
    (starts.root / "new/bin/switch-to-configuration").unlink()
    done = starts.start("x")
    assert done.returncode == guard.NOTHING_BEGAN and b"switch-to-configuration" in done.stderr
    assert starts.units == [] == starts.roots


def test_without_a_watchdog_no_guard_is_started(starts: Starts) -> None:
    starts.refuse("watchdog")
    assert starts.start("x").returncode == guard.NOTHING_BEGAN
    assert starts.units == [] and starts.state("x") == "refused"


def test_a_guard_that_systemd_did_not_take_may_have_begun(starts: Starts) -> None:
    starts.refuse("nixops-guard")
    assert starts.start("x").returncode not in (0, guard.NOTHING_BEGAN)
    assert starts.units == ["nixops-watchdog-x"] and starts.state("x") == "prepared"


def test_a_start_that_was_fenced_off_never_begins(starts: Starts) -> None:
    assert starts.sh(guard._FENCE, "x", "its start was cut off").returncode == 0
    assert starts.start("x").returncode == guard.NOTHING_BEGAN
    assert starts.state("x") == "refused" and starts.units == []
    assert (starts.deploys / "x/reason").read_text() == "its start was cut off\n"


def test_a_fence_leaves_a_start_that_began_alone(starts: Starts) -> None:
    starts.start("x")
    assert starts.sh(guard._FENCE, "x", "too late").returncode == 0
    assert starts.state("x") == "prepared" and not (starts.deploys / "x/reason").exists()


def test_a_host_remembers_a_bounded_number_of_deploys_and_all_that_are_not_finished(starts: Starts) -> None:
    for number in range(guard.KEEP + 5):
        directory = starts.deploys / f"2026-{number:02}"
        directory.mkdir(parents=True)
        (directory / "state").write_text({0: "rollback-failed", 1: "committing"}.get(number, "rolled-back") + "\n")
        (starts.root / f"gcroots/nixops-2026-{number:02}-old").symlink_to("/nowhere")
    assert starts.start("2026-99").returncode == 0
    kept = sorted(p.name for p in starts.deploys.iterdir())
    assert kept == ["2026-00", "2026-01", *(f"2026-{n:02}" for n in range(5, guard.KEEP + 5)), "2026-99"]
    assert "nixops-2026-00-old" in starts.roots and "nixops-2026-02-old" not in starts.roots


def test_a_verdict_is_given_with_its_reason_and_no_secret_in_an_argument(starts: Starts) -> None:
    starts.start("x")
    assert starts.sh(guard._VERDICT, "x", "abort", stdin=b"n0nce\nchecks failed: 'a' $(b)\n").returncode == 0
    assert (starts.deploys / "x/verdict").read_text() == "abort n0nce checks failed: 'a' $(b)\n"
