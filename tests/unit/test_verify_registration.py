"""A runner is registered when its own files say so and, where the forge lists its runners, the forge does too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from nixops.errors import ForgeError
from nixops.verify.model import CheckResult
from tests.unit.verify_recorded import UUID, Clock, RecordedHost, check, inventory_host


@dataclass(frozen=True)
class Listed:
    """A runner as a forge lists it."""

    id: int = 7
    uuid: str = UUID
    name: str = "nix-cache02-native"
    status: str = "idle"
    labels: tuple[str, ...] = ("native",)


def registered(*runners: Listed, clock: Clock | None = None) -> CheckResult:
    return check(RecordedHost(), forge=lambda: runners, clock=clock)["registered"]


def test_a_listed_idle_runner_is_registered() -> None:
    result = registered(Listed(), Listed(id=3, uuid="33333333-3333-3333-3333-333333333333", name="another"))
    assert result.ok
    assert "nix-cache02-native is idle" in result.detail


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([], f"no runner with uuid {UUID} among 0"),
        ([Listed(uuid="33333333-3333-3333-3333-333333333333")], f"no runner with uuid {UUID} among 1"),
        ([Listed(status="offline")], "nix-cache02-native offline"),
        ([Listed(labels=("docker",))], "expected the labels native; found docker"),
    ],
)
def test_a_runner_the_forge_does_not_see_alive_fails_after_waiting(listed: list[Listed], said: str) -> None:
    clock = Clock()
    result = registered(*listed, clock=clock)
    assert not result.ok
    assert said in result.detail
    assert 15 <= clock.now <= 17


def test_a_daemon_that_takes_a_moment_is_waited_for() -> None:
    answers = [[Listed(status="offline", labels=())], [Listed(status="offline")], [Listed(status="active")]]
    forge: Callable[[], object] = lambda: tuple(answers.pop(0))  # noqa: E731 - a list of answers, one a call
    clock = Clock()
    assert check(RecordedHost(), forge=forge, clock=clock)["registered"].ok
    assert clock.now == 2


def test_labels_not_declared_yet_are_no_wrong_labels() -> None:
    assert registered(Listed(labels=())).ok


def test_an_orphaned_older_registration_is_mentioned() -> None:
    result = registered(Listed(), Listed(id=3, uuid="33333333-3333-3333-3333-333333333333", status="offline"))
    assert result.ok
    assert "1 older registration" in result.detail


def test_a_forge_that_does_not_answer_leaves_it_undecided() -> None:
    def forge() -> tuple[Listed, ...]:
        raise ForgeError("Forgejo answered 503", hint="try again")

    result = check(RecordedHost(), forge=forge)["registered"]
    assert not result.ok
    assert "could not be decided: the forge could not be asked: Forgejo answered 503" in result.detail


CONNECTIONS = (
    '@config\nuuid: "11111111-1111-1111-1111-111111111111\nuuid: 22222222-2222-2222-2222-222222222222\n@declared\n2\n'
)


def connected(registration: str, forge: object = None, *, then: str | None = None) -> CheckResult:
    recorded = RecordedHost(registration=registration, registrations=[then] if then else [])
    host = inventory_host(
        module="forgejo-runner", scope=None, trusted=["torjus/nixos", "torjus/nixos-servers"], other=False
    )
    recorded.unit["User"] = "forgejo-runner-actions2"
    return check(recorded, host, forge=forge, unit="forgejo-runner-actions2.service")["registered"]


def test_every_connection_must_be_listed() -> None:
    both = (Listed(uuid="11111111-1111-1111-1111-111111111111"), Listed())
    assert connected(CONNECTIONS, lambda: both).ok
    assert not connected(CONNECTIONS, lambda: both[:1]).ok


def test_a_connection_for_each_trusted_repository_must_be_configured() -> None:
    result = connected(CONNECTIONS.replace('uuid: "11111111-1111-1111-1111-111111111111\n', ""))
    assert not result.ok
    assert "expected 2 connections" in result.detail


def test_where_the_forge_cannot_list_the_journal_must_say_that_each_connection_was_declared() -> None:
    assert connected(CONNECTIONS).ok
    result = connected(CONNECTIONS.replace("\n2\n", "\n1\n"))
    assert not result.ok
    assert "1 in the journal" in result.detail


def test_a_daemon_that_declares_one_connection_after_the_other_is_waited_for() -> None:
    assert connected(CONNECTIONS.replace("\n2\n", "\n1\n"), then=CONNECTIONS).ok


def test_a_registration_file_that_is_being_written_is_waited_for() -> None:
    recorded = RecordedHost()
    recorded.registrations = ["@registration\n@config\n@declared\n0\n", recorded.registration]
    recorded.registration = "@config\n@declared\n0\n"
    clock = Clock()
    assert check(recorded, clock=clock)["registered"].ok
    assert clock.now == 2
