"""The order in which builders are chosen: capacity, speed, features, what they hold already."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixops.build.model import PoolBuilder, Probe
from nixops.build.rank import busy, free_jobs, rank, score
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName, System

X86, ARM = System("x86_64-linux"), System("aarch64-linux")


def answer(name: str, **given: object) -> Probe:
    builder = PoolBuilder(SshTarget(HostName(name), Address("192.0.2.1")), (X86,), max_jobs=4)
    fields = {k: given.pop(k) for k in list(given) if k in ("systems", "max_jobs", "speed_factor", "features")}
    if "mandatory" in given:
        fields["mandatory_features"] = given.pop("mandatory")
    probe = Probe(replace(builder, **fields), nix=(2, 26), cores=4, load=0.0, free=10**12, building=0)  # type: ignore[arg-type]  # names are checked above
    return replace(probe, **given)  # type: ignore[arg-type]  # a field of Probe, by the tests below


def names(*probes: Probe, required: frozenset[str] = frozenset(), **more: object) -> list[str]:
    return [str(p.builder.name) for p in rank(probes, X86, required, **more)]  # type: ignore[arg-type]  # as rank has them


def test_who_cannot_be_used_or_builds_for_another_system_is_left_out() -> None:
    assert names(answer("dead", reason="refused"), answer("arm", systems=(ARM,)), answer("good")) == ["good"]


def test_required_features_leave_out_who_lacks_one() -> None:
    probes = (answer("plain"), answer("kvm", features=frozenset({"kvm", "big-parallel"})))
    assert names(*probes, required=frozenset({"kvm"})) == ["kvm"]
    assert names(*probes, required=frozenset({"nixos-test"})) == []


def test_a_mandatory_feature_keeps_other_work_away_and_counts_as_a_feature() -> None:
    probes = (answer("plain"), answer("special", mandatory=frozenset({"benchmark"}), speed_factor=9))
    assert names(*probes) == ["plain"]
    assert names(*probes, required=frozenset({"benchmark"})) == ["special"]


def test_a_free_builder_comes_before_a_faster_one_whose_jobs_are_all_taken() -> None:
    assert names(answer("fast", speed_factor=50, building=4), answer("slow")) == ["slow", "fast"]


def test_our_own_claims_count_as_jobs_that_are_taken() -> None:
    one = answer("one", max_jobs=1)
    assert free_jobs(one) == 1
    assert names(replace(one, claims=1), answer("two", max_jobs=1)) == ["two", "one"]


def test_an_overloaded_builder_comes_after_one_that_has_time() -> None:
    assert busy(answer("hot", load=6.0)) and not busy(answer("warm", load=5.9))
    assert names(answer("hot", load=40.0, speed_factor=20), answer("cool")) == ["cool", "hot"]


def test_among_free_builders_the_one_that_holds_the_closure_is_preferred_to_a_faster_one() -> None:
    probes = (answer("fast", speed_factor=4), answer("warm"))
    assert names(*probes) == ["fast", "warm"]
    assert names(*probes, held={HostName("warm"): 0.8, HostName("fast"): 0.1}) == ["warm", "fast"]
    assert names(*probes, held={HostName("warm"): 0.2}) == ["fast", "warm"]


def test_a_full_builder_that_holds_the_closure_does_not_draw_every_build_to_itself() -> None:
    probes = (answer("warm", building=4), answer("cold"))
    assert names(*probes, held={HostName("warm"): 1.0}) == ["cold", "warm"]


def test_the_speed_factor_decides_between_equals_and_the_load_against_it() -> None:
    assert names(answer("a"), answer("b", speed_factor=2)) == ["b", "a"]
    assert names(answer("a"), answer("b", speed_factor=2, load=5.0)) == ["a", "b"]


def test_who_failed_a_while_ago_comes_last_but_comes() -> None:
    assert names(answer("failed", speed_factor=9), answer("full", building=4), last={HostName("failed")}) == [
        "full",
        "failed",
    ]


def test_what_a_builder_did_not_say_does_not_rule_it_out() -> None:
    silent = answer("silent", cores=None, load=None, free=None, building=None)
    assert names(silent) == ["silent"]
    assert 0 < score(silent) < score(answer("idle"))


probes_of = st.builds(
    answer,
    st.sampled_from([f"b{n}" for n in range(40)]),
    max_jobs=st.integers(1, 64),
    speed_factor=st.integers(1, 1000),
    building=st.none() | st.integers(0, 500),
    claims=st.integers(0, 50),
    cores=st.none() | st.integers(1, 512),
    load=st.none() | st.floats(0, 5000),
    free=st.none() | st.integers(0, 2**60),
    reason=st.none() | st.just("refused"),
)


@given(st.lists(probes_of, unique_by=lambda p: p.builder.name), st.randoms())
def test_the_order_is_total_loses_nobody_usable_and_does_not_depend_on_the_order_asked(
    probes: list[Probe], random: object
) -> None:
    ranked = rank(probes, X86)
    assert {p.builder.name for p in ranked} == {p.builder.name for p in probes if p.usable}
    shuffled = list(probes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    assert rank(shuffled, X86) == ranked


@pytest.mark.parametrize("jobs", [0, 3])
def test_more_running_builds_never_make_a_builder_better(jobs: int) -> None:
    assert score(answer("a", building=jobs)) > score(answer("a", building=jobs + 1))
