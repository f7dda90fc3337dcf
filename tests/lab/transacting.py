"""What the tests of the activation share: a host with the runner deployed, and deploys caught in a certain state."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from nixops.lab.setting import Invoked, Setting
from tests.lab.reaching import wait_for

# Bounds short enough to be waited for; seconds.
BOUNDS = {"deploy": {"activation_timeout": 30, "confirm_timeout": 25, "lease_timeout": 20}}


def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """A host with the runner deployed, which every test of this module leaves as it found it."""
    directory = tmp_path_factory.mktemp("transaction")
    with Setting(directory, name=f"trans-{os.getpid()}", settings={"nix-cache02": BOUNDS}) as made:
        first = made.invoke("deploy-runner", "--yes", "--commit")
        assert first.code == 0, first
        yield made


def unchanged(setting: Setting) -> Iterator[dict[str, str]]:
    """The state before the test; at its end the host, Forgejo, OpenBao and the checkout's content are as they were."""
    state = setting.snapshot()
    yield state
    configure(setting, "")
    assert setting.snapshot() == state
    wait_for(lambda: not units(setting), 10, "the guard's units are gone")


def configure(setting: Setting, nix: str) -> None:
    """The host's own settings, edited and not committed: the checkout's revision stays what it is."""
    setting.repo.configure("nix-cache02", nix, commit=False)


def units(setting: Setting) -> str:
    """Guards, watchdogs and leases that are still at work on the host."""
    listed = setting.host.exec("systemctl", "list-units", "--no-legend", "--plain", "nixops-*", check=False)
    return "\n".join(
        line
        for line in listed.stdout.decode().splitlines()
        if line.startswith(("nixops-guard", "nixops-watchdog", "nixops-lease"))
    )


def deploy(setting: Setting, *args: str) -> Invoked:
    done = setting.invoke("deploy-runner", "--yes", *args)
    assert "Traceback" not in done.err and "a defect in nixops" not in done.err, done
    return done


def guard_state(setting: Setting) -> str:
    """The state of the newest deploy, from outside."""
    script = "d=$(ls -d /var/lib/nixops/deploys/*/ | tail -n 1); cat $d/state"
    return setting.host.exec("sh", "-c", script, check=False).stdout.decode().strip()


def started(setting: Setting, state: str) -> subprocess.Popen[str]:
    """A deploy that has reached ``state``, left running."""
    known = setting.host.exec("ls", "/var/lib/nixops/deploys").stdout.split()
    process = setting.start("deploy-runner", "--yes")

    def reached() -> bool:
        assert process.poll() is None, process.communicate()
        now = setting.host.exec("ls", "/var/lib/nixops/deploys").stdout.split()
        return now != known and guard_state(setting) == state

    wait_for(reached, 60, f"state {state}")
    return process


def came_up(setting: Setting) -> None:
    """Wait until a host that boots has its secrets and its runner again."""
    setting.host.wait_ready()
    unit = "gitea-runner-actions2.service"
    wait_for(
        lambda: setting.host.exec("systemctl", "is-active", "--quiet", unit, check=False).returncode == 0,
        60,
        "the runner is up after the boot",
    )


def note(word: str) -> str:
    """A harmless change that restarts the runner: its checks then take the seconds that these tests need."""
    return f'systemd.services.gitea-runner-actions2.restartTriggers = [ "{word}" ];'
