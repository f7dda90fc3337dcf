"""The runner's protocol of the lab's Forgejo: Connect over HTTP with JSON, as ``actions-proto`` defines it.

Names are protobuf's JSON names (``tasksVersion``); 64-bit numbers are strings in answers and either in requests;
bytes are base64. Errors are ``{"code", "message"}`` with Connect's HTTP status.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from nixops.lab.forgejo_state import JobRow, RunnerRow, State

SERVICE = "runner.v1.RunnerService"
PING = "ping.v1.PingService"
_STATUS = {"invalid_argument": 400, "unauthenticated": 401, "not_found": 404, "internal": 500, "unimplemented": 501}
_RESULTS = {
    "RESULT_SUCCESS": "success",
    "RESULT_FAILURE": "failure",
    "RESULT_CANCELLED": "cancelled",
    "RESULT_SKIPPED": "skipped",
}
_NUMBERED = ("RESULT_UNSPECIFIED", "RESULT_SUCCESS", "RESULT_FAILURE", "RESULT_CANCELLED", "RESULT_SKIPPED")


class RpcError(Exception):
    """A Connect error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Rpc:
    """Answers one procedure at a time over a :class:`State`."""

    def __init__(self, state: State) -> None:
        self.state = state

    def answer(self, procedure: str, headers: Mapping[str, str], body: Any, base: str) -> tuple[int, dict[str, Any]]:
        """HTTP status and JSON body. ``procedure`` is ``runner.v1.RunnerService/Declare``."""
        try:
            return 200, self._call(procedure, headers, body if isinstance(body, dict) else {}, base)
        except RpcError as error:
            return _STATUS[error.code], {"code": error.code, "message": error.message}

    def _call(self, procedure: str, headers: Mapping[str, str], body: dict[str, Any], base: str) -> dict[str, Any]:
        service, _, method = procedure.partition("/")
        if (service, method) == (PING, "Ping"):
            return {"data": f"Hello, {body.get('data', '')}!"}
        if service != SERVICE:
            raise RpcError("unimplemented", f"no service {service}")
        if method == "Register":
            return self._register(body)
        runner = self.state.runner_by_login(headers.get("x-runner-uuid", ""), headers.get("x-runner-token", ""))
        if runner is None:
            raise RpcError("unauthenticated", "unregistered runner")
        with self.state.changed:
            runner.last_online = self.state.clock()
            if method in ("UpdateTask", "UpdateLog"):
                runner.last_active = runner.last_online
            self.state.changed.notify_all()
            match method:
                case "Declare":
                    runner.version = str(body.get("version", ""))
                    runner.labels = [str(label) for label in body.get("labels", [])]
                    return {"runner": _runner(runner, with_token=False)}
                case "FetchTask":
                    return self._fetch(runner, body, base)
                case "UpdateTask":
                    return self._update_task(runner, body)
                case "UpdateLog":
                    return self._update_log(runner, body)
        raise RpcError("unimplemented", f"no procedure {method}")

    def _register(self, body: dict[str, Any]) -> dict[str, Any]:
        token, name = str(body.get("token", "")), str(body.get("name", ""))
        if not token or not name:
            raise RpcError("invalid_argument", "missing runner token, name")
        with self.state.changed:
            owner = next((o for o, t in self.state.registration_tokens.items() if t == token), None)
            if owner is None:
                raise RpcError("invalid_argument", "runner registration token not found")
            labels = [str(x) for x in body.get("labels") or body.get("agentLabels") or []]
            row = self.state.add_runner(owner, name[:255], labels=labels or None)
            row.version = str(body.get("version", ""))
        return {"runner": _runner(row, with_token=True)}

    def _fetch(self, runner: RunnerRow, body: dict[str, Any], base: str) -> dict[str, Any]:
        latest = self.state.tasks_version
        # A runner that has seen the latest version is not searched for: as the real server saves its database.
        job = self.state.take_job(runner) if _number(body.get("tasksVersion")) != latest else None
        answer: dict[str, Any] = {"tasksVersion": str(latest)}
        if job is not None:
            answer["task"] = self._task(job, base)
        return answer

    def _task(self, job: JobRow, base: str) -> dict[str, Any]:
        run, repo = job.run, job.run.repository
        context = {
            "actor": run.user.login,
            "event": {"inputs": run.inputs, "repository": {"full_name": repo.full_name}},
            "event_name": run.event,
            "job": job.name,
            "ref": f"refs/heads/{repo.default_branch}",
            "ref_name": repo.default_branch,
            "ref_type": "branch",
            "repository": repo.full_name,
            "repository_owner": repo.owner.login,
            "repositoryUrl": f"{base}/{repo.full_name}",
            "run_attempt": "1",
            "run_id": str(run.id),
            "run_number": str(run.number),
            "server_url": base,
            "sha": "0" * 40,
            "token": job.token,
            "workflow": run.workflow,
            "gitea_default_actions_url": "https://data.forgejo.org",
            "forgejo_default_actions_url": "https://data.forgejo.org",
            # Of ours: whether a clone over HTTP will find anything.
            "lab_serves_git": repo.git,
        }
        return {
            "id": str(job.task_id),
            "workflowPayload": base64.b64encode(json.dumps(job.payload).encode()).decode(),
            "context": context,
            "secrets": {"GITHUB_TOKEN": job.token, "GITEA_TOKEN": job.token, "FORGEJO_TOKEN": job.token},
            "vars": {},
            "needs": {},
        }

    def _own_job(self, runner: RunnerRow, task_id: Any) -> JobRow:
        job = self.state.job_of_task(_number(task_id))
        if job is None or job.runner_id != runner.id:
            raise RpcError("internal", "get task: resource does not exist")
        return job

    def _update_task(self, runner: RunnerRow, body: dict[str, Any]) -> dict[str, Any]:
        state = body.get("state") or {}
        job = self._own_job(runner, state.get("id"))
        result = state.get("result", 0)
        name = _NUMBERED[result] if isinstance(result, int) else str(result)
        if name in _RESULTS:
            self.state.finish(job, _RESULTS[name])
        known = {v: k for k, v in _RESULTS.items()}.get(job.status, "RESULT_UNSPECIFIED")
        return {"state": {"id": str(job.task_id), "result": known}, "sentOutputs": sorted(body.get("outputs") or {})}

    def _update_log(self, runner: RunnerRow, body: dict[str, Any]) -> dict[str, Any]:
        job = self._own_job(runner, body.get("taskId"))
        rows, index, have = body.get("rows") or [], _number(body.get("index")), len(job.log)
        if rows and index <= have < index + len(rows):
            job.log += [str(r.get("content", "")) for r in rows[have - index :]]
        return {"ackIndex": str(len(job.log))}


def _runner(row: RunnerRow, *, with_token: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": str(row.id), "uuid": row.uuid, "name": row.name, "version": row.version}
    if row.labels:
        shown["labels"] = row.labels
    if with_token:
        shown["token"] = row.token
    return shown


def _number(value: Any) -> int:
    """A 64-bit number of protobuf's JSON: a number, a string of digits, or left out for 0."""
    try:
        return int(value or 0)
    except (TypeError, ValueError):
        raise RpcError("invalid_argument", "not a number") from None
