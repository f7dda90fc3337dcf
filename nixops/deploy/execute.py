"""Carrying a plan out: credentials, files, build, copy, the guarded activation; all of it, or none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

from nixops.deploy import credentials as creds
from nixops.deploy import journal as journals
from nixops.deploy import transaction
from nixops.deploy.build import build_toplevel, copy_toplevel
from nixops.deploy.guard import recover
from nixops.deploy.host import HostFacts, read_facts
from nixops.deploy.journal import Journal
from nixops.deploy.lease import Lease
from nixops.deploy.plan import Plan, evaluate, render_facts, rendered_files
from nixops.deploy.result import Outcome
from nixops.deploy.retire import retire
from nixops.deploy.session import Session
from nixops.deploy.subject import Subject
from nixops.deploy.undo import Clients, undo
from nixops.errors import HostFault, HostStateUnknown, Leased, NixopsError
from nixops.forge.shapes import RunnerInfo
from nixops.forge.version import ForgejoVersion
from nixops.inventory.derived import runner_state
from nixops.inventory.model import RunnerModule
from nixops.nix.closure import closure_diff, requisites
from nixops.render.managed import apply_files, files_undo, plan_files
from nixops.transport.command import Runner
from nixops.transport.exec import StreamRunner
from nixops.ui.report import Reporter
from nixops.values import StorePath
from nixops.vault.approle import HostRoles
from nixops.vault.deliver import Delivered, deliver_approle, settle_approle
from nixops.verify.model import CheckResult
from nixops.verify.run import verify_runner


@dataclass(frozen=True)
class Executed:
    """What came of a plan that was carried out."""

    outcome: Outcome
    from_: StorePath
    to: StorePath
    checks: tuple[CheckResult, ...]


def clients(session: Session, transport: Callable[[], Runner]) -> Clients:
    """What an undo reaches the world through."""
    return Clients(session.forge, session.bao, session.roles, transport, session.local)


def checks_of(
    session: Session, subject: Subject, known: ForgejoVersion | None = None
) -> Callable[[Runner], tuple[CheckResult, ...]]:
    """The checks of one runner as a function of the connection they run over."""
    version = known or session.forge().version()
    runner = subject.runner

    def registered() -> tuple[RunnerInfo, ...]:
        found: list[RunnerInfo] = []
        for _, scope, _ in creds.wanted(runner):
            found.extend(session.forge().list_runners(scope))
        return tuple(found)

    def run(transport: Runner) -> tuple[CheckResult, ...]:
        return verify_runner(
            transport,
            host_name=subject.host_name,
            host=subject.host,
            runner_name=subject.name,
            forge=registered if version.lists_runners else None,
            forge_url=session.loaded.inventory.forge.url if session.loaded.inventory.forge else None,
        )

    return run


def recover_first(session: Session, subject: Subject, transport: Runner, reporter: Reporter) -> None:
    """Finish or take back what killed deploys left, on the host and here, and say so. Takes the lease if it must.

    :raises Leased: such a deploy is still at work on the host.
    """
    directory = journals.state_directory(session.environ)
    dead = journals.unfinished(directory, subject.host_name)
    facts = read_facts(transport)
    open_records = [d for d in facts.deploys if not d.finished]
    if not dead and not open_records:
        return
    with Lease(
        transport, doing="recovering an earlier deploy", seconds=subject.host.deploy.lease_timeout, warn=reporter.warn
    ):
        # Asked again: until the lease was ours, another may have been at work.
        facts = read_facts(transport)
        states = {d.id: d.state for d in facts.deploys}
        mine = {entry.id for entry in journals.entries(directory)}
        for record in (d for d in facts.deploys if not d.finished):
            state = recover(transport, record)
            states[record.id] = state.name
            reporter.warn(
                f"deploy {record.id} was left in state {record.state}; {subject.host_name} is now {state.name}"
                + (f" ({state.reason})" if state.reason else "")
            )
            if state.name == "rollback-failed":
                raise HostStateUnknown(f"deploy {record.id} could not be rolled back: {state.reason}")
        for entry in dead:
            if states.get(entry.id) == "committed":
                journals.close(entry, "committed")
                reporter.warn(f"the deploy begun at {entry.since} was killed after it was committed: it stands")
                continue
            if _superseded(entry, facts, mine):
                journals.close(entry, "superseded")
                reporter.warn(
                    f"the deploy of {entry.runner} begun at {entry.since} was killed, and somebody else has deployed "
                    f"to {subject.host_name} since: what it made elsewhere may be in use, and is left as it is"
                )
                continue
            host = (
                f"{subject.host_name} rolled back by itself"
                if states.get(entry.id) == "rolled-back"
                else f"{subject.host_name} did not begin to activate it"
            )
            reporter.warn(
                f"the deploy of {entry.runner} begun at {entry.since} was killed before it was confirmed; "
                f"{host}, and what it changed elsewhere is taken back now"
            )
            problems = _take_back(
                session, transport, entry.effects, functools.partial(journals.settle, entry), reporter
            )
            if not problems:
                journals.close(entry, "taken-back")


def _superseded(entry: journals.Entry, facts: HostFacts, mine: Collection[str]) -> bool:
    """Another operator has committed since: from the KV entries on, that deploy took over what this one had made.

    Our own later deploys are no sign of it, since each begins with taking back what the earlier ones left.
    """
    return any(d.state == "committed" and d.id > entry.id and d.id not in mine for d in facts.deploys)


def _take_back(
    session: Session, transport: Runner, effects: Any, settled: Callable[[int], None], reporter: Reporter
) -> tuple[str, ...]:
    problems: list[str] = []
    for done in undo(effects, clients(session, lambda: transport), settled):
        if done.problem:
            problems.append(done.what)
            reporter.warn(f"could not take back {done.what}: {done.problem}")
        else:
            reporter.say(f"    {done.what}")
    return tuple(problems)


def execute(
    session: Session,
    plan: Plan,
    transport: StreamRunner,
    reporter: Reporter,
    *,
    connect: Callable[[], Runner],
    adopt: bool,
) -> Executed:
    """Carry ``plan`` out.

    On any failure before the commit everything that was changed is taken back, in reverse.

    :raises RolledBack: the new generation did not hold. :raises HostStateUnknown: nobody knows what the host runs;
        then nothing is taken back here until the next run has asked the host.
    """
    subject = plan.subject
    held = False
    journal = Journal(journals.state_directory(session.environ), host=subject.host_name, runner=subject.name)
    try:
        with Lease(
            transport,
            doing=f"deploy-runner {subject.name}",
            seconds=subject.host.deploy.lease_timeout,
            warn=reporter.warn,
        ) as lease:
            held = True
            execution = _Execution(session, plan, transport, reporter, journal, connect, lease, adopt)
            try:
                executed = execution.run()
            except HostStateUnknown:
                reporter.warn("nothing is taken back here until the host can be asked: the next run does both")
                raise
            except BaseException:
                problems = _take_back(session, connect(), journal.effects, journal.settled, reporter)
                if not problems:
                    _ended(journal, "taken-back", reporter)
                raise
            # From here on it stands: nothing that comes after takes it back.
            _ended(journal, executed.outcome.value, reporter)
            execution.finish()
            return executed
    except BaseException as error:
        if not held:  # nothing was begun, so there is nothing for the next run to take back
            _ended(journal, "leased" if isinstance(error, Leased) else "not-begun", reporter)
        raise


def _ended(journal: Journal, outcome: str, reporter: Reporter) -> None:
    """Write the end down. Where that cannot be, it is said, and what ended is not changed by it."""
    try:
        journal.outcome(outcome)
    except HostFault as error:
        reporter.warn(f"that this deploy ended ({outcome}) could not be noted; the next run asks the host: {error}")


class _Execution:
    """The steps, in order; each leaves in the journal what takes it back."""

    def __init__(
        self,
        session: Session,
        plan: Plan,
        transport: StreamRunner,
        reporter: Reporter,
        journal: Journal,
        connect: Callable[[], Runner],
        lease: Lease,
        adopt: bool,
    ) -> None:
        self.session = session
        self.plan = plan
        self.subject = plan.subject
        self.transport = transport
        self.reporter = reporter
        self.journal = journal
        self.connect = connect
        self.lease = lease
        self.adopt = adopt
        self.delivered: Delivered | None = None

    def run(self) -> Executed:
        plan, subject, reporter = self.plan, self.subject, self.reporter
        facts = read_facts(self.transport)
        if facts.running != plan.facts.running or facts.profile != plan.facts.profile:
            raise NixopsError(
                f"{subject.host_name} changed since the plan was made: it runs {facts.running}",
                hint="run it again to see what the plan is now",
            )
        credentials = self._credentials()
        self._role()
        toplevel_facts = render_facts(credentials)
        if plan.changed_files:
            with reporter.step("rendering"):
                self._files(toplevel_facts)
        if not plan.activates:
            with reporter.step("checking"):
                checks = checks_of(self.session, subject, plan.forge_version)(self.connect())
            self._require(checks)
            return Executed(Outcome.COMMITTED, facts.running, facts.running, checks)
        with reporter.step("evaluating the flake"):
            answer = evaluate(self.session, subject, plan.checkout, toplevel_facts, git=True)
        with reporter.step(f"building {answer.toplevel.name} ({subject.host.deploy.build})"):
            toplevel = build_toplevel(self.session, subject, answer)
        with reporter.step("copying the closure"):
            copy_toplevel(self.session, subject, toplevel, self.transport)
        if plan.difference is None:
            # Built elsewhere, so the plan could not know it; both closures are on the host now.
            before, after = (requisites(self.transport, path) for path in (facts.running, toplevel))
            for line in closure_diff(before, after).lines():
                reporter.say(f"    {line}")
        self._note_registrations()
        checks = transaction.activate(
            self.transport,
            self.connect,
            facts,
            transaction.Activation(
                self.journal.id,
                toplevel,
                subject.host.deploy.activation_timeout,
                subject.host.deploy.confirm_timeout,
            ),
            checks_of(self.session, subject, plan.forge_version),
            reporter,
            self.lease,
        )
        return Executed(Outcome.COMMITTED, facts.running, toplevel, checks)

    def finish(self) -> None:
        """What the deploy has made useless goes away. What cannot is said, and tried again by the next run."""
        self._settle()
        for retired in self.plan.retired:
            try:
                done = retire(retired, self.session.forge(), self.session.bao(), self.connect())
                self.reporter.say(f"    {done}")
            except NixopsError as error:
                self.reporter.warn(f"the registration for {retired.scope} could not be taken away: {error}")

    def _settle(self) -> None:
        """What the new AppRole credentials replaced is of no more use to anybody. The deploy stands either way."""
        if self.delivered is None:
            return
        try:
            settle_approle(self.connect(), self.delivered)
            self.session.roles().destroy_older(self.subject.host_name, keep=self.delivered.accessor)
        except NixopsError as error:
            self.reporter.warn(f"older secret-ids of {self.subject.host_name} could not be destroyed: {error}")

    @staticmethod
    def _require(checks: tuple[CheckResult, ...]) -> None:
        failed = [c for c in checks if not c.ok]
        if failed:
            raise NixopsError("checks failed: " + "; ".join(f"{c.name}: {c.detail}" for c in failed))

    def _credentials(self) -> tuple[creds.Credential, ...]:
        made: list[creds.Credential] = []
        for credential in self.plan.credentials:
            if not credential.mint:
                made.append(credential)
                continue
            with self.reporter.step(f"registering for {credential.scope}, kept in {credential.path}"):
                made.append(
                    creds.mint(
                        credential,
                        host=self.subject.host_name,
                        name=self.subject.name,
                        runner=self.subject.runner,
                        forge=self.session.forge(),
                        version=self.plan.forge_version,
                        bao=self.session.bao(),
                        journal=self.journal,
                    )
                )
        return tuple(made)

    def _role(self) -> None:
        plan, name = self.plan, self.subject.host_name
        if not (plan.role_changes or plan.deliver):
            return
        with self.reporter.step("giving the host its AppRole"):
            roles = self.session.roles()
            role = roles.ensure(name)
            self.journal.effect("role", host=name, undo=asdict(role.undo))
            if plan.deliver:
                self._deliver(roles, role.role_id)

    def _deliver(self, roles: HostRoles, role_id: str) -> None:
        name, host, vault = self.subject.host_name, self.subject.host, self.session.loaded.inventory.vault
        wrapped = roles.wrap_secret_id(name)
        self.journal.effect("secret-id", host=name, accessor=wrapped.accessor)
        # Taken back before the secret-id is destroyed: the host gets back what it had, or nothing if it had none.
        self.journal.effect("approle-files", directory=host.approle_dir, accessor=wrapped.accessor)
        self.delivered = deliver_approle(
            self.transport,
            directory=host.approle_dir,
            address=vault.host_address or self.session.bao_settings.address,
            namespace=self.session.bao_settings.namespace,
            host_ca_file=vault.host_ca_file,
            role_id=role_id,
            wrapped=wrapped,
            destroy=lambda: roles.destroy_secret_id(name, wrapped.accessor),
        )

    def _files(self, facts: Any) -> None:
        plan = self.plan
        files = plan_files(plan.checkout, rendered_files(self.session, self.subject, facts), adopt=self.adopt)
        before = files_undo(plan.checkout, files, self.session.local)
        self.journal.effect("files", root=str(plan.checkout), undo=before.to_json())
        apply_files(plan.checkout, files, self.session.local, prepared=before)

    def _note_registrations(self) -> None:
        """The older module registers by itself when it starts; what appears from now on is this deploy's."""
        runner = self.subject.runner
        if runner.module is not RunnerModule.GITEA or not self.plan.forge_version.lists_runners:
            return
        assert runner.scope is not None  # the model holds it for this module
        state = runner_state(self.subject.name, runner).private
        self.journal.effect(
            "self-registered",
            scope=runner.scope.model_dump(mode="json", exclude_none=True),
            name=runner.name,
            known=list(self.plan.known_runners),
            state=[f"{state}/.runner", f"{state}/.labels"],
        )
