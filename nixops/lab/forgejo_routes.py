"""The routes of the lab's Forgejo, version by version, and what each does.

The templates are the contracts' own paths, so that ``tests/contract`` can hold each to its specification.
"""

from __future__ import annotations

from collections.abc import Callable

from nixops.lab import forgejo_json as shape
from nixops.lab.forgejo_api import Call, Refused, Reply, Route, integer, missing
from nixops.lab.forgejo_state import JobRow, Owner, Repository, RunnerRow, RunRow

# -- who and what ---------------------------------------------------------------------------------------------


def _version(call: Call) -> Reply:
    return Reply(200, {"version": call.api.text})


def _me(call: Call) -> Reply:
    return Reply(200, shape.user(call.user, call.base))


def _user(call: Call) -> Reply:
    account = call.state.account(call.params["username"])
    return Reply(200, shape.user(account, call.base)) if account else missing()


def _organization(call: Call) -> Reply:
    return Reply(200, shape.organization(call.organization(), call.base))


def _my_organizations(call: Call) -> Reply:
    login = call.user.login
    mine = [a for a in call.state.accounts.values() if a.organization and login in a.owners | a.members]
    return call.page(mine, lambda a: shape.organization(a, call.base))


def _repository(call: Call) -> Reply:
    return Reply(200, call.repo_json(call.repository()))


def _repositories(call: Call, wanted: Callable[[Repository], bool]) -> Reply:
    found = [r for r in call.state.repositories.values() if wanted(r) and call.state.sees(call.user, r)]
    return call.page(found, lambda r: call.repo_json(r))


def _my_repositories(call: Call) -> Reply:
    user = call.user
    return _repositories(call, lambda r: r.owner is user or user.login in r.administrators)


def _user_repositories(call: Call) -> Reply:
    account = call.state.account(call.params["username"])
    return _repositories(call, lambda r: r.owner is account) if account else missing()


def _organization_repositories(call: Call) -> Reply:
    account = call.organization()
    return _repositories(call, lambda r: r.owner is account)


def _search(call: Call) -> Reply:
    reply = _repositories(call, lambda _: True)
    return Reply(200, {"ok": True, "data": reply.value}, headers=reply.headers)


# -- runners --------------------------------------------------------------------------------------------------


def _registration_token(call: Call) -> Reply:
    return Reply(200, {"token": call.state.registration_token(call.owner())})


def _list_runners(call: Call) -> Reply:
    owner = call.owner()
    inherited: list[Owner] = []
    if call.request.query.get("visible") == "true":
        inherited = [Owner()]
        if owner.repo_id:
            inherited.append(Owner(owner_id=call.repository().owner.id))
    rows = call.state.visible_runners(owner, inherited=inherited)
    return call.page(rows, lambda r: shape.runner(r, call.state.clock()))


def _create_runner(call: Call) -> Reply:
    owner = call.owner()
    body = call.request.body if isinstance(call.request.body, dict) else {}
    name = body.get("name")
    if not isinstance(name, str) or not name.strip():
        raise Refused(422, "[Name]: Required")
    row = call.state.add_runner(
        owner, name, description=str(body.get("description") or ""), ephemeral=bool(body.get("ephemeral"))
    )
    return Reply(201, {"id": row.id, "uuid": row.uuid, "token": row.token})


def _one_runner(call: Call) -> RunnerRow:
    owner = call.owner()
    row = call.state.runners.get(integer(call.params["runner_id"], 0))
    return row if row is not None and row.owner == owner else missing()


def _show_runner(call: Call) -> Reply:
    return Reply(200, shape.runner(_one_runner(call), call.state.clock()))


def _delete_runner(call: Call) -> Reply:
    call.state.runners.pop(_one_runner(call).id, None)
    return Reply(204)


def _waiting_jobs(call: Call) -> Reply:
    owner = call.owner()
    labels = {w for w in call.request.query.get("labels", "").split(",") if w}
    found = [
        shape.job(j, call.api.level)
        for run in call.state.runs.values()
        for j in run.jobs
        if j.status in ("waiting", "running")
        and owner.admits(run.repository)
        and (not labels or labels >= set(j.runs_on))
    ]
    # An empty list is written as null.
    return Reply(200, found or None)


# -- workflows and runs ---------------------------------------------------------------------------------------


def _dispatch(call: Call) -> Reply:
    repo = call.repository()
    if not call.state.administers(call.user, repo):
        raise Refused(403, "user should have a permission to write to a repository")
    file = call.params.get("workflowname") or call.params.get("workflowfilename", "")
    body = call.request.body if isinstance(call.request.body, dict) else {}
    if not body.get("ref"):
        raise Refused(422, "[Ref]: Required")
    definition = repo.workflows.get(file)
    if definition is None or str(body["ref"]).removeprefix("refs/heads/") != repo.default_branch:
        missing()
    given = {str(k): str(v) for k, v in (body.get("inputs") or {}).items()}
    triggers = definition.get("on", {})
    dispatch = triggers.get("workflow_dispatch") if isinstance(triggers, dict) else None
    declared = (dispatch or {}).get("inputs") or {}
    for name, about in declared.items():
        if about.get("required") and not given.get(name):
            raise Refused(500, f"input '{name}' is required")
        given.setdefault(name, str(about.get("default", "")))
    run = call.state.add_run(repo, file, definition, user=call.user, inputs=given)
    if call.api.level >= 11 and body.get("return_run_info"):
        return Reply(201, {"id": run.id, "run_number": run.number, "jobs": [j.name for j in run.jobs]})
    return Reply(204)


