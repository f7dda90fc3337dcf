"""The text of an inventory file, and what is wrong with it before it is YAML at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import yaml

from nixops.errors import InventoryError, Position

MAX_BYTES: Final = 8 * 2**20

_CONTROL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ufffe\uffff]")


def read_text(path: Path) -> str:
    """The text of an inventory file, without a byte-order mark.

    :raises InventoryError: when it cannot be read, is no UTF-8, holds control characters or is too large.
    """
    name = str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InventoryError(
            f"{name}: there is no such inventory file", hint="name one with --inventory FILE"
        ) from None
    except IsADirectoryError:
        inside = path / "hosts.yml"
        advice = f"did you mean {inside}?" if inside.is_file() else "name the YAML file in it"
        raise InventoryError(f"{name}: is a directory, not an inventory file", hint=advice) from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InventoryError(f"{name}: cannot be read: {reason}", hint="check its permissions") from None
    if len(raw) > MAX_BYTES:
        raise InventoryError(f"{name}: is larger than {MAX_BYTES // 2**20} MiB, which no inventory is")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        position = _place_at(name, raw[: error.start].decode("utf-8", errors="replace"))
        raise InventoryError(
            f"not UTF-8: the byte 0x{raw[error.start]:02x} cannot stand here",
            position=position,
            hint="save the file as UTF-8",
        ) from None
    if control := _CONTROL.search(text):
        raise InventoryError(
            f"the control character U+{ord(control[0]):04X} cannot stand in YAML",
            position=_place_at(name, text[: control.start()]),
            hint="remove it",
        )
    return text


def _place_at(name: str, before: str) -> Position:
    """The position after the text ``before``."""
    return Position(name, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)


_PLAIN_WORDS: Final = (
    (
        "mapping values are not allowed",
        "a colon that makes no key here",
        'quote a text that holds ": ", or check the indentation of this line and the one above',
    ),
    ("could not find expected ':'", "a key without its colon", 'write "key: value", and check the lines above'),
    ("did not find expected key", "the indentation fits no line above", "align it with the keys it belongs to"),
    ("expected <block end>", "the indentation fits no line above", "align it with the keys it belongs to"),
    ("did not find expected '-' indicator", "the indentation fits no line above", "align it with the items above"),
    ("',' or ']'", "a list in [ ] that is not closed", 'close it with "]", and separate its items with commas'),
    ("',' or '}'", "a mapping in { } that is not closed", 'close it with "}", and separate its keys with commas'),
    ("unexpected end of stream", "a quote that is never closed", "close it"),
    ("cannot start any token", "a character that cannot begin a value", "quote the value"),
)


def syntax_error(error: yaml.MarkedYAMLError, text: str, name: str) -> InventoryError:
    """A syntax error in plain words, at the place where it can be mended."""
    problem = error.problem or error.context or "not YAML"
    mark = error.problem_mark or error.context_mark
    opened = ("',' or ']'", "',' or '}'", "unexpected end of stream")
    if error.context_mark is not None and any(word in problem for word in opened):
        mark = error.context_mark
    place = (mark.line, mark.column) if mark else (0, 0)
    lines = text.splitlines()
    # What a tab in the indentation leads to shows on its own line or on the one after.
    for number in (place[0], place[0] - 1):
        indent = re.match(r"[ \t]*", lines[number])[0] if 0 <= number < len(lines) else ""  # type: ignore[index]  # always matches
        if "\t" in indent:
            return InventoryError(
                "a tab in the indentation",
                position=Position(name, number + 1, indent.index("\t") + 1),
                hint="YAML indents with spaces",
            )
    position = Position(name, place[0] + 1, place[1] + 1)
    for known, plain, advice in _PLAIN_WORDS:
        if known in problem:
            return InventoryError(f"not YAML: {plain}", position=position, hint=advice)
    return InventoryError(f"not YAML: {problem}", position=position)
