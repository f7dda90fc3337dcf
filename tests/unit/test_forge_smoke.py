"""Dispatching a workflow and following its run, for every version's way of telling about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from nixops.errors import ForgeError
from nixops.forge.forgejo import Forgejo
from nixops.forge.smoke import Smoke
from nixops.inventory.model import Scope
from nixops.lab.forgejo_server import ForgejoServer
from nixops.secret import Redactor
from nixops.values import RepoName

REPO = RepoName("torjus/nixos")
WORKFLOW = """
name: Smoke
run-name: smoke ${{ inputs.nonce }}
on:
  workflow_dispatch:
    inputs:
      nonce: {required: true}
jobs:
  build:
    runs-on: native
    steps: [{run: "echo ${{ inputs.nonce }}"}]
"""


class Worker:
    """A runner without a process: takes one job and ends it as told, over the runner's protocol."""

    def __init__(self, server: ForgejoServer) -> None:
        made = Forgejo(server.url, server.add_token("torjus"), redactor=Redactor()).create_runner(
            Scope(user="torjus"), name="worker"
        )
        self.url = f"{server.url}/api/actions/runner.v1.RunnerService/"
        self.headers = {"x-runner-uuid": made.uuid, "x-runner-token": made.token.reveal()}
        self.call("Declare", version="v12", labels=["native"])

    def call(self, method: str, **body: Any) -> dict[str, Any]:
        answer = requests.post(self.url + method, json=body, headers=self.headers, timeout=10)
        value: dict[str, Any] = answer.json()
        assert answer.status_code == 200, value
        return value

    def work(self, result: str = "RESULT_SUCCESS", lines: tuple[str, ...] = ("hello",)) -> dict[str, Any]:
        task: dict[str, Any] = self.call("FetchTask")["task"]
        rows = [{"content": line} for line in lines]
        self.call("UpdateLog", taskId=task["id"], index="0", rows=rows, noMore=True)
        self.call("UpdateTask", state={"id": task["id"], "result": result})
        return task


@contextmanager
def forge(version: int, **options: Any) -> Iterator[tuple[ForgejoServer, Forgejo]]:
    with ForgejoServer(version, **options) as server:
        server.add_user("torjus")
        server.add_repo(REPO)
        server.put_workflow(REPO, "smoke.yml", WORKFLOW)
        yield server, Forgejo(server.url, server.add_token("torjus"), redactor=Redactor())


class Time:
    """A clock that moves when somebody waits, and lets things happen meanwhile."""

    def __init__(self, *events: Callable[[], object]) -> None:
        self.now = 0.0
        self.events = list(events)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.events:
            self.events.pop(0)()

    def smoke(self, client: Forgejo) -> Smoke:
        return Smoke(client, clock=lambda: self.now, sleep=self.sleep)


@pytest.mark.parametrize(
    ("version", "run_by_id"), [(8, False), (9, False), (11, False), (12, False), (14, True), (15, False), (17, False)]
)
def test_a_run_is_followed_to_its_end(version: int, run_by_id: bool) -> None:
    with forge(version, run_by_id=run_by_id) as (server, client):
        worker = Worker(server)
        time = Time(lambda: None, worker.work)
        smoke = time.smoke(client)
        run = smoke.dispatch(REPO, "smoke.yml")
        assert (run.run_id is not None) == (version >= 11)
        seen: list[str] = []
        outcome = smoke.follow(run, timeout=60, on_status=seen.append)
        assert outcome.ok
        assert (outcome.status, outcome.run_number, outcome.seconds) == ("success", 1, 4.0)
        assert outcome.url.endswith("/torjus/nixos/actions/runs/1")
        assert seen == ["waiting", "success"]
        asked_by_id = [r.status for r in server.requests if r.path.endswith("/actions/runs/1")]
        expected = 200 if version >= 15 or run_by_id else 404
        assert set(asked_by_id) == ({expected} if version >= 12 else set())


