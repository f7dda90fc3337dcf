"""Try a runner for real: dispatch a workflow with a nonce as input, and follow its run to its end.

From Forgejo 8 on. What a version tells about a run differs: from 15 on it is asked for by id (12 to 14 may or may
not know that path); before, only the list of tasks is there, which shows a run once a runner has taken it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from nixops.errors import ForgeError
from nixops.forge.forgejo import Forgejo
from nixops.forge.http import ForgeRefused
from nixops.forge.shapes import DispatchedShape, JobShape, RunShape, TaskShape, TasksShape, read
from nixops.values import RepoName

READ = "a token with the scope read:repository"
WRITE = "a token with the scope write:repository, of somebody who may write to the repository"
FINISHED = frozenset({"success", "failure", "cancelled", "skipped"})
LOG_LINES = 20


@dataclass(frozen=True)
class Dispatched:
    """A run that was asked for.

    :ivar run_id: its id, where the version tells it (11+).
    :ivar run_number: its number in the repository, or 0 where it is not known yet.
    :ivar after: the highest run number there was before.
    :ivar jobs: how many jobs it has, or 0 where that is not known.
    """

    repo: RepoName
    workflow: str
    nonce: str
    run_id: int | None
    run_number: int
    after: int
    jobs: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a run stands. ``status`` is Forgejo's word; ``log`` the end of its log, where the version shows it (17+)."""

    status: str
    run_number: int
    url: str
    seconds: float
    log: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == "success"


