"""The runner's unit: up and staying up, under a user of its own, within its limits."""

from __future__ import annotations

from nixops.transport.command import Runner
from nixops.verify.model import Check, Patience, Subject, Verdict, failed, passed
from nixops.verify.quantities import mismatches
from nixops.verify.unit import UnitFacts, read_units

# systemd takes the user ids of DynamicUser= from here (systemd.exec(5), "DynamicUser=").
DYNAMIC_UIDS = range(61184, 65520)


def wait_until_up(transport: Runner, facts: UnitFacts, patience: Patience) -> UnitFacts:
    """The unit's facts once it runs, or as they are when ``patience.start`` is over."""
    deadline = patience.clock() + patience.start
    while not facts.running and _may_come_up(facts) and patience.clock() < deadline:
        patience.sleep(patience.interval)
        (facts,) = read_units(transport, (facts.name,))
    return facts


def _may_come_up(facts: UnitFacts) -> bool:
    """Whether it is on its way: starting, about to be (its job waits for others), or not the unit's program yet."""
    state, started = facts.get("ActiveState"), facts.get("SubState") == "running" and facts.process is None
    waits = state == "inactive" and facts.number("Job") != 0
    return facts.exists and (state in ("activating", "reloading") or waits or started)


def unit_active(subject: Subject) -> Verdict:
    """Active, running, and the same process for long enough: a crash loop looks active between two crashes."""
    facts = subject.facts
    logs = f"look at `journalctl -u '{subject.unit}'` on {subject.host_name}"
    if not facts.exists:
        return failed(
            expected=f"the unit {subject.unit}",
            found=f"LoadState={facts.get('LoadState') or 'unknown'}",
            todo="deploy the runner's module, and import it from the host's configuration",
        )
    first, patience = facts, subject.patience
    deadline = patience.clock() + patience.start
    while facts.running:
        (again,) = read_units(subject.transport, (subject.unit,))
        restarts = again.number("NRestarts")
        if not again.running or _life(again) != _life(first):
            return failed(
                expected="one process that stays up",
                found=f"it ended or was replaced while being watched ({restarts} restarts, last exit status "
                f"{again.get('ExecMainStatus')}, now {again.get('ActiveState')}/{again.get('SubState')})",
                todo=logs,
            )
        needed = patience.settle_restarted if restarts else patience.settle
        if again.age >= needed:
            return passed(f"active (running) for {again.age:.0f} s as process {again.process and again.process.pid}")
        if patience.clock() >= deadline:
            break
        patience.sleep(min(patience.interval, max(0.05, needed - again.age)))
        facts = again
    return failed(
        expected="ActiveState=active, SubState=running",
        found=f"{facts.get('ActiveState')}/{facts.get('SubState')} (result {facts.get('Result')}, "
        f"{facts.number('NRestarts')} restarts, last exit status {facts.get('ExecMainStatus')})",
        todo=logs,
    )


def _life(facts: UnitFacts) -> tuple[int, str, str]:
    pid = facts.process.pid if facts.process else 0
    return pid, facts.get("NRestarts"), facts.get("ExecMainStartTimestampMonotonic")


def dynamic_user(subject: Subject) -> Verdict:
    """DynamicUser is in force: set, the process' uid is an ephemeral one, and no account stands behind it."""
    facts = subject.facts
    todo = "leave DynamicUser as the NixOS module sets it, and remove the static account"
    if facts.get("DynamicUser") != "yes":
        return failed(expected="DynamicUser=yes", found=f"DynamicUser={facts.get('DynamicUser') or 'no'}", todo=todo)
    if facts.process is None:
        return failed(expected="a running process with an ephemeral uid", found="no process", todo="start the unit")
    user, uid = facts.get("User"), facts.process.uid
    if uid not in DYNAMIC_UIDS:
        return failed(
            expected=f"a uid from {DYNAMIC_UIDS[0]} to {DYNAMIC_UIDS[-1]}", found=f"uid {uid} ({user})", todo=todo
        )
    # Not asked of the name service, which knows dynamic users too.
    if subject.remote.file("/etc/passwd").contains(rf"^{user}:\|^[^:]*:[^:]*:{uid}:"):
        return failed(
            expected="no account for an ephemeral user", found=f"{user} or uid {uid} in /etc/passwd", todo=todo
        )
    return passed(f"ephemeral user {user}, uid {uid}")


def limits_in_force(subject: Subject) -> Verdict:
    """Each limit of the inventory is what systemd states and, where the kernel has the controller, enforces."""
    given = subject.runner.limits.given()
    wrong = mismatches(given, subject.facts)
    if wrong:
        return failed(
            expected=", ".join(f"{w.name}={w.expected}" for w in wrong),
            found=", ".join(f"{w.name}={w.found}" for w in wrong),
            todo=f"deploy again, then `systemctl restart '{subject.unit}'` if the unit was not restarted",
        )
    enforced = bool(subject.facts.process and subject.facts.process.cgroup)
    note = "" if enforced else " (as systemd states them; the kernel shows no controller for this unit)"
    return passed(", ".join(f"{k}={v}" for k, v in given.items()) + note)


CHECKS = (
    Check("unit-active", unit_active),
    Check("dynamic-user", dynamic_user),
    Check("limits-in-force", limits_in_force, applies=lambda _host, _name, runner: bool(runner.limits.given())),
)
