"""YAML as nodes with positions: what resolves to what, and every way a file can be wrong before it is an inventory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from nixops.errors import ExitCode, InventoryError
from nixops.inventory.origin import layer, plain
from nixops.inventory.positions import Items, Scalar, Table, parse
from nixops.inventory.source import read_text


def refused(text: str) -> InventoryError:
    with pytest.raises(InventoryError) as caught:
        parse(text, "f.yml")
    assert caught.value.exit_code is ExitCode.USAGE
    return caught.value


def value(text: str) -> object:
    node = parse(f"k: {text}\n", "f.yml").entries["k"].value
    assert isinstance(node, Scalar)
    return node.value


def values(text: str) -> object:
    return plain(layer(parse(text, "f.yml"), "host", ()))


def test_every_key_and_value_knows_its_line_and_column() -> None:
    root = parse("a: 1\nbé:\n  - x\n  - {c: 'd'}\n", "f.yml")
    assert (root.entries["bé"].key.line, root.entries["bé"].key.column) == (2, 1)
    items = root.entries["bé"].value
    assert isinstance(items, Items)
    assert [str(item.position) for item in items.items] == ["f.yml:3:5", "f.yml:4:5"]
    inner = items.items[1]
    assert isinstance(inner, Table)
    assert str(inner.entries["c"].at) == "f.yml:4:9"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("", None),
        ("-12", -12),
        ("1.5", 1.5),
        ("'12'", "12"),
        ("!!str 12", "12"),
        ("022", "022"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x1f", "0x1f"),
        ("1e3", "1e3"),
        ("1_000", "1_000"),
        ("y", "y"),
        (".inf", ".inf"),
        ("400%", "400%"),
    ],
)
def test_scalars_resolve_to_what_their_writer_means(written: str, read: object) -> None:
    found = value(written)
    assert found == read
    assert type(found) is type(read)


def test_merge_keys_give_way_to_own_keys_and_to_earlier_ones() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc:\n  <<: [*a, *b]\n  x: 3\n"
    assert values(text) == {"a": {"x": 1, "y": 1}, "b": {"y": 2, "z": 2}, "c": {"y": 1, "z": 2, "x": 3}}


def test_a_duplicate_key_is_an_error_that_names_both_places() -> None:
    error = refused("hosts:\n  a: 1\n  b: 2\n  a: 3\n")
    assert str(error.position) == "f.yml:4:3"
    assert "first at f.yml:2:3" in error.message


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("", "1:1", "the inventory is empty"),
        ("# only a comment\n", "1:1", "the inventory is empty"),
        ("---\n", "2:1", "the inventory is empty"),
        ("- a\n", "1:1", "an inventory is a mapping, found a list"),
        ("text\n", "1:1", "an inventory is a mapping, found the text 'text'"),
        ("a: 1\n---\nb: 1\n", "2:1", "a second document"),
        ("a:\n\tb: 1\n", "2:1", "a tab in the indentation"),
        ("a: 1\n \tb: 1\n", "2:2", "a tab in the indentation"),
        ("a: b: c\n", "1:5", "a colon that makes no key here"),
        ("a:\n  b: 1\n c: 2\n", "3:2", "the indentation fits no line above"),
        ("a: [1, 2\nb: 3\n", "1:4", "a list in [ ] that is not closed"),
        ("a: {b: 1\n", "1:4", "a mapping in { } that is not closed"),
        ("a: 'x\n", "1:4", "a quote that is never closed"),
        ("a: @x\n", "1:4", "a character that cannot begin a value"),
        ("a: *x\n", "1:4", "the alias *x has no anchor"),
        ("a: &x {b: *x}\n", "1:11", "stands inside of its own anchor"),
        ("a: !!python/object:os.system {}\n", "1:4", "the tag '!!python/object:os.system' means nothing"),
        ("a: !!binary aGk=\n", "1:4", "the tag '!!binary' means nothing"),
        ("a: !mine x\n", "1:4", "the tag '!mine' means nothing"),
        ("a: !!int x\n", "1:4", "'x' is no !!int"),
        ("a: !!int yes\n", "1:4", "'yes' is no !!int"),
        ("on: 1\n", "1:1", "a key is text, found true (YAML reads a bare on so)"),
        ("5: 1\n", "1:1", "a key is text, found the number 5"),
        ("? [a]\n: 1\n", "1:3", "a key is text, found a list"),
        ("a: {<<: 5}\n", "1:9", '"<<" merges mappings, found the number 5'),
        ("a: 99999999999999999999999\n", "1:4", "the number is too large"),
        ("a: 9223372036854775808\n", "1:4", "the number is too large"),
        (f"a: 1.0e{'9' * 5}\n", "1:4", "the number is too large"),
    ],
)
def test_wrong_yaml_is_named_with_its_place(text: str, place: str, said: str) -> None:
    error = refused(text)
    assert str(error.position) == f"f.yml:{place}"
    assert said in error.message


def test_aliases_that_multiply_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    begin = time.monotonic()
    error = refused("\n".join(lines))
    assert "aliases make this more than" in error.message
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("text", ["[" * 5000, "a: " + "{a: " * 5000, "- " * 5000 + "x", "? " * 5000])
def test_deep_nesting_is_refused_and_does_not_exhaust_the_stack(text: str) -> None:
    assert "nested more than" in refused(text).message or "not YAML" in refused(text).message


def test_a_file_that_is_not_there_is_named_as_the_user_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InventoryError, match=r"^nope\.yml: there is no such inventory file"):
        read_text(Path("nope.yml"))


def test_a_directory_is_told_from_a_file_and_the_file_in_it_suggested(tmp_path: Path) -> None:
    with pytest.raises(InventoryError, match="is a directory"):
        read_text(tmp_path)
    (tmp_path / "hosts.yml").write_text("hosts: {}\n")
    with pytest.raises(InventoryError, match=r"did you mean .*/hosts\.yml\?"):
        read_text(tmp_path)


def test_an_unreadable_file_says_why(tmp_path: Path) -> None:
    loop = tmp_path / "loop.yml"
    loop.symlink_to(loop)
    with pytest.raises(InventoryError, match="cannot be read"):
        read_text(loop)


def test_bytes_that_are_not_utf8_have_a_place(tmp_path: Path) -> None:
    file = tmp_path / "f.yml"
    file.write_bytes(b"a: 1\nb\xc3\xa9: \xff\n")
    with pytest.raises(InventoryError, match="the byte 0xff cannot stand here") as caught:
        read_text(file)
    assert caught.value.position is not None
    assert (caught.value.position.line, caught.value.position.column) == (2, 5)


def test_a_control_character_has_a_place(tmp_path: Path) -> None:
    file = tmp_path / "f.yml"
    file.write_bytes(b"a: 1\nb: x\x1b[2J\n")
    with pytest.raises(InventoryError, match=r"U\+001B") as caught:
        read_text(file)
    assert str(caught.value.position) == f"{file}:2:5"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "f.yml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_text(file) == "a: 1\n"


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(InventoryError, match="is larger than"):
        read_text(Path("/dev/zero"))


def test_a_pipe_is_read_like_a_file() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"a: 1\n")
    os.close(writer)
    assert read_text(Path(f"/dev/fd/{reader}")) == "a: 1\n"
    os.close(reader)
