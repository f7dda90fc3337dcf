"""`import nixops` and `invoke --list` load nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("fabric", "paramiko", "boto3", "botocore", "hvac", "requests", "testinfra", "pydantic", "rich", "jinja2")
TOP = Path(__file__).parents[2]


@pytest.mark.parametrize("statement", ["import nixops", "import tasks"])
def test_importing_loads_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True).stdout
    loaded = set(out.split())
    # Not yaml: Invoke itself loads it.
    assert not loaded & set(HEAVY)


def test_every_task_is_listed_with_a_line_of_help() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "invoke", "--list"], cwd=TOP, capture_output=True, text=True, check=True
    ).stdout
    for name in ("deploy-runner", "verify-runner", "inventory", "trust", "lab.up", "lab.down"):
        line = next(row for row in out.splitlines() if row.split()[:1] == [name])
        assert len(line.split()) > 2
