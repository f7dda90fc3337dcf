"""What a deploy would do, found out without changing anything anywhere."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nixops.deploy import journal
from nixops.deploy.credentials import Credential, decide, wanted, wider_than_trusted
from nixops.deploy.host import HostFacts, read_facts
from nixops.deploy.retire import Retired, find_retired
from nixops.deploy.session import Session
from nixops.deploy.subject import Subject
from nixops.errors import BuildFailed, UsageError
from nixops.forge.shapes import RunnerInfo
from nixops.forge.version import ForgejoVersion
from nixops.inventory.derived import kv_paths
from nixops.inventory.model import Scope
from nixops.nix.closure import ClosureDiff, closure_diff, requisites
from nixops.render.context import RunnerFacts
from nixops.render.flake import FlakeAnswer, check_flake, flake_reference, overlay
from nixops.render.managed import FilePlan, files_undo, plan_files
from nixops.render.runner import RenderedFile, render_runner
from nixops.render.state import uncommitted
from nixops.transport.command import Runner
from nixops.transport.exec import Cancellation, cancellable
from nixops.values import RepoName, StorePath
from nixops.vault.approle import RolePlan
from nixops.vault.deliver import HostAppRole, approle_delivered
from nixops.verify.run import planned_checks

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Everything that is shown before anything is done.

    :ivar retired: registrations for repositories that are no longer trusted.
    :ivar wider: repositories the registration admits beyond the trusted ones.
    :ivar role_changes: what would change of the host's AppRole and policy, in words.
    :ivar deliver: the host needs AppRole credentials: it has none, or none that open.
    :ivar toplevel: what the flake evaluates to with the rendered files; not the final one while a uuid is unknown.
    :ivar revision_only: it differs from what runs only by the checkout's revision.
    :ivar difference: between the closures; ``None`` where the new one is not built before it is asked for.
    :ivar uncommitted: rendered files that the checkout's HEAD does not have.
    :ivar known_runners: ids of the runners in the registration's scope, where the version can list them.
    """

    subject: Subject
    facts: HostFacts
    forge_version: ForgejoVersion
    credentials: tuple[Credential, ...]
    retired: tuple[Retired, ...]
    wider: tuple[RepoName, ...]
    role_changes: tuple[str, ...]
    deliver: bool
    files: tuple[FilePlan, ...]
    toplevel: StorePath
    revision_only: bool
    difference: ClosureDiff | None
    checks: tuple[str, ...]
    uncommitted: tuple[str, ...]
    known_runners: tuple[int, ...]
    checkout: Path

    @property
    def minting(self) -> tuple[Credential, ...]:
        return tuple(c for c in self.credentials if c.mint)

    @property
    def changed_files(self) -> tuple[FilePlan, ...]:
        return tuple(f for f in self.files if f.status != "unchanged")

    @property
    def final(self) -> bool:
        """The toplevel is the one that will be built: no connection still waits for its uuid."""
        return not any(c.mint and c.repo for c in self.credentials)

    @property
    def activates(self) -> bool:
        """The host does not run, or would not boot, what the flake says."""
        if self.revision_only:
            return False
        return bool(self.minting) or self.toplevel != self.facts.running or self.toplevel != self.facts.profile

    @property
    def changes(self) -> bool:
        return bool(
            self.minting or self.retired or self.role_changes or self.deliver or self.changed_files or self.activates
        )

    def document(self) -> dict[str, Any]:
        """As JSON: files with diffs, secrets by path and version only, the closure's difference, the checks."""
        return {
            "changes": self.changes,
            "files": [{"path": str(f.path), "status": str(f.status), "diff": f.diff} for f in self.files],
            "secrets": [
                {
                    "path": c.path,
                    "action": "create" if c.mint else "keep",
                    "version": c.version,
                    "to_version": c.planned_version,
                    "scope": str(c.scope),
                    "reason": c.why or None,
                }
                for c in self.credentials
            ],
            "retired": [
                {"path": r.path, "scope": str(r.scope), "registrations": len(r.registrations), "stays": r.stays or None}
                for r in self.retired
            ],
            "wider_scope": list(self.wider),
            "host_role": {"changes": list(self.role_changes), "deliver": self.deliver},
            "closure": {
                "from": self.facts.running,
                "to": self.toplevel,
                "final": self.final,
                "revision_only": self.revision_only,
                "lines": list(self.difference.lines()) if self.difference else None,
                "size_delta": self.difference.size_delta if self.difference else None,
            },
            "checks": list(self.checks),
            "uncommitted": list(self.uncommitted),
            "auto_upgrade": self.facts.auto_upgrade,
        }


