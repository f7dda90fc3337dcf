"""The pages tell the truth: every command in them exists with those flags, and the library's example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from invoke.collection import Collection
from invoke.parser import Parser

from nixops.errors import ExitCode
from nixops.tasks.collection import ns

TOP = Path(__file__).parents[2]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
INVOKE = re.compile(r"^\s{4,}(?:\$ )?invoke ((?:[a-z][\w.-]*)(?: [^`#\n]*)?)", re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """Every indented `invoke …` line of the pages."""
    return [(page.name, m.group(1).strip()) for page in PAGES for m in INVOKE.finditer(page.read_text())]


def test_there_are_commands_to_look_at() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_of_a_page_parses(page: str, command: str) -> None:
    """Invoke's own parser takes it: the task is there and has these flags."""
    collection = Collection.from_module(sys.modules["nixops.tasks.collection"])
    assert Parser(contexts=collection.to_contexts()).parse_argv(command.split())


def test_the_task_table_of_the_readme_names_each_task_and_its_flags() -> None:
    text = (TOP / "README.md").read_text()
    for name, aliases in ns.task_names.items():
        called = "|".join(re.escape(n) for n in (name, *aliases))
        assert re.search(rf"`({called})[ `]", text), f"the README does not name {name}"
    rows = re.findall(r"^\| `([a-z.-]+)((?: \[?--[^|`]*(?:\\\|[^|`]*)*)?)`", text, re.MULTILINE)
    for name, flags in rows:
        known = {f"--{a.name.replace('_', '-')}" for a in _task(name).get_arguments()}
        assert set(re.findall(r"--[a-z-]+", flags)) <= known, name


def _task(name: str):  # type: ignore[no-untyped-def]  # invoke has no types
    return ns[name]


def test_the_exit_codes_of_the_readme_are_those_of_the_code() -> None:
    text = (TOP / "README.md").read_text()
    told = {int(code) for code in re.findall(r"^\| ([0-9]+) \|", text, re.MULTILINE)}
    assert told == {code.value for code in ExitCode}


def test_the_librarys_example_in_the_readme_runs() -> None:
    text = (TOP / "README.md").read_text()
    block = text[text.index("    from pathlib import Path") :]
    lines = [line[4:] for line in block.splitlines() if line.startswith("    ") or not line]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "nix-cache02.home.2rjus.net" in done.stdout, done.stderr


def test_the_pages_that_the_readme_links_to_are_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (TOP / "README.md").read_text()):
        assert (TOP / target).exists(), target
