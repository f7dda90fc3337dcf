"""Reading an inventory: YAML with positions, ``defaults → group → host`` merged, validated, cross-checked.

The file's top-level keys are ``forge``, ``vault``, ``config``, ``default``, ``defaults`` (host settings),
``groups`` (name → host settings) and ``hosts``. Mappings merge deeply, lists and scalars replace, an explicit
null takes out what was inherited.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from nixops.errors import InventoryError, Position, UsageError
from nixops.inventory import nearest
from nixops.inventory.crosscheck import cross_check
from nixops.inventory.explain import Problem, explain, refuse
from nixops.inventory.model import Host, Inventory, ManagedRunner
from nixops.inventory.origin import DEFAULT, HOST, INVENTORY, Branch, Leaf, Origin, Tree, dotted, layer, merge, plain
from nixops.inventory.positions import Entry, Items, Scalar, Table, kind_of, parse, shorten
from nixops.inventory.settings import origins_of
from nixops.inventory.source import read_text
from nixops.values import HostName, RunnerName

DEFAULT_FILE: Final = Path("inventory/hosts.yml")
_SERVICES: Final = ("forge", "vault", "config", "default", "build", "images", "registries", "cache")
_SECTIONS: Final = (*_SERVICES, "defaults", "groups", "hosts")
# Names that Ansible's inventory format gives a meaning of its own.
_RESERVED: Final = ("all", "ungrouped", "_meta")
MAX_MERGED: Final = 1_000_000


@dataclass(frozen=True)
class Loaded:
    """An inventory that holds, the file it came from, and where each value stands in it."""

    inventory: Inventory
    file: Path
    tree: Branch

    @property
    def base(self) -> Path:
        """The directory that relative paths in the inventory start from."""
        return self.file.parent

    @cached_property
    def origins(self) -> Mapping[tuple[str, ...], Origin]:
        """The origin of every value: ``("hosts", "nix-cache02", "address")`` → ``host, inventory/hosts.yml:14``."""
        return origins_of(self.inventory, self.tree)

    def host(self, name: str) -> tuple[HostName, Host]:
        """The host of that name.

        :raises UsageError: with the nearest name, when there is none.
        """
        for known, host in self.inventory.hosts.items():
            if known == name:
                return known, host
        raise UsageError(
            f"{self.file}: there is no host {shorten(name)}",
            hint=nearest.hint(name, self.inventory.hosts, what="hosts"),
        )

    def runner(self, host: str, name: str) -> tuple[RunnerName, ManagedRunner]:
        """The runner of that name, which nixops manages.

        :raises UsageError: when there is none, with the nearest name, or when it is ``managed: false``.
        """
        host_name, settings = self.host(host)
        for known, runner in settings.runners.items():
            if known != name:
                continue
            if isinstance(runner, ManagedRunner):
                return known, runner
            raise UsageError(
                f"{self.file}: runner {known} on {host_name} has managed: false: it is known, and left alone",
                hint=f"runners to choose from: {nearest.listing(self._managed(settings))}",
            )
        raise UsageError(
            f"{self.file}: host {host_name} has no runner {shorten(name)}",
            hint=nearest.hint(name, settings.runners, what="its runners"),
        )

    def group(self, name: str) -> tuple[HostName, ...]:
        """The hosts that list the group, in the file's order.

        :raises UsageError: when no host does, with the nearest name.
        """
        hosts = tuple(h for h, host in self.inventory.hosts.items() if name in host.groups)
        if hosts:
            return hosts
        known = dict.fromkeys(g for host in self.inventory.hosts.values() for g in host.groups)
        raise UsageError(
            f"{self.file}: no host is in a group {shorten(name)}", hint=nearest.hint(name, known, what="groups")
        )

    def default_target(self) -> tuple[HostName, RunnerName]:
        """What a task works on that was called bare: :meth:`target` without names."""
        return self.target(None, None)

    def target(self, host: str | None, runner: str | None) -> tuple[HostName, RunnerName]:
        """The host and the runner meant, with what was left out taken from ``default:`` or from there being one.

        :raises UsageError: for an unknown name, and listing the choices where it is not clear what is meant.
        """
        default = self.inventory.default
        if host is None:
            if default is None or default.host is None:
                raise UsageError(f"{self.file}: which runner? The inventory has no default host", hint=self._choices())
            host = default.host
        host_name, settings = self.host(host)
        if runner is None:
            managed = self._managed(settings)
            if default is not None and default.host == host_name and default.runner is not None:
                runner = default.runner
            elif len(managed) == 1:
                runner = managed[0]
            elif managed:
                raise UsageError(
                    f"{self.file}: which runner on {host_name}? Name one with --runner", hint=self._choices()
                )
            else:
                raise UsageError(f"{self.file}: host {host_name} has no managed runner", hint=self._choices())
        return host_name, self.runner(host_name, runner)[0]

    @staticmethod
    def _managed(host: Host) -> list[RunnerName]:
        return [name for name, runner in host.runners.items() if isinstance(runner, ManagedRunner)]

    def _choices(self) -> str:
        pairs = [f"--host {h} --runner {r}" for h, host in self.inventory.hosts.items() for r in self._managed(host)]
        if not pairs:
            return "no host has a managed runner"
        return "choose: " + "; ".join(pairs[:12]) + (f"; and {len(pairs) - 12} more" if len(pairs) > 12 else "")


def load(path: Path) -> Loaded:
    """Read, merge, validate and cross-check an inventory.

    :param path: the file; positions in errors call it as it is given here.
    :raises InventoryError: at the first thing wrong in the file's order; ``detail`` has the others.
    """
    root = parse(read_text(path), str(path))
    problems = [
        Problem(entry.key, dotted((name,)), "unknown key", nearest.hint(name, _SECTIONS, what="known here"))
        for name, entry in root.entries.items()
        if name not in _SECTIONS
    ]
    problems += _shapes(root)
    refuse(problems)
    tree, parts = _merged(root)
    problems = []
    for part in parts:
        problems += _partial(part)
    try:
        inventory = Inventory.model_validate(plain(tree))
    except ValidationError as error:
        refuse([*problems, *explain(error, tree)])
        raise AssertionError("a validation error explains itself") from error
    groups = _section(root, "groups")
    refuse([*problems, *cross_check(inventory, tree, list(groups.entries) if groups else [])])
    return Loaded(inventory, path, tree)


def locate(given: str | Path, directory: Path) -> Path:
    """The inventory a task reads: the one named; for the default name also the one in a directory above.

    :param directory: where the task runs; Invoke itself finds ``tasks.py`` in the directories above too.
    """
    path = Path(given)
    if path == DEFAULT_FILE and not (directory / path).exists():
        # `invoke -r CHECKOUT` runs from anywhere: the checkout that these tasks belong to comes last.
        for above in (*directory.parents, Path(__file__).resolve().parents[2]):
            if (above / path).is_file():
                return above / path
    return path.expanduser()


def _section(root: Table, name: str) -> Table | None:
    entry = root.entries.get(name)
    return entry.value if entry and isinstance(entry.value, Table) else None


def _is_null(entry: Entry) -> bool:
    return isinstance(entry.value, Scalar) and entry.value.value is None


def _shapes(root: Table) -> list[Problem]:
    """What merging needs to hold: sections, groups and hosts are mappings; groups stand only in hosts."""
    problems: list[Problem] = []

    def mapping(entry: Entry, where: str, what: str) -> bool:
        if isinstance(entry.value, Table) or _is_null(entry):
            return True
        problems.append(Problem(entry.at, where, f"expected {what}, found {kind_of(entry.value)}"))
        return False

    for section in ("defaults", "groups", "hosts"):
        if section in root.entries:
            mapping(root.entries[section], section, "a mapping")
    inherited = [(("defaults",), root.entries["defaults"])] if "defaults" in root.entries else []
    if groups := _section(root, "groups"):
        for name, entry in groups.entries.items():
            if mapping(entry, dotted(("groups", name)), "a mapping of host settings"):
                inherited.append((("groups", name), entry))  # type: ignore[arg-type]  # paths of any length
            if name in _RESERVED:
                problems.append(
                    Problem(
                        entry.key, dotted(("groups", name)), "is a name that Ansible's format reserves", "rename it"
                    )
                )
    for path, entry in inherited:
        if isinstance(entry.value, Table) and "groups" in entry.value.entries:
            problems.append(
                Problem(
                    entry.value.entries["groups"].key,
                    dotted((*path, "groups")),
                    "groups are listed by a host, not by the defaults or a group",
                    "move it into the hosts",
                )
            )
    if hosts := _section(root, "hosts"):
        for name, entry in hosts.entries.items():
            mapping(entry, dotted(("hosts", name)), "a mapping of host settings")
    return problems


def _merged(root: Table) -> tuple[Branch, list[Branch]]:
    """The whole inventory with its hosts merged, and the layers that stand alone (the defaults and each group)."""
    top = root.position
    children: dict[str, Tree] = {}
    removed = {name: (entry.key, False) for name, entry in root.entries.items() if _is_null(entry)}
    for name in _SERVICES:
        if name in root.entries and not _is_null(root.entries[name]):
            entry = root.entries[name]
            value = entry.value
            if isinstance(value, Table):
                children[name] = layer(value, INVENTORY, (name,), entry.key)
            else:
                children[name] = Leaf(value, INVENTORY, entry.key, entry.at, (name,))
    lowest = _layer(root, ("defaults",), root.entries.get("defaults"), DEFAULT)
    groups: dict[str, Branch] = {}
    if section := _section(root, "groups"):
        groups = {n: _layer(root, ("groups", n), e, f"group {n}") for n, e in section.entries.items()}
    if "hosts" in root.entries and "hosts" not in removed:
        entry = root.entries["hosts"]
        hosts: dict[str, Tree] = {}
        section = _section(root, "hosts")
        assert section is not None  # _shapes saw to it
        _bounded(root, section)
        for name, host in section.entries.items():
            own = _layer(root, ("hosts", name), host, HOST)
            layers = [lowest, *(groups[g] for g in _listed(own) if g in groups), own]
            hosts[name] = merge(layers)
        children["hosts"] = Branch(hosts, INVENTORY, entry.key, entry.at, ("hosts",))
    tree = Branch(children, INVENTORY, top, top, (), removed)
    return tree, [lowest, *groups.values()]


def _layer(root: Table, path: tuple[str, ...], entry: Entry | None, kind: str) -> Branch:
    if entry is not None and isinstance(entry.value, Table):
        return layer(entry.value, kind, path, entry.key)
    place = entry.key if entry else root.position
    return Branch({}, kind, place, place, path)


def _listed(host: Branch) -> list[str]:
    """The groups a host lists, each once; anything wrong in the list is left to validation."""
    groups = host.children.get("groups")
    if not isinstance(groups, Leaf) or not isinstance(groups.node, Items):
        return []
    names = [item.value for item in groups.node.items if isinstance(item, Scalar) and isinstance(item.value, str)]
    return list(dict.fromkeys(names))


def _bounded(root: Table, hosts: Table) -> None:
    """Refuse a file whose merged form would be huge: every host takes in the defaults and its groups."""
    defaults, groups = _section(root, "defaults"), _section(root, "groups")
    each = (defaults.size if defaults else 0) + (groups.size if groups else 0)
    if hosts.size + len(hosts.entries) * each > MAX_MERGED:
        raise InventoryError(f"merged, this is more than {MAX_MERGED} values", position=hosts.position)


def _partial(part: Branch) -> list[Problem]:
    """What is wrong in the defaults or in a group, also where no host uses it."""
    here: Position = part.key
    stand_in = Branch({"part": part}, part.kind, here, here, ())
    whole = Branch({"hosts": stand_in}, part.kind, here, here, ())
    try:
        Inventory.model_validate(plain(whole))
    except ValidationError as error:
        return explain(error, whole, partial=True)
    return []
