"""The inventory for people: rows of text, drawn by whoever prints them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from nixops.inventory.load import Loaded
from nixops.inventory.model import Host, ManagedRunner
from nixops.inventory.origin import Origin
from nixops.inventory.settings import shown, values_of

HOSTS_HEADER = ("host", "address", "system", "groups", "host key", "builder")
RUNNERS_HEADER = ("host", "runner", "managed", "labels", "scope", "trusted")
VALUES_HEADER = ("name", "value", "origin")


def host_rows(loaded: Loaded) -> Iterator[tuple[str, ...]]:
    """One row for each host: :data:`HOSTS_HEADER`."""
    for name, host in loaded.inventory.hosts.items():
        yield (
            str(name),
            _address(host),
            host.system,
            ", ".join(host.groups) or "-",
            "pinned" if host.host_key else "not pinned",
            f"{host.builder.max_jobs} job{'s' * (host.builder.max_jobs > 1)}" if host.builder else "-",
        )


def runner_rows(loaded: Loaded) -> Iterator[tuple[str, ...]]:
    """One row for each runner: :data:`RUNNERS_HEADER`. The default is marked."""
    default = loaded.inventory.default
    for name, host in loaded.inventory.hosts.items():
        for runner_name, runner in host.runners.items():
            chosen = default is not None and (default.host, default.runner) == (name, runner_name)
            managed = isinstance(runner, ManagedRunner)
            scope = trusted = "-"
            if isinstance(runner, ManagedRunner):
                scope = str(runner.scope) if runner.scope else "one connection per repository"
                trusted = ", ".join(runner.trusted)
            yield (
                str(name),
                f"{runner_name} (default)" if chosen else str(runner_name),
                "yes" if managed else "no",
                ", ".join(runner.labels) or "-",
                scope,
                trusted,
            )


def value_rows(loaded: Loaded, host: str) -> Iterator[tuple[str, ...]]:
    """One row for each value of a host, built-in ones too, with where it comes from: :data:`VALUES_HEADER`."""
    name, settings = loaded.host(host)
    for path, value in values_of(settings):
        yield ".".join(path), _text(shown(value)), _origin(loaded.origins[("hosts", name, *path)])


def _origin(origin: Origin) -> str:
    place = origin.position
    return origin.kind if place is None else f"{place.file}:{place.line} ({origin.kind})"


def _address(host: Host) -> str:
    return str(host.address) if host.port == 22 else f"{host.address} port {host.port}"


def _text(value: Any) -> str:
    """A value as YAML's flow style writes it, near enough to be copied into the file."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "[" + ", ".join(value) + "]"
    return json.dumps(value, ensure_ascii=False)
