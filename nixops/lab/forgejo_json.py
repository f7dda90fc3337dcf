"""How the lab's Forgejo shows its values as JSON, key by key as the real one does."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from nixops.lab.forgejo_state import Account, JobRow, Repository, RunnerRow, RunRow


def when(seconds: float | None) -> str:
    """A time as Go writes it; its zero time where there is none."""
    if seconds is None:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def user(account: Account, base: str) -> dict[str, Any]:
    return {
        "id": account.id,
        "login": account.login,
        "login_name": "",
        "source_id": 0,
        "full_name": "",
        "email": f"{account.login}@noreply.example.org",
        "avatar_url": f"{base}/avatars/{account.id}",
        "html_url": f"{base}/{account.login}",
        "language": "",
        "is_admin": account.is_admin,
        "last_login": when(None),
        "created": when(1_600_000_000.0),
        "restricted": False,
        "active": True,
        "prohibit_login": False,
        "location": "",
        "pronouns": "",
        "website": "",
        "description": "",
        "visibility": "public",
        "followers_count": 0,
        "following_count": 0,
        "starred_repos_count": 0,
    }


def organization(account: Account, base: str) -> dict[str, Any]:
    return {
        "id": account.id,
        "name": account.login,
        "username": account.login,
        "full_name": "",
        "email": "",
        "avatar_url": f"{base}/avatars/{account.id}",
        "description": "",
        "website": "",
        "location": "",
        "visibility": "public",
        "repo_admin_change_team_access": True,
    }


def repository(repo: Repository, base: str, *, admin: bool) -> dict[str, Any]:
    url = f"{base}/{repo.full_name}"
    return {
        "id": repo.id,
        "owner": user(repo.owner, base),
        "name": repo.name,
        "full_name": repo.full_name,
        "description": "",
        "empty": not repo.git,
        "private": repo.private,
        "fork": False,
        "template": False,
        "mirror": False,
        "archived": False,
        "size": 1,
        "html_url": url,
        "url": f"{base}/api/v1/repos/{repo.full_name}",
        "clone_url": f"{url}.git",
        "ssh_url": f"git@example.org:{repo.full_name}.git",
        "default_branch": repo.default_branch,
        "created_at": when(1_600_000_000.0),
        "updated_at": when(1_600_000_000.0),
        "permissions": {"admin": admin, "push": admin, "pull": True},
        "has_actions": repo.has_actions,
        "has_issues": True,
        "topics": [],
        "object_format_name": "sha1",
    }


def runner(row: RunnerRow, now: float) -> dict[str, Any]:
    return {
        "id": row.id,
        "uuid": row.uuid,
        "owner_id": row.owner.owner_id,
        "repo_id": row.owner.repo_id,
        "name": row.name,
        "description": row.description,
        "status": row.status(now),
        "version": row.version,
        # null until the daemon has declared them
        "labels": row.labels,
        "ephemeral": row.ephemeral,
    }


def run(row: RunRow, base: str) -> dict[str, Any]:
    started = [j.started for j in row.jobs if j.started is not None]
    stopped = [j.stopped for j in row.jobs if j.stopped is not None]
    done = len(stopped) == len(row.jobs)
    return {
        "id": row.id,
        "title": row.title,
        "repository": repository(row.repository, base, admin=True),
        "workflow_id": row.workflow,
        "index_in_repo": row.number,
        "trigger_user": user(row.user, base),
        "ScheduleID": 0,
        "prettyref": row.repository.default_branch,
        "is_ref_deleted": False,
        "commit_sha": "0" * 40,
        "is_fork_pull_request": False,
        "need_approval": False,
        "approved_by": 0,
        "event": row.event,
        "event_payload": json.dumps({"inputs": row.inputs}),
        "trigger_event": row.event,
        "status": row.status,
        "started": when(min(started, default=None)),
        "stopped": when(max(stopped) if done and stopped else None),
        "created": when(row.created),
        "updated": when(max([row.created, *started, *stopped])),
        "duration": int((max(stopped) - min(started)) * 1e9) if done and started else 0,
        "html_url": f"{base}/{row.repository.full_name}/actions/runs/{row.number}",
    }


def task(job: JobRow, base: str) -> dict[str, Any]:
    row = job.run
    return {
        "id": job.task_id,
        "name": job.name,
        "head_branch": row.repository.default_branch,
        "head_sha": "0" * 40,
        "run_number": row.number,
        "event": row.event,
        "display_title": row.title,
        "status": job.status,
        "workflow_id": row.workflow,
        "url": f"{base}/{row.repository.full_name}/actions/runs/{row.number}",
        "created_at": when(job.started),
        "updated_at": when(job.stopped or job.started),
        "run_started_at": when(job.started),
    }


def job(row: JobRow, level: int) -> dict[str, Any]:
    """A job of a list, with the keys of that contract level: some came with 15 and 17."""
    value: dict[str, Any] = {
        "id": row.id,
        "repo_id": row.run.repository.id,
        "owner_id": row.run.repository.owner.id,
        "name": row.name,
        "needs": None,
        "runs_on": list(row.runs_on),
        "task_id": row.task_id,
        "status": row.status,
    }
    if level >= 15:
        value |= {"attempt": 1, "handle": f"{row.run.id}-{row.id}"}
    if level >= 17:
        value["run_id"] = row.run.id
    return value
