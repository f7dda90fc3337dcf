"""The Forgejo client against the lab's server: credentials for every version and scope, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests

from nixops.errors import ForgeError
from nixops.forge.forgejo import Forgejo
from nixops.forge.http import Answer
from nixops.inventory.model import Scope
from nixops.lab.forgejo_server import ForgejoServer
from nixops.lab.forgejo_state import RunnerRow
from nixops.secret import Redactor
from nixops.values import RepoName

REPOSITORY = Scope(repository=RepoName("torjus/nixos"))
ORGANIZATION = Scope(organization="acme")
USER = Scope(user="torjus")
ADMIN = Scope(admin=True)
SCOPES = (REPOSITORY, ORGANIZATION, USER, ADMIN)
ALL_VERSIONS = range(7, 18)


def furnish(server: ForgejoServer) -> ForgejoServer:
    server.add_user("torjus", admin=True)
    server.add_user("guest")
    server.add_org("acme", owners=["torjus"])
    server.add_repo("torjus/nixos")
    server.add_repo("torjus/nixos-exporter")
    server.add_repo("torjus/private-notes", private=True)
    server.add_repo("acme/tools")
    return server


@pytest.fixture
def forge() -> Iterator[ForgejoServer]:
    with furnish(ForgejoServer(15)) as server:
        yield server


def client(server: ForgejoServer, *, owner: str = "torjus", timeout: float = 10.0, **options: Any) -> Forgejo:
    token = server.add_token(owner, **options)
    return Forgejo(server.url, token, redactor=Redactor(), timeout=timeout, sleep=lambda _: None)


def declares(server: ForgejoServer, uuid: str, token: str) -> bool:
    """The credentials are accepted by the runner's protocol."""
    answer = requests.post(
        f"{server.url}/api/actions/runner.v1.RunnerService/Declare",
        json={"version": "v12", "labels": ["native"]},
        headers={"x-runner-uuid": uuid, "x-runner-token": token},
        timeout=10,
    )
    return answer.status_code == 200


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_every_version_gives_credentials_that_work_for_every_scope(version: int, scope: Scope) -> None:
    with furnish(ForgejoServer(version)) as server:
        forge = client(server)
        assert forge.version().major == version
        made = forge.create_runner(scope, name="native", description="of nix-cache02")
        assert declares(server, made.uuid, made.token.reveal())
        (runner,) = server.runners
        assert (runner.id, runner.uuid, runner.name) == (made.id, made.uuid, "native")
        assert runner.scope == (scope.repository or scope.organization or scope.user or "admin")


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_a_plan_asks_for_nothing_that_makes_something(version: int) -> None:
    with furnish(ForgejoServer(version)) as server:
        forge = client(server)
        for scope in SCOPES:
            forge.check_access(scope)
            forge.admitted(scope)
            assert not server.registration_token_made(scope)
        assert {r.method for r in server.requests} == {"GET"}
        assert server.runners == ()


@pytest.mark.parametrize("version", [7, 15])
def test_the_registration_token_is_the_same_until_it_is_reset(version: int) -> None:
    with furnish(ForgejoServer(version)) as server:
        forge = client(server)
        for scope in SCOPES:
            first = forge.registration_token(scope)
            assert server.registration_token_made(scope)
            assert forge.registration_token(scope) == first
            assert server.reset_registration_token(scope) == forge.registration_token(scope) != first


def test_what_the_server_gives_out_is_known_to_the_redactor(forge: ForgejoServer) -> None:
    redactor = Redactor()
    asking = Forgejo(forge.url, forge.add_token("torjus"), redactor=redactor)
    asking.registration_token(USER)
    asking.create_runner(REPOSITORY, name="n")
    assert len(forge.issued) == 3
    assert redactor.clean(" ".join(forge.issued)) == "*** *** ***"


def test_the_token_must_be_of_the_account_meant(forge: ForgejoServer) -> None:
    with pytest.raises(ForgeError, match="belongs to guest, but the runner is meant for the account torjus"):
        client(forge, owner="guest").check_access(USER)
    client(forge).check_access(Scope(user="Torjus"))


@pytest.mark.parametrize(
    ("scope", "said"),
    [
        (REPOSITORY, "may not administer torjus/nixos"),
        (ORGANIZATION, "not in the organization acme"),
        (ADMIN, "no site administrator"),
        (Scope(repository=RepoName("torjus/private-notes")), "404"),
        (Scope(repository=RepoName("torjus/absent")), "404"),
        (Scope(organization="absent"), "404"),
    ],
    ids=str,
)
@pytest.mark.parametrize("version", [9, 11, 15])
def test_a_token_without_the_rights_is_told_apart_before_anything_is_made(
    version: int, scope: Scope, said: str
) -> None:
    with furnish(ForgejoServer(version)) as server, pytest.raises(ForgeError, match=said) as error:
        client(server, owner="guest").check_access(scope)
    assert error.value.hint


