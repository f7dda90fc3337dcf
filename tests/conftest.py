"""The order of a run on several workers: what takes long begins first."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

LAB = Path(__file__).parent / "lab"

# The lab's slowest files, three quarters of a minute to two minutes each in a whole run. Those with more than two tests
# are first, the longest of them foremost: a worker that has but two tests left is given the next file at once, so that
# a file of one or two would have another one wait behind it from the start.
SLOWEST = (
    "test_deploy_refusals.py",
    "test_verify_lab.py",
    "test_deploy_awkward.py",
    "test_image_leaks.py",
    "test_deploy_crash.py",
    "test_lab_toplevel.py",
    "test_deploy_interrupted.py",
    "test_deploy_transaction.py",
    "test_deploy_unknown.py",
    "test_deploy_cut_off.py",
    "test_deploy_scopes.py",
    "test_image_push.py",
    "test_deploy_before_15.py",
    "test_leaks_older.py",
    "test_transport_lab.py",
    "test_deploy_operators.py",
    "test_mux_lab.py",
    "test_pool_lab.py",
    "test_image_faults.py",
    "test_deploy_checkout.py",
    "test_distributed.py",
    "test_leaks_newer.py",
    "test_deploy_flake.py",
    "test_image_cut.py",
    "test_image_build.py",
    "test_distributed_daemon.py",
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
    # A shell starts what it puts in the background with SIGINT ignored, and every program of a test would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Before a file of unit tests is imported: Hypothesis' examples have no deadline, which a busy machine exceeds.

    Not sooner, as Hypothesis takes a while to import and the lab's tests do without it.
    """
    if isinstance(collector, pytest.Module) and collector.path.parent.name == "unit":
        from hypothesis import settings

        settings.register_profile("unit", deadline=None)
        settings.load_profile("unit")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a worker of xdist: the order of :func:`_mixed`. Alone, the quick ones stay first."""
    if hasattr(config, "workerinput"):
        turns = _mixed(list(dict.fromkeys(item.path for item in items)), config.workerinput["workercount"])
        items.sort(key=lambda item: turns[item.path])


def _mixed(files: list[Path], workers: int) -> dict[Path, int]:
    """The turn of each file: the lab's, the slowest first, and between them the quick ones, which have the processors
    busy while the lab waits.

    The first file of each worker is of the lab.
    """
    lab = sorted((file for file in files if file.parent == LAB), key=_slowness)
    quick = [file for file in files if file.parent != LAB]
    spread = len(lab) - workers
    places = [(float(place - workers), file) for place, file in enumerate(lab)]
    places += [((place + 0.5) * max(spread, 0) / len(quick), file) for place, file in enumerate(quick)]
    places.sort(key=lambda pair: pair[0])
    return {file: turn for turn, (_, file) in enumerate(places)}


def _slowness(file: Path) -> int:
    return SLOWEST.index(file.name) if file.name in SLOWEST else len(SLOWEST)
