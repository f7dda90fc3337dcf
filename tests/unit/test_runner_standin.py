"""The lab's runner as a real process against the lab's Forgejo: what the lab tests lean on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nixops.forge.forgejo import Forgejo
from nixops.inventory.model import Scope
from nixops.lab.forgejo_server import ForgejoServer
from nixops.secret import Redactor
from nixops.values import RepoName

SCRIPT = Path(__file__).parents[2] / "nixops/lab/flake/pkgs/runner.py"
REPO = Scope(repository=RepoName("torjus/nixos"))
OWNER = Scope(user="torjus")


@dataclass
class Host:
    """A working directory as a unit would have it, and the processes started in it."""

    home: Path
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *argv: str, **env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *argv],
            cwd=self.home,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.running.append(process)
        return process

    def run(self, *argv: str, **env: str) -> tuple[int, str]:
        process = self.start(*argv, **env)
        out, _ = process.communicate(timeout=30)
        return process.returncode, out

    def config(self, **sections: Any) -> str:
        sections.setdefault("runner", {})
        sections["runner"] = {"fetch_interval": "100ms", "report_interval": "100ms", **sections["runner"]}
        path = self.home / "config.yaml"
        path.write_text(json.dumps(sections))
        return str(path)

    def stop(self, process: subprocess.Popen[str]) -> str:
        process.send_signal(signal.SIGTERM)
        return process.communicate(timeout=30)[0]

    def register(self, forge: ForgejoServer, labels: str = "native:host") -> tuple[int, str]:
        token = forge.reset_registration_token(OWNER).reveal()
        return self.run(
            "register",
            "--no-interactive",
            "--instance",
            forge.url,
            "--token",
            token,
            "--name",
            "n1",
            "--labels",
            labels,
        )


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    for process in host.running:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def forge() -> Iterator[ForgejoServer]:
    with ForgejoServer(15) as server:
        server.add_user("torjus")
        server.add_repo("torjus/nixos")
        server.add_repo("torjus/other")
        yield server


def connect(host: Host, forge: ForgejoServer, *, suffix: str = "", name: str = "c1") -> dict[str, Any]:
    """A connection with credentials as nixops mints them, its token in a file as LoadCredential gives it."""
    client = Forgejo(forge.url, forge.add_token("torjus"), redactor=Redactor())
    made = client.create_runner(REPO, name="n1")
    (host.home / name).write_text(made.token.reveal() + suffix)
    return {
        name: {"url": forge.url, "uuid": made.uuid, "token": None, "token_url": f"file:$CREDENTIALS_DIRECTORY/{name}"}
    }


def daemon(host: Host, config: str) -> subprocess.Popen[str]:
    return host.start("daemon", "--config", config, CREDENTIALS_DIRECTORY=str(host.home))


def registered(host: Host, forge: ForgejoServer, **runner: Any) -> subprocess.Popen[str]:
    """A registered runner with its daemon running and declared."""
    assert host.register(forge)[0] == 0
    process = host.start("daemon", "--config", host.config(runner=runner), TOKEN="registration-token-of-the-unit")
    forge.wait_runner("n1")
    deadline = time.monotonic() + 10
    while forge.runners[0].version != "v12.8.0-stand-in" or not any("FetchTask" in r.path for r in forge.requests):
        assert time.monotonic() < deadline, "the daemon does not poll"
        time.sleep(0.02)
    return process


def test_register_writes_the_registration_file_with_the_real_keys(host: Host, forge: ForgejoServer) -> None:
    code, out = host.register(forge)
    assert code == 0, out
    written = json.loads((host.home / ".runner").read_text())
    assert list(written) == ["WARNING", "id", "uuid", "name", "token", "address", "labels"]
    assert (written["name"], written["address"], written["labels"]) == ("n1", forge.url, ["native:host"])
    assert (written["id"], written["uuid"]) == (forge.runners[0].id, forge.runners[0].uuid)
    assert forge.runners[0].labels == ("native",), "labels are declared without their schema"


def test_register_with_a_stale_token_fails_and_leaves_no_file(host: Host, forge: ForgejoServer) -> None:
    stale = forge.reset_registration_token(OWNER).reveal()
    forge.reset_registration_token(OWNER)
    code, out = host.run(
        "register", "--no-interactive", "--instance", forge.url, "--token", stale, "--labels", "a:host"
    )
    assert code == 1
    assert "invalid_argument: runner registration token not found" in out
    assert not (host.home / ".runner").exists()


def test_register_pings_until_the_server_is_there(host: Host, forge: ForgejoServer) -> None:
    token = forge.reset_registration_token(OWNER).reveal()
    forge.stop()
    argv = ("register", "--no-interactive", "--instance", forge.url, "--token", token, "--name", "n1")
    process = host.start(*argv, "--labels", "native:host")
    assert process.stdout is not None
    seen = ""
    while "Cannot ping" not in seen:
        seen = process.stdout.readline()
        assert seen, "it gave up"
    assert process.poll() is None
    forge.start()
    assert process.wait(20) == 0
    assert (host.home / ".runner").exists()


def test_a_job_runs_in_the_daemons_environment_and_its_log_comes_back(host: Host, forge: ForgejoServer) -> None:
    process = registered(host, forge)
    run = forge.dispatch(
        "torjus/nixos",
        [
            {
                "run": "echo token=$TOKEN path=$PATH repo=$GITHUB_REPOSITORY,$FORGEJO_REPOSITORY\n"
                "echo word=hello >> $GITHUB_ENV"
            },
            {"run": "echo $word ${{ inputs.nonce }} ${{ github.repository }} in $PWD", "env": {"X": "y"}},
        ],
        inputs={"nonce": "n0nce"},
    )
    view = forge.wait_run(run)
    log = "\n".join(view.log)
    assert view.status == "success", log
    assert view.runners == ("n1",)
    assert f"token=registration-token-of-the-unit path={os.environ['PATH']} repo=torjus/nixos,torjus/nixos" in log
    assert f"hello n0nce torjus/nixos in {host.home}/.cache/act/" in log
    assert not list((host.home / ".cache/act").iterdir()), "the job's directories are removed"
    assert "shutdown initiated" in host.stop(process)
    assert process.returncode == 0


def test_a_failing_step_ends_the_job_and_skips_the_rest(host: Host, forge: ForgejoServer) -> None:
    registered(host, forge)
    steps = [{"run": "echo one; false; echo two"}, {"run": "echo three"}, {"run": "echo last", "if": "always()"}]
    view = forge.wait_run(forge.dispatch("torjus/nixos", steps))
    assert view.status == "failure"
    assert [w for w in ("one", "two", "three", "exit status 1", "last") if w in view.log] == [
        "one",
        "exit status 1",
        "last",
    ]


def test_the_jobs_own_token_is_masked_in_its_log(host: Host, forge: ForgejoServer) -> None:
    registered(host, forge)
    view = forge.wait_run(forge.dispatch("torjus/nixos", [{"run": "echo got $GITHUB_TOKEN"}]))
    assert "got ***" in view.log
    assert not any(secret in line for secret in forge.issued for line in view.log)


def test_checkout_clones_from_the_forge_and_wants_node_and_git(
    host: Host, forge: ForgejoServer, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(source)]
    source.mkdir()
    (source / "flake.nix").write_text("{ }\n")
    for argv in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *argv], check=True)
    forge.add_repo("torjus/Source", source=source)
    registered(host, forge)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "node").write_text("#!/bin/sh\n")
    (tools / "node").chmod(0o755)
    steps: list[dict[str, Any]] = [{"uses": "actions/checkout@v4"}, {"run": "cat flake.nix"}]
    without = {"PATH": "/nowhere"}
    view = forge.wait_run(forge.dispatch("torjus/Source", steps, env=without))
    assert (view.status, view.log[-1]) == ("failure", "Cannot find: node in PATH")
    view = forge.wait_run(forge.dispatch("torjus/Source", steps, env={"PATH": f"{tools}:{os.environ['PATH']}"}))
    assert (view.status, view.log[-1]) == ("success", "{ }"), view.log


def test_a_connection_with_a_token_file_declares_and_works(host: Host, forge: ForgejoServer) -> None:
    config = host.config(server={"connections": connect(host, forge)}, runner={"labels": ["native:host"]})
    process = daemon(host, config)
    assert forge.wait_runner("n1").labels == ("native",)
    view = forge.wait_run(forge.dispatch("torjus/nixos", [{"run": "echo hi"}]))
    assert view.status == "success"
    assert not (host.home / ".runner").exists()
    host.stop(process)


def test_a_newline_at_the_end_of_a_token_file_locks_the_runner_out(host: Host, forge: ForgejoServer) -> None:
    config = host.config(server={"connections": connect(host, forge, suffix="\n")}, runner={"labels": ["native:host"]})
    process = daemon(host, config)
    out = process.communicate(timeout=20)[0]
    assert process.returncode == 1
    assert 'invalid header field value for "X-Runner-Token"' in out
    assert not any(secret in out for secret in forge.issued)


def test_a_left_over_registration_file_beside_connections_stops_the_start(host: Host, forge: ForgejoServer) -> None:
    host.register(forge)
    process = daemon(
        host, host.config(server={"connections": connect(host, forge)}, runner={"labels": ["native:host"]})
    )
    assert ".runner exists, but server.connections is configured" in process.communicate(timeout=20)[0]
    assert process.returncode == 1


def test_wrong_credentials_end_the_daemon_with_the_servers_word(host: Host, forge: ForgejoServer) -> None:
    connections = connect(host, forge)
    forge.delete_runner(forge.runners[0].id)
    process = daemon(host, host.config(server={"connections": connections}, runner={"labels": ["native:host"]}))
    assert "unauthenticated: unregistered runner" in process.communicate(timeout=20)[0]
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token": "x" * 40}, "exactly one of token and token_url"),
        ({"token_url": "https://example.org/token"}, "unsupported scheme"),
        ({"token_url": "file:$CREDENTIALS_DIRECTORY/absent"}, "No such file"),
        ({"uuid": None}, "has no uuid"),
    ],
)
def test_a_connection_that_cannot_be_read_stops_the_start(
    host: Host, forge: ForgejoServer, change: dict[str, Any], said: str
) -> None:
    connections = connect(host, forge)
    connections["c1"] |= change
    process = daemon(host, host.config(server={"connections": connections}, runner={"labels": ["native:host"]}))
    assert said in process.communicate(timeout=20)[0]
    assert process.returncode == 1


def test_a_bare_label_means_docker_and_stops_the_start_where_there_is_none(host: Host, forge: ForgejoServer) -> None:
    assert host.register(forge, labels="native")[0] == 0
    code, out = host.run("daemon")
    assert code == 1
    assert "daemon Docker Engine socket not found" in out


def test_without_a_registration_file_the_daemon_says_to_register_first(host: Host) -> None:
    code, out = host.run("daemon", "--config", host.config())
    assert code == 1
    assert "please register the runner first" in out


def test_a_runner_gets_only_jobs_of_its_scope_and_its_labels(host: Host, forge: ForgejoServer) -> None:
    config = host.config(server={"connections": connect(host, forge)}, runner={"labels": ["native:host"]})
    daemon(host, config)
    forge.wait_runner("n1")
    foreign = forge.dispatch("torjus/other", [{"run": "true"}])
    unlabelled = forge.dispatch("torjus/nixos", [{"run": "true"}], runs_on="elsewhere")
    own = forge.dispatch("torjus/nixos", [{"run": "true"}])
    assert forge.wait_run(own).status == "success"
    assert (forge.run(foreign).status, forge.run(unlabelled).status) == ("waiting", "waiting")


def test_several_connections_each_serve_their_repository(host: Host, forge: ForgejoServer) -> None:
    client = Forgejo(forge.url, forge.add_token("torjus"), redactor=Redactor())
    connections = connect(host, forge)
    made = client.create_runner(Scope(repository=RepoName("torjus/other")), name="n2")
    (host.home / "c2").write_text(made.token.reveal())
    connections["c2"] = {**connections["c1"], "uuid": made.uuid, "token_url": f"file://{host.home}/c2"}
    daemon(host, host.config(server={"connections": connections}, runner={"labels": ["native:host"]}))
    runs = [forge.dispatch(repo, [{"run": "true"}]) for repo in ("torjus/nixos", "torjus/other")]
    assert [forge.wait_run(r).runners for r in runs] == [("n1",), ("n2",)]


def test_capacity_bounds_the_jobs_at_a_time(host: Host, forge: ForgejoServer) -> None:
    registered(host, forge, capacity=2)
    gate = host.home / "gate"
    wait = [{"run": f"echo in; while [ ! -e {gate} ]; do sleep 0.05; done"}]
    runs = [forge.dispatch("torjus/nixos", wait) for _ in range(3)]
    deadline = time.monotonic() + 15
    while [forge.run(r).status for r in runs].count("running") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    assert [forge.run(r).status for r in runs] == ["running", "running", "waiting"]
    gate.touch()
    assert {forge.wait_run(r).status for r in runs} == {"success"}


@pytest.mark.parametrize(("timeout", "status"), [("20s", "success"), ("0s", "cancelled")])
def test_a_stop_waits_for_jobs_as_long_as_shutdown_timeout_says(
    host: Host, forge: ForgejoServer, timeout: str, status: str
) -> None:
    process = registered(host, forge, shutdown_timeout=timeout)
    # One that is to be cut short must not have ended by itself before.
    seconds = 1 if status == "success" else 60
    run = forge.dispatch("torjus/nixos", [{"run": f"echo begun; sleep {seconds}; echo ended"}])
    deadline = time.monotonic() + 15
    while "begun" not in forge.run(run).log:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    host.stop(process)
    assert process.returncode == 0
    view = forge.run(run)
    assert view.status == status
    assert ("ended" in view.log) == (status == "success")


def test_a_cancelled_run_is_killed(host: Host, forge: ForgejoServer) -> None:
    registered(host, forge)
    mark = host.home / "pid"
    run = forge.dispatch("torjus/nixos", [{"run": f"echo $$ > {mark}; sleep 600"}])
    deadline = time.monotonic() + 15
    while not (mark.exists() and mark.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    forge.cancel_run(run)
    pid = int(mark.read_text())
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline + 15, "the step's process is still there"
        time.sleep(0.05)
    assert forge.run(run).status == "cancelled"


def test_the_daemon_survives_a_server_that_goes_away_for_a_while(host: Host, forge: ForgejoServer) -> None:
    process = registered(host, forge)
    forge.stop()
    assert process.stdout is not None
    seen = ""
    while "failed to fetch task" not in seen:
        seen = process.stdout.readline()
        assert seen, "it gave up"
    forge.start()
    assert forge.wait_run(forge.dispatch("torjus/nixos", [{"run": "true"}])).status == "success"


def test_the_log_is_never_sent_twice_when_an_answer_is_lost(host: Host, forge: ForgejoServer) -> None:
    registered(host, forge)
    forge.fault("UpdateLog", drop="after", times=3)
    lines: Sequence[str] = [f"line {n}" for n in range(5)]
    view = forge.wait_run(forge.dispatch("torjus/nixos", [{"run": "\n".join(f"echo {x}" for x in lines)}]))
    assert [x for x in view.log if re.match(r"line \d", x)] == lines


def test_an_unknown_expression_fails_the_job_instead_of_being_passed_on(host: Host, forge: ForgejoServer) -> None:
    registered(host, forge)
    view = forge.wait_run(forge.dispatch("torjus/nixos", [{"run": "echo ${{ toJSON(github) }}"}]))
    assert view.status == "failure"
    assert "does not know the expression" in view.log[-1]