def test_a_member_of_an_organization_who_does_not_own_it_is_refused_by_the_server(forge: ForgejoServer) -> None:
    forge.add_org("club", owners=["torjus"], members=["guest"])
    with pytest.raises(ForgeError, match="Must be an organization owner"):
        client(forge, owner="guest").check_access(Scope(organization="club"))


def test_an_organization_needs_no_scope_for_the_user(forge: ForgejoServer) -> None:
    client(forge, scopes=["write:organization"]).check_access(ORGANIZATION)


def test_a_repository_without_actions_could_have_no_runner(forge: ForgejoServer) -> None:
    forge.add_repo("torjus/quiet", has_actions=False)
    with pytest.raises(ForgeError, match="Actions is switched off in torjus/quiet"):
        client(forge).check_access(Scope(repository=RepoName("torjus/quiet")))


@pytest.mark.parametrize("version", [7, 15])
def test_admitted_names_every_repository_of_the_scope(version: int) -> None:
    with furnish(ForgejoServer(version)) as server:
        forge = client(server)
        mine = ("torjus/nixos", "torjus/nixos-exporter", "torjus/private-notes")
        assert forge.admitted(REPOSITORY) == ("torjus/nixos",)
        assert forge.admitted(USER) == mine
        assert forge.admitted(ORGANIZATION) == ("acme/tools",)
        assert forge.admitted(ADMIN) == ("acme/tools", *mine)


@pytest.mark.parametrize("page_limit", [1, 7, 50])
def test_long_lists_are_read_to_their_end_whatever_the_servers_page_is(page_limit: int) -> None:
    with furnish(ForgejoServer(15, page_limit=page_limit)) as server:
        names = {f"acme/r{n:02}" for n in range(60)} | {"acme/tools"}
        for name in names - {"acme/tools"}:
            server.add_repo(name)
        assert set(client(server).admitted(ORGANIZATION)) == names


def test_runners_that_move_between_pages_are_neither_doubled_nor_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with furnish(ForgejoServer(15, page_limit=4)) as server:
        ids = {server.add_runner(USER, f"r{n}").id for n in range(10)}
        honest = server._state.visible_runners
        calls = iter(range(1000))

        def shifting(*args: Any, **keys: Any) -> list[RunnerRow]:
            rows = honest(*args, **keys)
            # One runner after the other makes contact, and so comes to the head of the list.
            for number in range(next(calls) % 5):
                rows.insert(0, rows.pop((7 * number + 3) % len(rows)))
            return rows

        monkeypatch.setattr(server._state, "visible_runners", shifting)
        assert {r.id for r in client(server).list_runners(USER)} == ids


def test_listing_shows_only_the_scopes_own_runners(forge: ForgejoServer) -> None:
    own = forge.add_runner(REPOSITORY, "own")
    forge.add_runner(ADMIN, "of all")
    forge.add_runner(USER, "of the account")
    (shown,) = client(forge).list_runners(REPOSITORY)
    assert (shown.id, shown.name, shown.status, shown.labels) == (own.id, "own", "offline", ())


def test_status_and_labels_follow_the_daemon() -> None:
    now = [1_700_000_000.0]
    with furnish(ForgejoServer(15, clock=lambda: now[0])) as server:
        forge = client(server)
        made = forge.create_runner(REPOSITORY, name="n")

        def seen() -> tuple[str, tuple[str, ...]]:
            (runner,) = forge.list_runners(REPOSITORY)
            return runner.status, runner.labels

        assert seen() == ("offline", ())
        declares(server, made.uuid, made.token.reveal())
        assert seen() == ("idle", ("native",))
        now[0] += 60
        assert seen() == ("idle", ("native",))
        now[0] += 1
        assert seen() == ("offline", ("native",))


def test_deleting_is_repeatable_and_only_where_the_scope_is(forge: ForgejoServer) -> None:
    asking = client(forge)
    made = asking.create_runner(REPOSITORY, name="n")
    asking.delete_runner(USER, made.id)
    assert [r.id for r in forge.runners] == [made.id], "another scope's runner is not touched"
    asking.delete_runner(REPOSITORY, made.id)
    asking.delete_runner(REPOSITORY, made.id)
    assert forge.runners == ()


def test_a_deletion_whose_answer_is_lost_is_seen_to_be_done(forge: ForgejoServer) -> None:
    asking = client(forge)
    made = asking.create_runner(REPOSITORY, name="n")
    forge.fault("/actions/runners/", method="DELETE", drop="after")
    asking.delete_runner(REPOSITORY, made.id)
    assert forge.runners == ()


