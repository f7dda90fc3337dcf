"""The order of a run on several workers: what takes long begins first."""

from __future__ import annotations

from pathlib import Path

import pytest

LAB = Path(__file__).parent / "lab"

# The lab's slowest files, one to two and a half minutes each in a whole run. Those with more than two tests are first,
# the longest of them foremost: a worker that has but two tests left is given the next file at once, so that a file of
# one or two would have another one wait behind it from the start.
SLOWEST = (
    "test_deploy_refusals.py",
    "test_verify_lab.py",
    "test_deploy_awkward.py",
    "test_deploy_crash.py",
    "test_deploy_transaction.py",
    "test_deploy_interrupted.py",
    "test_deploy_unknown.py",
    "test_deploy_checkout.py",
    "test_leaks_newer.py",
    "test_deploy_scopes.py",
    "test_deploy_cut_off.py",
    "test_deploy_flake.py",
    "test_deploy_before_15.py",
    "test_deploy_operators.py",
    "test_leaks_older.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Have xdist hand out files in the order below, and not by how many tests they have.

    Here that guess has it upside down: a file with a hundred unit tests takes a second, one with a single lab test may
    take two minutes, and the one begun last is what everybody waits for.
    """
    missing = [name for name in SLOWEST if not (LAB / name).is_file()]
    if missing:
        raise pytest.UsageError(f"{__file__} names files that are not in {LAB}: {', '.join(missing)}")
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a worker of xdist: the slowest files first, then the rest of the lab. Alone, the quick ones stay first."""
    if hasattr(config, "workerinput"):
        items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    if item.path.parent != LAB:
        return len(SLOWEST) + 1
    return SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST)
