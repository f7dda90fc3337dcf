"""The whole way of a host's secret: role, policy, delivery, and the real ``bao agent`` that fetches it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from nixops.lab.openbao import BaoServer, find_bao
from nixops.secret import Redactor, Secret
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.local import LocalRunner
from nixops.values import AbsolutePath, HostName, VaultPath
from nixops.vault.approle import HostRoles
from nixops.vault.deliver import deliver_approle
from nixops.vault.openbao import OpenBao
from nixops.vault.settings import BaoSettings, TokenLogin

HOST = HostName("nix-cache02")
OTHER = HostName("nix-cache03")


class AsRoot:
    """A host's runner on this machine: root as root, and else root of a user namespace."""

    host = "nix-cache02"

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        prefix = () if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user")
        return LocalRunner().run(replace(command, argv=(*prefix, *command.argv), root=False), on_line)


@pytest.fixture(scope="module")
def server() -> Iterator[BaoServer]:
    with BaoServer() as running:
        running.namespace("team")
        yield running


def delivered(server: BaoServer, namespace: str | None, directory: Path) -> OpenBao:
    """Two hosts with an entry and a role each; the AppRole of the first is in ``directory``."""
    bao = OpenBao(BaoSettings(server.address, TokenLogin(server.root_token), namespace=namespace), Redactor())
    roles = HostRoles(bao)
    for host in (HOST, OTHER):
        path = VaultPath(f"hosts/{host}/token")
        bao.write(path, {"token": Secret(f"value-of-{host}")}, cas=bao.version(path))
        roles.ensure(host)
    wrapped = roles.wrap_secret_id(HOST)
    deliver_approle(
        AsRoot(),
        directory=AbsolutePath(str(directory)),
        address=server.address,
        namespace=namespace,
        host_ca_file=None,
        role_id=roles.ensure(HOST).role_id,
        wrapped=wrapped,
        destroy=lambda: roles.destroy_secret_id(HOST, wrapped.accessor),
    )
    return bao


def start_agent(
    server: BaoServer, approle: Path, work: Path, entry: str, namespace: str | None = None
) -> subprocess.Popen[str]:
    """Render ``entry`` into ``work/rendered``, as a unit of the host would, and end."""
    work.mkdir(exist_ok=True)
    method = {
        "role_id_file_path": f"{approle}/role-id",
        "secret_id_file_path": f"{approle}/secret-id",
        "remove_secret_id_file_after_reading": False,
    }
    config = {
        "exit_after_auth": True,
        "vault": [{"address": server.address, "retry": [{"num_retries": 1}]}],
        "auto_auth": [{"method": [{"type": "approle", "namespace": namespace or "", "config": [method]}]}],
        "template_config": [{"exit_on_retry_failure": True}],
        "template": [
            {
                "contents": f'{{{{ with secret "secret/data/{entry}" }}}}TOKEN={{{{ .Data.data.token }}}}{{{{ end }}}}',
                "destination": str(work / "rendered"),
                "perms": "0400",
                "error_on_missing_key": True,
            }
        ],
    }
    (work / "agent.json").write_text(json.dumps(config))
    environment = {"PATH": os.environ["PATH"], "HOME": str(work)}
    return subprocess.Popen(
        [str(find_bao()), "agent", f"-config={work / 'agent.json'}"],
        env={**environment, **({"BAO_NAMESPACE": namespace} if namespace else {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_agent(
    server: BaoServer, approle: Path, work: Path, entry: str, namespace: str | None = None
) -> tuple[int, str]:
    """The same, to its end: its exit code, and all that it said."""
    with start_agent(server, approle, work, entry, namespace) as agent:
        try:
            said, _ = agent.communicate(timeout=120)
        finally:
            agent.kill()
    return agent.returncode, said


@pytest.mark.parametrize("namespace", [None, "team"])
def test_the_agent_renders_the_hosts_secret_with_the_delivered_approle(
    server: BaoServer, tmp_path: Path, namespace: str | None
) -> None:
    """The login, a policy of nothing but read, the file's content and mode: all on the real programs, twice."""
    approle = tmp_path / "approle"
    with delivered(server, namespace, approle):
        for work in (tmp_path / "first", tmp_path / "after-a-reboot"):
            code, said = run_agent(server, approle, work, f"hosts/{HOST}/token", namespace)
            assert code == 0, said
            assert (work / "rendered").read_text() == f"TOKEN=value-of-{HOST}"
            assert (work / "rendered").stat().st_mode & 0o777 == 0o400
            assert f"value-of-{HOST}" not in said
    assert (approle / "secret-id").exists()


@pytest.mark.parametrize("entry", [f"hosts/{OTHER}/token", "shared/token", f"hosts/{HOST}x/token"])
def test_the_agent_is_refused_every_other_path(server: BaoServer, tmp_path: Path, entry: str) -> None:
    with delivered(server, None, tmp_path / "approle"):
        code, said = run_agent(server, tmp_path / "approle", tmp_path / "work", entry)
    assert code != 0
    assert "permission denied" in said
    assert not (tmp_path / "work" / "rendered").exists()


def test_a_new_version_reaches_the_host_the_next_time(server: BaoServer, tmp_path: Path) -> None:
    approle = tmp_path / "approle"
    path = VaultPath(f"hosts/{HOST}/token")
    with delivered(server, None, approle) as bao:
        run_agent(server, approle, tmp_path / "work", path)
        bao.write(path, {"token": Secret("a-newer-value")}, cas=bao.version(path))
        code, said = run_agent(server, approle, tmp_path / "work", path)
    assert code == 0, said
    assert (tmp_path / "work" / "rendered").read_text() == "TOKEN=a-newer-value"


def test_a_destroyed_secret_id_lets_the_agent_in_no_more(server: BaoServer, tmp_path: Path) -> None:
    approle = tmp_path / "approle"
    with delivered(server, None, approle) as bao:
        roles = HostRoles(bao)
        for accessor in roles.ours(HOST):
            roles.destroy_secret_id(HOST, accessor)
        # The agent tries again for ever: a unit of the host needs a time-out of its own.
        with start_agent(server, approle, tmp_path / "work", f"hosts/{HOST}/token") as agent:
            assert agent.stdout is not None
            refused = (line for line in agent.stdout if "invalid role or secret ID" in line)
            assert len(list(islice(refused, 2))) == 2 and agent.poll() is None
            agent.kill()
    assert not (tmp_path / "work" / "rendered").exists()
