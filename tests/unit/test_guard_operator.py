"""The operator's side of an activation: what it says and does when the connection, the host or the operator fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from nixops.deploy import guard, transaction
from nixops.deploy.host import HostFacts
from nixops.deploy.lease import Lease
from nixops.errors import (
    ConnectionLost,
    ExitCode,
    HostFault,
    HostStateUnknown,
    Interrupted,
    Leased,
    NixopsError,
    RolledBack,
)
from nixops.secret import Redactor
from nixops.transport.command import Command, LineSink, Result
from nixops.ui.report import Reporter
from nixops.values import StorePath
from nixops.verify.model import CheckResult

OLD = StorePath("/nix/store/" + "a" * 32 + "-old")
NEW = StorePath("/nix/store/" + "b" * 32 + "-new")
FACTS = HostFacts(
    running=OLD,
    booted=OLD,
    profile=OLD,
    generation=41,
    boot_id="boot-1",
    revision=None,
    tools="/nix/store/tools/bin",
    missing=(),
    deploys=(),
    lease=None,
    upgrading=False,
    auto_upgrade=False,
)

START, FENCE, FOLLOW = "starting the guard", "looking whether the guard began", "following the activation"
CONFIRM, ABORT = "giving the verdict confirm", "giving the verdict abort"


@dataclass
class FakeHost:
    """A host that behaves as the guard does; faults are raised before (or after) what a command does."""

    state: str = ""
    before: dict[str, list[BaseException]] = field(default_factory=dict)
    after: dict[str, list[BaseException]] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    did: list[str] = field(default_factory=list)
    leased: bool = True
    goes_back: str = "rolled-back"

    @property
    def host(self) -> str:
        return "nix-cache02"

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        title = command.name
        assert on_line is None, "nothing of the transaction is shown line by line"
        if faults := self.before.get(title):
            raise faults.pop(0)
        self.did.append(title)
        code, out = self._do(title)
        if faults := self.after.get(title):
            raise faults.pop(0)
        return Result(command, self.codes.get(title, code), out.encode(), b"", host=self.host)

    def _do(self, title: str) -> tuple[int, str]:
        if title == START and self.codes.get(START) != guard.NOTHING_BEGAN:
            self.state = "awaiting-confirm"
        elif title == FENCE:
            self.state = self.state or "refused"
        elif title == CONFIRM:
            self.state = "committed"
        elif title == ABORT and self.state == "awaiting-confirm":
            self.state = self.goes_back
        elif title == FOLLOW:
            return (0, f"{self.state}\nboot-1\n") if self.state else (1, "")
        return 0, ""


class FakeLease:
    """A lease that stands, or not."""

    def __init__(self, host: FakeHost) -> None:
        self.host = host

    def check(self) -> None:
        if not self.host.leased:
            raise Leased("the lease ended in the meantime")

    def use(self, runner: Any) -> None:
        """Signs of life are not given here."""


def good(_runner: Any) -> Sequence[CheckResult]:
    return [CheckResult("unit-active", True, "active")]


def raising(*errors: BaseException) -> Callable[[Any], Sequence[CheckResult]]:
    left = list(errors)

    def verify(runner: Any) -> Sequence[CheckResult]:
        if left:
            raise left.pop(0)
        return good(runner)

    return verify


def activate(host: FakeHost, verify: Callable[[Any], Sequence[CheckResult]] = good) -> Any:
    activation = transaction.Activation("x", NEW, 1.0, 30.0)
    lease = cast("Lease", FakeLease(host))
    return transaction.activate(host, lambda: host, FACTS, activation, verify, Reporter(Redactor(), quiet=True), lease)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)


def code_of(host: FakeHost, verify: Callable[[Any], Sequence[CheckResult]] = good) -> ExitCode:
    with pytest.raises(NixopsError) as caught:
        activate(host, verify)
    return caught.value.exit_code


def test_good_checks_commit() -> None:
    host = FakeHost()
    assert [c.name for c in activate(host)] == ["unit-active"] and host.state == "committed"


def test_failed_checks_roll_back() -> None:
    host = FakeHost()
    assert code_of(host, lambda _: [CheckResult("unit-active", False, "dead")]) == ExitCode.ROLLED_BACK
    assert host.state == "rolled-back"


def test_a_failed_roll_back_is_7() -> None:
    host = FakeHost(goes_back="rollback-failed")
    assert code_of(host, lambda _: [CheckResult("unit-active", False, "dead")]) == ExitCode.UNKNOWN_STATE


def test_without_the_lease_nothing_is_begun() -> None:
    host = FakeHost(leased=False)
    assert code_of(host) == ExitCode.LEASED and host.did == []


def test_a_connection_lost_before_the_guard_began_ends_with_the_host_as_it_was() -> None:
    host = FakeHost(before={START: [ConnectionLost("gone")]})
    with pytest.raises(HostFault, match="as it was") as caught:
        activate(host)
    assert caught.value.exit_code == ExitCode.FAILED and host.state == "refused"


def test_a_connection_lost_after_the_guard_began_ends_as_rolled_back() -> None:
    host = FakeHost(after={START: [ConnectionLost("gone")]}, before={FENCE: [ConnectionLost("still")] * 3})
    assert code_of(host) == ExitCode.ROLLED_BACK and host.state == "rolled-back"


def test_a_start_that_surely_did_nothing_asks_for_nothing_more() -> None:
    host = FakeHost(codes={START: guard.NOTHING_BEGAN})
    assert code_of(host) == ExitCode.FAILED and host.did == [START]


def test_a_start_that_failed_late_is_followed_to_its_end() -> None:
    host = FakeHost(codes={START: 1})
    assert code_of(host) == ExitCode.ROLLED_BACK and host.state == "rolled-back"


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_the_guard_is_started_leaves_nothing_behind(when: str) -> None:
    faults: dict[str, list[BaseException]] = {START: [KeyboardInterrupt()]}
    host = FakeHost(before=faults) if when == "before" else FakeHost(after=faults)
    with pytest.raises(Interrupted):
        activate(host)
    assert host.state == ("refused" if when == "before" else "rolled-back")


@pytest.mark.parametrize("title", [FOLLOW, CONFIRM])
def test_an_interrupt_before_the_confirmation_rolls_back(title: str) -> None:
    host = FakeHost(before={title: [KeyboardInterrupt()]})
    with pytest.raises(Interrupted):
        activate(host)
    assert host.state == "rolled-back"


def test_an_interrupt_after_the_confirmation_lets_it_stand() -> None:
    host = FakeHost(after={CONFIRM: [KeyboardInterrupt()]})
    assert activate(host) == () and host.state == "committed"


def test_a_second_interrupt_is_not_called_cleaned_up() -> None:
    host = FakeHost(before={ABORT: [KeyboardInterrupt()]})
    assert code_of(host, raising(KeyboardInterrupt())) == ExitCode.UNKNOWN_STATE


def test_a_defect_in_the_checks_rolls_back_and_is_said() -> None:
    host = FakeHost()
    with pytest.raises(RolledBack, match="ZeroDivisionError") as caught:
        activate(host, raising(ZeroDivisionError()))
    assert host.state == "rolled-back" and isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_confirmation_whose_answer_was_lost_counts() -> None:
    host = FakeHost(after={CONFIRM: [ConnectionLost("gone")]})
    assert activate(host) and host.state == "committed"


@pytest.mark.parametrize("error", [HostFault("no session"), HostStateUnknown("no shell"), ConnectionLost("gone")])
def test_an_answer_that_is_none_is_asked_for_again(error: NixopsError) -> None:
    host = FakeHost(before={FOLLOW: [error]})
    assert activate(host) and host.state == "committed"


def test_logs_that_cannot_be_read_change_no_exit_code() -> None:
    host = FakeHost(before={"sh": [HostFault("no session")]})
    assert code_of(host, lambda _: [CheckResult("unit-active", False, "dead")]) == ExitCode.ROLLED_BACK
