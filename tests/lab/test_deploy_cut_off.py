"""An activation that keeps its operator out, on a real host: nobody can confirm it, so it goes back by itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nixops.lab.setting import Setting
from tests.lab.transacting import configure, deploy, deployed, unchanged


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    yield from deployed(tmp_path_factory)


@pytest.fixture
def before(setting: Setting) -> Iterator[dict[str, str]]:
    yield from unchanged(setting)


def test_a_host_that_can_no_longer_be_logged_in_to_goes_back_by_itself(
    setting: Setting, before: dict[str, str]
) -> None:
    """The SSH server stops; the connection that stands goes on, but a new one is what counts."""
    configure(setting, "lab.breakSshd = true;")
    done = deploy(setting)
    assert done.code == 4 and "no new connection" in done.err, done


def test_a_connection_lost_in_the_middle_ends_with_4_once_the_host_is_back(
    setting: Setting, before: dict[str, str]
) -> None:
    """The new generation takes the network down: nobody can confirm, the host goes back, and is then seen to be."""
    configure(setting, "lab.activationDropsNetwork = true;")
    done = deploy(setting)
    assert done.code == 4 and "back on the old generation" in done.err, done
