"""Templates: what is quoted and what is not, where a value may stand, and errors that say where they are."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml

from nixops.errors import ExitCode, NixopsError, TemplateError, UsageError
from nixops.render.engine import Engine
from nixops.secret import Secret

HOSTILE = '"; x = builtins.readFile "/etc/passwd"; y = "${1}'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    found = tmp_path / "templates"
    found.mkdir()
    return found


def render(directory: Path, text: str, name: str = "t.nix.j2", /, **context: Any) -> str:
    (directory / name).write_text(text, encoding="utf-8")
    return Engine(directory).render(name, context)


def refused(directory: Path, text: str, name: str = "t.nix.j2", /, **context: Any) -> TemplateError:
    with pytest.raises(TemplateError) as caught:
        render(directory, text, name, **context)
    assert caught.value.exit_code is ExitCode.USAGE
    return caught.value


def by_nix(text: str) -> Any:
    command = ["nix-instantiate", "--eval", "--strict", "--json", "-"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode() + text
    return json.loads(done.stdout)


def test_a_value_is_quoted_and_the_templates_own_text_is_not(directory: Path) -> None:
    assert render(directory, '{ "a${b}" = {{ v }}; }\n', v=HOSTILE).startswith('{ "a${b}" = "')
    assert by_nix(render(directory, "{ a = {{ v }}; }", v=HOSTILE)) == {"a": HOSTILE}


def test_a_constant_of_the_template_is_quoted_like_any_value(directory: Path) -> None:
    text = '[ {{ "a\\nb" }} {{ 1 + 1 }} {{ true }} {{ none }} {{ ["x", 2] }} {{ {"a b": "$"} }} {{ "a" ~ 1 }} ]'
    assert by_nix(render(directory, text)) == ["a\nb", 2, True, None, ["x", 2], {"a b": "$"}, "a1"]


def test_only_a_filter_at_the_place_makes_text_raw(directory: Path) -> None:
    assert render(directory, "{{ v | raw }}", v="1 + 1") == "1 + 1"
    assert render(directory, '{{ "[ ]" | raw }}') == "[ ]"
    assert by_nix(render(directory, '{{ (v | raw) ~ "x" }}', v=HOSTILE)) == HOSTILE + "x"
    assert by_nix(render(directory, "{{ v | safe }}", v=HOSTILE)) == HOSTILE
    assert by_nix(render(directory, "builtins.fromJSON {{ v | tojson }}", v={"a": ["<"]})) == {"a": ["<"]}


def test_a_macro_and_a_block_give_text_that_raw_makes_code_again(directory: Path) -> None:
    macro = "{% macro m(x) %}{ a = {{ x }}; }{% endmacro %}"
    assert by_nix(render(directory, macro + "{{ m(v) | raw }}", v=HOSTILE)) == {"a": HOSTILE}
    assert by_nix(by_nix(render(directory, macro + "{{ m(v) }}", v=HOSTILE))) == {"a": HOSTILE}
    block = "{% set b %}[ {{ v }} ]{% endset %}{{ b | raw }}"
    assert by_nix(render(directory, block, v=HOSTILE)) == [HOSTILE]


def test_filters_work_on_the_value_and_blocks_of_text_may_be_indented(directory: Path) -> None:
    assert by_nix(render(directory, "{{ v | upper }}", v="a${b}")) == "A${B}"
    text = "{% filter indent(4) %}[\n{{ v }}\n]{% endfilter %}"
    assert by_nix(render(directory, text, v="a\nb")) == ["a\nb"]


def test_a_filter_that_changes_written_values_is_an_error(directory: Path) -> None:
    error = refused(directory, "{% filter reverse %}{{ v }}{% endfilter %}", v="x")
    assert "filter" in str(error)


def test_a_loop_and_an_include_write_literals_too(directory: Path) -> None:
    (directory / "part.nix.j2").write_text("{{ v }} {% for x in xs %}{{ x }} {% endfor %}", encoding="utf-8")
    text = '[ {% include "part.nix.j2" %} ]'
    assert by_nix(render(directory, text, v=HOSTILE, xs=["a", None])) == [HOSTILE, "a", None]


def test_a_template_of_another_language_cannot_be_included(directory: Path) -> None:
    (directory / "part.yml.j2").write_text("{{ v }}", encoding="utf-8")
    assert "part.yml.j2 is included from" in str(refused(directory, '{% include "part.yml.j2" %}', v=1))


@pytest.mark.parametrize(
    "text",
    [
        'a: "{{ v }}"',
        '"x ${"{{ v }}"}"',
        "''\n  x = {{ v }}\n''",
        "'' '''{{ v }}''",
        "'' ''${ {{ v }} ''",
        "'' $${ {{ v }}''",
        '"\\"{{ v }}"',
        '"$${ {{ v }}"',
        "/* {{ v }} */ 1",
        "x{{ v }}",
        "{{ v }}x",
        "{{ v }}{{ v }}",
    ],
)
def test_in_nix_a_value_inside_a_string_a_block_comment_or_a_word_is_refused(directory: Path, text: str) -> None:
    assert "without quotes" in str(refused(directory, text, v='x"'))


@pytest.mark.parametrize(
    "text",
    [
        "[ {{ v }} ]",
        '"a ${ {{ v }} } b"',
        "''a ${ {{ v }} } b''",
        "# {{ v }}\n1",
        '"#" + {{ v }}',
        "'' # '' + {{ v }}",
        "x'' {{ v }}",
        '{ a = "}"; b = {{ v }}; }',
        '"${"}"}" + {{ v }}',
        "{ ${ {{ v }} } = 1; }",
        '/* " */ {{ v }}',
        "/**/{{ v }}",
    ],
)
def test_in_nix_a_value_may_stand_in_code_and_in_a_line_comment(directory: Path, text: str) -> None:
    assert '"v"' in render(directory, text, v="v")


@pytest.mark.parametrize(
    "text", ['a = "{{ v }}"', "a = <<EOF\n{{ v }}\nEOF\n", "a = <<-E\n x\n {{ v }}\n  E\n", "/* {{ v }} */"]
)
def test_in_hcl_a_value_inside_a_string_or_a_heredoc_is_refused(directory: Path, text: str) -> None:
    assert "without quotes" in str(refused(directory, text, "t.tf.j2", v="x"))


def test_in_hcl_a_value_may_stand_in_code_labels_and_interpolations(directory: Path) -> None:
    text = (
        'resource "a" {{ v }} {\n  b = {{ v }} // {{ v }}\n  c = "x ${ {{ v }} } $${y} %%{z}"\n  # {{ v }}\n'
        '  d = <<E\n"\nE\n  e = {{ v }}\n}\n'
    )
    found = hcl2.loads(render(directory, text, "t.tf.j2", v='a"${b}'))
    assert set(found["resource"][0]['"a"']) == {'"a\\"\\u0024{b}"'}


@pytest.mark.parametrize(
    "text", ['a: "{{ v }}"', "a: '{{ v }}'", "a: x {{ v }}", "a: |\n  {{ v }}\n", "a: >-\n  {{ v }}\n", "a: {{ v }} x"]
)
def test_in_yaml_a_value_inside_a_longer_text_is_refused(directory: Path, text: str) -> None:
    assert "without quotes" in str(refused(directory, text, "t.yml.j2", v="x"))


def test_in_yaml_a_value_may_be_a_key_an_item_or_in_a_comment(directory: Path) -> None:
    text = "# {{ v }}\n{{ v }}: [{{ v }}, {a: {{ v }}}]\nb:\n  - {{ v }} # {{ v }}\n"
    value = "yes: @# \n'\""
    found = yaml.safe_load(render(directory, text, "t.yml.j2", v=value))
    assert found == {value: [value, {"a": value}], "b": [value]}


def test_what_is_no_yaml_at_all_is_a_template_error(directory: Path) -> None:
    assert "YAML" in str(refused(directory, "a: [\n{{ v }}\n", "t.yml.j2", v="x"))


def test_an_undefined_name_is_an_error_with_file_and_line(directory: Path) -> None:
    error = refused(directory, "{\n  a = 1;\n  b = {{ nothing }};\n}\n")
    assert error.position is not None
    assert (Path(error.position.file).name, error.position.line, error.position.column) == ("t.nix.j2", 3, 10)
    assert "'nothing' is undefined" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "\n{{ v.missing }}",
        "\n{{ [missing] }}",
        "\n{{ {'a': missing} }}",
        "\n{{ missing | raw }}",
        "\n{{ missing | default(other) }}",
        "\n{% for x in missing %}{% endfor %}",
        "\n{% if missing %}{% endif %}",
        "\n{{ 'a' ~ missing }}",
        "\n{{ v + 1 }}",
        "\n{{ 1 / 0 }}",
        "\n{{ 'x\\0' }}",
        "\n{{ s }}",
        "\n{{ s | raw }}",
        "\n{{ 'a b' | identifier }}",
    ],
)
def test_whatever_goes_wrong_while_rendering_names_its_line(directory: Path, text: str) -> None:
    error = refused(directory, text, v="x", s=Secret("hunter2hunter2"))
    assert error.position is not None
    assert error.position.line == 2
    assert "hunter2" not in str(error)


def test_an_error_in_an_included_template_names_that_template(directory: Path) -> None:
    (directory / "part.nix.j2").write_text("1\n2\n{{ nothing }}", encoding="utf-8")
    error = refused(directory, '{% include "part.nix.j2" %}')
    assert error.position is not None
    assert (Path(error.position.file).name, error.position.line) == ("part.nix.j2", 3)


@pytest.mark.parametrize(
    "text", ["\n{% if %}", "\n{{ a", "\n{% nonsense %}", "\n{{ a | nonsense }}", "\n{% for x in y %}"]
)
def test_a_syntax_error_names_file_and_line(directory: Path, text: str) -> None:
    error = refused(directory, text, a=1, y=[])
    assert error.position is not None
    assert error.position.line == 2
    assert str(error.position.file).endswith("t.nix.j2")


def test_a_missing_template_is_named(directory: Path) -> None:
    with pytest.raises(TemplateError, match=r"absent\.nix\.j2"):
        Engine(directory).render("absent.nix.j2", {})
    assert "gone.nix.j2" in str(refused(directory, '{% include "gone.nix.j2" %}'))


def test_a_directory_overrides_the_shipped_templates_file_by_file(directory: Path) -> None:
    (directory / "workflow.yml.j2").write_text("name: {{ name }}\n", encoding="utf-8")
    engine = Engine(directory)
    assert engine.render("workflow.yml.j2", {"name": "mine"}) == 'name: "mine"\n'
    with pytest.raises(NixopsError, match="entries"):
        engine.render("kv.tf.j2", {})


def test_a_template_directory_that_is_not_there_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent"):
        Engine(tmp_path / "absent")


def test_endless_recursion_in_a_template_is_told_and_not_thrown(directory: Path) -> None:
    assert refused(directory, '{% include "t.nix.j2" %}')


def test_private_characters_in_values_are_no_marks(directory: Path) -> None:
    value = "\ufdd0deadbeef:0\ufdd1"
    assert by_nix(render(directory, "[ {{ v }} {{ v }} ]", v=value)) == [value, value]