def _tasks(call: Call) -> Reply:
    repo = call.repository()
    jobs = [j for r in call.state.runs.values() if r.repository is repo for j in r.jobs if j.task_id]
    jobs.sort(key=lambda j: -j.task_id)
    reply = call.page(jobs, lambda j: shape.task(j, call.base))
    return Reply(200, {"workflow_runs": reply.value, "total_count": len(jobs)}, headers=reply.headers)


def _runs(call: Call) -> Reply:
    repo = call.repository()
    number = integer(call.request.query.get("run_number"), 0)
    found = [r for r in call.state.runs.values() if r.repository is repo and number in (0, r.number)]
    reply = call.page(found[::-1], lambda r: shape.run(r, call.base))
    return Reply(200, {"workflow_runs": reply.value, "total_count": len(found)}, headers=reply.headers)


def _one_run(call: Call) -> RunRow:
    repo = call.repository()
    run = call.state.runs.get(integer(call.params["run_id"], 0))
    return run if run is not None and run.repository is repo else missing()


def _run(call: Call) -> Reply:
    return Reply(200, shape.run(_one_run(call), call.base))


def _run_jobs(call: Call) -> Reply:
    return Reply(200, [shape.job(j, call.api.level) for j in _one_run(call).jobs])


def _cancel(call: Call) -> Reply:
    for job in _one_run(call).jobs:
        call.state.finish(job, "cancelled")
    return Reply(204)


def _job_log(call: Call) -> Reply:
    repo = call.repository()
    wanted = integer(call.params["job_id"], 0)
    jobs: list[JobRow] = [j for r in call.state.runs.values() if r.repository is repo for j in r.jobs if j.id == wanted]
    if not jobs or not jobs[0].task_id:
        missing()
    return Reply(200, text="".join(line + "\n" for line in jobs[0].log))


def routes() -> list[Route]:
    """Every route of every version."""
    repo = "/repos/{owner}/{repo}"
    table = [
        Route("GET", "/version", _version),
        Route("GET", "/user", _me, ("user",)),
        Route("GET", "/user/orgs", _my_organizations, ("user", "organization")),
        Route("GET", "/user/repos", _my_repositories, ("user", "repository")),
        Route("GET", "/users/{username}", _user, ("user",)),
        Route("GET", "/users/{username}/repos", _user_repositories, ("user", "repository")),
        Route("GET", "/orgs/{org}", _organization, ("organization",)),
        Route("GET", "/orgs/{org}/repos", _organization_repositories, ("organization", "repository")),
        # Not among the contracts' paths, which name what runners need; every Forgejo has it.
        Route("GET", "/repos/search", _search, ("repository",)),
        Route("GET", repo, _repository, ("repository",)),
        Route("GET", f"{repo}/actions/tasks", _tasks, ("repository",)),
        Route("POST", f"{repo}/actions/workflows/{{workflowname}}/dispatches", _dispatch, ("repository",), 8, 15),
        Route("POST", f"{repo}/actions/workflows/{{workflowfilename}}/dispatches", _dispatch, ("repository",), 15),
        Route("GET", f"{repo}/actions/runs", _runs, ("repository",), 15),
        Route("GET", f"{repo}/actions/runs/{{run_id}}", _run, ("repository",), 15),
        Route("GET", f"{repo}/actions/runs/{{run_id}}/jobs", _run_jobs, ("repository",), 17),
        Route("POST", f"{repo}/actions/runs/{{run_id}}/cancel", _cancel, ("repository",), 17),
        Route("GET", f"{repo}/actions/jobs/{{job_id}}/logs", _job_log, ("repository",), 17),
        Route("GET", "/admin/runners/registration-token", _registration_token, ("admin",)),
        Route("GET", "/admin/actions/runners/registration-token", _registration_token, ("admin",), 15),
        Route("GET", "/admin/runners/jobs", _waiting_jobs, ("admin",), 11),
        Route("GET", "/admin/actions/runners/jobs", _waiting_jobs, ("admin",), 15),
    ]
    for head, category in (
        ("/admin", "admin"),
        ("/orgs/{org}", "organization"),
        ("/user", "user"),
        (repo, "repository"),
    ):
        runners, needs = f"{head}/actions/runners", (category,)
        if head != "/admin":
            table.append(Route("GET", f"{runners}/registration-token", _registration_token, needs))
            table.append(Route("GET", f"{runners}/jobs", _waiting_jobs, needs, 11))
        table += [
            Route("GET", runners, _list_runners, needs, 15),
            Route("POST", runners, _create_runner, needs, 15),
            Route("GET", f"{runners}/{{runner_id}}", _show_runner, needs, 15),
            Route("DELETE", f"{runners}/{{runner_id}}", _delete_runner, needs, 15),
        ]
    return table
