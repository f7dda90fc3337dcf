"""The inventory as other tools take it: Ansible, OpenSSH, Nix, and JSON. No secret is in any of them.

Each function is pure: an inventory in, a value or a text out. ``host`` restricts the output to one host; it must
exist (:meth:`.load.Loaded.host` says so with a nearest name).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nixops.errors import UsageError
from nixops.inventory.load import Loaded
from nixops.inventory.model import Host, ManagedRunner
from nixops.inventory.settings import shown, values_of
from nixops.values import HostName

SCHEMA = "nixops/inventory/1"
FORMATS = ("text", "json", "ansible", "ssh-config", "known-hosts", "machines")


def _hosts(loaded: Loaded, host: str | None) -> Iterator[tuple[HostName, Host]]:
    if host is not None:
        yield loaded.host(host)
    else:
        yield from loaded.inventory.hosts.items()


def to_json(loaded: Loaded, host: str | None = None) -> dict[str, Any]:
    """The whole inventory with the origin of each value; schema ``nixops/inventory/1``, see docs/inventory.md."""
    inventory = loaded.inventory
    sections = {
        name: shown(value) if (value := getattr(inventory, name)) is not None else None
        for name in ("default", "forge", "vault", "config", "build", "images", "registries", "cache")
    }
    hosts = {}
    for name, settings in _hosts(loaded, host):
        origins = {}
        for path, _ in values_of(settings):
            origin = loaded.origins[("hosts", name, *path)]
            place = origin.position
            origins[".".join(path)] = {
                "kind": origin.kind,
                "file": place.file if place else None,
                "line": place.line if place else None,
                "column": place.column if place else None,
            }
        hosts[str(name)] = {"settings": shown(settings), "origins": origins}
    return {"schema": SCHEMA, "file": str(loaded.file), **sections, "hosts": hosts}


def identity_file(loaded: Loaded, host: Host) -> str | None:
    """The absolute path of a host's private key, ``~`` expanded, relative paths from the inventory's directory."""
    if host.ssh.identity_file is None:
        return None
    # abspath, not resolve: a link that is rotated must stay a link.
    return os.path.abspath(loaded.base / Path(host.ssh.identity_file).expanduser())  # noqa: PTH100 - as said above


# -- Ansible --------------------------------------------------------------------------------------------------


def to_ansible(loaded: Loaded) -> dict[str, Any]:
    """What ``--list`` of an Ansible inventory script prints: groups, and every host's variables under ``_meta``."""
    inventory = loaded.inventory
    groups: dict[str, list[str]] = {}
    ungrouped: list[str] = []
    for name, host in inventory.hosts.items():
        for group in host.groups:
            groups.setdefault(str(group), []).append(str(name))
        if not host.groups:
            ungrouped.append(str(name))
    return {
        "_meta": {"hostvars": {str(name): ansible_host(loaded, name) for name in inventory.hosts}},
        "all": {"children": ["ungrouped", *groups]},
        "ungrouped": {"hosts": ungrouped},
        **{group: {"hosts": hosts} for group, hosts in groups.items()},
    }


def ansible_host(loaded: Loaded, name: str) -> dict[str, Any]:
    """What ``--host NAME`` of an Ansible inventory script prints: the host's variables.

    Ansible checks host keys against the operator's known_hosts; ``--format known-hosts`` gives what belongs there.
    """
    host_name, host = loaded.host(name)
    variables: dict[str, Any] = {
        "ansible_host": str(host.address),
        "ansible_port": host.port,
        "ansible_user": host.user,
        "ansible_ssh_common_args": f"-o StrictHostKeyChecking=yes -o HostKeyAlias={host_name}",
        "nixops_system": host.system,
        "nixops_host_keys": [str(key) for key in host.host_key],
        "nixops_runners": {
            str(runner): {"managed": isinstance(settings, ManagedRunner), "labels": list(settings.labels)}
            for runner, settings in host.runners.items()
        },
    }
    if (key := identity_file(loaded, host)) is not None:
        variables["ansible_ssh_private_key_file"] = key
    if host.user != "root":
        variables["ansible_become"] = True
    if host.builder is not None:
        variables["nixops_builder"] = shown(host.builder)
    return variables


# -- OpenSSH --------------------------------------------------------------------------------------------------


