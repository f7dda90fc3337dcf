"""What the lab's Forgejo knows: accounts, repositories, tokens, runners, runs. No HTTP here.

The rules are the real server's: who may do what, which runner admits which job, when a runner counts as offline.
Every public method takes the lock, so that threads may call freely.
"""

from __future__ import annotations

import re
import secrets
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

OFFLINE_AFTER = 60.0
IDLE_AFTER = 10.0
FINISHED = frozenset({"success", "failure", "cancelled", "skipped"})


@dataclass
class Account:
    """A user or an organization; both own repositories."""

    id: int
    login: str
    organization: bool = False
    is_admin: bool = False
    owners: set[str] = field(default_factory=set)
    members: set[str] = field(default_factory=set)


@dataclass
class Repository:
    id: int
    owner: Account
    name: str
    private: bool = False
    has_actions: bool = True
    default_branch: str = "master"
    administrators: set[str] = field(default_factory=set)
    workflows: dict[str, dict[str, Any]] = field(default_factory=dict)
    git: bool = False

    @property
    def full_name(self) -> str:
        return f"{self.owner.login}/{self.name}"


@dataclass(frozen=True)
class AccessToken:
    value: str
    owner: Account
    scopes: frozenset[str]


@dataclass(frozen=True)
class Owner:
    """Whom a runner or a registration token belongs to; both 0 for the whole forge, as in Forgejo's tables."""

    owner_id: int = 0
    repo_id: int = 0

    def admits(self, repository: Repository) -> bool:
        """Jobs of ``repository`` are offered to a runner of this owner."""
        if self.repo_id:
            return self.repo_id == repository.id
        return self.owner_id in (0, repository.owner.id)


@dataclass
class RunnerRow:
    id: int
    uuid: str
    token: str
    name: str
    owner: Owner
    description: str = ""
    ephemeral: bool = False
    labels: list[str] | None = None
    version: str = ""
    last_online: float | None = None
    last_active: float | None = None

    def status(self, now: float) -> str:
        """``offline``, ``idle`` or ``active``, as Forgejo tells them apart."""
        if self.last_online is None or now - self.last_online > OFFLINE_AFTER:
            return "offline"
        if self.last_active is None or now - self.last_active > IDLE_AFTER:
            return "idle"
        return "active"


@dataclass
class JobRow:
    """One job of a run; ``task_id`` is 0 until a runner has taken it."""

    id: int
    run: RunRow
    name: str
    runs_on: tuple[str, ...]
    payload: dict[str, Any]
    status: str = "waiting"
    task_id: int = 0
    runner_id: int = 0
    token: str = ""
    log: list[str] = field(default_factory=list)
    started: float | None = None
    stopped: float | None = None


@dataclass
class RunRow:
    id: int
    number: int
    repository: Repository
    workflow: str
    event: str
    inputs: dict[str, str]
    title: str
    created: float
    user: Account
    jobs: list[JobRow] = field(default_factory=list)

    @property
    def status(self) -> str:
        """The run's status from its jobs'."""
        states = {j.status for j in self.jobs}
        if states <= FINISHED:
            for state in ("failure", "cancelled", "success"):
                if state in states:
                    return state
            return "skipped"
        return "running" if states & (FINISHED | {"running"}) else "waiting"


