"""`invoke deploy-runner` and the user's flake: where its toplevel is built, and what it has to import."""

from __future__ import annotations

from pathlib import Path

from nixops.lab.setting import NIX_CONFIG
from nixops.lab.userrepo import Imports, LabHostFacts, make_user_repo
from nixops.transport.command import Command
from nixops.transport.local import LocalRunner
from tests.lab.deploying import (
    HOST,
    call,
    change,
    changing_requests,
    deploy,
    deployed,
    host_file,
    is_unchanged,
    planned,
    setting_for,
    the_host,
    two_hosts,
)


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
