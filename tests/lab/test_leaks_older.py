"""The leak hunt with the older module, on an awkward host: its login has to give a password for root."""

from __future__ import annotations

from pathlib import Path

from nixops.inventory.model import RunnerModule
from tests.lab.hunting import hunt_through_deploys


def test_no_credential_of_the_older_module_is_anywhere_but_where_it_has_to_be(tmp_path: Path) -> None:
    """Proves that no argument list, environment, file, output, journal, state, commit or store path on either side
    ever held a credential, through deploys that fail and that hold, and that what is meant to hold one is closed."""
    hunt_through_deploys(tmp_path, RunnerModule.GITEA, "awkward")
