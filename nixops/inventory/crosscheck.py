"""What only the whole inventory can tell: names that must exist, things that must differ, claims that must agree."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from nixops.errors import Position
from nixops.inventory import nearest
from nixops.inventory.derived import connections
from nixops.inventory.explain import Problem
from nixops.inventory.model import Host, Inventory, ManagedRunner, RunnerModule
from nixops.inventory.origin import Branch, Path, dotted, find, leaves
from nixops.inventory.positions import Items, Node, Scalar, shorten
from nixops.transport.hostkey import HostKey
from nixops.values import HostName, RunnerName

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
_MANY_LINES: Final = frozenset(("settings", "workflow", "accepted_risks"))
_SECRET_KEY: Final = re.compile(r"(^|[_-])(token|password|passwd|secret|secret[_-]id|private[_-]key)$", re.IGNORECASE)


def cross_check(inventory: Inventory, tree: Branch, groups: Sequence[str]) -> list[Problem]:
    """Everything wrong with an inventory whose parts are each valid.

    :param tree: the merged inventory, for positions.
    :param groups: the names under ``groups:``.
    """
    problems = [
        *_text(tree),
        *_placeholders(inventory, tree),
        *_default(inventory, tree),
        *_cache(inventory, tree),
        *_addresses(inventory, tree),
        *_kv_entries(inventory, tree),
    ]
    for name, host in inventory.hosts.items():
        problems += _host(inventory, tree, groups, name, host)
    return problems


def _at(tree: Branch, *location: str | int, message: str, hint: str | None = None, key: bool = False) -> Problem:
    found = find(tree, location)
    position = found.key if key or found.node is None else found.at
    return Problem(position, dotted(found.path), message, hint)


def _text(tree: Branch) -> Iterator[Problem]:
    """Control characters: they would end a line in a configuration that is made from the value."""
    for leaf in leaves(tree):
        if _MANY_LINES.isdisjoint(leaf.path):
            yield from _text_in(leaf.node, leaf.path, leaf.at)


def _text_in(node: Node, path: Path, at: Position) -> Iterator[Problem]:
    if isinstance(node, Scalar) and isinstance(node.value, str) and (found := _CONTROL.search(node.value)):
        yield Problem(at, dotted(path), f"holds the control character U+{ord(found[0]):04X}", "write it on one line")
    elif isinstance(node, Items):
        for index, item in enumerate(node.items):
            yield from _text_in(item, (*path, index), item.position)


def _placeholders(inventory: Inventory, tree: Branch) -> Iterator[Problem]:
    """A misspelt ``{hots}`` in a path would else show only when the path is used."""
    known = {
        "attribute": ("host",),
        "runner_module": ("host", "runner"),
        "tofu_file": ("host", "runner"),
        "workflow_file": ("host", "runner", "repo"),
    }
    for field, names in known.items() if inventory.config else ():
        for found in re.finditer(r"\{([^{}]*)\}|[{}]", getattr(inventory.config, field)):
            if found[1] not in names:
                message = f"{shorten(found[0])} is no placeholder that can stand here"
                hint = nearest.hint(found[1] or "", names, what="placeholders")
                yield _at(tree, "config", field, message=message, hint=hint)


def _default(inventory: Inventory, tree: Branch) -> Iterator[Problem]:
    default = inventory.default
    if default is None:
        return
    if default.image is not None and default.image not in inventory.images:
        hint = nearest.hint(default.image, inventory.images, what="images")
        yield _at(tree, "default", "image", message=f"there is no image {shorten(default.image)}", hint=hint)
    if default.host is None:
        return
    host = inventory.hosts.get(default.host)
    if host is None:
        hint = nearest.hint(default.host, inventory.hosts, what="hosts")
        yield _at(tree, "default", "host", message=f"there is no host {shorten(default.host)}", hint=hint)
    elif default.runner is not None:
        runner = host.runners.get(default.runner)
        if runner is None:
            hint = nearest.hint(default.runner, host.runners, what="its runners")
            message = f"host {default.host} has no runner {shorten(default.runner)}"
            yield _at(tree, "default", "runner", message=message, hint=hint)
        elif not isinstance(runner, ManagedRunner):
            message = f"runner {default.runner} on {default.host} has managed: false, so no task can work on it"
            managed = [n for n, r in host.runners.items() if isinstance(r, ManagedRunner)]
            hint = f"its managed runners: {nearest.listing(managed)}"
            yield _at(tree, "default", "runner", message=message, hint=hint)


def _cache(inventory: Inventory, tree: Branch) -> Iterator[Problem]:
    cache = inventory.cache
    if cache is not None and cache.host not in inventory.hosts:
        hint = nearest.hint(cache.host, inventory.hosts, what="hosts")
        yield _at(tree, "cache", "host", message=f"there is no host {shorten(cache.host)}", hint=hint)


def _addresses(inventory: Inventory, tree: Branch) -> Iterator[Problem]:
    seen: dict[tuple[str, int], HostName] = {}
    for name, host in inventory.hosts.items():
        place = (host.address.casefold().rstrip("."), host.port)
        if place in seen:
            yield _at(
                tree,
                *("hosts", name, "address"),
                message=f"hosts {seen[place]} and {name} share the address {host.address}, port {host.port}",
                hint="give one host one entry",
            )
        else:
            seen[place] = name


def _kv_entries(inventory: Inventory, tree: Branch) -> Iterator[Problem]:
    """Two runners on one entry would overwrite each other's credential; on one host the model says so already."""
    seen: dict[str, tuple[HostName, RunnerName]] = {}
    for name, host in inventory.hosts.items():
        for runner_name, runner in host.runners.items():
            if not isinstance(runner, ManagedRunner):
                continue
            paths = [str(runner.token.path)]
            if runner.module is RunnerModule.FORGEJO:
                paths = [str(c.kv_path) for c in connections(runner)]
            for path in paths:
                if path in seen:
                    first_host, first = seen[path]
                    yield _at(
                        tree,
                        *("hosts", name, "runners", runner_name, "token", "path"),
                        message=f"shares the token path {path} with runner {first} on {first_host}",
                        hint="give each runner an entry of its own",
                    )
                    break
                seen[path] = (name, runner_name)


