"""What the lab tests of `invoke deploy-runner` share: calling it, changing its inventory, looking at what it left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from nixops.lab.lab import HostSpec
from nixops.lab.setting import Invoked, Setting

HOST = "nix-cache02"
NAME = f"{HOST}-native"
TOKEN = "forgejo-runner-token-native"


def setting_for(directory: Path, name: str, **options: Any) -> Setting:
    """A setting of a test's own; the name carries the process's number, so that two sessions do not meet."""
    return Setting(directory, name=f"{name}-{os.getpid()}", **options)


def two_hosts() -> tuple[HostSpec, HostSpec]:
    return HostSpec(HOST), HostSpec("builder01")


def call(setting: Setting, task: str, *args: str, environ: dict[str, str] | None = None) -> Invoked:
    """Call a task, which must show no traceback and no secret whatever happens."""
    done = setting.invoke(task, *args, environ=environ)
    said = done.out + done.err
    assert "Traceback" not in said and "a defect in nixops" not in said, done
    for secret in (*setting.forge.issued, setting.bao.root_token.reveal()):
        assert secret not in said
    return done


def deploy(setting: Setting, *args: str, environ: dict[str, str] | None = None) -> Invoked:
    """`invoke deploy-runner --yes`."""
    return call(setting, "deploy-runner", "--yes", *args, environ=environ)


def deployed(setting: Setting, *args: str) -> dict[str, Any]:
    """A deploy that holds; the host's part of its JSON document."""
    done = deploy(setting, "--format", "json", *args)
    assert done.code == 0, done
    result: dict[str, Any] = done.document["hosts"][0]
    assert result["outcome"] == "committed", done
    assert setting.running() == setting.profile() == setting.boot_default() == result["to"], done
    checks = {check["name"]: check for check in result["checks"]}
    assert checks["registered"]["ok"] and checks["unit-active"]["ok"], done
    return result


def planned(setting: Setting, *args: str) -> dict[str, Any]:
    """The plan as JSON."""
    done = call(setting, "deploy-runner", "--plan", "--format", "json", *args)
    assert done.code == 0, done
    plan: dict[str, Any] = done.document["hosts"][0]["plan"]
    return plan


def detail(result: dict[str, Any], check: str) -> str:
    """What a check of a deploy's result says."""
    return str(next(c["detail"] for c in result["checks"] if c["name"] == check))


def is_unchanged(setting: Setting, *args: str) -> Invoked:
    """Deploying again does nothing: no credential is asked for, no version is written, no generation is activated."""
    before = setting.snapshot(), versions(setting), deploys(setting)
    setting.forge.forget_requests()
    done = deploy(setting, "--format", "json", *args)
    assert done.code == 0 and done.document["outcome"] == "unchanged", done
    assert not changing_requests(setting)
    assert (setting.snapshot(), versions(setting), deploys(setting)) == before
    return done


def changing_requests(setting: Setting) -> list[str]:
    """What Forgejo's API was asked for that makes something there; the runners' own protocol is another."""
    asked = [r for r in setting.forge.requests if r.path.startswith("/api/v1")]
    return [f"{r.method} {r.path}" for r in asked if r.method != "GET" or "registration-token" in r.path]


def versions(setting: Setting) -> dict[str, int]:
    """The current version of each KV entry of the host."""
    directory = f"secret/metadata/hosts/{setting.host.name}"
    keys = setting.bao.api("LIST", directory)["data"]["keys"]
    return {key: setting.bao.api("GET", f"{directory}/{key}")["data"]["current_version"] for key in keys}


def kept(setting: Setting, key: str) -> dict[str, str]:
    """What a KV entry of the host holds."""
    data: dict[str, str] = setting.bao.api("GET", f"secret/data/hosts/{setting.host.name}/{key}")["data"]["data"]
    return data


def deploys(setting: Setting) -> list[str]:
    """The activations that the host remembers."""
    listed = setting.host.exec("ls", "/var/lib/nixops/deploys", check=False).stdout.decode()
    return sorted(listed.split())


def change(setting: Setting, edit: Callable[[Any], object]) -> None:
    """Change the setting's inventory in place; ``edit`` gets the whole document."""
    document = yaml.safe_load(setting.repo.inventory_file.read_text(encoding="utf-8"))
    edit(document)
    setting.repo.inventory_file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def the_host(document: Any) -> Any:
    return document["hosts"][HOST]


def the_runner(document: Any, runner: str = "actions2") -> Any:
    return document["hosts"][HOST]["runners"][runner]


def runs_a_job(setting: Setting, repository: str) -> None:
    """A job of ``repository`` is taken by a runner of the host and succeeds there."""
    run = setting.forge.dispatch(repository, [{"run": "echo on $(uname -n)"}], runs_on="native")
    view = setting.forge.wait_run(run, timeout=30)
    assert view.status == "success" and f"on {HOST}" in view.log, view


def host_file(setting: Setting, path: str) -> str:
    """A file of the host, with what it holds; empty when it is not there."""
    return setting.host.exec("cat", path, check=False).stdout.decode()