def render_facts(credentials: tuple[Credential, ...]) -> RunnerFacts:
    """What rendering needs of the credentials: uuids and versions, no secret."""
    return RunnerFacts(
        uuids={c.repo: c.uuid for c in credentials if c.repo and c.uuid},
        secret_versions={c.path: c.planned_version for c in credentials},
    )


def rendered_files(session: Session, subject: Subject, facts: RunnerFacts) -> tuple[RenderedFile, ...]:
    """What the inventory and the templates say that the checkout should hold for this runner.

    :raises TemplateError: a template is wrong.
    """
    return render_runner(session.loaded.inventory, subject.host_name, subject.name, facts, templates=subject.templates)


def evaluate(
    session: Session, subject: Subject, tree: Path, facts: RunnerFacts, *, git: bool, revision: str | None = None
) -> FlakeAnswer:
    """Ask the flake in ``tree`` for the host's toplevel and for the instance with our values.

    :param revision: see :func:`nixops.render.flake.check_flake`.

    :raises UsageError: nobody imports the rendered module, or the flake has other values than ours.
    :raises BuildFailed: it does not evaluate.
    """
    inventory = session.loaded.inventory
    return check_flake(
        session.nix(), tree, inventory, subject.host_name, subject.name, facts, git=git, revision=revision
    )


def make_plan(
    session: Session, subject: Subject, transport: Runner, *, adopt: bool, on_note: Callable[[str], None]
) -> Plan:
    """The plan for one runner on one host. Asks the host, Forgejo, OpenBao and the flake, in parallel.

    :param on_note: gets what should be said while it is made.
    :raises NixopsError: whatever keeps the plan from being made; nothing was changed.
    """
    checkout = session.checkout
    flake_reference(checkout, git=True)  # a copy of it can be named where it cannot: told now, not in the middle
    with ThreadPoolExecutor(max_workers=3, thread_name_prefix="nixops-plan") as pool:
        switch = Cancellation()
        of_host = pool.submit(_under, switch, lambda: _ask_host(transport, subject))
        of_forge = pool.submit(_under, switch, lambda: _ask_forge(session, subject))
        of_bao = pool.submit(_under, switch, lambda: _ask_bao(session, subject))
        try:
            # In this order, so that of several faults always the same one is told: the host, Forgejo, OpenBao.
            facts, approle = of_host.result()
            version, wider, listed = of_forge.result()
            role = of_bao.result()
        except BaseException:
            switch.cancel()  # the pool waits for its threads, and an interrupt reaches none of them by itself
            raise
    if wider and not subject.runner.accept_wider_scope:
        raise UsageError(
            f"the scope {subject.runner.scope} admits more than the trusted repositories: {', '.join(wider)}",
            hint="set accept_wider_scope: true to accept that, choose a narrower scope, or use module: "
            "forgejo-runner, which holds one connection per trusted repository",
        )
    for _, _, path in wanted(subject.runner):
        if not session.roles().covers(subject.host_name, path):
            raise UsageError(
                f"{subject.host_name} may not read {path}: its policy opens hosts/{subject.host_name}/ only",
                hint=f"set the runner's token.path to hosts/{subject.host_name}/…",
            )
    credentials = decide(subject.runner, session.bao(), version, listed)
    retired = find_retired(
        subject.host_name,
        subject.name,
        subject.runner,
        kv_paths(session.loaded.inventory),
        bao=session.bao(),
        version=version,
        listed=listed,
        on_note=on_note,
    )
    render = render_facts(credentials)
    files = plan_files(checkout, rendered_files(session, subject, render), adopt=adopt)
    changed = [f for f in files if f.status != "unchanged"]
    difference: ClosureDiff | None = None
    revision_only = False
    if changed:
        files_undo(checkout, files, session.local)  # what keeps them from being written is told now: exit 2 means it
        with overlay(checkout, files, session.local) as tree:
            answer = evaluate(session, subject, tree, render, git=False)
            difference = _difference(session, subject, transport, answer, facts)
    else:
        answer = evaluate(session, subject, checkout, render, git=True)
        if answer.toplevel != facts.running == facts.profile:
            # The tree as it is, with the revision that the running system was built with, or with none.
            with overlay(checkout, files, session.local) as tree:
                same = evaluate(session, subject, tree, render, git=False, revision=facts.revision)
            revision_only = same.toplevel == facts.running
        if answer.toplevel != facts.running and not revision_only:
            difference = _difference(session, subject, transport, answer, facts)
    for entry in journal.unfinished(journal.state_directory(session.environ), subject.host_name):
        on_note(f"a deploy of {entry.runner} begun at {entry.since} was killed; the next deploy takes it back")
    known: tuple[int, ...] = ()
    if subject.runner.scope is not None and version.lists_runners:
        known = tuple(r.id for r in listed(subject.runner.scope))
    return Plan(
        subject=subject,
        facts=facts,
        forge_version=version,
        credentials=credentials,
        retired=retired,
        wider=wider,
        role_changes=role.changes,
        deliver=not _opens(session, subject, approle, role),
        files=files,
        toplevel=answer.toplevel,
        revision_only=revision_only,
        difference=difference,
        checks=planned_checks(subject.host, subject.name),
        uncommitted=uncommitted(checkout, [f.path for f in files], session.local),
        known_runners=known,
        checkout=checkout,
    )


