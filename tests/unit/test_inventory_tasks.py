"""The tasks as they are typed: `invoke inventory`, `invoke trust`, `invoke completion`, and Ansible's script."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import paramiko
import pytest

from nixops.errors import HostKeyChanged, Unreachable
from nixops.inventory.complete import candidates
from nixops.inventory.load import load
from nixops.inventory.trust import TrustOptions, trust_host
from nixops.values import HostName

ROOT = Path(__file__).parents[2]
INVOKE = Path(sys.executable).with_name("invoke")
TASKS = """\
from invoke import Collection
from nixops.tasks import completion, inventory, trust
ns = Collection(completion.completion, inventory.inventory, trust.trust)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with these tasks and the shipped inventory."""
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / "inventory").mkdir()
    for name in ("hosts.yml", "ansible.sh"):
        shutil.copy(ROOT / "inventory" / name, tmp_path / "inventory" / name)
    return tmp_path


def run(directory: Path, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NIXOPS_INVOKE": str(INVOKE)}
    return subprocess.run(
        [str(a) for a in argv], cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_hosts_and_runners_are_listed_as_plain_text_where_there_is_no_terminal(project: Path) -> None:
    ran = run(project, INVOKE, "inventory")
    assert ran.returncode == 0, ran.stderr
    assert "nix-cache02.home.2rjus.net" in ran.stdout
    assert "actions2 (default)" in ran.stdout
    assert "\x1b" not in ran.stdout and "│" not in ran.stdout


def test_a_host_is_shown_with_the_origin_of_each_value(project: Path) -> None:
    ran = run(project, INVOKE, "inventory", "--host", "nix-cache02")
    rows = {line.split()[0]: line for line in ran.stdout.splitlines()[1:]}
    assert "inventory/hosts.yml:" in rows["address"] and rows["address"].endswith("(host)")
    assert rows["protected_files"].endswith("(group cache)")
    assert rows["port"].endswith("built-in")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--host", "nix-cach02"], "there is no host 'nix-cach02' (did you mean nix-cache02?)"),
        (["--format", "jsn"], "there is no format 'jsn' (did you mean json?)"),
        (["--inventory", "nope.yml"], "nope.yml: there is no such inventory file"),
        (["--inventory", "inventory"], "is a directory"),
        (["--inventory", "tasks.py"], "error: tasks.py:1:1: "),
        (["--format", "machines", "--host", "nix-cach02"], "did you mean nix-cache02?"),
    ],
)
def test_bad_use_is_one_line_on_stderr_and_exit_code_2(project: Path, argv: list[str], said: str) -> None:
    ran = run(project, INVOKE, "inventory", *argv)
    assert ran.returncode == 2
    assert said in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


def test_json_is_one_document_on_stdout(project: Path) -> None:
    ran = run(project, INVOKE, "inventory", "--format", "json")
    document = json.loads(ran.stdout)
    assert document["schema"] == "nixops/inventory/1"
    assert document["hosts"]["nix-cache02"]["settings"]["runners"]["actions2"]["capacity"] == 4


def test_the_task_works_from_a_directory_below(project: Path) -> None:
    ran = run(project / "inventory", INVOKE, "inventory")
    assert ran.returncode == 0, ran.stderr


def test_the_ansible_script_answers_list_and_host_from_anywhere(project: Path) -> None:
    script = project / "inventory" / "ansible.sh"
    assert os.access(ROOT / "inventory" / "ansible.sh", os.X_OK)
    listed = json.loads(run(Path("/"), script, "--list").stdout)
    variables = json.loads(run(Path("/"), script, "--host", "nix-cache02").stdout)
    assert listed["_meta"]["hostvars"]["nix-cache02"] == variables
    assert listed["cache"] == {"hosts": ["nix-cache02"]}
    assert run(Path("/"), script, "--host", "nope").returncode == 2
    assert run(Path("/"), script).returncode == 2


def test_the_tasks_modules_load_nothing_heavy() -> None:
    code = (
        "import sys, nixops.tasks.inventory, nixops.tasks.trust, nixops.tasks.completion\n"
        "print([m for m in ('pydantic', 'rich', 'paramiko', 'fabric', 'nixops.inventory.load') if m in sys.modules])"
    )
    assert run(ROOT, sys.executable, "-c", code).stdout.strip() == "[]"


# -- completion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["invoke", "deploy-runner", "--host", ""], ["nix-cache02"]),
        (["invoke", "deploy-runner", "--host", "x"], []),
        (["invoke", "deploy-runner", "--host", "="], ["nix-cache02"]),
        (["invoke", "deploy-runner", "--host", "=", "nix"], ["nix-cache02"]),
        (["invoke", "deploy-runner", "--host=nix"], ["--host=nix-cache02"]),
        (["invoke", "trust", ""], ["nix-cache02"]),
        (["invoke", "deploy-runner", "--runner", ""], ["actions2"]),
        (["invoke", "deploy-runner", "--host=nix-cache02", "--runner", "a"], ["actions2"]),
        (["invoke", "deploy-runner", "--host", "=", "nix-cache02", "--runner", "a"], ["actions2"]),
        (["invoke", "deploy", "--group", ""], ["cache", "builders"]),
        (["invoke", "build-image", "--image", ""], ["example"]),
        (["invoke", "build-image", "--systems", "x86"], ["x86_64-linux"]),
        (["invoke", "build.pool", "--system", "arm"], []),
        (["invoke", "inventory", "--format", "ssh"], ["ssh-config"]),
        (["invoke", "deploy-runner", "--format", ""], ["text", "json"]),
        (["invoke", "deploy-runner", "--inventory", "none.yml", "--host", ""], []),
        (["invoke", "deploy-runner", "--plan", ""], []),
        (["invoke"], []),
        ([], []),
    ],
)
def test_names_complete_behind_their_flags(project: Path, words: list[str], found: list[str]) -> None:
    assert candidates(words, max(0, len(words) - 1), project) == found


def test_runners_are_those_of_the_host_that_was_typed(tmp_path: Path) -> None:
    file = tmp_path / "pool.yml"
    file.write_text("hosts: {a: {runners: {r1: {}, r2: {managed: no}}}, b: {runners: {r3: {}}}, c: {}}\n")
    words = ["invoke", "deploy-runner", "--inventory", "pool.yml", "--runner", ""]
    assert candidates(words, 5, tmp_path) == ["r1", "r3"]
    assert candidates([*words[:4], "--host", "b", "--runner", ""], 7, tmp_path) == ["r3"]


def test_an_inventory_that_is_broken_completes_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "inventory").mkdir()
    (tmp_path / "inventory" / "hosts.yml").write_text("hosts: [")
    assert candidates(["invoke", "trust", ""], 2, tmp_path) == []


def test_bash_completes_hosts_runners_tasks_and_flags(project: Path) -> None:
    script = """
        eval "$("$1" completion --shell bash)"
        complete -p invoke >/dev/null || exit 1
        try() {
            COMP_WORDS=("$INVOKE" "$@"); COMP_CWORD=$#; COMPREPLY=()
            _nixops_complete "$INVOKE" "${!#}"; echo "${COMPREPLY[*]}"
        }
        INVOKE=$1
        try deploy-runner --host ""
        try deploy-runner --host nix-cache02 --runner act
        try tru
        try trust --fing
        try inventory --host = nix
    """
    ran = run(project, "bash", "-c", script, "bash", INVOKE)
    assert ran.stdout.splitlines() == ["nix-cache02", "actions2", "trust", "--fingerprint", "nix-cache02"], ran.stderr


def test_there_is_a_script_for_zsh_and_none_for_what_we_do_not_know(project: Path) -> None:
    assert "compdef _nixops_complete invoke inv" in run(project, INVOKE, "completion", "--shell", "zsh").stdout
    ran = run(project, INVOKE, "completion", "--shell", "fish")
    assert (ran.returncode, ran.stderr) == (2, "error: there is no completion for 'fish' (choose bash or zsh)\n")


# -- trust ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """Something that speaks SSH far enough to offer a host key."""

    port: int
    key: str

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(base64.b64decode(self.key.split()[1])).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


@pytest.fixture
def server() -> Iterator[Server]:
    key = paramiko.ECDSAKey.generate()
    listener = socket.create_server(("127.0.0.1", 0))
    transports: list[paramiko.Transport] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.add_server_key(key)
            transports.append(transport)
            transport.start_server(event=threading.Event(), server=paramiko.ServerInterface())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield Server(listener.getsockname()[1], f"{key.get_name()} {key.get_base64()}")
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)
    for transport in transports:
        transport.close()


def inventory(tmp_path: Path, port: int, key: str = "") -> Path:
    file = tmp_path / "i.yml"
    pinned = f"    host_key: {key}\n" if key else ""
    file.write_text(f"hosts:\n  a:\n    address: 127.0.0.1  # loopback\n    port: {port}\n{pinned}")
    return file


def test_trust_pins_the_key_that_the_host_offers(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    file = inventory(tmp_path, server.port)
    options = TrustOptions("a", fingerprint=server.fingerprint, yes=True, inventory=str(file))
    trust_host(options)
    assert load(file).inventory.hosts[HostName("a")].host_key == (server.key,)
    assert "# loopback" in file.read_text()
    shown = capsys.readouterr()
    assert server.fingerprint in shown.err
    assert shown.out == f"a: {server.fingerprint} pinned in {file}\n"
    trust_host(options)
    assert "pinned already" in capsys.readouterr().out


def test_trust_refuses_another_key_than_the_pinned_one(tmp_path: Path, server: Server) -> None:
    other = paramiko.ECDSAKey.generate()
    file = inventory(tmp_path, server.port, f"{other.get_name()} {other.get_base64()}")
    before = file.read_text()
    with pytest.raises(HostKeyChanged):
        trust_host(TrustOptions("a", inventory=str(file)), ask=lambda _: True)
    assert file.read_text() == before


def test_trust_of_a_host_that_is_down_says_unreachable_and_writes_nothing(tmp_path: Path) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        file = inventory(tmp_path, unheard.getsockname()[1])
        before = file.read_text()
        with pytest.raises(Unreachable):
            trust_host(TrustOptions("a", inventory=str(file)), ask=lambda _: True)
    assert file.read_text() == before


def test_trust_asks_and_ends_with_2_where_nobody_can_answer(project: Path, server: Server) -> None:
    file = inventory(project, server.port)
    ran = run(project, INVOKE, "trust", "a", "--inventory", file)
    assert ran.returncode == 2
    assert "nobody can be asked" in ran.stderr
    assert server.key not in file.read_text()
