"""Merging ``defaults → group → host`` over nodes, so that every value keeps the place it came from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from nixops.errors import Position
from nixops.inventory.positions import Items, Node, Scalar, Table

INVENTORY: Final = "inventory"
DEFAULT: Final = "default"
HOST: Final = "host"
BUILT_IN: Final = "built-in"

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    :ivar kind: ``default``, ``group <name>``, ``host``, ``built-in``, or ``inventory`` for what stands outside of
        ``hosts``.
    :ivar position: where it is written; ``None`` for ``built-in``.
    """

    kind: str
    position: Position | None = None

    def __str__(self) -> str:
        return self.kind if self.position is None else f"{self.kind}, {self.position.file}:{self.position.line}"


@dataclass(frozen=True)
class Leaf:
    """A scalar or a list: what merging replaces as a whole. ``path`` is where it stands in the file."""

    node: Scalar | Items
    kind: str
    key: Position
    at: Position
    path: Path


@dataclass(frozen=True)
class Branch:
    """A mapping: what merging goes into.

    :ivar removed: keys that an explicit null took out, where the null stands, and whether there was anything.
    """

    children: Mapping[str, Tree]
    kind: str
    key: Position
    at: Position
    path: Path
    removed: Mapping[str, tuple[Position, bool]] = field(default_factory=dict)


Tree = Branch | Leaf


def layer(node: Table, kind: str, path: Path, key: Position | None = None) -> Branch:
    """One layer's mapping as a tree: explicit nulls become removals."""
    children: dict[str, Tree] = {}
    removed: dict[str, tuple[Position, bool]] = {}
    for name, entry in node.entries.items():
        if isinstance(entry.value, Scalar) and entry.value.value is None:
            removed[name] = (entry.key, False)
        elif isinstance(entry.value, Table):
            children[name] = layer(entry.value, kind, (*path, name), entry.key)
        else:
            children[name] = Leaf(entry.value, kind, entry.key, entry.at, (*path, name))
    return Branch(children, kind, key or node.position, node.position, path, removed)


def merge(layers: Sequence[Branch]) -> Branch:
    """The layers over each other, the last one strongest: mappings deeply, lists and scalars replaced."""
    merged = layers[0]
    for upper in layers[1:]:
        merged = _over(merged, upper)
    return merged


def _over(lower: Branch, upper: Branch) -> Branch:
    children = dict(lower.children)
    removed = dict(lower.removed)
    for name, (position, _) in upper.removed.items():
        removed[name] = (position, children.pop(name, None) is not None)
    for name, tree in upper.children.items():
        below = children.get(name)
        removed.pop(name, None)
        if isinstance(tree, Branch) and isinstance(below, Branch) and not _one_value(tree.path):
            children[name] = _over(below, tree)
        else:
            children[name] = tree
    return Branch(children, upper.kind, upper.key, upper.at, upper.path, removed)


def _one_value(path: Path) -> bool:
    """Whether the mapping is one value spelled as a mapping, of which two halves from two layers make none."""
    return path[-1] in ("scope", "sudo_password") and "settings" not in path


def plain(tree: Tree) -> Any:
    """The values alone, as dicts, lists and scalars."""
    if isinstance(tree, Branch):
        return {name: plain(child) for name, child in tree.children.items()}
    return _plain_node(tree.node)


def _plain_node(node: Node) -> Any:
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Items):
        return [_plain_node(item) for item in node.items]
    return {name: _plain_node(entry.value) for name, entry in node.entries.items()}


@dataclass(frozen=True)
class Found:
    """What :func:`find` found: the place of the key, of the value, and what the file calls it."""

    key: Position
    at: Position
    path: Path
    node: Node | None
    removed_at: Position | None = None


def find(tree: Branch, location: Path) -> Found:
    """The innermost thing on the way along ``location`` that the file holds.

    ``path`` of the result is the whole ``location`` as the file calls it, even where its last steps are missing
    there; ``removed_at`` is set when an explicit null took the last step out.
    """
    here: Tree = tree
    removed: Position | None = None
    for depth, step in enumerate(location):
        if isinstance(here, Leaf):
            return _inside(here, location[depth:])
        child = here.children.get(str(step))
        if child is None:
            removed = here.removed[str(step)][0] if str(step) in here.removed else None
            return Found(here.key, here.at, (*here.path, *location[depth:]), None, removed)
        here = child
    return Found(here.key, here.at, here.path, here.node if isinstance(here, Leaf) else None)


def _inside(leaf: Leaf, rest: Path) -> Found:
    node: Node | None = leaf.node
    key, at = leaf.key, leaf.at
    for step in rest:
        if isinstance(node, Scalar):
            # One value that stands for a list of one (`host_key`): the file has no index there.
            return Found(key, at, leaf.path, node)
        if isinstance(node, Items) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
            key = at = node.position
        elif isinstance(node, Table) and str(step) in node.entries:
            entry = node.entries[str(step)]
            key, at, node = entry.key, entry.at, entry.value
        else:
            node = None
            break
    return Found(key, at, (*leaf.path, *rest), node)


def leaves(tree: Tree) -> Iterator[Leaf]:
    """Every leaf of the tree, in the file's order of each mapping."""
    if isinstance(tree, Leaf):
        yield tree
    else:
        for child in tree.children.values():
            yield from leaves(child)


_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")


def dotted(path: Path) -> str:
    """``hosts.nix-cache02.runners.actions2.labels[0]``; a name that holds other characters is quoted."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            name = step if len(step) <= 60 else step[:59] + "…"
            bare = name if _BARE.fullmatch(name) else '"' + name.replace("\n", "\\n").replace('"', '\\"') + '"'
            text += f".{bare}" if text else bare
    return text