def _under(switch: Cancellation, ask: Callable[[], T]) -> T:
    with cancellable(switch):
        return ask()


def _ask_host(transport: Runner, subject: Subject) -> tuple[HostFacts, HostAppRole | None]:
    facts = read_facts(transport)
    return facts, approle_delivered(transport, subject.host.approle_dir)


def _opens(session: Session, subject: Subject, found: HostAppRole | None, role: RolePlan) -> bool:
    """What the host has belongs to its role, is closed to others, and is still valid."""
    if found is None or not found.closed or found.role_id != role.role_id or found.accessor is None:
        return False
    return session.roles().secret_id_valid(subject.host_name, found.accessor)


Listed = Callable[[Scope], tuple[RunnerInfo, ...]]


def _ask_forge(session: Session, subject: Subject) -> tuple[ForgejoVersion, tuple[RepoName, ...], Listed]:
    forge = session.forge()
    version = forge.version()
    scopes = (
        [subject.runner.scope]
        if subject.runner.scope is not None
        else [Scope(repository=repo) for repo in subject.runner.trusted]
    )
    for scope in scopes:
        forge.check_access(scope)
    seen: dict[str, tuple[RunnerInfo, ...]] = {}

    def listed(scope: Scope) -> tuple[RunnerInfo, ...]:
        key = str(scope)
        if key not in seen:
            seen[key] = forge.list_runners(scope)
        return seen[key]

    return version, wider_than_trusted(subject.runner, forge), listed


def _ask_bao(session: Session, subject: Subject) -> RolePlan:
    session.bao().check()
    return session.roles().plan(subject.host_name)


def _difference(
    session: Session, subject: Subject, transport: Runner, answer: FlakeAnswer, facts: HostFacts
) -> ClosureDiff | None:
    """The difference of the closures, where the new one is built here: this machine's store is only a cache."""
    if subject.host.deploy.build != "here" or answer.toplevel == facts.running:
        return None
    try:
        built = session.nix().build(answer.installable, timeout=session.config.build_timeout)
    except BuildFailed as error:
        raise BuildFailed(f"the toplevel of {subject.host_name} does not build", detail=str(error)) from None
    return closure_diff(requisites(transport, facts.running), requisites(session.local, built.out))
