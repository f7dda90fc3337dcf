"""All checks of one runner, over the one connection that is open: what is planned, and what comes of it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from nixops.errors import Interrupted, NixopsError, Unreachable, UsageError, printable
from nixops.inventory import model
from nixops.transport.command import Runner
from nixops.transport.fleet import fan_out
from nixops.values import RunnerName
from nixops.verify import isolation, packages, registration, secret_files, service, store
from nixops.verify.model import Check, CheckResult, ForgeListing, Patience, Subject, Trial, Trying, Verdict
from nixops.verify.probe import run_trials
from nixops.verify.risks import risk_results
from nixops.verify.service import wait_until_up
from nixops.verify.unit import read_units

# In the order of the report.
CHECKS: Final[tuple[Check, ...]] = (
    *service.CHECKS,
    *packages.CHECKS,
    *secret_files.CHECKS,
    *isolation.CHECKS,
    *store.CHECKS,
    *registration.CHECKS,
)
# The checks that have something tried are one job beside the others, and ask at most so many things at once before. Of
# all jobs together as much runs at once as fits the channels of one connection (sshd's MaxSessions is 10 by default,
# and others use it too); the one that waits for time to pass begins first.
AT_ONCE: Final = 3
ASKING: Final = 4

OnCheck = Callable[[CheckResult], None]
Tell = Callable[[Iterable[CheckResult]], tuple[CheckResult, ...]]


def _managed(host: model.Host, runner_name: RunnerName) -> model.ManagedRunner:
    runner = host.runners.get(runner_name)
    if not isinstance(runner, model.ManagedRunner):
        known = ", ".join(n for n, r in host.runners.items() if isinstance(r, model.ManagedRunner))
        raise UsageError(f"{runner_name} is no managed runner of this host", hint=f"managed: {known or 'none'}")
    return runner


def _applicable(host: model.Host, runner_name: RunnerName) -> tuple[Check, ...]:
    runner = _managed(host, runner_name)
    return tuple(check for check in CHECKS if check.applies(host, runner_name, runner))


def _judged_risks() -> frozenset[str]:
    return frozenset(check.risk for check in CHECKS if check.risk)


def planned_checks(host: model.Host, runner_name: RunnerName) -> tuple[str, ...]:
    """The names of what :func:`verify_runner` will report, in its order. Asks nobody.

    :raises UsageError: the host has no such managed runner.
    """
    runner = _managed(host, runner_name)
    risks = risk_results(runner, _judged_risks())
    return (*(check.name for check in _applicable(host, runner_name)), *(risk.name for risk in risks))


def verify_runner(
    transport: Runner,
    *,
    host_name: str,
    host: model.Host,
    runner_name: RunnerName,
    forge: ForgeListing | None = None,
    forge_url: str | None = None,
    patience: Patience | None = None,
    on_check: OnCheck | None = None,
) -> tuple[CheckResult, ...]:
    """Check the runner on its host.

    :param transport: an open connection; everything runs as root through it (``Command.root``).
    :param forge: lists the runners of every scope that the runner is registered with; ``None`` where the forge
        cannot (before 15), when the host's own files have to do.
    :param forge_url: the address that the registration should be with, where it is to be compared.
    :param on_check: is given each result as it comes, one at a time, not always from the caller's thread.
    :raises Unreachable: the connection was lost; no result means anything then.
    :raises UsageError: the host has no such managed runner.
    """
    # testinfra is heavy, and a plan only needs the names.
    from nixops.verify.backend import connect

    runner = _managed(host, runner_name)
    wait = patience or Patience()
    unit = model.unit_name(runner_name, runner.module)
    others = {n: model.unit_name(n, r.module) for n, r in host.runners.items() if n != runner_name}
    checks = _applicable(host, runner_name)
    results: tuple[CheckResult, ...]
    try:
        first, *rest = read_units(transport, (unit, *others.values()))
        facts = wait_until_up(transport, first, wait)
    except (Unreachable, Interrupted):
        raise
    except NixopsError as error:
        results = tuple(_undecided(check, error) for check in checks)
    else:
        subject = Subject(
            host_name=host_name,
            host=host,
            runner_name=runner_name,
            runner=runner,
            unit=unit,
            transport=transport,
            remote=connect(transport),
            facts=facts,
            others=dict(zip(others, rest, strict=True)),
            forge=forge,
            forge_url=forge_url,
            patience=wait,
        )

        results = _decide_all(checks, subject, on_check)
    risks = risk_results(runner, _judged_risks())
    if on_check is not None:
        for risk in risks:
            on_check(risk)
    return (*results, *risks)


def _decide_all(checks: Sequence[Check], subject: Subject, on_check: OnCheck | None) -> tuple[CheckResult, ...]:
    """Every check's result, in the order of ``checks``."""
    telling = threading.Lock()

    def tell(results: Iterable[CheckResult]) -> tuple[CheckResult, ...]:
        told = tuple(results)
        if on_check is not None:
            with telling:
                for result in told:
                    on_check(result)
        return told

    def alone(check: Check) -> tuple[CheckResult, ...]:
        return tell(_decided(_begun(check, subject)))

    first, *others = [functools.partial(alone, check) for check in checks if not check.tries]
    together = functools.partial(_try_together, [check for check in checks if check.tries], subject, tell)
    jobs = [first, together, *others]
    results = {r.name: r for outcome in fan_out(jobs, lambda job: job(), limit=AT_ONCE) for r in outcome.unwrap()}
    return tuple(results[check.name] for check in checks)