class State:
    """Everything the server remembers; it outlives a stop and a start.

    :param clock: seconds since the epoch; injectable, so that a test need not wait 60 s for ``offline``.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.changed = threading.Condition(threading.RLock())
        self.accounts: dict[str, Account] = {}
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, AccessToken] = {}
        self.registration_tokens: dict[Owner, str] = {}
        self.runners: dict[int, RunnerRow] = {}
        self.runs: dict[int, RunRow] = {}
        self.issued: list[str] = []
        self.tasks_version = 0
        self._ids: dict[str, int] = {}

    def next_id(self, kind: str) -> int:
        """1, 2, 3, … per kind."""
        with self.changed:
            self._ids[kind] = self._ids.get(kind, 0) + 1
            return self._ids[kind]

    def secret(self, length: int = 40) -> str:
        """A new hexadecimal credential, remembered as issued."""
        value = secrets.token_hex(length // 2)
        with self.changed:
            self.issued.append(value)
        return value

    # -- accounts ---------------------------------------------------------------------------------------------

    def account(self, login: str) -> Account | None:
        """Names are compared without regard to case, as Forgejo does."""
        return self.accounts.get(login.lower())

    def repository(self, full_name: str) -> Repository | None:
        return self.repositories.get(full_name.lower())

    def sees(self, user: Account, repository: Repository) -> bool:
        """``user`` may read it."""
        owner = repository.owner
        return (
            not repository.private
            or user.is_admin
            or user is owner
            or user.login in owner.owners | owner.members | repository.administrators
        )

    def administers(self, user: Account, repository: Repository) -> bool:
        """``user`` is its owner or one of its administrators."""
        owner = repository.owner
        return user.is_admin or user is owner or user.login in owner.owners | repository.administrators

    # -- runners ----------------------------------------------------------------------------------------------

    def registration_token(self, owner: Owner, *, reset: bool = False) -> str:
        """The one reusable token of a scope, made when it is first asked for."""
        with self.changed:
            if reset or owner not in self.registration_tokens:
                self.registration_tokens[owner] = self.secret()
            return self.registration_tokens[owner]

    def add_runner(
        self,
        owner: Owner,
        name: str,
        *,
        description: str = "",
        ephemeral: bool = False,
        labels: list[str] | None = None,
    ) -> RunnerRow:
        with self.changed:
            row = RunnerRow(
                self.next_id("runner"), str(uuid.uuid4()), self.secret(), name, owner, description, ephemeral, labels
            )
            self.runners[row.id] = row
            self.changed.notify_all()
            return row

    def runner_by_login(self, runner_uuid: str, token: str) -> RunnerRow | None:
        """The runner that these credentials belong to, if it is still there."""
        with self.changed:
            for row in self.runners.values():
                if row.uuid == runner_uuid:
                    return row if secrets.compare_digest(row.token.encode(), token.encode()) else None
            return None

    def visible_runners(self, owner: Owner, *, inherited: Iterable[Owner] = ()) -> list[RunnerRow]:
        """Runners of ``owner`` and of ``inherited``, in Forgejo's order: last contact first."""
        wanted = {owner, *inherited}
        with self.changed:
            rows = [r for r in self.runners.values() if r.owner in wanted]
            return sorted(rows, key=lambda r: (-(r.last_online or 0.0), r.id))

    # -- runs -------------------------------------------------------------------------------------------------

    def add_run(
        self,
        repository: Repository,
        workflow: str,
        definition: dict[str, Any],
        *,
        user: Account,
        inputs: dict[str, str] | None = None,
        event: str = "workflow_dispatch",
    ) -> RunRow:
        """Make a run with one job for each of the workflow's; they wait for a runner that fits."""
        with self.changed:
            run = RunRow(
                self.next_id("run"),
                self.next_id(f"run of {repository.full_name}"),
                repository,
                workflow,
                event,
                dict(inputs or {}),
                _title(str(definition.get("run-name") or workflow), inputs or {}),
                self.clock(),
                user,
            )
            for name, job in definition["jobs"].items():
                wanted = job["runs-on"]
                labels = (wanted,) if isinstance(wanted, str) else tuple(wanted)
                payload = {**definition, "jobs": {name: job}}
                run.jobs.append(JobRow(self.next_id("job"), run, name, labels, payload))
            self.runs[run.id] = run
            self.tasks_version += 1
            self.changed.notify_all()
            return run

    def take_job(self, runner: RunnerRow) -> JobRow | None:
        """The oldest waiting job that ``runner`` may have: its scope admits it and all of ``runs-on`` is there."""
        with self.changed:
            labels = set(runner.labels or ())
            for run in self.runs.values():
                for job in run.jobs:
                    if job.status == "waiting" and runner.owner.admits(run.repository) and labels >= set(job.runs_on):
                        job.status = "running"
                        job.task_id = self.next_id("task")
                        job.runner_id = runner.id
                        job.token = self.secret()
                        job.started = self.clock()
                        self.tasks_version += 1
                        self.changed.notify_all()
                        return job
            return None

    def job_of_task(self, task_id: int) -> JobRow | None:
        with self.changed:
            return next((j for r in self.runs.values() for j in r.jobs if j.task_id == task_id != 0), None)

    def finish(self, job: JobRow, status: str) -> None:
        """End a job. What has ended stays as it ended. An ephemeral runner is gone after its one job."""
        with self.changed:
            if job.status not in FINISHED:
                job.status = status
                job.stopped = self.clock()
                runner = self.runners.get(job.runner_id)
                if runner is not None and runner.ephemeral:
                    del self.runners[runner.id]
                self.changed.notify_all()


def _title(text: str, inputs: dict[str, str]) -> str:
    """``run-name`` with its inputs filled in."""
    return re.sub(r"\$\{\{\s*inputs\.([\w-]+)\s*\}\}", lambda m: inputs.get(m[1], ""), text)