def test_the_nonce_reaches_the_job() -> None:
    with forge(15) as (server, client):
        run = Time().smoke(client).dispatch(REPO, "smoke.yml", inputs={"more": "x"})
        task = Worker(server).work()
        assert task["context"]["event"]["inputs"] == {"nonce": run.nonce, "more": "x"}


def test_without_an_id_the_run_with_our_nonce_is_ours_among_others() -> None:
    with forge(9) as (server, client):
        worker = Worker(server)
        server.dispatch(REPO, [{"run": "old"}], workflow="smoke.yml")
        worker.work("RESULT_FAILURE")
        time = Time(worker.work)
        smoke = time.smoke(client)
        run = smoke.dispatch(REPO, "smoke.yml")
        assert run.after == 1
        outcome = smoke.follow(run, timeout=60)
        assert (outcome.status, outcome.run_number) == ("success", 2)


def test_a_failed_run_shows_the_end_of_its_log_where_the_version_does() -> None:
    for version, shown in ((15, ()), (17, ("line 28", "line 29"))):
        with forge(version) as (server, client):
            worker = Worker(server)
            smoke = Time().smoke(client)
            run = smoke.dispatch(REPO, "smoke.yml")
            worker.work("RESULT_FAILURE", tuple(f"line {n}" for n in range(30)))
            outcome = smoke.follow(run, timeout=60)
            assert not outcome.ok
            assert outcome.status == "failure"
            assert outcome.log[-2:] == shown
            assert len(outcome.log) <= 20


def test_a_run_that_nobody_takes_ends_with_what_to_look_at() -> None:
    for version in (9, 15):
        with forge(version) as (_, client):
            smoke = Time().smoke(client)
            run = smoke.dispatch(REPO, "smoke.yml")
            with pytest.raises(ForgeError, match="still waiting after 10 s") as error:
                smoke.follow(run, timeout=10)
            assert "no runner with a label" in str(error.value.hint)


@pytest.mark.parametrize("version", [9, 11, 15])
def test_a_run_with_a_job_still_waiting_is_not_over(version: int) -> None:
    two = {"build": {"runs-on": "native", "steps": []}, "other": {"runs-on": "elsewhere", "steps": []}}
    with forge(version) as (server, client):
        server.put_workflow(REPO, "two.yml", {"on": {"workflow_dispatch": {}}, "jobs": two})
        worker = Worker(server)
        smoke = Time().smoke(client)
        run = smoke.dispatch(REPO, "two.yml")
        worker.work()
        if version >= 11:
            with pytest.raises(ForgeError, match="still running"):
                smoke.follow(run, timeout=4)
        else:
            assert smoke.follow(run, timeout=4).ok, "before 11 nothing tells of a job that nobody has taken"


def test_before_8_nothing_can_be_dispatched() -> None:
    with forge(7) as (server, client):
        with pytest.raises(ForgeError, match="cannot dispatch") as error:
            Time().smoke(client).dispatch(REPO, "smoke.yml")
        assert "Forgejo 8" in str(error.value)
        assert {r.method for r in server.requests} == {"GET"}


def test_a_workflow_that_is_not_there_and_a_lost_answer_are_errors() -> None:
    with forge(15) as (server, client):
        smoke = Time().smoke(client)
        with pytest.raises(ForgeError, match="404"):
            smoke.dispatch(REPO, "absent.yml")
        server.fault("dispatches", drop="after")
        with pytest.raises(ForgeError, match="lost its connection"):
            smoke.dispatch(REPO, "smoke.yml")
        assert len(server.runs) == 1, "a dispatch is never sent twice"


def test_an_error_while_following_is_not_taken_for_not_there() -> None:
    with forge(15) as (server, client):
        smoke = Time().smoke(client)
        run = smoke.dispatch(REPO, "smoke.yml")
        server.fault("/actions/runs/", status=500)
        with pytest.raises(ForgeError, match="refused with 500"):
            smoke.follow(run, timeout=60)
