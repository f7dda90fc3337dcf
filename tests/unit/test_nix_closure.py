"""Differences of closures, as a reader sees them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixops.nix.closure import ClosureDiff, PathInfo, closure_diff, signed_size, split_name
from nixops.values import StorePath

MIB = 1024 * 1024


def info(name: str, size: int = 1000, seed: str = "a") -> PathInfo:
    return PathInfo(StorePath(f"/nix/store/{seed * 32}-{name}"), size)


def test_a_new_version_is_one_line_with_its_growth() -> None:
    diff = closure_diff([info("nix-2.18.1", 10 * MIB)], [info("nix-2.24.9", 12 * MIB)])
    assert diff.changed == ("nix: 2.18.1 → 2.24.9, +2.0 MiB",)
    assert diff.size_delta == 2 * MIB
    assert diff.lines() == ("~ nix: 2.18.1 → 2.24.9, +2.0 MiB", "closure size +2.0 MiB")


def test_what_comes_and_what_goes_are_told_apart() -> None:
    diff = closure_diff([info("python3-3.11.9", 110 * MIB)], [info("nodejs-22.1.0", 48 * MIB)])
    assert diff.added == ("nodejs: 22.1.0, +48.0 MiB",)
    assert diff.removed == ("python3: 3.11.9, -110.0 MiB",)


def test_the_same_closure_is_no_difference() -> None:
    closure = [info("nix-2.18.1"), info("bash-5.2")]
    assert closure_diff(closure, list(reversed(closure))) == ClosureDiff()
    assert closure_diff(closure, closure).lines() == ()


def test_what_differs_in_nothing_but_its_hash_is_counted() -> None:
    diff = closure_diff(
        [info("etc", seed="a"), info("bash-5.2", seed="a")], [info("etc", seed="b"), info("bash-5.2", seed="b")]
    )
    assert (diff.added, diff.removed, diff.changed, diff.rebuilt) == ((), (), (), 2)
    assert diff.lines()[0] == "~ 2 paths rebuilt with no change of version"


def test_a_rebuilt_path_of_another_size_is_named() -> None:
    diff = closure_diff([info("etc", 1000, "a")], [info("etc", 20 * 1024 + 1000, "b")])
    assert diff.changed == ("etc: (no version), +20.0 KiB",)


def test_outputs_of_a_package_are_one_name() -> None:
    diff = closure_diff(
        [info("openssl-3.0.12", seed="a"), info("openssl-3.0.12-bin", seed="b")],
        [info("openssl-3.0.13", seed="c"), info("openssl-3.0.13-bin", seed="d")],
    )
    assert diff.changed == ("openssl: 3.0.12 → 3.0.13",)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("openssl-3.0.13-bin", ("openssl", "3.0.13")),
        ("nixos-system-web-24.05pre", ("nixos-system-web", "24.05pre")),
        ("unit-gitea-runner.service", ("unit-gitea-runner.service", "")),
        ("python3.11-pip-24.0", ("python3.11-pip", "24.0")),
        ("source", ("source", "")),
    ],
)
def test_names_are_split_where_nix_splits_them(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize(
    ("size", "text"), [(0, "+0 B"), (-1, "-1 B"), (2048, "+2.0 KiB"), (-3 * MIB, "-3.0 MiB"), (5000 * MIB, "+4.9 GiB")]
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert signed_size(size) == text


NAMES = st.sampled_from(["bash-5.2", "bash-5.3", "nix-2.18", "etc", "openssl-3.0-bin", "openssl-3.0"])
CLOSURES = st.lists(
    st.builds(info, NAMES, st.integers(0, 10**10), st.sampled_from("abcd")), unique_by=lambda i: i.path, max_size=12
)


@given(CLOSURES, CLOSURES)
def test_the_difference_is_empty_only_for_the_same_paths_and_turns_around(
    before: list[PathInfo], after: list[PathInfo]
) -> None:
    there, back = closure_diff(before, after), closure_diff(after, before)
    assert there.size_delta == -back.size_delta
    assert [line.split(":")[0] for line in there.added] == [line.split(":")[0] for line in back.removed]
    same = {i.path for i in before} == {i.path for i in after}
    assert there.empty == same
