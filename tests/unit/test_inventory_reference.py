"""The reference and the words of errors cover the models, and the file in docs/ is the one they make."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter

from nixops.inventory import model
from nixops.inventory.reference import reference
from nixops.inventory.words import WORDS

DOCS = Path(__file__).parents[2] / "docs" / "inventory.md"
HOW = "run: python -m nixops.inventory.reference > docs/inventory.md"


def reachable(described: type[BaseModel]) -> set[type[BaseModel]]:
    """The models below ``described``, itself included, as pydantic's own schema names them."""
    names = TypeAdapter(described).json_schema().get("$defs", {})
    return {described, *(getattr(model, name) for name in names if issubclass(getattr(model, name), BaseModel))}


def test_the_reference_in_docs_is_up_to_date() -> None:
    assert DOCS.read_text(encoding="utf-8") == reference(), HOW


def test_every_field_of_every_model_is_described_and_nothing_else() -> None:
    fields = {described.__name__: set(described.model_fields) for described in reachable(model.Inventory)}
    assert {name: set(words) for name, words in WORDS.items()} == fields


def test_every_model_has_a_table() -> None:
    text = reference()
    for name, words in WORDS.items():
        if name != "Inventory":
            for field in words:
                assert f"\n| `{field}` | " in text, (name, field)


EXAMPLES = [
    (described, field, word.example)
    for described in sorted(reachable(model.Inventory), key=lambda m: m.__name__)
    for field, word in WORDS[described.__name__].items()
    # These name their shape only; each of them is an example somewhere else.
    if "…" not in word.example and field not in ("runners", "approle")
]


@pytest.mark.parametrize(("described", "field", "example"), EXAMPLES, ids=[f"{d.__name__}.{f}" for d, f, _ in EXAMPLES])
def test_every_example_is_a_value_that_the_model_takes(described: type[BaseModel], field: str, example: str) -> None:
    value = yaml.safe_load(example)
    errors: list[object] = []
    try:
        described.model_validate({field: value})
    except ValueError as error:
        found = error.errors() if hasattr(error, "errors") else [{"loc": (), "msg": str(error)}]
        errors = [e for e in found if e["loc"][:1] == (field,)]
    assert errors == []
