"""Whatever is in the file: an inventory or one clear error, quickly, and never another exception."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nixops.errors import ExitCode, InventoryError, Position
from nixops.inventory import export
from nixops.inventory.load import Loaded, load
from nixops.inventory.settings import values_of
from nixops.inventory.words import WORDS

SHIPPED = (Path(__file__).parents[2] / "inventory" / "hosts.yml").read_text()
# One deadline for all: even the worst of these files is refused in far less.
quick = settings(max_examples=150, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def outcome(directory: Path, raw: bytes) -> Loaded | InventoryError:
    """What comes of a file with these bytes. Any exception but :class:`InventoryError` fails the test."""
    file = directory / "i.yml"
    file.write_bytes(raw)
    try:
        found = load(file)
    except InventoryError as error:
        assert error.exit_code is ExitCode.USAGE
        assert isinstance(error.position, Position) or str(file) in error.message
        assert "\n" not in error.message
        assert str(error)
        return error
    # What loads can be shown and given out too.
    assert len(found.origins) == len(list(values_of(found.inventory)))
    export.to_json(found)
    export.to_ansible(found)
    export.to_known_hosts(found)
    return found


@quick
@given(st.binary(max_size=300))
def test_arbitrary_bytes(tmp_path: Path, raw: bytes) -> None:
    outcome(tmp_path, raw)


@quick
@given(st.text(alphabet=st.sampled_from("ab:-[]{},&*!|>'\"%@#?~<\n\t 0.é\\"), max_size=120))
def test_arbitrary_text_made_of_what_yaml_gives_a_meaning(tmp_path: Path, text: str) -> None:
    outcome(tmp_path, text.encode())


NAMES = sorted({field for words in WORDS.values() for field in words} | {"defaults", "groups", "<<", "nix-cache02"})
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["native:host", "torjus/nixos", "x86_64-linux", "/run/secrets/x", "-o", "here", "a.b", "5m"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=25,
)


@quick
@given(
    st.dictionaries(
        st.sampled_from(["forge", "vault", "config", "default", "defaults", "groups", "hosts"]), VALUES, max_size=5
    )
)
def test_arbitrary_values_under_the_known_keys(tmp_path: Path, document: dict[str, object]) -> None:
    outcome(tmp_path, yaml.safe_dump(document, allow_unicode=True).encode())


@quick
@given(st.integers(0, 2**32), VALUES)
def test_the_shipped_inventory_with_one_value_changed(tmp_path: Path, seed: int, value: object) -> None:
    document = yaml.safe_load(SHIPPED)
    pick = random.Random(seed)
    here = document
    while True:
        key = pick.choice(list(here)) if isinstance(here, dict) else pick.randrange(len(here))
        below = here[key]
        if not isinstance(below, dict | list) or not below or pick.random() < 0.3:
            here[key] = value
            break
        here = below
    outcome(tmp_path, yaml.safe_dump(document, allow_unicode=True).encode())


@quick
@given(st.integers(0, len(SHIPPED)), st.integers(0, 40), st.text(max_size=8))
def test_the_shipped_inventory_with_a_piece_cut_out_and_another_put_in(
    tmp_path: Path, at: int, length: int, piece: str
) -> None:
    outcome(tmp_path, (SHIPPED[:at] + piece + SHIPPED[at + length :]).encode("utf-8", errors="surrogatepass"))


@pytest.mark.parametrize("raw", [b"a: " + b"[" * 10000, b"? " * 10000, b"- " * 10000, b"&a " * 10000, b"x" * 100000])
def test_what_is_built_to_exhaust_a_parser(tmp_path: Path, raw: bytes) -> None:
    assert isinstance(outcome(tmp_path, raw), InventoryError)
