"""YAML as nodes that know where they stand.

PyYAML's parser gives events; they are composed here, so that depth, size and aliases are bounded while reading,
no tag is ever executed, duplicate keys are errors, and each key and value keeps its line and column. Scalars
resolve as in YAML 1.2's core schema, with YAML 1.1's ``yes``/``no``/``on``/``off`` still booleans (people write
them); octal (``022``), base-60 (``1:30``) and dates stay text, since nobody who writes them means the number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import yaml
from yaml import events

from nixops.errors import InventoryError, Position
from nixops.inventory.source import syntax_error

MAX_DEPTH: Final = 60
MAX_VALUES: Final = 500_000

ScalarValue = str | int | float | bool | None

_NULL: Final = frozenset(("", "~", "null", "Null", "NULL"))
_BOOL: Final = {
    form: value
    for word, value in (("yes", True), ("true", True), ("on", True), ("no", False), ("false", False), ("off", False))
    for form in (word, word.capitalize(), word.upper())
}
_INT: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)?\.[0-9]+([eE][-+]?[0-9]+)?")
_TAG: Final = "tag:yaml.org,2002:"

Place = tuple[int, int]


@dataclass(frozen=True)
class Scalar:
    """A single value. ``written`` is its text in the file; ``end`` the line and column after it, from 1."""

    value: ScalarValue
    written: str
    position: Position
    end: Place
    block: bool = False

    @property
    def size(self) -> int:
        return 1


@dataclass(frozen=True)
class Items:
    """A list. ``size`` counts the values in it with aliases expanded."""

    items: tuple[Node, ...]
    position: Position
    end: Place
    size: int


@dataclass(frozen=True)
class Entry:
    """One key of a mapping: where the key stands, where its value is written here, and the value.

    ``shared`` is true for what came through an alias or a merge key, and so is written elsewhere too.
    """

    key: Position
    at: Position
    value: Node
    shared: bool = False


@dataclass(frozen=True)
class Table:
    """A mapping with text keys, in the file's order. ``flow`` is true for the ``{…}`` style."""

    entries: Mapping[str, Entry]
    position: Position
    end: Place
    size: int
    flow: bool = False


Node = Scalar | Items | Table


def kind_of(node: Node) -> str:
    """What a node is, in the words of an error message, with its value where that is short."""
    if isinstance(node, Table):
        return "a mapping"
    if isinstance(node, Items):
        return "a list"
    match node.value:
        case None:
            return "nothing"
        case bool():
            word = "true" if node.value else "false"
            return word if node.written.lower() == word else f"{word} (YAML reads a bare {node.written} so)"
        case int() | float():
            return f"the number {node.written}"
    return f"the text {shorten(node.written)}"


def shorten(text: str, limit: int = 80) -> str:
    """``text`` quoted for a message, cut to ``limit`` characters, with a password in a URL left out."""
    text = re.sub(r"(://[^/@\s:]*:?)[^/@\s]*@", r"\1***@", text)
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def parse(text: str, name: str) -> Table:
    """The one document of ``text`` as a mapping.

    :param name: what positions call the file: its path as the user gave it.
    :raises InventoryError: for YAML that is wrong, with the position.
    """
    try:
        return _Composer(text, name).document()
    except yaml.MarkedYAMLError as error:
        raise syntax_error(error, text, name) from None
    except yaml.YAMLError as error:
        raise InventoryError(f"not YAML: {error}", position=Position(name, 1, 1)) from None


