"""The course of ``deploy-runner`` and ``verify-runner``, once it is known which runner on which host they are about."""

from __future__ import annotations

import sys

from nixops.deploy import journal as journals
from nixops.deploy.execute import Executed, checks_of, execute, recover_first
from nixops.deploy.plan import Plan, make_plan
from nixops.deploy.result import BY_EXIT_CODE, DEPLOY_SCHEMA, VERIFY_SCHEMA, Document, HostResult, Outcome
from nixops.deploy.session import Session
from nixops.deploy.show import show_checks, show_plan
from nixops.deploy.subject import DeployOptions, Subject
from nixops.errors import ChecksFailed, Declined, HostFault, Interrupted, NixopsError, UsageError
from nixops.render.state import commit_files
from nixops.ui.question import answered_yes
from nixops.ui.report import Reporter
from nixops.verify.model import CheckResult


def deploy(session: Session, subject: Subject, options: DeployOptions, reporter: Reporter) -> None:
    """Plan, show, ask, deploy, report.

    :raises NixopsError: of the class whose exit code says how it ended.
    """
    plan: Plan | None = None
    problem: NixopsError | None = None
    try:
        transport = session.connect(subject.host_name, subject.host)
        if not options.plan_only:
            recover_first(session, subject, transport, reporter)
        with reporter.step("planning"):
            plan = make_plan(session, subject, transport, adopt=options.adopt, on_note=reporter.warn)
        if not options.json:
            show_plan(plan, reporter)
        if options.plan_only:
            result = _planned(plan, options, reporter)
        elif not plan.changes:
            result, problem = _unchanged(session, plan, options, reporter)
        else:
            _ask(options)
            executed = execute(
                session,
                plan,
                transport,
                reporter,
                connect=lambda: session.connect(subject.host_name, subject.host),
                adopt=options.adopt,
            )
            result, problem = _committed(session, plan, executed, options, reporter)
    except (NixopsError, KeyboardInterrupt) as caught:
        error = caught if isinstance(caught, NixopsError) else Interrupted("interrupted")
        problem = error
        outcome = BY_EXIT_CODE.get(error.exit_code, Outcome.FAILED)
        running = plan.facts.running if plan else None
        result = HostResult(subject.host_name, outcome, running, None, reporter.steps, error=str(error))
    if options.json:
        try:
            reporter.document(Document(DEPLOY_SCHEMA, result.outcome, [result]).dumps())
        except HostFault as fault:
            problem = problem or _unsaid(fault, result.outcome, subject)
    if problem is not None:
        raise problem


def _unsaid(fault: HostFault, outcome: Outcome, subject: Subject) -> HostFault:
    """The result could not be written: what is on the host is said in the error at least."""
    stands = f"{subject.name} runs on {subject.host_name}, and that stands; but " * (outcome is Outcome.COMMITTED)
    return HostFault(f"{stands}{fault.message}", hint=fault.hint)


def _ask(options: DeployOptions) -> None:
    if options.yes:
        return
    if options.json or not sys.stdin.isatty():
        raise UsageError("nobody can be asked: stdin is not a terminal, or the output is JSON", hint="say --yes")
    if not answered_yes("Deploy?"):
        raise Declined("not deployed: the answer was no; nothing was changed")


def _planned(plan: Plan, options: DeployOptions, reporter: Reporter) -> HostResult:
    if not options.json:
        reporter.result("Nothing was changed: this was only the plan." if plan.changes else "There is nothing to do.")
    running, host = plan.facts.running, plan.subject.host_name
    return HostResult(host, Outcome.PLANNED, running, plan.toplevel, reporter.steps, plan=plan.document())


def _unchanged(
    session: Session, plan: Plan, options: DeployOptions, reporter: Reporter
) -> tuple[HostResult, NixopsError | None]:
    subject = plan.subject
    with reporter.step("checking"):
        checks = checks_of(session, subject, plan.forge_version)(session.connect(subject.host_name, subject.host))
    problem = _failed(checks, subject) or _commit(session, plan, options, reporter)
    if not options.json:
        show_checks(checks, reporter)
        reporter.result(f"There is nothing to do: {subject.host_name} is as the inventory says.")
    running, error = plan.facts.running, str(problem) if problem else None
    host = subject.host_name
    return HostResult(host, Outcome.UNCHANGED, running, running, reporter.steps, checks, error), problem


def _committed(
    session: Session, plan: Plan, executed: Executed, options: DeployOptions, reporter: Reporter
) -> tuple[HostResult, NixopsError | None]:
    subject = plan.subject
    problem = _commit(session, plan, options, reporter)
    journals.prune(journals.state_directory(session.environ))
    if not options.json:
        try:
            show_checks(executed.checks, reporter)
            reporter.result(f"{subject.name} runs on {subject.host_name}: {executed.to}", "bold green")
        except HostFault as fault:
            problem = problem or _unsaid(fault, Outcome.COMMITTED, subject)
    result = HostResult(
        subject.host_name,
        executed.outcome,
        executed.from_,
        executed.to,
        reporter.steps,
        executed.checks,
        str(problem) if problem else None,
    )
    return result, problem


def _commit(session: Session, plan: Plan, options: DeployOptions, reporter: Reporter) -> NixopsError | None:
    """With ``--commit``, commit the rendered files; the error where git refuses. What is on the host stands."""
    if not options.commit:
        return None
    subject = plan.subject
    try:
        with reporter.step("committing the rendered files"):
            paths = [f.path for f in plan.files]
            commit_files(plan.checkout, paths, f"nixops: {subject.name} on {subject.host_name}", session.local)
    except NixopsError as error:
        return NixopsError(
            f"{subject.name} runs on {subject.host_name}, and that stands; but the rendered files could not be "
            f"committed: {error.message}",
            hint="commit them by hand, or run it again with --commit",
            detail=error.detail,
        )
    return None


def _failed(checks: tuple[CheckResult, ...], subject: Subject) -> ChecksFailed | None:
    failed = [c.name for c in checks if not c.ok]
    if not failed:
        return None
    return ChecksFailed(f"{subject.name} on {subject.host_name}: {len(failed)} check(s) failed: {', '.join(failed)}")


def verify(session: Session, subject: Subject, options: DeployOptions, reporter: Reporter) -> None:
    """The checks alone.

    :raises ChecksFailed: at least one failed and is no accepted risk.
    """
    transport = session.connect(subject.host_name, subject.host)
    with reporter.step("checking"):
        checks = checks_of(session, subject)(transport)
    if options.json:
        ok = all(c.ok for c in checks)
        outcome = Outcome.UNCHANGED if ok else Outcome.FAILED
        result = HostResult(subject.host_name, outcome, steps=reporter.steps, checks=checks)
        reporter.document(Document(VERIFY_SCHEMA, outcome, [result]).dumps())
    else:
        show_checks(checks, reporter)
    if problem := _failed(checks, subject):
        raise problem
