"""systemd's sizes, times and limits."""

from __future__ import annotations

import math

import pytest

from nixops.verify.quantities import INFINITY, mismatches, size, timespan
from nixops.verify.unit import ProcessFacts, UnitFacts

GIB = 1 << 30


def facts(properties: dict[str, str], cgroup: dict[str, str] | None = None, nice: int = 0) -> UnitFacts:
    process = ProcessFacts(7, 61234, nice, (), cgroup or {}, 1.0)
    return UnitFacts("u.service", {k: (v,) for k, v in properties.items()}, process, frozenset(), 100.0, 8 * GIB)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("16G", 16 * GIB),
        ("512M", 512 << 20),
        ("3K", 3072),
        ("1T", 1 << 40),
        ("1000", 1000),
        ("50%", 4 * GIB),
        ("infinity", INFINITY),
        ("max", INFINITY),
    ],
)
def test_a_size_is_read(text: str, wanted: float) -> None:
    assert size(text, 8 * GIB) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("4s", 4.0), ("500ms", 0.5), ("1.5s", 1.5), ("1min 20s", 80.0), ("330us", 0.00033), ("infinity", INFINITY)],
)
def test_a_time_is_read(text: str, wanted: float) -> None:
    assert timespan(text) == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["", "[not set]", "4 parsecs", "1.2.3s"])
def test_nonsense_is_equal_to_nothing(text: str) -> None:
    assert math.isnan(size(text, 1))
    assert math.isnan(timespan(text))


GOOD: dict[str, tuple[str | int, str, str, str]] = {
    "MemoryMax": ("16G", "17179869184", "memory.max", "17179869184"),
    "MemoryHigh": ("50%", "4294967296", "memory.high", "4294967296"),
    "MemorySwapMax": ("0", "0", "memory.swap.max", "0"),
    "CPUWeight": (50, "50", "cpu.weight", "50"),
    "IOWeight": (20, "20", "io.weight", "default 20"),
    "TasksMax": (4096, "4096", "pids.max", "4096"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_limit_in_force_is_no_mismatch(name: str) -> None:
    value, shown, file, held = GOOD[name]
    assert mismatches({name: value}, facts({name: shown}, {file: held})) == []
    assert mismatches({name: value}, facts({name: shown})) == []


@pytest.mark.parametrize("name", GOOD)
def test_a_limit_that_systemd_does_not_state_is_a_mismatch(name: str) -> None:
    value = GOOD[name][0]
    for shown in ("infinity", "[not set]", "", "70000000"):
        (wrong,) = mismatches({name: value}, facts({name: shown}))
        assert (wrong.name, wrong.expected, wrong.found) == (name, str(value), shown or "not set")


@pytest.mark.parametrize("name", GOOD)
def test_a_limit_that_the_kernel_does_not_hold_is_a_mismatch(name: str) -> None:
    value, shown, file, _ = GOOD[name]
    (wrong,) = mismatches({name: value}, facts({name: shown}, {file: "max"}))
    assert file in wrong.found


def test_a_cpu_quota_is_compared_as_cpu_time() -> None:
    limit = {"CPUQuota": "400%"}
    assert mismatches(limit, facts({"CPUQuotaPerSecUSec": "4s"}, {"cpu.max": "400000 100000"})) == []
    assert mismatches(limit, facts({"CPUQuotaPerSecUSec": "4s"}, {"cpu.max": "max 100000"}))
    assert mismatches(limit, facts({"CPUQuotaPerSecUSec": "1.5s"}))
    assert mismatches(limit, facts({"CPUQuotaPerSecUSec": "infinity"}))
    assert mismatches({"CPUQuota": "8000%"}, facts({"CPUQuotaPerSecUSec": "1min 20s"})) == []


def test_a_niceness_is_that_of_the_process_too() -> None:
    assert mismatches({"Nice": 5}, facts({"Nice": "5"}, nice=5)) == []
    assert mismatches({"Nice": -1}, facts({"Nice": "-1"}, nice=-1)) == []
    assert mismatches({"Nice": 5}, facts({"Nice": "5"}, nice=0))[0].found == "0 on the process"
    assert mismatches({"Nice": 5}, facts({"Nice": "0"}, nice=5))


def test_a_percentage_may_differ_by_what_the_machine_keeps() -> None:
    assert mismatches({"MemoryMax": "50%"}, facts({"MemoryMax": str(4 * GIB - (40 << 20))})) == []
    assert mismatches({"MemoryMax": "50%"}, facts({"MemoryMax": str(5 * GIB)}))


def test_infinity_is_a_limit_like_another() -> None:
    assert mismatches({"MemoryMax": "infinity"}, facts({"MemoryMax": "infinity"})) == []
    assert mismatches({"MemoryMax": "infinity"}, facts({"MemoryMax": "1000000"}))
