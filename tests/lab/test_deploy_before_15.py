"""`invoke deploy-runner` with Forgejo 7 to 11, whose API lists no runners: both modules, both secret flavours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nixops.inventory.model import RunnerModule, SecretFlavour
from nixops.lab.setting import TRUSTED
from tests.lab.deploying import (
    NAME,
    TOKEN,
    change,
    deployed,
    detail,
    host_file,
    is_unchanged,
    kept,
    planned,
    runs_a_job,
    setting_for,
    the_runner,
)


def test_the_newer_module_before_forgejo_15(tmp_path: Path) -> None:
    """forgejo-runner, vault.secrets, Forgejo 9: uuid and token come from Connect's Register.

    Proves that no runner is listed or deleted over an API that has no such thing, and that this is said of a
    registration that is no longer trusted.
    """
    options: dict[str, Any] = {"module": RunnerModule.FORGEJO, "secret": SecretFlavour.VAULT_SECRETS}
    with setting_for(tmp_path, "connect", version=9, **options) as setting:
        result = deployed(setting)
        assert "3 connections declared" in detail(result, "registered")
        ours = {r.scope: r for r in setting.forge.runners if r.name == NAME}
        assert sorted(ours) == sorted(TRUSTED)
        for repo, runner in ours.items():
            entry = kept(setting, f"{TOKEN}-{repo.replace('/', '-')}")
            assert (entry["uuid"], entry["scope"]) == (runner.uuid, f"repository {repo}")
            # The newer runner takes the file as it is: a newline would be part of the token.
            assert host_file(setting, f"/run/secrets/{TOKEN}-{repo.replace('/', '-')}") == entry["token"]
        runs_a_job(setting, TRUSTED[1])
        is_unchanged(setting)
        change(setting, lambda d: the_runner(d).update(trusted=list(TRUSTED[:2])))
        (retired,) = planned(setting)["retired"]
        assert retired["scope"] == f"repository {TRUSTED[2]}" and retired["registrations"] == 0
        assert ours[TRUSTED[2]].uuid in retired["stays"] and "cannot delete" in retired["stays"]


@pytest.mark.parametrize(
    ("version", "flavour"), [(11, SecretFlavour.VAULT_SECRETS), (7, SecretFlavour.AGENT)], ids=["11", "7"]
)
def test_the_older_module_before_forgejo_15(tmp_path: Path, version: int, flavour: SecretFlavour) -> None:
    """gitea-actions-runner: one registration by token; where no list tells, its own registration file does."""
    with setting_for(tmp_path, f"older{version}", version=version, secret=flavour) as setting:
        result = deployed(setting)
        assert f"registered as {NAME} (this forge cannot list" in detail(result, "registered")
        (runner,) = [r for r in setting.forge.runners if r.name == NAME]
        assert (runner.scope, runner.labels) == ("torjus", ("native",))
        token = kept(setting, TOKEN)["token"]
        # This module's file is an EnvironmentFile.
        assert host_file(setting, f"/run/secrets/{TOKEN}") == f"TOKEN={token}\n"
        if flavour is SecretFlavour.VAULT_SECRETS:
            assert host_file(setting, f"/run/secrets/{TOKEN}.value").strip() == token
        runs_a_job(setting, TRUSTED[0])
        is_unchanged(setting)