def test_a_deletion_that_did_not_happen_is_an_error(forge: ForgejoServer) -> None:
    asking = client(forge)
    made = asking.create_runner(REPOSITORY, name="n")
    forge.fault("/actions/runners/", method="DELETE", status=500)
    with pytest.raises(ForgeError, match="refused with 500"):
        asking.delete_runner(REPOSITORY, made.id)


@pytest.mark.parametrize("version", [7, 14])
def test_before_15_listing_and_deleting_say_where_to_do_it_by_hand(version: int) -> None:
    with furnish(ForgejoServer(version)) as server:
        forge = client(server)
        for act in (lambda: forge.list_runners(REPOSITORY), lambda: forge.delete_runner(REPOSITORY, 1)):
            with pytest.raises(ForgeError, match="through its API") as error:
                act()
            assert "/torjus/nixos/settings/actions/runners" in str(error.value)


# -- a POST whose answer is lost ------------------------------------------------------------------------------

LOST: dict[str, dict[str, Any]] = {
    "connection ends": {"drop": "after"},
    "not JSON": {"status": 201, "body": b"<html>"},
    "another shape": {"status": 201, "body": b'{"id": 1}'},
    "gateway": {"status": 504, "body": b"late"},
}


@pytest.mark.parametrize("kind", LOST)
def test_a_post_without_a_good_answer_leaves_no_runner(forge: ForgejoServer, kind: str) -> None:
    other = forge.add_runner(REPOSITORY, "native", "somebody else's of the same name")
    forge.fault("/actions/runners$", method="POST", **LOST[kind])
    with pytest.raises(ForgeError) as error:
        client(forge).create_runner(REPOSITORY, name="native")
    assert [r.id for r in forge.runners] == [other.id]
    assert [r.method for r in forge.requests].count("POST") == 1, "a POST is never sent again by itself"
    carried_out = LOST[kind].get("drop") == "after"
    assert ("was deleted again" if carried_out else "made no runner so far") in error.value.message
    assert not any(secret in str(error.value) for secret in forge.issued)


def test_a_runner_that_appears_only_after_the_time_out_is_found(forge: ForgejoServer) -> None:
    forge.fault("/actions/runners$", method="POST", delay=2.3)
    asking = Forgejo(forge.url, forge.add_token("torjus"), redactor=Redactor(), timeout=2.0)
    with pytest.raises(ForgeError, match="was deleted again"):
        asking.create_runner(REPOSITORY, name="native")
    assert forge.runners == ()


def test_when_nobody_can_tell_what_was_made_the_error_says_how_to_look(forge: ForgejoServer) -> None:
    forge.fault("/actions/runners$", method="POST", drop="after")
    forge.fault("/actions/runners$", method="GET", status=500, times=9)
    with pytest.raises(ForgeError, match="whether it made a runner is not known") as error:
        client(forge).create_runner(REPOSITORY, name="native")
    assert "/torjus/nixos/settings/actions/runners" in str(error.value)
    assert forge.runners[0].description in str(error.value)


def test_an_interrupted_post_leaves_no_runner(forge: ForgejoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = client(forge)
    honest = asking.http.send

    def interrupted(method: str, path: str, **keys: Any) -> Answer:
        answer = honest(method, path, **keys)
        if method == "POST":
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(asking.http, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asking.create_runner(REPOSITORY, name="native")
    assert forge.runners == ()
    assert len(forge.issued) == 2


def test_a_refused_post_is_that_and_no_more(forge: ForgejoServer) -> None:
    forge.fault("/actions/runners$", method="POST", status=422, body=b'{"message": "[Name]: MaxSize"}')
    with pytest.raises(ForgeError, match=r"refused with 422: \[Name\]: MaxSize"):
        client(forge).create_runner(REPOSITORY, name="n" * 300)
    assert [r.path for r in forge.requests if r.method == "GET"] == ["/api/v1/version"]


def test_before_15_a_lost_registration_says_what_may_be_left() -> None:
    with furnish(ForgejoServer(11)) as server:
        server.fault("Register", drop="after")
        with pytest.raises(ForgeError, match="a runner native may have been made") as error:
            client(server).create_runner(USER, name="native")
        assert "/user/settings/actions/runners" in str(error.value)
        assert len(server.runners) == 1


def test_before_15_a_token_reset_in_between_is_named() -> None:
    with furnish(ForgejoServer(11)) as server:
        body = b'{"code": "invalid_argument", "message": "runner registration token not found"}'
        server.fault("Register", status=400, body=body)
        with pytest.raises(ForgeError, match="registration token not found") as error:
            client(server).create_runner(USER, name="native")
        assert "reset in the meantime" in str(error.value)
        assert server.runners == ()