def _host(inventory: Inventory, tree: Branch, groups: Sequence[str], name: HostName, host: Host) -> Iterator[Problem]:
    for index, group in enumerate(host.groups):
        if group not in groups:
            hint = nearest.hint(group, groups, what="groups") + '; a group without settings is written "NAME: {}"'
            yield _at(tree, "hosts", name, "groups", index, message=f"there is no group {shorten(group)}", hint=hint)
        elif group in host.groups[:index]:
            yield _at(tree, "hosts", name, "groups", index, message=f"names the group {group} twice", hint="remove one")
    for index, key in enumerate(host.host_key):
        try:
            HostKey.parse(key)
        except ValueError as error:
            hint = f"`invoke trust {name}` writes it; else take it from /etc/ssh/ssh_host_ed25519_key.pub on the host"
            yield _at(tree, "hosts", name, "host_key", index, message=str(error), hint=hint)
    yield from _build(inventory, tree, name, host)
    yield from _empty(tree, name)
    for runner_name, runner in host.runners.items():
        if isinstance(runner, ManagedRunner):
            yield from _runner(inventory, tree, name, runner_name, runner)


def _build(inventory: Inventory, tree: Branch, name: HostName, host: Host) -> Iterator[Problem]:
    where = host.deploy.build
    if where in ("here", "target"):
        return
    builders = {h: b for h, b in inventory.hosts.items() if b.builder is not None}
    other = inventory.hosts.get(HostName(where)) if where in inventory.hosts else None
    if other is None:
        message = f"{shorten(where)} is neither here, target nor a host"
        hint = nearest.hint(where, ["here", "target", *builders])
    elif other.builder is None:
        message = f"host {where} has no builder: settings"
        hint = f"builders: {nearest.listing(builders)}"
    elif host.system not in (other.builder.systems or (other.system,)):
        message = f"builder {where} does not build for {host.system}"
        fitting = [h for h, b in builders.items() if b.builder and host.system in (b.builder.systems or (b.system,))]
        hint = f"builders for it: {nearest.listing(fitting)}"
    else:
        return
    yield _at(tree, "hosts", name, "deploy", "build", message=message, hint=hint)


def _empty(tree: Branch, name: HostName) -> Iterator[Problem]:
    """A runner or a risk with nothing under it is a slip, unless the null takes out an inherited one."""
    hosts = tree.children["hosts"]
    host = hosts.children[name] if isinstance(hosts, Branch) else None
    runners = host.children.get("runners") if isinstance(host, Branch) else None
    if not isinstance(runners, Branch):
        return
    branches = [runners]
    for runner in runners.children.values():
        risks = runner.children.get("accepted_risks") if isinstance(runner, Branch) else None
        if isinstance(risks, Branch):
            branches.append(risks)
    for branch in branches:
        for key, (position, inherited) in branch.removed.items():
            if not inherited:
                yield Problem(position, dotted((*branch.path, key)), "has nothing under it", "describe it or remove it")


def _runner(
    inventory: Inventory, tree: Branch, host: HostName, name: RunnerName, runner: ManagedRunner
) -> Iterator[Problem]:
    here = ("hosts", host, "runners", name)
    for section, why in (("forge", "registers it with"), ("config", "renders it into")):
        if getattr(inventory, section) is None:
            yield _at(
                tree,
                *here,
                key=True,
                message=f"a managed runner needs the top-level section {section}:, which nixops {why}",
                hint="add it, or mark the runner managed: false",
            )
    yield from _scope(tree, here, runner)
    found = find(tree, (*here, "settings"))
    if found.path[-1:] == ("settings",):
        yield from _settings(tree, (*here, "settings"), runner.settings)


def _scope(tree: Branch, here: Path, runner: ManagedRunner) -> Iterator[Problem]:
    scope = runner.scope
    if scope is None:
        return
    if scope.repository is not None:
        if [r.casefold() for r in runner.trusted] != [scope.repository.casefold()]:
            yield _at(
                tree,
                *(*here, "scope", "repository"),
                message=f"this registration admits {scope.repository} alone, but trusted names "
                + nearest.listing(runner.trusted),
                hint="make them the same, or use module: forgejo-runner, which has a connection for each repository",
            )
        return
    owner = scope.user or scope.organization
    if owner is None:
        return
    for index, repository in enumerate(runner.trusted):
        if repository.owner.casefold() != owner.casefold():
            yield _at(
                tree,
                *(*here, "trusted", index),
                message=f"a registration of {scope} does not admit {repository}, which {repository.owner} owns",
                hint="take it out, or use module: forgejo-runner, which has a connection for each repository",
            )


def _settings(tree: Branch, here: Path, settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings end in the Nix store, which everybody on the host can read: no secret may stand there."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _settings(tree, (*here, key), value)
        elif _SECRET_KEY.search(key) and isinstance(value, str) and value:
            yield _at(
                tree,
                *(*here, key),
                key=True,
                message="a secret does not stand in an inventory: settings end in the world-readable Nix store",
                hint="keep it in the vault, and name it under token:",
            )
