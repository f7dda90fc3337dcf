"""The order in which secret ids were issued."""

from __future__ import annotations

import itertools

from nixops.vault.approle import sortable_time


def test_times_sort_by_age_though_go_leaves_zeros_out() -> None:
    ordered = [
        "2026-11-21T18:34:14.999999999Z",
        "2026-11-21T18:34:15Z",
        "2026-11-21T18:34:15.000000001Z",
        "2026-11-21T18:34:15.4Z",
        "2026-11-21T18:34:15.41Z",
        "2026-11-21T18:34:15.486410365Z",
        "2026-11-21T18:34:16Z",
    ]
    for mixed in itertools.islice(itertools.permutations(ordered), 0, None, 97):
        assert sorted(mixed, key=sortable_time) == ordered
