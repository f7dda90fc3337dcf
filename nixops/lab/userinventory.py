"""The inventory that goes with the lab's user repository."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nixops.inventory.model import RunnerModule, SecretFlavour
from nixops.lab import recipe
from nixops.lab.host import LabHost
from nixops.secret import Secret
from nixops.values import HostName


@dataclass(frozen=True)
class LabHostFacts:
    """What the inventory says of one lab host.

    :ivar sudo_password: asked for by sudo where the login is not root.
    :ivar settings: further keys of the host in the inventory, merged over what is written anyway.
    """

    name: HostName
    address: str
    host_key: str
    identity_file: Path
    user: str = "root"
    port: int = 22
    sudo_password: Secret | None = None
    runners: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, host: LabHost, *, runners: bool = True, settings: Mapping[str, Any] | None = None) -> LabHostFacts:
        """The facts of a host that is up; on an awkward one with the password that its sudo asks for."""
        return cls(
            name=HostName(host.name),
            address=host.address,
            host_key=host.host_key,
            identity_file=host.identity_file,
            user=host.user,
            port=host.port,
            sudo_password=None if host.user == "root" else Secret(recipe.sudo_password()),
            runners=runners,
            settings=settings or {},
        )


@dataclass(frozen=True)
class Services:
    """Where the forge and OpenBao are, and the operator's tokens for them."""

    forge_url: str
    bao_address: str
    forge_token: Secret | None = None
    bao_token: Secret | None = None


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write ``text`` to a new or emptied file that has ``mode`` before it has content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=mode)
    path.chmod(mode)
    path.write_text(text, encoding="utf-8")


def managed_runner(runner: str, module: RunnerModule, secret: SecretFlavour) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "{host}-native",
        "module": str(module),
        "labels": ["native:host"],
        "trusted": ["torjus/nixos-servers", "torjus/nixos-exporter", "torjus/nixos"],
        "host_packages": ["bash", "coreutils", "curl", "gawk", "gitMinimal", "gnused", "nodejs", "wget", "nix"],
        "capacity": 4,
        "cache": {"enabled": True},
        "limits": {"MemoryMax": "16G", "CPUQuota": "400%"},
        "token": {"path": "hosts/{host}/forgejo-runner-token-native", "key": "token"},
        "secret": str(secret),
        "accepted_risks": {"shared-store": "trusted repositories already deploy to production"},
    }
    if module is RunnerModule.GITEA:
        values |= {"scope": {"user": "torjus"}, "accept_wider_scope": True}
        values["cache"]["dir"] = f"/var/lib/gitea-runner/{runner}/cache"
    return values


def inventory_document(
    destination: Path,
    hosts: Sequence[LabHostFacts],
    services: Services,
    runner: str,
    managed: Mapping[str, Any],
) -> dict[str, Any]:
    secrets = destination / "secrets"

    def reference(name: str, value: Secret) -> dict[str, str]:
        write(secrets / name, value.reveal() + "\n", 0o600)
        return {"file": f"../secrets/{name}"}

    secrets.mkdir(mode=0o700)
    document: dict[str, Any] = {
        "forge": {
            "url": services.forge_url,
            "token": reference("forge-token", services.forge_token)
            if services.forge_token
            else {"env": "FORGEJO_TOKEN"},
        },
        "vault": {"address": services.bao_address, "mount": "secret"},
        "config": {"flake": "../nixos-servers"},
        "hosts": {},
    }
    if services.bao_token:
        document["vault"]["token"] = reference("bao-token", services.bao_token)
    for host in hosts:
        entry: dict[str, Any] = {
            "address": host.address,
            "port": host.port,
            "user": host.user,
            "host_key": host.host_key,
            "system": f"{platform.machine()}-linux",
            "ssh": {"identity_file": str(host.identity_file)},
        }
        if host.sudo_password:
            entry["sudo_password"] = reference(f"sudo-{host.name}", host.sudo_password)
        if host.runners:
            entry["protected_files"] = ["/run/secrets/cache-secret"]
            entry["runners"] = {
                "actions1": {
                    "managed": False,
                    "name": str(host.name),
                    "module": str(RunnerModule.GITEA),
                    "labels": ["ubuntu-latest:docker://node:18-bullseye"],
                    "token_file": "/run/secrets/forgejo-runner-token",
                },
                runner: _filled(managed, host.name),
            }
        merge(entry, host.settings)
        document["hosts"][str(host.name)] = entry
    first = next((h for h in hosts if h.runners), None)
    if first:
        document["default"] = {"host": str(first.name), "runner": runner}
    return document


def _filled(value: Any, host: str) -> Any:
    """A copy of ``value`` with ``{host}`` filled in wherever it stands in a text."""
    if isinstance(value, Mapping):
        return {k: _filled(v, host) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(v, host) for v in value]
    return str(value).replace("{host}", host) if isinstance(value, str) else value


def merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Merge deeply; a ``None`` takes a key away."""
    for key, value in values.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def write_yaml(path: Path, document: Mapping[str, Any]) -> None:
    import yaml

    write(path, yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True))
