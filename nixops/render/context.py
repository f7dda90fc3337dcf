"""The names that the templates are given, made from the inventory. Plain values only: no secret is among them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nixops.errors import TemplateError, UsageError
from nixops.inventory.derived import (
    HostSecret,
    connections,
    host_secrets,
    runner_state,
    runner_unit,
    secret_unit,
)
from nixops.inventory.model import (
    Host,
    Inventory,
    KvOwner,
    ManagedRunner,
    RunnerModule,
    SecretFlavour,
    duration_seconds,
)
from nixops.values import HostName, RepoName, RunnerName

# What a stop may take beyond the jobs' own time, in seconds: the runner tells the forge that they were cancelled.
STOP_GRACE = 30


@dataclass(frozen=True)
class RunnerFacts:
    """What rendering needs and the inventory does not hold.

    :ivar uuids: of each connection's runner, by repository; Forgejo gives them.
    :ivar secret_versions: the current version of each KV entry, by its path below the mount. A changed version
        changes the unit, so that a new secret restarts what reads it.
    """

    uuids: Mapping[RepoName, str] = field(default_factory=dict)
    secret_versions: Mapping[str, int] = field(default_factory=dict)


def managed(inventory: Inventory, host: HostName, runner: RunnerName) -> tuple[Host, ManagedRunner]:
    """The host and the runner, if nixops renders it.

    :raises UsageError: the inventory has no such host or runner, or the runner is not managed.
    """
    if host not in inventory.hosts:
        raise UsageError(f"the inventory has no host {host}", hint=f"it has {', '.join(inventory.hosts)}")
    found = inventory.hosts[host].runners.get(runner)
    if found is None:
        names = ", ".join(inventory.hosts[host].runners) or "none"
        raise UsageError(f"host {host} has no runner {runner}", hint=f"it has {names}")
    if not isinstance(found, ManagedRunner):
        raise UsageError(
            f"runner {runner} on {host} is managed: false", hint="it is known to nixops, but not rendered by it"
        )
    return inventory.hosts[host], found


def settings(inventory: Inventory, name: RunnerName, runner: ManagedRunner, facts: RunnerFacts) -> dict[str, Any]:
    """The instance's ``settings``: what the inventory's own fields say, and its free ``settings`` beside them.

    :raises UsageError: both say the same thing, or there is no forge.
    :raises TemplateError: a connection's uuid is not known.
    """
    ours: dict[str, Any] = {
        "runner": {"capacity": runner.capacity, "shutdown_timeout": str(runner.shutdown_timeout)},
        "cache": {k: str(v) if k == "dir" else v for k, v in runner.cache if v is not None},
    }
    if runner.module is RunnerModule.FORGEJO:
        ours["runner"] = {"name": runner.name, "labels": list(runner.labels), **ours["runner"]}
        ours["server"] = {"connections": {c.name: _connection(inventory, c.repo, facts) for c in connections(runner)}}
    return _merged(ours, runner.settings, f"runners.{name}.settings")


def _connection(inventory: Inventory, repo: RepoName, facts: RunnerFacts) -> dict[str, Any]:
    if repo not in facts.uuids:
        raise TemplateError(f"no uuid is known for the connection to {repo}", hint="register the runner first")
    # The module takes the token from `secrets`; a literal one here would end in the Nix store.
    return {"url": forge_url(inventory), "uuid": facts.uuids[repo], "token": None}


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
    out = dict(ours)
    for key, value in theirs.items():
        if key not in ours:
            out[key] = value
        elif isinstance(ours[key], Mapping) and isinstance(value, Mapping):
            out[key] = _merged(ours[key], value, f"{where}.{key}")
        else:
            raise UsageError(
                f"{where}.{key} is already set by the runner's own fields",
                hint="use name, labels, capacity, shutdown_timeout, cache and trusted instead",
            )
    return out


def forge_url(inventory: Inventory) -> str:
    """The forge's address, as the runner uses it.

    :raises UsageError: the inventory names no forge.
    """
    if inventory.forge is None:
        raise UsageError("the inventory names no forge", hint="add forge: {url: …, token: …}")
    return inventory.forge.url


def service_config(runner: ManagedRunner) -> dict[str, str | int]:
    """What is set in the unit's ``serviceConfig`` beside what the module sets.

    ``mixed``: only the daemon gets the signal, and waits for its jobs; otherwise they would all get it at once.
    """
    stop = duration_seconds(runner.shutdown_timeout) + STOP_GRACE
    return {**runner.limits.given(), "KillMode": "mixed", "TimeoutStopSec": f"{stop}s"}


def isolation(name: RunnerName, runner: ManagedRunner) -> dict[str, str]:
    """What takes the place of the older module's shared user and state; empty where nothing is shared.

    All its instances are one user with one directory, so a host job of one could read the credentials of another.
    With a user and a StateDirectory of its own, bound to the path that the module knows, nothing else changes. The
    empty /var/lib is needed for more than hiding: without it, another instance that starts for the first time
    moves the directory that the bind lies on, and a running one loses its state.
    """
    if runner.module is not RunnerModule.GITEA or not runner.isolate:
        return {}
    state = runner_state(name, runner)
    return {
        "User": state.user,
        "StateDirectory": state.directory,
        "WorkingDirectory": f"-{state.seen}",
        "TemporaryFileSystem": "/var/lib:ro",
        "BindPaths": f"/var/lib/private/{state.directory}:/var/lib/{runner.module.user}",
    }


def _trigger(inventory: Inventory, path: str, facts: RunnerFacts) -> str:
    version = facts.secret_versions.get(path)
    return f"{inventory.vault.mount}/{path}" + (f" version {version}" if version is not None else "")


def go_string(text: str) -> str:
    """``text`` as a string of Go's template language, which the agent's templates are written in."""
    return json.dumps(text, ensure_ascii=False)


def agent_template(mount: str, secret: HostSecret, prefix: str) -> str:
    """What the agent writes into the secret's file: ``prefix`` and the value. A missing key is an error.

    ``error_on_missing_key`` looks at ``.name`` only and not at ``index``, so a key that is no name is looked up
    with a check of its own.
    """
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", secret.key):
        value = f"{{{{ .Data.data.{secret.key} }}}}"
    else:
        key = go_string(secret.key)
        value = (
            f"{{{{ if not (index .Data.data {key}) }}}}"
            f"{{{{ sprig_fail {go_string(f'{secret.kv_path} has no key {secret.key}')} }}}}{{{{ end }}}}"
            f"{{{{ index .Data.data {key} }}}}"
        )
    end = "\n" if prefix else ""
    return f"{prefix}{{{{ with secret {go_string(f'{mount}/data/{secret.kv_path}')} }}}}{value}{{{{ end }}}}{end}"


def secret_context(
    inventory: Inventory, host: Host, name: RunnerName, runner: ManagedRunner, facts: RunnerFacts
) -> dict[str, Any]:
    """How the host gets the secret's files. The older module wants ``TOKEN=…``, the newer the bare value.

    :raises UsageError: nothing says where the host reaches OpenBao.
    """
    vault = inventory.vault
    prefix = "TOKEN=" if runner.module is RunnerModule.GITEA else ""
    address = vault.host_address or vault.address
    if address is None and runner.secret is SecretFlavour.AGENT:
        raise UsageError("nothing says where the hosts reach OpenBao", hint="set vault.host_address or vault.address")
    found = host_secrets(runner)
    return {
        "flavour": str(runner.secret),
        "unit": secret_unit(name),
        "prefix": prefix,
        "triggers": [_trigger(inventory, s.kv_path, facts) for s in found],
        "entries": [
            {
                "name": s.name,
                "path": s.kv_path,
                "key": s.key,
                "file": s.file,
                "value_file": f"{s.file}.value",
                "template": agent_template(vault.mount, s, prefix),
            }
            for s in found
        ],
        "directories": sorted({s.file.rsplit("/", 1)[0] for s in found}),
        "address": address,
        "namespace": vault.namespace,
        "ca_file": vault.host_ca_file,
        "auth_path": f"auth/{vault.host_approle_mount}",
        "role_id_file": f"{host.approle_dir}/role-id",
        "secret_id_file": f"{host.approle_dir}/secret-id",
    }


def module_context(inventory: Inventory, host_name: HostName, name: RunnerName, facts: RunnerFacts) -> dict[str, Any]:
    """What ``runner-gitea.nix.j2`` and ``runner-forgejo.nix.j2`` are given.

    :raises UsageError: the inventory lacks something.
    :raises TemplateError: a connection's uuid is not known.
    """
    host, runner = managed(inventory, host_name, name)
    return {
        "host": str(host_name),
        "runner": str(name),
        "name": runner.name,
        "unit": runner_unit(name, runner),
        "url": forge_url(inventory),
        "token_file": str(runner.token_path),
        "labels": list(runner.labels),
        "packages": list(runner.packages),
        "settings": settings(inventory, name, runner, facts),
        "service": service_config(runner),
        "isolation": isolation(name, runner),
        "home": runner_state(name, runner).seen,
        "connections": [{"name": c.name, "file": c.file, "repository": str(c.repo)} for c in connections(runner)],
        "secret": secret_context(inventory, host, name, runner, facts),
        "accepted_risks": dict(runner.accepted_risks),
        "trusted": [str(r) for r in runner.trusted],
    }


def tofu_context(inventory: Inventory, host_name: HostName, name: RunnerName) -> dict[str, Any]:
    """What ``kv.tf.j2`` is given. A variable is named as its secret is; with the host's name where two agree."""
    _, runner = managed(inventory, host_name, name)
    taken = Counter(
        _tofu_name(secret.name)
        for host in inventory.hosts.values()
        for other in host.runners.values()
        if isinstance(other, ManagedRunner) and other.token.owner is KvOwner.TOFU
        for secret in host_secrets(other)
    )
    entries = []
    for secret in host_secrets(runner):
        variable = _tofu_name(secret.name)
        if taken[variable] > 1:
            digest = hashlib.sha256(secret.kv_path.encode()).hexdigest()[:8]
            variable = f"{_tofu_name(host_name)}_{variable}_{digest}"
        entries.append({"variable": variable, "path": secret.kv_path, "key": secret.key})
    return {
        "host": str(host_name),
        "runner": str(name),
        "name": runner.name,
        "mount": inventory.vault.mount,
        "entries": entries,
    }


def _tofu_name(text: str) -> str:
    name = re.sub(r"[^a-z0-9_]", "_", text.lower())
    return name if name[:1].isalpha() else f"_{name}"


def workflow_context(inventory: Inventory, host_name: HostName, name: RunnerName, repo: RepoName) -> dict[str, Any]:
    """What ``workflow.yml.j2`` is given; ``label`` is what ``runs-on`` asks for: a label's part before the colon."""
    _, runner = managed(inventory, host_name, name)
    return {
        "host": str(host_name),
        "runner": str(name),
        "repository": str(repo),
        "label": runner.labels[0].split(":", 1)[0],
        "name": runner.workflow.name,
        "checkout": runner.workflow.checkout,
        "commands": list(runner.workflow.commands),
    }