class _Composer:
    """Turns events into nodes."""

    def __init__(self, text: str, name: str) -> None:
        self._name = name
        # The binding to libyaml is many times faster and is in every wheel; the events are the same.
        loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
        self._events: Iterator[events.Event] = yaml.parse(text, Loader=loader)
        self._anchors: dict[str, Node | None] = {}
        self._size = 0

    def document(self) -> Table:
        event = self._next()
        while isinstance(event, (events.StreamStartEvent, events.DocumentStartEvent)):
            event = self._next()
        if isinstance(event, events.StreamEndEvent):
            raise self._error("the inventory is empty", Position(self._name, 1, 1), hint='it needs at least "hosts:"')
        root = self._node(event, 0)
        following = [e for e in self._events if isinstance(e, events.DocumentStartEvent)]
        if following:
            raise self._error(
                "a second document begins here", self._start(following[0]), hint="an inventory is one YAML document"
            )
        if isinstance(root, Table):
            return root
        if isinstance(root, Scalar) and root.value is None:
            raise self._error("the inventory is empty", root.position, hint='it needs at least "hosts:"')
        raise self._error(
            f"an inventory is a mapping, found {kind_of(root)}",
            root.position,
            hint='it begins with a key such as "hosts:"',
        )

    def _next(self) -> events.Event:
        return next(self._events)

    def _start(self, event: events.Event) -> Position:
        line, column = _place(event.start_mark)
        return Position(self._name, line, column)

    @staticmethod
    def _end(event: events.Event) -> Place:
        return _place(event.end_mark)

    @staticmethod
    def _error(message: str, position: Position, hint: str | None = None) -> InventoryError:
        return InventoryError(message, position=position, hint=hint)

    def _node(self, event: events.Event, depth: int) -> Node:
        at = self._start(event)
        if depth > MAX_DEPTH:
            raise self._error(f"nested more than {MAX_DEPTH} levels deep", at)
        if isinstance(event, events.AliasEvent):
            return self._alias(event, at)
        anchor: str | None = getattr(event, "anchor", None)
        if anchor is not None:
            # Known as unfinished, so that an alias to it from inside is told from one to nothing.
            self._anchors[anchor] = None
        if isinstance(event, events.ScalarEvent):
            node: Node = self._scalar(event, at)
        elif isinstance(event, events.SequenceStartEvent):
            self._collection_tag(event, at, "seq")
            node = self._items(at, depth, flow=bool(event.flow_style))
        else:
            assert isinstance(event, events.MappingStartEvent)
            self._collection_tag(event, at, "map")
            node = self._table(at, depth, flow=bool(event.flow_style))
        if anchor is not None:
            self._anchors[anchor] = node
        return node

    def _alias(self, event: events.AliasEvent, at: Position) -> Node:
        name = str(event.anchor)
        if name not in self._anchors:
            raise self._error(f"the alias *{name} has no anchor &{name} before it", at)
        node = self._anchors[name]
        if node is None:
            raise self._error(f"the alias *{name} stands inside of its own anchor", at)
        return node

    def _count(self, size: int, at: Position) -> int:
        if size > MAX_VALUES:
            raise self._error(f"aliases make this more than {MAX_VALUES} values", at)
        return size

    def _collection_tag(self, event: events.CollectionStartEvent, at: Position, tag: str) -> None:
        if event.tag not in (None, "!", _TAG + tag):
            raise self._foreign_tag(event.tag, at)

    def _foreign_tag(self, tag: str, at: Position) -> InventoryError:
        short = "!!" + tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag
        return self._error(f"the tag {shorten(short)} means nothing in an inventory", at, hint="remove it")

    def _items(self, at: Position, depth: int, *, flow: bool) -> Items:
        items: list[Node] = []
        size, last = 1, None
        while not isinstance(event := self._next(), events.SequenceEndEvent):
            node = self._node(event, depth + 1)
            items.append(node)
            size = self._count(size + node.size, at)
            last = self._end(event) if isinstance(event, events.AliasEvent) else node.end
        # What is in block style ends, for the parser, where the next token begins; its text ends with its last item.
        return Items(tuple(items), at, last if last and not flow else self._end(event), size)

    def _table(self, at: Position, depth: int, *, flow: bool) -> Table:
        entries: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        size, last = 1, None
        while not isinstance(event := self._next(), events.MappingEndEvent):
            key = self._start(event)
            is_merge = isinstance(event, events.ScalarEvent) and event.value == "<<" and event.implicit[0]
            name = "<<" if is_merge else self._key(self._node(event, depth + 1), key)
            event = self._next()
            value = self._node(event, depth + 1)
            size = self._count(size + value.size, at)
            aliased = isinstance(event, events.AliasEvent)
            last = self._end(event) if aliased else value.end
            if is_merge:
                for more, entry in self._merge_key(value, self._start(event)):
                    merged.setdefault(more, entry)
                continue
            if name in entries:
                first = entries[name].key
                raise self._error(
                    f"the key {shorten(name)} stands twice in one mapping, first at {first}",
                    key,
                    hint="remove one of them",
                )
            entries[name] = Entry(key, self._start(event), value, shared=aliased)
        end = last if last and not flow else self._end(event)
        return Table({**{k: e for k, e in merged.items() if k not in entries}, **entries}, at, end, size, flow)

    def _merge_key(self, value: Node, at: Position) -> Iterator[tuple[str, Entry]]:
        tables = value.items if isinstance(value, Items) else (value,)
        for table in tables:
            if not isinstance(table, Table):
                raise self._error(f'"<<" merges mappings, found {kind_of(table)}', at, hint="write <<: *anchor")
            for name, entry in table.entries.items():
                yield name, Entry(entry.key, entry.at, entry.value, shared=True)

    def _key(self, node: Node, at: Position) -> str:
        if isinstance(node, Scalar) and isinstance(node.value, str):
            return node.value
        quoted = f'quote it: "{node.written}"' if isinstance(node, Scalar) and node.value is not None else None
        raise self._error(f"a key is text, found {kind_of(node)}", at, hint=quoted)

    def _scalar(self, event: events.ScalarEvent, at: Position) -> Scalar:
        written = str(event.value)
        tag = event.tag
        if tag is None:
            value = self._resolve(written, at) if event.implicit[0] else written
        elif tag in ("!", _TAG + "str"):
            value = written
        elif tag in (_TAG + "int", _TAG + "float", _TAG + "bool", _TAG + "null"):
            value = self._resolve(written, at)
            kinds: dict[str, tuple[type, ...]] = {
                "int": (int,),
                "float": (float, int),
                "bool": (bool,),
                "null": (type(None),),
            }
            short = tag.removeprefix(_TAG)
            if not isinstance(value, kinds[short]) or (short != "bool" and isinstance(value, bool)):
                raise self._error(f"{shorten(written)} is no !!{short}", at, hint="remove the tag")
        else:
            raise self._foreign_tag(tag, at)
        return Scalar(value, written, at, self._end(event), block=event.style in ("|", ">"))

    def _resolve(self, written: str, at: Position) -> ScalarValue:
        if written in _NULL:
            return None
        if written in _BOOL:
            return _BOOL[written]
        if _INT.fullmatch(written):
            # Nix's integers have 64 bits; a longer number in an inventory is a slip, or meant as text.
            if len(written) > 20 or not -(2**63) <= int(written) < 2**63:
                raise self._error("the number is too large", at, hint="quote it if it is text")
            return int(written)
        if _FLOAT.fullmatch(written):
            number = float(written)
            if abs(number) > 1e300:
                raise self._error("the number is too large", at, hint="quote it if it is text")
            return number
        return written


def _place(mark: Any) -> Place:
    """A mark of either parser as line and column from 1; every event that is read from a text has them."""
    return mark.line + 1, mark.column + 1
