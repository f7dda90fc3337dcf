"""Every value of a loaded inventory with its name and its origin, built-in values too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from pydantic import BaseModel

from nixops.inventory.model import Inventory, SecretRef
from nixops.inventory.origin import BUILT_IN, Branch, Leaf, Origin, Tree

Name = tuple[str, ...]


def values_of(value: Any, name: Name = ()) -> Iterator[tuple[Name, Any]]:
    """The leaves of a model: scalars, lists and references to secrets. What is not set is left out."""
    if isinstance(value, BaseModel) and not isinstance(value, SecretRef):
        for field in type(value).model_fields:
            yield from values_of(getattr(value, field), (*name, field))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from values_of(item, (*name, str(key)))
    elif value is not None:
        yield name, value


def shown(value: Any) -> Any:
    """A leaf as it is shown and serialised: a reference to a secret as its description, never a value."""
    if isinstance(value, SecretRef):
        return value.describe()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [shown(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): shown(item) for key, item in value.items()}
    if isinstance(value, BaseModel):
        return {field: shown(getattr(value, field)) for field in type(value).model_fields}
    return str(value) if isinstance(value, str) else value


def origin_of(tree: Branch, name: Name) -> Origin:
    """Where the value of that name stands; ``built-in`` when the file does not hold it."""
    here: Tree = tree
    for step in name:
        if isinstance(here, Leaf):
            break
        child = here.children.get(step)
        if child is None:
            return Origin(BUILT_IN)
        here = child
    return Origin(here.kind, here.key)


def origins_of(inventory: Inventory, tree: Branch) -> dict[Name, Origin]:
    """The origin of every value of the inventory."""
    return {name: origin_of(tree, name) for name, _ in values_of(inventory)}
