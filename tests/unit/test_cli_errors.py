"""Bad input on the command line and in the inventory: one line with file and position, exit 2, and nothing changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
GOOD = (TOP / "inventory/hosts.yml").read_text()


def run(*args: str, cwd: Path = TOP, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "invoke", *args],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=env,
    )
    assert "Traceback" not in done.stderr and "a defect in nixops" not in done.stderr, done.stderr
    return done


def with_change(directory: Path, old: str, new: str) -> Path:
    assert old in GOOD
    file = directory / "hosts.yml"
    file.write_text(GOOD.replace(old, new, 1))
    return file


@pytest.mark.parametrize("task", ["deploy-runner", "verify-runner", "render"])
def test_an_unknown_host_is_refused_with_the_nearest_name(task: str) -> None:
    done = run(task, "--host", "nix-cache01", "--runner", "actions2")
    assert done.returncode == 2 and "nix-cache02" in done.stderr


def test_an_unknown_runner_is_refused_with_the_nearest_name() -> None:
    done = run("deploy-runner", "--host", "nix-cache02", "--runner", "action2")
    assert done.returncode == 2 and "actions2" in done.stderr


def test_a_runner_written_by_hand_is_not_deployed() -> None:
    done = run("deploy-runner", "--host", "nix-cache02", "--runner", "actions1")
    assert done.returncode == 2 and "managed" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("hosts:\n", "hosts: [\n", "hosts.yml:"),
        ("capacity: 4", 'capacity: "four"', "capacity"),
        ("capacity: 4", "capacty: 4", "capacity"),
        ("native:host", "native", "native:host"),
        ("address: nix-cache02.home.2rjus.net", "address: -oProxyCommand=touch /x", "address"),
    ],
)
def test_a_bad_inventory_is_refused_with_its_position(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = with_change(tmp_path, old, new)
    done = run("deploy-runner", "--inventory", str(file))
    assert done.returncode == 2 and f"{file}:" in done.stderr and said in done.stderr


def test_two_runners_on_one_token_path_are_refused(tmp_path: Path) -> None:
    second = (
        "      actions3:\n        name: other\n        labels: ['native:host']\n        scope: {user: torjus}\n"
        "        trusted: [torjus/nixos]\n"
        "        token: {path: hosts/nix-cache02/forgejo-runner-token-native}\n      actions2:\n"
    )
    file = with_change(tmp_path, "      actions2:\n", second)
    done = run("deploy-runner", "--host", "nix-cache02", "--runner", "actions2", "--inventory", str(file))
    assert done.returncode == 2 and "token path" in done.stderr


def test_an_absent_inventory_is_named() -> None:
    done = run("deploy-runner", "--inventory", "no/such.yml")
    assert done.returncode == 2 and "no/such.yml" in done.stderr


def test_an_unknown_format_is_refused() -> None:
    done = run("deploy-runner", "--format", "xml")
    assert done.returncode == 2 and "text or json" in done.stderr


def test_a_bare_call_without_a_default_lists_the_choices(tmp_path: Path) -> None:
    file = with_change(tmp_path, "default: {host: nix-cache02, runner: actions2, image: example}", "")
    done = run("deploy-runner", "--inventory", str(file))
    assert done.returncode == 2 and "--host nix-cache02 --runner actions2" in done.stderr


def test_a_missing_checkout_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    file = with_change(tmp_path, "address: nix-cache02.home.2rjus.net", "address: 127.0.0.1\n    port: 9")
    done = run("deploy-runner", "--plan", "--inventory", str(file))
    assert done.returncode == 2 and "flake" in done.stderr


STREAMS = """
import os, sys
from pathlib import Path
from nixops.secret import Redactor
from nixops.tasks.support import guarded
from nixops.ui.report import Reporter

@guarded
def task():
    assert not sys.stdin.isatty() and sys.stdin.readline() == ""
    reporter = Reporter(Redactor())
    with reporter.step("a step"):
        reporter.result("the result")
    number = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    assert number > 2, number
    raise SystemExit(4)

task()
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_task_that_is_started_with_a_closed_stream_does_its_work(tmp_path: Path, closed: str) -> None:
    """No standard stream is missing, and no file or connection of ours gets the number of one."""
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", STREAMS, str(tmp_path / "file")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 4, done
    assert done.stdout == ("" if " >&-" in f" {closed}" else "the result\n")


def test_a_result_that_a_full_disk_does_not_take_is_no_success(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", '"$@" >/dev/full', "sh", sys.executable, "-m", "invoke", "inventory"],
        cwd=TOP,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and "stdout cannot be written: No space left" in done.stderr, done
