"""`invoke deploy-runner` with Forgejo 15 and 17: one connection for each repository, or one for a whole scope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nixops.inventory.model import RunnerModule
from nixops.lab.setting import TRUSTED, WIDER
from tests.lab.deploying import (
    HOST,
    NAME,
    TOKEN,
    change,
    deployed,
    host_file,
    is_unchanged,
    planned,
    runs_a_job,
    setting_for,
    the_runner,
)


def test_the_newer_module_is_registered_with_exactly_the_trusted_repositories(tmp_path: Path) -> None:
    """forgejo-runner, agent, Forgejo 15: one connection each, jobs of them and of nobody else; then one less.

    Proves that a second run changes nothing, and that a repository taken out of the inventory loses its
    registration, its KV entry, the host's file and its workflow, while the others keep theirs.
    """
    with setting_for(tmp_path, "newer", module=RunnerModule.FORGEJO) as setting:
        deployed(setting)
        ours = {r.scope: r for r in setting.forge.runners if r.name == NAME}
        assert sorted(ours) == sorted(TRUSTED) and len(setting.forge.runners) == len(TRUSTED) + 1
        assert all(r.status != "offline" and r.labels == ("native",) for r in ours.values()), ours
        foreign = setting.forge.dispatch(WIDER, [{"run": "true"}], runs_on="native")
        for repository in TRUSTED:
            runs_a_job(setting, repository)
        view = setting.forge.run(foreign)
        assert (view.status, view.runners) == ("waiting", ()), "a job of an untrusted repository was taken"
        is_unchanged(setting)

        *still, gone = TRUSTED
        key = f"{TOKEN}-{gone.replace('/', '-')}"
        change(setting, lambda d: the_runner(d).update(trusted=still))
        before = setting.snapshot()
        plan = planned(setting)
        assert [(r["scope"], r["registrations"]) for r in plan["retired"]] == [(f"repository {gone}", 1)]
        assert setting.snapshot() == before, "the plan changed something"
        deployed(setting)
        left = {r.scope: r.uuid for r in setting.forge.runners if r.name == NAME}
        assert left == {repo: ours[repo].uuid for repo in still}
        assert setting.bao.api("GET", f"secret/metadata/hosts/{HOST}/{key}")["data"]["versions"]["1"]["destroyed"]
        assert host_file(setting, f"/run/secrets/{key}") == ""
        assert not (setting.repo.path / "workflows" / gone / ".forgejo/workflows/nixops-actions2.yml").exists()
        runs_a_job(setting, still[0])
        is_unchanged(setting)


def test_scopes_of_an_organization_and_of_a_repository_side_by_side(tmp_path: Path) -> None:
    """gitea-actions-runner, Forgejo 17: two runners of one host, one for an organization, one for a repository."""
    another = {
        "name": "of-one-repository",
        "module": "gitea-actions-runner",
        "labels": ["single:host"],
        "scope": {"repository": "torjus/nixos"},
        "trusted": ["torjus/nixos"],
        "token": {"path": f"hosts/{HOST}/token-single"},
    }
    options: dict[str, Any] = {
        "runner_overrides": {"scope": {"user": None, "organization": "home"}, "trusted": ["home/infra"]},
        "overrides": {"hosts": {HOST: {"runners": {"actions3": another}}}},
        "host_nix": {HOST: "imports = lib.optional (builtins.pathExists ./nixops-actions3.nix) ./nixops-actions3.nix;"},
    }
    with setting_for(tmp_path, "scopes", version=17, **options) as setting:
        setting.forge.add_org("home", owners=["torjus"])
        for repository in ("home/infra", "home/other"):
            setting.forge.add_repo(repository)
        assert planned(setting)["wider_scope"] == ["home/other"]
        deployed(setting)
        runs_a_job(setting, "home/infra")
        assert planned(setting, "--runner", "actions3")["wider_scope"] == []
        deployed(setting, "--runner", "actions3")
        scopes = {r.name: (r.scope, r.labels) for r in setting.forge.runners}
        assert scopes[NAME] == ("home", ("native",)) and scopes["of-one-repository"] == ("torjus/nixos", ("single",))
        is_unchanged(setting, "--runner", "actions2")
