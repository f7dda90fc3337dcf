"""Taking back a deploy's effects: what is settled, and what a second try still has to do."""

from __future__ import annotations

from typing import Any, cast

from nixops.deploy.undo import Clients, undo
from nixops.errors import CheckAndSetLost, HostFault, VaultError
from nixops.transport.local import LocalRunner


class FakeBao:
    """KV entries whose restoring fails as told."""

    def __init__(self, errors: dict[str, Exception]) -> None:
        self.errors = errors
        self.restored: list[str] = []

    def restore(self, path: str, *, to_version: int, from_version: int) -> int:
        if path in self.errors:
            raise self.errors[path]
        self.restored.append(path)
        assert to_version < from_version
        return from_version + 1


def clients(bao: FakeBao) -> Clients:
    unused: Any = None
    return Clients(unused, lambda: cast("Any", bao), unused, unused, LocalRunner())


def written(path: str) -> list[dict[str, Any]]:
    return [
        {"kind": "kv", "path": path, "from_version": 1},
        {"kind": "kv-written", "path": path, "from_version": 1, "to_version": 2},
    ]


def test_what_fails_stays_open_with_its_announcement_and_the_rest_is_settled() -> None:
    bao = FakeBao({"a/b": VaultError("sealed")})
    settled: list[int] = []
    done = undo([*written("a/b"), *written("c/d")], clients(bao), settled.append)
    assert sorted(settled) == [2, 3] and bao.restored == ["c/d"]
    assert [bool(d.problem) for d in done] == [False, True]


def test_a_second_try_keeps_the_numbers_of_the_first() -> None:
    bao = FakeBao({})
    settled: list[int] = []
    left = [{**effect, "number": number} for number, effect in enumerate(written("a/b"), start=4)]
    undo(left, clients(bao), settled.append)
    assert sorted(settled) == [4, 5] and bao.restored == ["a/b"]


def test_what_somebody_else_wrote_since_stands_and_is_not_tried_again() -> None:
    bao = FakeBao({"a/b": CheckAndSetLost("a/b is at version 3")})
    settled: list[int] = []
    done = undo(written("a/b"), clients(bao), settled.append)
    assert sorted(settled) == [0, 1] and [d.problem for d in done] == [""] and "version 3" in done[0].what


def test_an_entry_that_makes_no_sense_is_said_and_stays_open() -> None:
    settled: list[int] = []
    done = undo([{"kind": "unheard-of"}, {"kind": "kv-written", "path": "a/b"}], clients(FakeBao({})), settled.append)
    assert settled == [] and all("not usable" in d.problem for d in done) and len(done) == 2


def test_a_journal_that_cannot_be_written_keeps_nothing_from_being_undone() -> None:
    """The operator's full disk may be why the deploy failed."""
    bao = FakeBao({})

    def settled(_number: int) -> None:
        raise HostFault("the journal cannot be written")

    done = undo([*written("a/b"), *written("c/d")], clients(bao), settled)
    assert bao.restored == ["c/d", "a/b"]
    assert [d.problem for d in done] == ["", "", "the journal cannot be written"]