@dataclass(frozen=True)
class _Waiting:
    """A check that is under way, and what it wants to have tried."""

    check: Check
    course: Trying
    trial: Trial


def _try_together(checks: Sequence[Check], subject: Subject, tell: Tell) -> tuple[CheckResult, ...]:
    """Run checks to their ends, in rounds: what they want to have tried is tried together."""
    steps = [outcome.unwrap() for outcome in fan_out(checks, lambda check: _begun(check, subject), limit=ASKING)]
    results = tell(_decided(*steps))
    while waiting := [step for step in steps if isinstance(step, _Waiting)]:
        answers: Sequence[Sequence[str] | NixopsError]
        try:
            answers = run_trials(subject, [each.trial for each in waiting])
        except (Unreachable, Interrupted):
            raise
        except NixopsError as error:
            answers = [error] * len(waiting)
        steps = [_resumed(each, answer, subject) for each, answer in zip(waiting, answers, strict=True)]
        results += tell(_decided(*steps))
    return results


def _decided(*steps: CheckResult | _Waiting) -> list[CheckResult]:
    return [step for step in steps if isinstance(step, CheckResult)]


def _begun(check: Check, subject: Subject) -> CheckResult | _Waiting:
    def begin() -> Verdict | _Waiting:
        course = check.run(subject)
        return course if isinstance(course, Verdict) else _next(check, course, lambda: next(course))

    return _step(check, subject, begin)


def _resumed(waiting: _Waiting, answer: Sequence[str] | NixopsError, subject: Subject) -> CheckResult | _Waiting:
    check, course = waiting.check, waiting.course

    def resume() -> Verdict | _Waiting:
        if isinstance(answer, NixopsError):
            raise answer
        return _next(check, course, lambda: course.send(answer))

    return _step(check, subject, resume)


def _next(check: Check, course: Trying, advance: Callable[[], Trial]) -> Verdict | _Waiting:
    try:
        return _Waiting(check, course, advance())
    except StopIteration as end:
        verdict = end.value
        assert isinstance(verdict, Verdict)
        return verdict


def _step(check: Check, subject: Subject, step: Callable[[], Verdict | _Waiting]) -> CheckResult | _Waiting:
    """What comes of a step of a check. What cannot be decided is a result too, but a lost host is none."""
    try:
        came = step()
    except (Unreachable, Interrupted):
        raise
    except NixopsError as error:
        return _undecided(check, error)
    except (AssertionError, LookupError, RuntimeError, ValueError) as error:
        # testinfra's modules, and our own reading of what a host printed, raise these where it answers otherwise.
        return _undecided(check, NixopsError(f"the host's answer was not understood: {str(error)[:500]}"))
    return came if isinstance(came, _Waiting) else _judge(check, came, subject.runner)


def _judge(check: Check, verdict: Verdict, runner: model.ManagedRunner) -> CheckResult:
    result = CheckResult(check.name, verdict.ok, printable(verdict.detail))
    reason = runner.accepted_risks.get(check.risk) if check.risk else None
    if not verdict.ok and reason is not None:
        return replace(result, ok=True, accepted=reason)
    return result


def _undecided(check: Check, error: NixopsError) -> CheckResult:
    """What cannot be decided has not been shown to hold."""
    return CheckResult(check.name, False, f"could not be decided: {error}")