class Smoke:
    """Dispatches and follows workflows.

    :param forge: the client; its token needs ``write:repository``.
    :param clock: seconds, monotonic.
    :param sleep: how to wait between looks.
    """

    def __init__(
        self,
        forge: Forgejo,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._forge = forge
        self._clock = clock
        self._sleep = sleep

    def dispatch(
        self,
        repo: RepoName,
        workflow: str,
        *,
        ref: str | None = None,
        inputs: Mapping[str, str] | None = None,
        nonce_input: str = "nonce",
    ) -> Dispatched:
        """Dispatch ``workflow`` (its file's name), with a new nonce in the input ``nonce_input``.

        :param ref: branch or tag; left out, the repository's default branch.
        :raises ForgeError: before 8; refused; or the answer was lost, and then it may run.
        """
        version = self._forge.version()
        if not version.dispatches:
            raise ForgeError(
                f"{version} cannot dispatch a workflow through its API",
                hint="push a commit to try the runner, or upgrade to Forgejo 8 or later",
            )
        if ref is None:
            ref = self._forge.repository(repo).default_branch or "main"
        nonce = secrets.token_hex(8)
        # Without an answer that names the run, it is the one that comes after these.
        after = max((t.run_number for t in self._tasks(repo)), default=0)
        body: dict[str, Any] = {"ref": ref, "inputs": {**(inputs or {}), nonce_input: nonce}}
        if version.returns_run:
            body["return_run_info"] = True
        path = f"{_path(repo)}/actions/workflows/{quote(workflow, safe='')}/dispatches"
        answer = self._forge.http.send("POST", path, needs=WRITE, body=body, ok=(200, 201, 204))
        if not answer.body.strip():
            return Dispatched(repo, workflow, nonce, None, 0, after)
        made: DispatchedShape = read(DispatchedShape, answer.json(), answer.what)
        return Dispatched(repo, workflow, nonce, made.id, made.run_number, after, len(made.jobs))

    def follow(
        self,
        run: Dispatched,
        *,
        timeout: float,
        every: float = 2.0,
        on_status: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Look every ``every`` seconds until the run has ended.

        :param timeout: seconds; a run that no runner takes waits for ever.
        :param on_status: told each new status.
        :raises ForgeError: not ended in time, or the server cannot be asked.
        """
        begun = self._clock()
        last = ""
        while True:
            found = self._look(run)
            status = found.status if found else "waiting"
            if status != last and on_status is not None:
                on_status(status)
            last = status
            seconds = self._clock() - begun
            if found is not None and status in FINISHED:
                log = self._log(run) if status != "success" else ()
                return Outcome(status, found.run_number, found.url, seconds, log)
            if seconds >= timeout:
                raise ForgeError(
                    f"the run of {run.workflow} in {run.repo} is still {status} after {seconds:.0f} s",
                    hint="no runner with a label of its runs-on has taken it: is one registered for this repository, "
                    "and not offline?"
                    if status == "waiting"
                    else "look at its log on the forge",
                )
            self._sleep(min(every, max(0.0, timeout - seconds)))

    # -- parts ------------------------------------------------------------------------------------------------

    def _look(self, run: Dispatched) -> Outcome | None:
        """The run as it stands, or ``None`` while no list shows it."""
        if run.run_id is not None and self._forge.version().shows_run:
            try:
                answer = self._forge.http.get(f"{_path(run.repo)}/actions/runs/{run.run_id}", needs=READ)
            except ForgeRefused as error:
                # 404 says nothing of the run where the path itself may be missing.
                if error.status != 404:
                    raise
            else:
                shown: RunShape = read(RunShape, answer.json(), answer.what)
                return Outcome(shown.status, shown.index_in_repo, shown.html_url, 0.0)
        return _of_tasks([t for t in self._tasks(run.repo) if _is_of(t, run)], run)

    def _tasks(self, repo: RepoName) -> list[TaskShape]:
        """The newest tasks. One page will do: what is looked for is new."""
        answer = self._forge.http.get(f"{_path(repo)}/actions/tasks", needs=READ, params={"page": 1, "limit": 50})
        tasks: TasksShape = read(TasksShape, answer.json(), answer.what)
        return tasks.workflow_runs

    def _log(self, run: Dispatched) -> tuple[str, ...]:
        """The end of the log of the jobs that did not succeed."""
        if run.run_id is None or not self._forge.version().shows_logs:
            return ()
        lines: list[str] = []
        answer = self._forge.http.get(f"{_path(run.repo)}/actions/runs/{run.run_id}/jobs", needs=READ)
        jobs: list[JobShape] = read(list[JobShape], answer.json() or [], answer.what)
        for job in jobs:
            if job.status not in ("success", "skipped"):
                try:
                    text = self._forge.http.get(f"{_path(run.repo)}/actions/jobs/{job.id}/logs", needs=READ).body
                except ForgeRefused as error:
                    if error.status != 404:
                        raise
                    continue
                lines += self._forge.http.redactor.clean(text.decode(errors="replace")).splitlines()
        return tuple(lines[-LOG_LINES:])


def _path(repo: RepoName) -> str:
    return f"/repos/{quote(repo.owner, safe='')}/{quote(repo.repo, safe='')}"


def _is_of(task: TaskShape, run: Dispatched) -> bool:
    if run.run_number:
        return task.run_number == run.run_number
    return task.run_number > run.after and task.workflow_id == run.workflow and task.event == "workflow_dispatch"


def _of_tasks(tasks: list[TaskShape], run: Dispatched) -> Outcome | None:
    """The run's status from its tasks'. Of several dispatches at the same time, the one that shows the nonce
    (``run-name``) is ours, else the first."""
    if not tasks:
        return None
    mine = [t for t in tasks if run.nonce in t.display_title] or tasks
    number = min(t.run_number for t in mine)
    ours = [t for t in mine if t.run_number == number]
    open_states = {t.status for t in ours} - FINISHED
    if len(ours) < run.jobs:
        # A job that no runner has taken yet is in no list of tasks.
        open_states |= {"running"}
    if open_states:
        status = "running" if "running" in open_states else sorted(open_states)[0]
    else:
        states = {t.status for t in ours}
        status = next(s for s in ("failure", "cancelled", "success", "skipped") if s in states)
    return Outcome(status, number, ours[0].url, 0.0)
