"""`invoke deploy-runner` over the matrix: both modules, both secret flavours, Forgejo 7 to 17, and where it builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nixops.inventory.model import RunnerModule, SecretFlavour
from nixops.lab.setting import NIX_CONFIG, TRUSTED, WIDER, Setting
from nixops.lab.userrepo import Imports, LabHostFacts, make_user_repo
from nixops.transport.command import Command
from nixops.transport.local import LocalRunner
from tests.lab.deploying import (
    HOST,
    NAME,
    call,
    change,
    changing_requests,
    deploy,
    deployed,
    deploys,
    detail,
    host_file,
    is_unchanged,
    kept,
    planned,
    runs_a_job,
    setting_for,
    the_host,
    the_runner,
    two_hosts,
    versions,
    wait_for,
)

TOKEN = "forgejo-runner-token-native"
MODULE = f"hosts/{HOST}/nixops-actions2.nix"
FILES = {MODULE, *(f"workflows/{repo}/.forgejo/workflows/nixops-actions2.yml" for repo in TRUSTED)}


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


def test_what_a_killed_deploy_made_stays_once_another_operator_has_deployed_with_it(tmp_path: Path) -> None:
    """The second operator has a journal of their own: they take over the first one's registrations and AppRole.

    Proves that the first operator's next run does not take these from under the running service.
    """
    bounds = {HOST: {"deploy": {"confirm_timeout": 20, "lease_timeout": 3}}}
    with setting_for(tmp_path, "second", module=RunnerModule.FORGEJO, settings=bounds) as setting:
        killed = setting.start("deploy-runner", "--yes")
        wait_for(lambda: len(deploys(setting)) == 1, 60, "the activation begins")
        killed.kill()
        killed.communicate()
        other = tmp_path / "other"

        def second() -> bool:
            done = deploy(setting, environ={"XDG_STATE_HOME": str(other)})
            assert done.code in (0, 6), done
            return done.code == 0

        wait_for(second, 60, "the first operator's lease has ended")
        before = setting.snapshot(), versions(setting), deploys(setting)
        first = deploy(setting, "--format", "json")
        assert first.code == 0 and first.document["outcome"] == "unchanged", first
        assert "left as it is" in first.err and (setting.snapshot(), versions(setting), deploys(setting)) == before
        assert "killed" not in deploy(setting).err


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


def test_the_toplevel_is_built_on_a_builder_or_on_the_target(tmp_path: Path) -> None:
    """deploy.build: its outputs are in the builder's store, or the target's alone, and never in the operator's."""
    settings = {HOST: {"deploy": {"build": "builder01"}}, "builder01": {"builder": {"max_jobs": 2}}}
    with setting_for(tmp_path, "build", hosts=two_hosts(), settings=settings) as setting:
        builder = setting.lab.hosts["builder01"]

        def has(path: str) -> tuple[bool, bool, bool]:
            """Whether the path is valid in the operator's store, the builder's, the target's."""
            query = ("nix-store", "--check-validity", path)
            here = LocalRunner().run(Command.of(*query)).ok
            there = [host.exec(*query, check=False).returncode == 0 for host in (builder, setting.host)]
            return (here, there[0], there[1])

        result = deployed(setting)
        assert any("(builder01)" in step["name"] for step in result["steps"])
        assert has(result["to"]) == (False, True, True)
        change(setting, lambda d: the_host(d)["deploy"].update(build="target"))
        setting.repo.configure(HOST, 'environment.etc."note".text = "built on the target";')
        plan = planned(setting)
        assert plan["closure"]["lines"] is None and not plan["secrets"][0]["reason"]
        result = deployed(setting)
        assert any("(target)" in step["name"] for step in result["steps"])
        assert has(result["to"]) == (False, False, True)
        assert host_file(setting, "/etc/note") == "built on the target"
        setting.repo.configure(HOST, 'environment.etc."note".text = "and again, with more text";')
        said = deploy(setting)
        assert said.code == 0 and "closure size" in said.err, "the difference is shown once it is known"
        is_unchanged(setting)


