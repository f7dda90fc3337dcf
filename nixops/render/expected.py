"""What evaluating the user's flake must give back, once the rendered module is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nixops.inventory.derived import connections, runner_unit, secret_unit
from nixops.inventory.model import Inventory, RunnerModule
from nixops.render.context import RunnerFacts, forge_url, isolation, managed, service_config, settings
from nixops.values import HostName, RunnerName


@dataclass(frozen=True)
class Expected:
    """An attribute of the host's configuration and the value that we rendered for it.

    :ivar packages: the value is a list of attribute paths below ``pkgs``; the packages' names are compared.
    """

    path: tuple[str, ...]
    value: Any
    packages: bool = False

    @property
    def name(self) -> str:
        """``services.gitea-actions-runner.instances.actions2.name``."""
        return ".".join(p if re.fullmatch(r"[A-Za-z_][\w'-]*", p) else f'"{p}"' for p in self.path)


def instance_path(inventory: Inventory, host: HostName, runner: RunnerName) -> tuple[str, ...]:
    """The attribute path of the runner's instance."""
    _, found = managed(inventory, host, runner)
    return ("services", str(found.module), "instances", str(runner))


def expectations(inventory: Inventory, host: HostName, runner: RunnerName, facts: RunnerFacts) -> tuple[Expected, ...]:
    """Every attribute that our module sets for the instance and its unit, one by one."""
    _, found = managed(inventory, host, runner)
    at = instance_path(inventory, host, runner)
    wanted = [
        Expected((*at, "enable"), True),
        Expected((*at, "hostPackages"), list(found.packages), packages=True),
    ]
    values = settings(inventory, runner, found, facts)
    if found.module is RunnerModule.GITEA:
        wanted += [
            Expected((*at, "name"), found.name),
            Expected((*at, "url"), forge_url(inventory)),
            Expected((*at, "tokenFile"), str(found.token_path)),
            Expected((*at, "labels"), list(found.labels)),
        ]
    else:
        for connection in connections(found):
            secrets = (*at, "secrets", "server", "connections", connection.name, "token_url")
            wanted.append(Expected(secrets, connection.file))
            # What the module makes of a null token is its own affair; that none is set is ours.
            del values["server"]["connections"][connection.name]["token"]
    wanted += [Expected((*at, "settings", *path), value) for path, value in _leaves(values)]
    unit = ("systemd", "services", runner_unit(runner, found), "serviceConfig")
    service = {**service_config(found), **isolation(runner, found)}
    wanted += [Expected((*unit, key), value) for key, value in service.items()]
    wanted.append(Expected(("systemd", "services", secret_unit(runner), "serviceConfig", "Type"), "oneshot"))
    return tuple(wanted)


def expected_values(inventory: Inventory, host: HostName, runner: RunnerName, facts: RunnerFacts) -> Mapping[str, Any]:
    """The same by attribute name; ``hostPackages`` as attribute paths below ``pkgs``."""
    return {e.name: e.value for e in expectations(inventory, host, runner, facts)}


def _leaves(values: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found += [((key, *path), leaf) for path, leaf in _leaves(value)]
        else:
            found.append(((key,), value))
    return found
