"""KV v2 with check-and-set, against the real OpenBao server."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from nixops.errors import CheckAndSetLost, VaultError, VaultSealed
from nixops.lab.openbao import BaoServer
from nixops.secret import Redactor, Secret
from nixops.values import VaultPath
from nixops.vault.openbao import OpenBao
from nixops.vault.settings import BaoSettings, TokenLogin


@pytest.fixture(scope="module")
def server() -> Iterator[BaoServer]:
    with BaoServer() as running:
        yield running


@pytest.fixture
def redactor() -> Redactor:
    return Redactor()


@pytest.fixture
def bao(server: BaoServer, redactor: Redactor) -> Iterator[OpenBao]:
    with OpenBao(BaoSettings(server.address, TokenLogin(server.root_token)), redactor) as opened:
        yield opened


@pytest.fixture
def path(request: pytest.FixtureRequest) -> VaultPath:
    return VaultPath(f"hosts/kv/{request.node.name.replace('[', '-').replace(']', '')}")


def text(bao: OpenBao, path: VaultPath, version: int | None = None) -> str | None:
    entry = bao.read(path, version)
    return entry.data["token"].reveal() if entry else None


def put(bao: OpenBao, path: VaultPath, value: str, cas: int) -> int:
    return bao.write(path, {"token": Secret(value)}, cas=cas)


def test_an_entry_that_is_not_there_reads_as_none_at_version_zero(bao: OpenBao, path: VaultPath) -> None:
    assert bao.read(path) is None
    assert bao.version(path) == 0


def test_a_write_gives_the_new_version_and_reads_back(bao: OpenBao, path: VaultPath) -> None:
    assert put(bao, path, "first-value", 0) == 1
    assert put(bao, path, "second-value", 1) == 2
    entry = bao.read(path)
    assert entry is not None
    assert (entry.path, entry.version, entry.data) == (path, 2, {"token": Secret("second-value")})


def test_an_older_version_can_be_read(bao: OpenBao, path: VaultPath) -> None:
    put(bao, path, "first-value", 0)
    put(bao, path, "second-value", 1)
    old = bao.read(path, 1)
    assert old is not None
    assert (old.version, old.data["token"].reveal()) == (1, "first-value")
    assert bao.read(path, 7) is None


def test_everything_read_or_written_is_known_to_the_redactor(
    bao: OpenBao, server: BaoServer, path: VaultPath, redactor: Redactor
) -> None:
    put(bao, path, "written-by-us", 0)
    server.api("POST", f"secret/data/{path}", {"data": {"token": "written-elsewhere", "uuid": "not-a-secret"}})
    bao.read(path, public=("uuid",))
    assert redactor.clean("written-by-us written-elsewhere not-a-secret") == "*** *** not-a-secret"


def test_a_value_shown_by_accident_is_masked(bao: OpenBao, path: VaultPath) -> None:
    put(bao, path, "first-value", 0)
    assert "first-value" not in repr(bao.read(path))


@pytest.mark.parametrize("cas", [0, 1, 3])
def test_a_lost_race_names_both_versions_and_the_other_write_stands(bao: OpenBao, path: VaultPath, cas: int) -> None:
    put(bao, path, "first-value", 0)
    put(bao, path, "theirs-value", 1)
    with pytest.raises(CheckAndSetLost) as caught:
        put(bao, path, "ours-value", cas)
    assert f"version {cas}" in caught.value.message
    assert "version 2" in caught.value.message
    assert text(bao, path) == "theirs-value"


def test_of_writers_at_the_same_moment_exactly_one_wins(server: BaoServer, path: VaultPath) -> None:
    """Eight writers that saw the same version: one new version, seven errors, nothing lost in silence."""
    outcomes: list[str] = []
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        with OpenBao(BaoSettings(server.address, TokenLogin(server.root_token)), Redactor()) as mine:
            mine.version(path)
            barrier.wait()
            try:
                put(mine, path, f"value-of-{number}", 0)
                outcomes.append(f"value-of-{number}")
            except CheckAndSetLost:
                outcomes.append("lost")

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [o for o in outcomes if o != "lost"]
    assert len(winners) == 1
    assert len(outcomes) == 8
    with OpenBao(BaoSettings(server.address, TokenLogin(server.root_token)), Redactor()) as reader:
        assert (text(reader, path), reader.version(path)) == (winners[0], 1)


def test_a_deleted_entry_reads_as_none_and_is_written_again_at_its_own_number(bao: OpenBao, path: VaultPath) -> None:
    put(bao, path, "first-value", 0)
    bao.delete(path, (1,))
    assert bao.read(path) is None
    assert bao.version(path) == 1
    with pytest.raises(CheckAndSetLost):
        put(bao, path, "second-value", 0)
    assert put(bao, path, "second-value", 1) == 2


def test_deleting_can_be_undone(bao: OpenBao, path: VaultPath) -> None:
    put(bao, path, "first-value", 0)
    bao.delete(path, (1,))
    bao.undelete(path, (1,))
    assert text(bao, path) == "first-value"


def test_a_destroyed_entry_reads_as_none_and_keeps_its_number(bao: OpenBao, path: VaultPath) -> None:
    put(bao, path, "first-value", 0)
    bao.destroy(path, (1,))
    assert bao.read(path) is None
    assert bao.version(path) == 1
    assert put(bao, path, "second-value", 1) == 2


def test_values_that_are_no_strings_are_given_as_json_and_restored_as_they_were(
    bao: OpenBao, server: BaoServer, path: VaultPath
) -> None:
    data = {"n": 5, "list": [1, "x"], "none": None, "token": "first-value"}
    server.api("POST", f"secret/data/{path}", {"data": data})
    entry = bao.read(path)
    assert entry is not None
    assert entry.data["n"].reveal() == "5"
    assert entry.data["list"].reveal() == '[1, "x"]'
    put(bao, path, "second-value", 1)
    bao.restore(path, to_version=1, from_version=2)
    assert server.api("GET", f"secret/data/{path}")["data"]["data"] == data


def test_an_update_leaves_the_other_keys_with_the_json_they_hold(
    server: BaoServer, bao: OpenBao, path: VaultPath
) -> None:
    others = {"note": {"n": [1, 2]}, "number": 5, "text": "é\n", "nothing": None}
    server.api("POST", f"secret/data/{path}", {"data": {**others, "token": "old"}})
    assert bao.update(path, {"token": Secret("new-token")}, cas=1) == 2
    assert server.api("GET", f"secret/data/{path}")["data"]["data"] == {**others, "token": "new-token"}
    with pytest.raises(CheckAndSetLost, match="version 2"):
        bao.update(path, {"token": Secret("newer-token")}, cas=1)
    bao.delete(path, (2,))
    assert bao.update(path, {"token": Secret("alone-now")}, cas=2) == 3
    assert server.api("GET", f"secret/data/{path}")["data"]["data"] == {"token": "alone-now"}


def test_restore_writes_the_old_data_again(bao: OpenBao, path: VaultPath) -> None:
    put(bao, path, "first-value", 0)
    put(bao, path, "second-value", 1)
    assert bao.restore(path, to_version=1, from_version=2) == 3
    assert text(bao, path) == "first-value"


def test_restore_of_a_first_write_leaves_nothing_to_read(bao: OpenBao, path: VaultPath) -> None:
    put(bao, path, "first-value", 0)
    assert bao.restore(path, to_version=0, from_version=1) is None
    assert bao.read(path) is None
    assert bao.read(path, 1) is None


def test_restore_to_a_deleted_version_leaves_nothing_to_read(bao: OpenBao, path: VaultPath) -> None:
    put(bao, path, "first-value", 0)
    bao.delete(path, (1,))
    put(bao, path, "second-value", 1)
    assert bao.restore(path, to_version=1, from_version=2) is None
    assert bao.read(path) is None


@pytest.mark.parametrize("to_version", [0, 1])
def test_restore_never_touches_a_newer_write_of_somebody_else(bao: OpenBao, path: VaultPath, to_version: int) -> None:
    ours = to_version + 1
    for version in range(ours):
        put(bao, path, f"value-number-{version}", version)
    put(bao, path, "theirs-value", ours)
    with pytest.raises(CheckAndSetLost) as caught:
        bao.restore(path, to_version=to_version, from_version=ours)
    assert f"version {ours}" in caught.value.message
    assert f"version {ours + 1}" in caught.value.message
    assert text(bao, path) == "theirs-value"


class Racing(OpenBao):
    """Somebody else writes between the look at the current version and what comes after it."""

    def _get(self, path: VaultPath, version: int | None) -> object:  # type: ignore[override]  # only watched
        found = super()._get(path, version)
        if version is None and found is not None and found.version == 1:
            put(OpenBao(self.settings, Redactor()), path, "theirs-value", 1)
        return found


def test_restore_of_a_first_write_spares_a_write_that_comes_in_that_very_moment(bao: OpenBao, path: VaultPath) -> None:
    put(bao, path, "first-value", 0)
    racing = Racing(bao.settings, Redactor())
    racing.restore(path, to_version=0, from_version=1)
    assert text(bao, path) == "theirs-value"
    assert bao.read(path, 1) is None


def test_forget_destroys_every_version_but_none_newer(bao: OpenBao, path: VaultPath) -> None:
    put(bao, path, "first-value", 0)
    put(bao, path, "second-value", 1)
    with pytest.raises(CheckAndSetLost):
        bao.forget(path, version=1)
    assert text(bao, path, 1) == "first-value"
    bao.forget(path, version=2)
    assert [bao.read(path, v) for v in (1, 2, None)] == [None, None, None]


def test_check_passes_on_a_server_that_is_ready(bao: OpenBao) -> None:
    bao.check()


def test_a_sealed_server_is_told_as_such(server: BaoServer, bao: OpenBao, path: VaultPath) -> None:
    server.seal()
    try:
        for ask in (bao.check, lambda: bao.read(path), lambda: put(bao, path, "first-value", 0)):
            with pytest.raises(VaultSealed, match="unseal"):
                ask()
    finally:
        server.unseal()
    bao.check()
    assert bao.read(path) is None


def test_a_mount_that_is_not_there_is_an_error_and_not_an_absent_entry(server: BaoServer, path: VaultPath) -> None:
    bao = OpenBao(BaoSettings(server.address, TokenLogin(server.root_token), mount="nope"), Redactor())
    for ask in (bao.check, lambda: bao.read(path), lambda: bao.version(path), lambda: put(bao, path, "value-1", 0)):
        with pytest.raises(VaultError, match="nothing mounted") as caught:
            ask()
        assert "bao secrets enable -path=nope kv-v2" in (caught.value.hint or "")


def test_a_mount_of_kv_version_one_is_an_error_and_not_an_absent_entry(server: BaoServer, path: VaultPath) -> None:
    server.api("POST", "sys/mounts/kv1", {"type": "kv", "options": {"version": "1"}})
    bao = OpenBao(BaoSettings(server.address, TokenLogin(server.root_token), mount="kv1"), Redactor())
    for ask in (bao.check, lambda: bao.read(path), lambda: put(bao, path, "value-1", 0)):
        with pytest.raises(VaultError, match="KV engine of version 1, and KV version 2 is needed") as caught:
            ask()
        assert "bao kv enable-versioning kv1/" in (caught.value.hint or "")


def test_another_mount_name_works(server: BaoServer, path: VaultPath) -> None:
    server.api("POST", "sys/mounts/team-kv", {"type": "kv", "options": {"version": "2"}})
    bao = OpenBao(BaoSettings(server.address, TokenLogin(server.root_token), mount="team-kv"), Redactor())
    bao.check()
    assert put(bao, path, "first-value", 0) == 1
    assert server.api("GET", f"team-kv/data/{path}")["data"]["data"] == {"token": "first-value"}
