"""What pydantic found wrong, as one-line errors at a place in the file, in plain words, with what to write instead."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nixops.errors import InventoryError, Position
from nixops.inventory import nearest
from nixops.inventory.model import Inventory, ManagedRunner, OpenBaoRef, SecretRef, UnmanagedRunner
from nixops.inventory.origin import Branch, Found, Path, dotted, find
from nixops.inventory.positions import Items, Scalar, Table, kind_of, shorten
from nixops.inventory.words import REFERENCE, WORDS, Word

SHOWN: Final = 20
_TAGS: Final[dict[str, type[BaseModel]]] = {"managed": ManagedRunner, "unmanaged": UnmanagedRunner}
_REFERENCES: Final = (SecretRef, OpenBaoRef)

# Which key of the mapping a model's own rule is about, so that the error stands there and not at the mapping.
_RULES: Final = (
    (re.compile(r"leave scope out"), ("scope",)),
    (re.compile(r"trusted names"), ("trusted",)),
    (re.compile(r"runners \S+ and (?P<runner>\S+) share the token path"), ("runners", "{runner}", "token")),
    (re.compile(r"one login"), ("approle",)),
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. ``where`` is what the file calls the place."""

    position: Position
    where: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.position}: {self.text}" + (f" ({self.hint})" if self.hint else "")

    @property
    def text(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


def refuse(problems: Iterable[Problem]) -> None:
    """Nothing, when there are no problems.

    :raises InventoryError: the first of the file as the message, the others as its detail.
    """
    ordered = sorted(
        {str(p): p for p in problems}.values(), key=lambda p: (p.position.file, p.position.line, p.position.column)
    )
    if not ordered:
        return
    first, rest = ordered[0], ordered[1:]
    more = f" (and {len(rest)} more below)" if rest else ""
    detail = "\n".join(str(p).replace("\n", "\\n") for p in rest[:SHOWN])
    if len(rest) > SHOWN:
        detail += f"\n… and {len(rest) - SHOWN} more"
    raise InventoryError(
        first.text.replace("\n", "\\n") + more, position=first.position, hint=first.hint, detail=detail or None
    )


def explain(error: ValidationError, tree: Branch, *, partial: bool = False) -> list[Problem]:
    """Each error of ``error`` at its place in ``tree``.

    :param tree: what was validated, with a child for each field of :class:`.model.Inventory`.
    :param partial: the tree is only part of a host (a group): what is missing may come from elsewhere.
    """
    details = error.errors(include_url=False)
    wrong = {d["loc"] for d in details}
    problems = []
    for detail in details:
        if partial and detail["type"] == "missing":
            continue
        # A tuple whose items are wrong is reported as too short as well: that adds nothing.
        if detail["type"] == "too_short" and any(o[: len(detail["loc"])] == detail["loc"] != o for o in wrong):
            continue
        problems.append(_problem(detail, tree))
    return problems


@dataclass(frozen=True)
class _Spot:
    """A place of the models: the location as the file has it, the model, the field and whether an item of it."""

    location: Path
    model: type[BaseModel]
    field: str | None
    in_field: bool
    is_key: bool
    secret: bool

    @property
    def word(self) -> Word | None:
        return WORDS.get(self.model.__name__, {}).get(self.field or "")


def _spot(location: Sequence[str | int]) -> _Spot:
    """Follow a pydantic location through the models, leaving out what only pydantic has: tags and ``[key]``."""
    kept: list[str | int] = []
    model: type[BaseModel] = Inventory
    here: Any = Inventory
    field: str | None = None
    in_field = secret = is_key = False
    for step in location:
        if step == "[key]":
            is_key = True
            continue
        if here is _TAGS and step in _TAGS:
            here = model = _TAGS[str(step)]
            field = None
            continue
        kept.append(step)
        if isinstance(here, type) and issubclass(here, BaseModel):
            model, field, in_field = here, str(step), False
            info = here.model_fields.get(field)
            here = _bare(info.annotation) if info else None
            secret = secret or here is SecretRef
        elif get_origin(here) is tuple:
            here, in_field = _bare(get_args(here)[0]), True
        elif get_origin(here) is dict:
            here, in_field = _bare(get_args(here)[1]), True
        else:
            here = None
        if isinstance(here, type) and issubclass(here, BaseModel):
            model = here if in_field else model
    secret = secret or issubclass(model, _REFERENCES)
    return _Spot(tuple(kept), model, field, in_field, is_key, secret)


def _bare(annotation: Any) -> Any:
    """An annotation without ``Annotated`` and ``None``; the union of runner kinds becomes its tags."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            members = [_bare(a) for a in get_args(annotation) if a is not type(None)]
            if ManagedRunner in members:
                return _TAGS
            annotation = members[0]
        else:
            return annotation


def _problem(detail: ErrorDetails, tree: Branch) -> Problem:
    spot = _spot(detail["loc"])
    found = find(tree, spot.location)
    where = dotted(found.path)
    kind = detail["type"]
    if kind == "missing":
        return _missing(spot, found)
    if kind == "extra_forbidden":
        return _unknown(spot, found)
    if spot.is_key:
        return Problem(found.key, where, *_key_reason(detail, spot))
    if kind == "value_error":
        return _rule(detail, spot, found, tree)
    message, hint = _mismatch(detail, spot, found)
    return Problem(found.at if found.node is not None else found.key, where, message, hint)


def _missing(spot: _Spot, found: Found) -> Problem:
    name = str(spot.location[-1])
    word = WORDS.get(spot.model.__name__, {}).get(name)
    hint = f"write {name}: {word.example}" if word else None
    if found.removed_at is not None:
        expect = f"; expected {word.expect}" if word else ""
        return Problem(found.removed_at, dotted(found.path), f"has no value{expect}", hint)
    return Problem(found.key, dotted(found.path[:-1]), f"needs the key {name}, which is missing", hint)


def _unknown(spot: _Spot, found: Found) -> Problem:
    name = str(spot.location[-1])
    known = list(spot.model.model_fields)
    what = "known here"
    if spot.model is UnmanagedRunner:
        what = "a runner with managed: false has only"
    return Problem(found.key, dotted(found.path), "unknown key", nearest.hint(name, known, what=what))


def _key_reason(detail: ErrorDetails, spot: _Spot) -> tuple[str, str | None]:
    if detail["type"] == "value_error":
        return _reason(detail), "rename it"
    return f"{shorten(str(spot.location[-1]))} is not a name of letters, digits, '.', '_' and '-'", "rename it"


def _reason(detail: ErrorDetails) -> str:
    text = str(detail.get("ctx", {}).get("error", detail["msg"]))
    return text if len(text) <= 300 else text[:299] + "…"


def _rule(detail: ErrorDetails, spot: _Spot, found: Found, tree: Branch) -> Problem:
    reason = _reason(detail)
    if spot.secret and isinstance(found.node, Scalar):
        # The text of a checked string quotes the value, which may be the secret itself, put in the wrong place.
        word = spot.word
        return Problem(found.at, dotted(found.path), f"expected {word.expect if word else REFERENCE}", _example(spot))
    if isinstance(found.node, Scalar):
        hint = _example(spot)
        if str(found.node.value).startswith("-"):
            hint = "a program would take it for an option; remove the dash"
        elif isinstance(found.node.value, str) and found.node.value != found.node.value.strip():
            hint = "remove the white space around it"
        return Problem(found.at, dotted(found.path), reason, hint)
    for pattern, below in _RULES:
        if match := pattern.search(reason):
            location = (*spot.location, *(step.format(**match.groupdict()) for step in below))
            at = find(tree, location)
            if at.node is not None or len(at.path) >= len(location):
                return Problem(at.key, dotted(at.path), reason, _rule_hint(reason))
    return Problem(found.key, dotted(found.path), reason, _rule_hint(reason))


def _rule_hint(reason: str) -> str | None:
    if "secret reference" in reason:
        return "such as {env: NAME} or {file: PATH}"
    if "share the token path" in reason:
        return "give each runner an entry of its own"
    if "names exactly one of repository" in reason:
        return "such as {user: NAME}"
    return None


def _mismatch(detail: ErrorDetails, spot: _Spot, found: Found) -> tuple[str, str | None]:
    kind, word, node = detail["type"], spot.word, found.node
    is_item = spot.in_field and word is not None and bool(word.item)
    expect = (word.item if is_item else word.expect) if word else _generic(detail)
    if spot.model is not Inventory and spot.in_field and not is_item:
        expect = _generic(detail)
    if spot.secret and isinstance(node, Scalar):
        if word is not None and word.expect == REFERENCE:
            return (
                f"expected {REFERENCE}, found a bare value (not shown, as it may be the secret)",
                f"write {spot.field}: {word.example}; a secret itself never stands in an inventory",
            )
        return f"expected {expect}, found something else (not shown, as it may be a secret)", _example(spot)
    if kind == "too_short" and isinstance(node, Items):
        return "the list is empty", _example(spot) or "name at least one"
    if kind == "too_short":
        return f"expected {expect}, found none", _example(spot)
    got = kind_of(node) if node is not None else "a mapping"
    message = f"expected {expect}, found {got}"
    if isinstance(node, Scalar) and node.written == "" and isinstance(node.value, str):
        message = f"expected {expect}, found an empty text"
    return message, _advice(kind, spot, node)


def _generic(detail: ErrorDetails) -> str:
    names = {
        "string_type": "text",
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "tuple_type": "a list",
    }
    return names.get(detail["type"], "another value")


def _advice(kind: str, spot: _Spot, node: Any) -> str | None:
    """What to write instead."""
    if spot.field == "labels" and spot.in_field and isinstance(node, Scalar):
        bare = node.written
        if re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", bare):
            return f'write "{bare}:host"; a bare label means docker'
        return 'a schema is host, docker://IMAGE or lxc://IMAGE, such as "native:host"'
    if isinstance(node, Scalar) and kind == "string_type" and not isinstance(node.value, str):
        if spot.field == "CPUQuota":
            return f'write "{node.written}%"'
        return f'quote it: "{node.written}"'
    if isinstance(node, Scalar) and isinstance(node.value, str):
        if kind in ("int_type", "float_type", "bool_type", "literal_error", "float_parsing"):
            unquoted = _EXACT.fullmatch(node.value)
            return "write it without quotes" if unquoted else _example(spot)
        if kind == "tuple_type" and spot.field:
            return f'write {spot.field}: ["{node.value}"]' if len(node.value) < 60 else _example(spot)
        if kind == "enum" and (close := nearest.nearest(node.value, _choices(spot))):
            return f"did you mean {close}?"
    if kind == "tuple_type" and isinstance(node, Table):
        return _example(spot)
    return _example(spot)


_EXACT: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)(\.[0-9]+)?|true|false")


def _choices(spot: _Spot) -> list[str]:
    info = spot.model.model_fields.get(spot.field or "")
    annotation = _bare(info.annotation) if info else None
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(member.value) for member in annotation]
    return []


def _example(spot: _Spot) -> str | None:
    word = spot.word
    return f"such as {spot.field}: {word.example}" if word and spot.field else None
