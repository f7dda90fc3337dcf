"""All checks of one runner, over the one connection that is open: what is planned, and what comes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from nixops.errors import Interrupted, NixopsError, Unreachable, UsageError, printable
from nixops.inventory import model
from nixops.transport.command import Runner
from nixops.transport.fleet import fan_out
from nixops.values import RunnerName
from nixops.verify import isolation, packages, registration, secret_files, service, store
from nixops.verify.model import Check, CheckResult, ForgeListing, Patience, Subject, Verdict
from nixops.verify.risks import risk_results
from nixops.verify.service import wait_until_up
from nixops.verify.unit import read_units

# In the order of the report. They run in this order too, as many at once as fit the channels of one connection
# (sshd's MaxSessions is 10 by default, and others use it too); the one that waits for time to pass begins first.
CHECKS: Final[tuple[Check, ...]] = (
    *service.CHECKS,
    *packages.CHECKS,
    *secret_files.CHECKS,
    *isolation.CHECKS,
    *store.CHECKS,
    *registration.CHECKS,
)
AT_ONCE: Final = 6

OnCheck = Callable[[CheckResult], None]


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

        telling = threading.Lock()

        def one(check: Check) -> CheckResult:
            result = _decide(check, subject)
            if on_check is not None:
                with telling:
                    on_check(result)
            return result

        results = tuple(outcome.unwrap() for outcome in fan_out(checks, one, limit=AT_ONCE))
    risks = risk_results(runner, _judged_risks())
    if on_check is not None:
        for risk in risks:
            on_check(risk)
    return (*results, *risks)


def _decide(check: Check, subject: Subject) -> CheckResult:
    try:
        verdict = check.run(subject)
    except (Unreachable, Interrupted):
        raise
    except NixopsError as error:
        return _undecided(check, error)
    except (AssertionError, LookupError, RuntimeError, ValueError) as error:
        # testinfra's modules, and our own reading of what a host printed, raise these where it answers otherwise.
        return _undecided(check, NixopsError(f"the host's answer was not understood: {str(error)[:500]}"))
    return _judge(check, verdict, subject.runner)


def _judge(check: Check, verdict: Verdict, runner: model.ManagedRunner) -> CheckResult:
    result = CheckResult(check.name, verdict.ok, printable(verdict.detail))
    reason = runner.accepted_risks.get(check.risk) if check.risk else None
    if not verdict.ok and reason is not None:
        return replace(result, ok=True, accepted=reason)
    return result


def _undecided(check: Check, error: NixopsError) -> CheckResult:
    """What cannot be decided has not been shown to hold."""
    return CheckResult(check.name, False, f"could not be decided: {error}")