def test_what_is_committed_edited_adopted_and_limited(tmp_path: Path) -> None:
    """One checkout through its life: --commit, a new revision, an edit by hand, --adopt, another limit.

    Proves that only the rendered files are committed, that a toplevel which differs by its revision alone is shown
    as such and not activated, that an edit by hand is never replaced unasked, and that a changed limit changes that
    limit and nothing of the registration.
    """
    with setting_for(tmp_path, "life") as setting:
        git = setting.repo.git
        (setting.repo.path / "README.md").write_text("not committed\n")
        (setting.repo.path / "staged.txt").write_text("staged\n")
        git("add", "staged.txt")
        result = deployed(setting, "--commit")
        assert set(git("show", "--name-only", "--format=", "HEAD").split()) == FILES
        assert git("status", "--porcelain").splitlines() == ["A  staged.txt", "?? README.md"]
        git("rm", "-q", "--cached", "staged.txt")
        # The tree is clean now, so the toplevel has a revision, which the one that runs has not.
        (setting.repo.path / "staged.txt").unlink()
        only_the_revision_differs(setting, result["to"])
        registration = setting.snapshot()["forgejo"], versions(setting)

        module = setting.repo.path / MODULE
        module.write_text(module.read_text().replace('"16G"', '"1G"'))
        before = setting.snapshot()
        done = deploy(setting)
        assert done.code == 2 and MODULE in done.err and "--adopt" in done.err, done
        assert '-      MemoryMax = "1G";' in done.err and '+      MemoryMax = "16G";' in done.err, done
        assert setting.snapshot() == before
        # What is taken over is what ran before the edit.
        assert deployed(setting, "--adopt")["to"] == result["to"]

        change(setting, lambda d: the_runner(d)["limits"].update(MemoryMax="2G"))
        plan = planned(setting)
        (file,) = [f for f in plan["files"] if f["status"] != "unchanged"]
        changed = [x for x in file["diff"].splitlines() if x[:1] in "+-" and "sha256=" not in x][2:]
        assert changed == ['-      MemoryMax = "16G";', '+      MemoryMax = "2G";'], file["diff"]
        assert [s["action"] for s in plan["secrets"]] == ["keep"] and not plan["host_role"]["changes"]
        deployed(setting)
        assert (
            setting.host.exec("systemctl", "show", "-P", "MemoryMax", "gitea-runner-actions2").stdout == b"2147483648\n"
        )
        assert (setting.snapshot()["forgejo"], versions(setting)) == registration
        runs_a_job(setting, TRUSTED[0])

        # --commit holds for what an earlier run left uncommitted, and a refusal does not unsay the deploy.
        hook = setting.repo.path / ".git/hooks/pre-commit"
        hook.write_text("#!/bin/sh\necho not on a Friday >&2; exit 1\n")
        hook.chmod(0o755)
        done = deploy(setting, "--commit", "--format", "json")
        assert done.code == 1 and done.document["outcome"] == "unchanged" and "not on a Friday" in done.err, done
        hook.unlink()
        assert deploy(setting, "--commit").code == 0
        assert git("show", "--name-only", "--format=", "HEAD") == MODULE

        # Deployed from a clean tree, the running system has a revision; the next commit gives it another.
        setting.repo.configure(HOST, 'environment.etc."note".text = "of a clean tree";')
        result = deployed(setting)
        assert (
            git("rev-parse", "HEAD")
            == setting.host.exec("nixos-version", "--configuration-revision").stdout.decode().strip()
        )
        git("commit", "-q", "--allow-empty", "-m", "Nothing of the hosts")
        only_the_revision_differs(setting, result["to"])

        # What was changed on the host behind our back is a matter of the checks; still one document.
        setting.host.exec("chmod", "0444", f"/run/secrets/{TOKEN}")
        done = deploy(setting, "--format", "json")
        assert done.code == 5 and "secret-files" in done.document["hosts"][0]["error"], done


def only_the_revision_differs(setting: Setting, running: str) -> None:
    """The flake's toplevel is another one, is said to differ by the revision alone, and is not activated."""
    done = call(setting, "deploy-runner", "--plan")
    assert done.code == 0 and "only by the checkout's revision" in done.out, done
    assert "There is nothing to do." in done.out and running not in done.out, done
    assert is_unchanged(setting).document["hosts"][0]["to"] == running


def test_a_module_that_nobody_imports_ends_with_2_and_the_missing_line(tmp_path: Path) -> None:
    """Proves that the flake itself is asked whether the host has the runner, before anything is changed."""
    with setting_for(tmp_path, "imports") as setting:
        repo = make_user_repo(
            tmp_path / "none",
            hosts=[LabHostFacts.of(setting.host)],
            forge_url=setting.forge.url,
            bao_address=setting.bao.address,
            local=LocalRunner(env={"NIX_CONFIG": NIX_CONFIG}),
            imports=Imports.NONE,
        )
        before = setting.snapshot()
        for args in (("--yes",), ("--plan",)):
            done = call(setting, "deploy-runner", *args, "--inventory", str(repo.inventory_file))
            assert done.code == 2 and "imports = [ ./nixops-actions2.nix ];" in done.err, done
            assert f"hosts/{HOST}/default.nix" in done.err, done
        assert setting.snapshot() == before and repo.git("status", "--porcelain") == ""
        assert not changing_requests(setting) and not list((tmp_path / "state").rglob("*.jsonl"))
