"""A plan and its result as people read them. Results go to stdout; nothing here decides anything."""

from __future__ import annotations

from collections.abc import Sequence

from nixops.deploy.host import HostFacts
from nixops.deploy.lease import describe
from nixops.deploy.plan import Plan
from nixops.ui.report import Reporter
from nixops.verify.model import CheckResult


def show_plan(plan: Plan, reporter: Reporter) -> None:
    """Files with diffs, secrets by path and version only, the closure's difference, the checks to run."""
    subject = plan.subject
    reporter.result(
        f"Plan for {subject.name} ({subject.runner.name}) on {subject.host_name}, Forgejo {plan.forge_version.text}",
        "bold",
    )
    _show_files(plan, reporter)
    _show_secrets(plan, reporter)
    _show_closure(plan, reporter)
    if plan.wider:
        reporter.result(f"Scope {subject.runner.scope} also admits (accepted in the inventory):", "yellow")
        for repo in plan.wider:
            reporter.result(f"    {repo}")
    for risk, reason in subject.runner.accepted_risks.items():
        reporter.result(f"Accepted risk {risk}: {reason}")
    if plan.activates or plan.changes:
        reporter.result(f"Checks before the commit: {', '.join(plan.checks)}")
    _show_notes(plan.facts, plan, reporter)


def _show_files(plan: Plan, reporter: Reporter) -> None:
    changed = plan.changed_files
    reporter.result(f"Files: {len(changed)} to change, {len(plan.files) - len(changed)} unchanged")
    for file in changed:
        reporter.result(f"  {file.status} {file.path}")
        reporter.diff(file.diff)


def _show_secrets(plan: Plan, reporter: Reporter) -> None:
    reporter.result("Secrets:")
    for credential in plan.credentials:
        if credential.mint:
            reporter.result(
                f"  {credential.path}: new version {credential.planned_version}, registered for {credential.scope} "
                f"({credential.why})"
            )
        else:
            reporter.result(f"  {credential.path}: version {credential.version} stays")
    for retired in plan.retired:
        what = retired.stays or f"{len(retired.registrations)} registration(s) are deleted"
        reporter.result(f"  {retired.path}: deleted, {retired.scope} is no longer trusted; {what}")
    for change in plan.role_changes:
        reporter.result(f"  {change}")
    if plan.deliver:
        reporter.result(f"  a new secret-id goes to {plan.subject.host.approle_dir} on the host, response-wrapped")


def _show_closure(plan: Plan, reporter: Reporter) -> None:
    running = plan.facts.running
    if plan.revision_only:
        reporter.result(f"Closure: differs from what runs only by the checkout's revision ({plan.toplevel.name})")
    elif plan.toplevel == running:
        reporter.result(f"Closure: the host runs it already ({running.name})")
    else:
        reporter.result(f"Closure: {running}")
        final = " (the final one follows from the new registration's uuid)" if not plan.final else ""
        reporter.result(f"      -> {plan.toplevel}{final}")
        if plan.difference is None:
            reporter.result(f"  its difference is shown after the build on {plan.subject.host.deploy.build}")
        else:
            for line in plan.difference.lines():
                reporter.result(f"  {line}")


def _show_notes(facts: HostFacts, plan: Plan, reporter: Reporter) -> None:
    if facts.lease is not None:
        reporter.warn(f"the host is leased by {describe(facts.lease)}")
    waiting = {*plan.uncommitted, *(str(f.path) for f in plan.changed_files if f.status != "removed")}
    if waiting:
        names = ", ".join(sorted(waiting))
        if facts.auto_upgrade:
            reporter.warn(
                f"{plan.subject.host_name} upgrades itself to what its branch says, which does not have {names}: "
                "commit and push them (--commit commits them after the deploy has held)"
            )
        else:
            reporter.say(f"Not committed in the checkout: {names} (--commit commits them after the deploy has held)")


def show_checks(checks: Sequence[CheckResult], reporter: Reporter) -> None:
    """The checks as a table; an accepted risk with its reason."""
    rows = []
    for check in checks:
        word = "accepted" if check.accepted else ("ok" if check.ok else "FAILED")
        detail = f"{check.detail} [{check.accepted}]" if check.accepted else check.detail
        rows.append((check.name, word, detail))
    reporter.table("Checks", ("check", "result", "detail"), rows)
