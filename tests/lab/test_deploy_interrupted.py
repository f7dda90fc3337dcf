"""The operator's side in the middle of an activation on a real host: interrupted, killed, and not alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from nixops.lab.setting import Setting
from tests.lab.reaching import wait_for
from tests.lab.transacting import configure, deploy, deployed, guard_state, note, started, unchanged, units


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    yield from deployed(tmp_path_factory)


@pytest.fixture
def before(setting: Setting) -> Iterator[dict[str, str]]:
    yield from unchanged(setting)


def test_an_interrupted_operator_rolls_back_and_ends_with_130(setting: Setting, before: dict[str, str]) -> None:
    """Ctrl-C while the host waits for the verdict."""
    configure(setting, note("interrupted"))
    process = started(setting, "awaiting-confirm")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err


def test_a_killed_operator_leaves_a_host_that_goes_back_and_the_next_command_says_so(
    setting: Setting, before: dict[str, str]
) -> None:
    """SIGKILL while the host waits: it rolls back by itself after deploy.confirm_timeout."""
    configure(setting, note("killed"))
    process = started(setting, "awaiting-confirm")
    process.kill()
    process.communicate()
    wait_for(lambda: guard_state(setting) == "rolled-back", 45, "rolled back by itself")
    assert setting.running() == before["running"] and setting.boot_default() == before["boot default"]
    wait_for(lambda: not units(setting), 45, "the lease ended by itself")
    configure(setting, "")
    done = deploy(setting)
    assert done.code == 0 and "was killed before it was confirmed" in done.err, done


def test_while_one_deploys_another_ends_with_6_and_is_told_who(setting: Setting, before: dict[str, str]) -> None:
    """Two at once: the lease says who holds it, since when and for what."""
    configure(setting, note("leased"))
    process = started(setting, "awaiting-confirm")
    # Held up, so that it does not end before the other has begun; its lease stands without a sign of life meanwhile.
    process.send_signal(signal.SIGSTOP)
    other = deploy(setting)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert other.code == 6 and "since" in other.err and "deploy-runner actions2" in other.err, other
