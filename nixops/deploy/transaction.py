"""Activating a toplevel as a transaction: guard, checks over a new connection, verdict, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nixops.deploy import guard
from nixops.deploy.guard import GuardedDeploy, GuardState
from nixops.deploy.host import HostFacts
from nixops.deploy.lease import Lease
from nixops.errors import (
    CommandTimeout,
    HostFault,
    HostStateUnknown,
    Interrupted,
    NixopsError,
    RolledBack,
    Unreachable,
)
from nixops.transport.command import Runner
from nixops.ui.report import Reporter
from nixops.values import StorePath
from nixops.verify.model import CheckResult


@dataclass(frozen=True)
class Activation:
    """What to activate and within which bounds (seconds)."""

    id: str
    toplevel: StorePath
    activation_seconds: float
    confirm_seconds: float


Connect = Callable[[], Runner]
Verify = Callable[[Runner], Sequence[CheckResult]]


def activate(
    runner: Runner,
    connect: Connect,
    facts: HostFacts,
    activation: Activation,
    verify: Verify,
    reporter: Reporter,
    lease: Lease,
) -> tuple[CheckResult, ...]:
    """Carry the activation through: the host is on the new generation, committed, or back on the old one.

    :param connect: opens a new connection each time; nothing is shared with the first.
    :param verify: the checks, over the connection it is given.
    :return: the results of the checks, when it was committed.
    :raises RolledBack: the host was seen to be back on the old generation.
    :raises HostFault: the activation did not begin.
    :raises HostStateUnknown: the roll-back failed, or the host did not say how it ended.
    :raises Interrupted: the operator interrupted, and the host was seen to be back.
    """
    deploy = guard.prepare(
        activation.id, facts, activation.toplevel, activation.activation_seconds, activation.confirm_seconds
    )
    lease.check()
    attempt = _Attempt(runner, connect, deploy, reporter, lease)
    try:
        attempt.start(facts)
        with reporter.step("activating (the boot default is not moved yet)"):
            state = attempt.until(lambda s: s.final or s.name == "awaiting-confirm", deploy.longest_seconds)
            if state.final:
                raise attempt.ended(state)
        with reporter.step("checking over a new connection"):
            checks, why = attempt.verify(verify)
        if why is None:
            with reporter.step("committing"):
                state = attempt.confirm()
            if state.name == "committed":
                return checks
            raise attempt.ended(state)
        with reporter.step("rolling back"):
            state = attempt.abort(why)
        raise attempt.ended(state, why)
    except NixopsError:
        raise
    except KeyboardInterrupt:
        why = "interrupted by the operator"
        cause = None
    except Exception as defect:  # noqa: BLE001 - a defect here must not leave the host waiting; it is raised again
        why = f"a defect in nixops: {type(defect).__name__}"
        cause = defect
    return _give_up(attempt, why, cause)


def _give_up(attempt: _Attempt, why: str, cause: Exception | None) -> tuple[CheckResult, ...]:
    """End a transaction that the operator's side cannot carry on with.

    :return: nothing, when the confirmation had been accepted already.
    """
    host = attempt.runner.host
    try:
        if cause is None:
            attempt.reporter.warn("interrupted: rolling the host back before ending")
        attempt.begun()
        state = attempt.abort(why)
        if state.name == "committed":
            attempt.reporter.warn("the confirmation had been accepted: the new generation stands")
            return ()
        error = attempt.ended(state, why)
    except KeyboardInterrupt:
        raise HostStateUnknown(
            f"interrupted again before {host} was seen to be back",
            hint="without a confirmation it rolls back by itself; run the command again to see how it ended",
        ) from None
    if isinstance(error, RolledBack | HostFault) and cause is None:
        raise Interrupted(f"interrupted; {host} is on the old generation") from None
    raise error from cause


class _Attempt:
    """The connection that works now, and the transaction it follows."""

    def __init__(
        self, runner: Runner, connect: Connect, deploy: GuardedDeploy, reporter: Reporter, lease: Lease
    ) -> None:
        self.runner = runner
        self.connect = connect
        self.deploy = deploy
        self.reporter = reporter
        self.lease = lease
        self.sure = False
        self._last: GuardState | None = None

    def _said(self, state: GuardState) -> None:
        # A host that is away says the same every second.
        if state == self._last:
            return
        self._last = state
        self.reporter.say(f"    {state.name}{': ' + state.reason if state.reason else ''}", "dim")

    def start(self, facts: HostFacts) -> None:
        """Start the guard. With the connection lost in the middle of it, find out whether it began."""
        try:
            guard.start(self.runner, self.deploy, facts)
            self.sure = True
        except (Unreachable, CommandTimeout) as error:
            self._said(GuardState("unreachable", str(error)))
            self.begun()
            raise self.ended(self.abort("the connection was lost while the guard was started")) from None
        except guard.NotBegun:
            self.sure = True
            raise
        except HostFault as error:
            # Not even then is it certain that nothing began: systemd may start a unit and not live to say so.
            self.begun()
            state = self.abort("the guard could not be started")
            raise (error if state.name == "refused" else self.ended(state)) from None

    def begun(self) -> None:
        """Keep a guard whose start was cut off from beginning, if it has not."""
        end = time.monotonic() + self.deploy.longest_seconds
        while not self.sure:
            try:
                guard.fence(self.runner, self.deploy, "its start was cut off")
                self.sure = True
            except NixopsError as error:
                if time.monotonic() > end:
                    raise HostStateUnknown(
                        f"{self.runner.host} cannot be asked whether the activation began: {error}",
                        hint="without a confirmation it rolls back by itself",
                    ) from None
                time.sleep(1.0)
                self.runner = self.connect()

    def until(self, holds: Callable[[GuardState], bool], seconds: float) -> GuardState:
        state, self.runner = guard.follow(self.connect, self.runner, self.deploy, holds, self._said, seconds)
        self.lease.use(self.runner)
        return state

    def verify(self, verify: Verify) -> tuple[tuple[CheckResult, ...], str | None]:
        """The checks' results and, if they do not allow a commit, why."""
        end = time.monotonic() + self.deploy.confirm_seconds - 5
        while True:
            try:
                # A new login is what proves that the operator can still get in; then the checks use it.
                checks = tuple(verify(self.connect()))
                failed = [c for c in checks if not c.ok]
                if failed:
                    return checks, "checks failed: " + "; ".join(f"{c.name}: {c.detail}" for c in failed)
                return checks, None
            except Unreachable as error:
                if time.monotonic() > end:
                    return (), f"no new connection: {error}"
                time.sleep(1.0)
            except NixopsError as error:
                return (), f"the checks could not be run: {error}"

    def confirm(self) -> GuardState:
        try:
            guard.give_verdict(self.runner, self.deploy, "confirm")
        except NixopsError as error:
            # Whether it arrived is for the host to say; it rolls back by itself if it did not.
            self._said(GuardState("unreachable", str(error)))
        return self.until(lambda s: s.final, self.deploy.longest_seconds)

    def abort(self, why: str) -> GuardState:
        try:
            guard.give_verdict(self.runner, self.deploy, "abort", why)
        except NixopsError as error:
            self._said(GuardState("unreachable", str(error)))
        return self.until(lambda s: s.final, self.deploy.longest_seconds)

    def ended(self, state: GuardState, why: str | None = None) -> NixopsError:
        """The error for a transaction that did not end committed."""
        host = self.runner.host
        reason = why or state.reason or state.name
        logs = guard.logs(self.runner, self.deploy)
        if state.name == "refused":
            return HostFault(f"{host} did not begin and is as it was: {reason}", detail=logs)
        if state.name == "rolled-back":
            return RolledBack(
                f"{host} is back on the old generation ({self.deploy.old}) and boots what it did before: {reason}",
                hint="mend the cause and run it again",
                detail=logs,
            )
        return HostStateUnknown(
            f"the roll-back of {host} failed: {reason}",
            hint=f"act now: log in and run {self.deploy.old}/bin/switch-to-configuration test",
            detail=logs,
        )
