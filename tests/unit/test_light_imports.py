"""`import nixops` and `invoke --list` load nothing heavy, and an inventory that is refused no client of anything."""

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


@pytest.mark.parametrize("name", ["deploy_runner", "verify_runner", "render"])
def test_a_refused_inventory_loads_no_client_of_a_host_forgejo_or_openbao(name: str, tmp_path: Path) -> None:
    (tmp_path / "hosts.yml").write_text("version: 1\nhots: {}\n")
    code = f"""
import sys
from nixops.deploy.commands import {name}
from nixops.deploy.subject import DeployOptions
from nixops.errors import InventoryError
try:
    {name}(DeployOptions(inventory={str(tmp_path / "hosts.yml")!r}))
except InventoryError as error:
    assert "hosts" in str(error), error
    print(' '.join(sys.modules))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True).stdout
    loaded = set(out.split())
    assert "nixops.inventory.load" in loaded
    assert not loaded & {"fabric", "paramiko", "requests", "hvac", "testinfra", "jinja2", "boto3", "rich"}


def test_every_task_is_listed_with_a_line_of_help() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "invoke", "--list"], cwd=TOP, capture_output=True, text=True, check=True
    ).stdout
    for name in ("deploy-runner", "verify-runner", "inventory", "trust", "lab.up", "lab.down"):
        line = next(row for row in out.splitlines() if row.split()[:1] == [name])
        assert len(line.split()) > 2