def to_ssh_config(loaded: Loaded, host: str | None = None) -> str:
    """An OpenSSH client configuration, one ``Host`` block each. Keys are looked up by the inventory's name.

    :raises UsageError: for a path that ssh_config(5) has no way to write.
    """
    blocks = []
    for name, settings in _hosts(loaded, host):
        lines = [
            f"Host {name}",
            f"  HostName {settings.address.replace('%', '%%')}",
            f"  Port {settings.port}",
            f"  User {settings.user}",
            f"  HostKeyAlias {name}",
            "  StrictHostKeyChecking yes",
            f"  ConnectTimeout {max(1, round(settings.ssh.connect_timeout))}",
            f"  ServerAliveInterval {max(1, round(settings.ssh.keepalive))}",
        ]
        if (key := identity_file(loaded, settings)) is not None:
            lines += [f"  IdentityFile {_quoted(name, key)}", "  IdentitiesOnly yes"]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _quoted(name: str, path: str) -> str:
    """A path as one argument of ssh_config: in double quotes, ``%`` and ``${`` kept from being expanded."""
    if '"' in path or "\\" in path or "${" in path:
        raise UsageError(
            f"hosts.{name}.ssh.identity_file: ssh_config cannot hold the path {path!r}",
            hint='use a path without ", \\ and ${',
        )
    return '"' + path.replace("%", "%%") + '"'


def to_known_hosts(loaded: Loaded, host: str | None = None) -> str:
    """A known_hosts file: each pinned key under the inventory's name and under the address with its port.

    A host without a pinned key is a comment that says so.
    """
    lines = []
    for name, settings in _hosts(loaded, host):
        address = str(settings.address) if settings.port == 22 else f"[{settings.address}]:{settings.port}"
        names = ",".join(dict.fromkeys((str(name), address)))
        keys = [" ".join(key.split()[:2]) for key in settings.host_key]
        lines += [f"{names} {key}" for key in keys] or [f"# {name}: no host key pinned; run: invoke trust {name}"]
    return "".join(line + "\n" for line in lines)


# -- Nix ------------------------------------------------------------------------------------------------------


def to_machines(loaded: Loaded, host: str | None = None) -> str:
    """A Nix machines file of the hosts that have ``builder:``.

    The fields of a line are, by the Nix manual ("Remote Builds"): store URI, systems, private key, jobs at once,
    speed factor, features, mandatory features, base64 of the public host key; ``-`` stands for none. A port other
    than 22 has no place in the URI before Nix 2.31 (nix#7044): such a builder goes by its name in the inventory,
    which ``--format ssh-config`` describes to ssh.

    :raises UsageError: for a private key whose path has white space, which a line cannot hold; for a host that is
        no builder.
    """
    lines = []
    for name, settings in _hosts(loaded, host):
        builder = settings.builder
        if builder is None:
            if host is not None:
                raise UsageError(f"{loaded.file}: host {name} has no builder: settings", hint="add builder: {}")
            continue
        place = str(settings.address)
        if ":" in place:
            place = f"[{place}]"
        key = _base64_key(settings)
        if settings.port != 22:
            lines.append(f"# {name} listens on port {settings.port}: ssh finds it by `--format ssh-config`.")
            place = str(name)
        identity = identity_file(loaded, settings) or "-"
        if any(c.isspace() for c in identity):
            raise UsageError(
                f"hosts.{name}.ssh.identity_file: a machines file cannot hold the path {identity!r}",
                hint="use a path without white space",
            )
        fields = (
            f"ssh-ng://{settings.user}@{place}",
            ",".join(builder.systems or (settings.system,)),
            identity,
            str(builder.max_jobs),
            str(builder.speed_factor),
            ",".join(builder.features) or "-",
            ",".join(builder.mandatory_features) or "-",
            key,
        )
        lines.append(" ".join(fields))
    return "".join(line + "\n" for line in lines)


def _base64_key(host: Host) -> str:
    """The pinned key as a machines file has it; one fits, and OpenSSH prefers ed25519."""
    keys = sorted(host.host_key, key=lambda key: not key.startswith("ssh-ed25519"))
    return base64.b64encode(" ".join(keys[0].split()[:2]).encode()).decode() if keys else "-"
