"""Evaluating what was rendered gives the value back: held against Nix itself, python-hcl2 and PyYAML."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import hcl2
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nixops.errors import ExitCode, TemplateError
from nixops.render.literal import Language, attribute_path, identifier, literal
from nixops.secret import Secret
from nixops.values import HostName

# What has bitten somebody in one of the three languages, or might.
TRAPS = [
    *(
        "",
        " ",
        "  leading",
        "trailing  ",
        "\t",
        "\n",
        "\r",
        "\r\n",
        "a\nb\n",
        "\x00",
        "\x01",
        "\x1b[31m",
        "\x7f",
        "\x85",
    ),
    *(
        "$",
        "$$",
        "$$$",
        "${",
        "$${",
        "$$${",
        "${x}",
        "$${x}",
        "\\${x}",
        "''${x}",
        "''",
        "'''",
        "''\\",
        "%{",
        "%%{",
        "%%%{",
    ),
    *(
        "%{ if true }x%{ endif }",
        "${jsonencode(1)}",
        "$%{",
        "%${",
        "\\",
        "\\\\",
        "\\n",
        "\\u0041",
        '"',
        '\\"',
        '""',
        "'",
    ),
    *(
        "*/",
        "/*",
        "#",
        "//",
        "<<EOF",
        "${pkgs.hello}",
        "{{ x }}",
        "{% x %}",
        "{# x #}",
        "\ue000",
        "\ue001",
        "\ufeff",
        "\ufffe",
    ),
    *("\uffff", "\u2028", "\u2029", "\u202e", "\xa0", "é", "e\u0301", "😀", "\U0010ffff", "\U0001fffe", "日本語"),
    *(
        "yes",
        "no",
        "on",
        "off",
        "true",
        "False",
        "null",
        "~",
        "1",
        "1e3",
        "0x1F",
        "0o17",
        "1_000",
        ".inf",
        ".nan",
        "12:30:45",
    ),
    *(
        "2026-11-21",
        "@x",
        "`x",
        "%x",
        "!x",
        "&x",
        "*x",
        "- x",
        "? x",
        "x: y",
        "x #y",
        "[",
        "]",
        "{",
        "}",
        ",",
        "=",
        "<<",
        "---",
    ),
    *("...", "-", "|", ">", "with pkgs; x", "or", "let", "a.b", "a b", "-x", "x'", "1a", "_"),
]

texts = st.one_of(st.sampled_from(TRAPS), st.text(), st.text("$%{}\\\"'\n#ab", max_size=12))
integers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([-(2**63), 2**63 - 1, -(2**63) + 1, -1, 0]))
floats = st.floats(allow_nan=False, allow_infinity=False).filter(lambda f: f == 0 or abs(f) >= sys.float_info.min)


def values(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.one_of(st.none(), st.booleans(), integers, text),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.tuples(inner, inner), st.dictionaries(text, inner, max_size=4)
        ),
        max_leaves=8,
    )


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Many examples at once, so that one process of the real tool can judge them all."""
    found: list[Any] = []

    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def plain(value: Any) -> Any:
    """As JSON and the parsers give it back: tuples are lists."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def by_nix(expression: str) -> Any:
    command = ["nix-instantiate", "--eval", "--strict", "--json", "-"]
    done = subprocess.run(command, input=expression.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def nix_values(wanted: list[Any]) -> list[Any]:
    found: list[Any] = by_nix("[\n" + "\n".join(literal(v, Language.NIX) for v in wanted) + "\n]")
    return found


def hcl_values(wanted: list[Any]) -> list[Any]:
    text = "".join(f"v{i} = {literal(v, Language.HCL)}\n" for i, v in enumerate(wanted))
    options = hcl2.SerializationOptions(strip_string_quotes=True, with_comments=False, explicit_blocks=False)
    found = hcl2.loads(text, serialization_options=options)
    return [found[f"v{i}"] for i in range(len(wanted))]


def yaml_values(wanted: list[Any]) -> list[Any]:
    text = "".join(f"- {literal(v, Language.YAML)}\n" for v in wanted)
    found: list[Any] = yaml.safe_load(text)
    return found


def json_safe(value: Any) -> bool:
    """Nix prints a set with one of these as what the attribute says, which is about its JSON and not our literal."""
    if isinstance(value, Mapping):
        return not {"outPath", "__toString"} & set(value) and all(map(json_safe, value.values()))
    return all(map(json_safe, value)) if isinstance(value, list | tuple) else True


READERS: list[tuple[Language, Callable[[list[Any]], list[Any]]]] = [
    (Language.NIX, nix_values),
    (Language.HCL, hcl_values),
    (Language.YAML, yaml_values),
]


@pytest.mark.parametrize(("language", "read"), READERS)
def test_every_text_comes_back_from_the_real_reader(language: Language, read: Callable[[list[Any]], list[Any]]) -> None:
    wanted = [t for t in (*TRAPS, *drawn(texts, 400)) if language is not Language.NIX or "\0" not in t]
    for value, found in zip(wanted, read(wanted), strict=True):
        assert found == value, literal(value, language)


@pytest.mark.parametrize(("language", "read"), READERS)
def test_every_nested_value_comes_back_from_the_real_reader(
    language: Language, read: Callable[[list[Any]], list[Any]]
) -> None:
    text = texts.filter(lambda t: "\0" not in t) if language is Language.NIX else texts
    wanted = [v for v in drawn(values(text), 200) if json_safe(v)]
    for value, found in zip(wanted, read(wanted), strict=True):
        assert found == plain(value), literal(value, language)
        assert json.dumps(found, sort_keys=True) == json.dumps(plain(value), sort_keys=True), "1 is not true"


def test_every_float_is_exactly_itself_in_nix() -> None:
    # Nix prints floats with six digits, so it is asked to compare instead.
    wanted = [0.0, -0.0, 1e22, -1.5e-300, 0.1, sys.float_info.max, sys.float_info.min, *drawn(floats, 150)]
    pairs = [f"(builtins.fromJSON {literal(repr(v), Language.NIX)} == {literal(v, Language.NIX)})" for v in wanted]
    assert by_nix(f"[ {' '.join(pairs)} ]") == [True] * len(wanted)
    kinds = by_nix(f"map builtins.typeOf {literal(wanted, Language.NIX)}")
    assert set(kinds) == {"float"}


def test_every_float_is_exactly_itself_in_yaml_and_hcl() -> None:
    wanted = [0.0, 1e22, -1.5e-300, 0.1, *drawn(floats, 150)]
    assert [(type(f), f) for f in yaml_values(wanted)] == [(float, v) for v in wanted]
    # python-hcl2 gives a float with an exponent back as the text of an expression.
    assert [float(str(f).strip("${}")) for f in hcl_values(wanted)] == wanted


def test_a_literal_is_one_line_so_that_a_comment_holds_it() -> None:
    for language in Language:
        for value in drawn(values(texts.filter(lambda t: "\0" not in t)), 100):
            line = literal(value, language)
            assert len(line.split("\n")) == 1
            assert "\r" not in line
    assert len(literal("\u2028\x85\x0b", Language.YAML).splitlines()) == 1


def test_hcl_escapes_every_template_sequence_without_relying_on_doubling() -> None:
    assert literal("${x} $${x} %{x}", Language.HCL) == '"\\u0024{x} $\\u0024{x} \\u0025{x}"'
    assert literal("100% $5", Language.HCL) == '"100% $5"'


def test_text_keeps_its_form_though_hcl_itself_compares_in_nfc() -> None:
    decomposed = unicodedata.normalize("NFD", "é")
    assert hcl_values([decomposed]) == [decomposed]


@pytest.mark.parametrize("language", list(Language))
def test_half_a_character_is_refused_in_every_language(language: Language) -> None:
    with pytest.raises(TemplateError, match="surrogate"):
        literal({"a": ["\ud800"]}, language)
    with pytest.raises(TemplateError, match="surrogate"):
        literal({"\udfff": 1}, language)


def test_a_nul_is_refused_in_nix_which_cannot_hold_it() -> None:
    for value in ("a\0b", ["\0"], {"\0": 1}):
        with pytest.raises(TemplateError, match="NUL") as caught:
            literal(value, Language.NIX)
        assert caught.value.exit_code is ExitCode.USAGE
    with pytest.raises(TemplateError, match="NUL"):
        attribute_path(["a\0"])


def test_a_number_that_nix_cannot_hold_is_refused() -> None:
    for value in (2**63, -(2**63) - 1, 5e-324):
        with pytest.raises(TemplateError):
            literal(value, Language.NIX)
    assert literal(2**63, Language.YAML) == str(2**63)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_float_that_is_no_number_is_refused_everywhere(value: float) -> None:
    for language in Language:
        with pytest.raises(TemplateError):
            literal(value, language)


@pytest.mark.parametrize("value", [b"bytes", object(), {1: "a"}, {None: 1}, {"a": {1, 2}}, range])
def test_a_value_of_another_type_is_refused_and_not_guessed_at(value: object) -> None:
    for language in Language:
        with pytest.raises(TemplateError):
            literal(value, language)


def test_a_secret_is_refused_even_deep_inside_and_its_value_is_not_told() -> None:
    for language in Language:
        with pytest.raises(TemplateError) as caught:
            literal({"a": [Secret("hunter2hunter2")]}, language)
        assert "hunter2" not in str(caught.value)


def test_checked_texts_and_enumerations_are_written_as_their_text() -> None:
    class Colour(StrEnum):
        RED = "red"

    assert literal(HostName("nix-cache02"), Language.NIX) == '"nix-cache02"'
    assert literal(Colour.RED, Language.HCL) == '"red"'


def test_attribute_paths_reach_the_attribute_they_name() -> None:
    names = [n for n in (*TRAPS, *drawn(texts, 100)) if "\0" not in n]
    for_nix = [f"({{ {attribute_path([n])} = {i}; }}.{attribute_path([n])})" for i, n in enumerate(names)]
    assert by_nix(f"[ {' '.join(for_nix)} ]") == list(range(len(names)))
    assert attribute_path("gst_all_1.gstreamer") == "gst_all_1.gstreamer"
    assert attribute_path("a.if.b") == 'a."if".b'


def test_an_identifier_is_letters_digits_and_underscores() -> None:
    assert identifier("forgejo_runner_token") == "forgejo_runner_token"
    for text in ("", "a b", "1a", "a-b", 'a"', "a.b", "let", "${a}", "é"):
        with pytest.raises(TemplateError):
            identifier(text)


def test_a_template_of_unknown_language_is_refused() -> None:
    assert Language.of_template("a.nix.j2") is Language.NIX
    assert Language.of_template("a.yaml.j2") is Language.YAML
    with pytest.raises(TemplateError, match="language"):
        Language.of_template("a.json.j2")
