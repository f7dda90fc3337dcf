"""The rendered host-side secret, run for real: the real agent against a real OpenBao, and our own shell script."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixops.lab.openbao import BaoServer, find_bao
from nixops.render.runner import render_runner
from tests.unit.render_inventory import ACTIONS2, HOST, facts, forgejo, inventory

TOKEN = "s3cret-registration-token"
PATH = "hosts/nix-cache02/token"
# As in the other tests, but scripts show as their own text and have real tools.
STUB = """
let pkgs = builtins.listToAttrs (map (name: { inherit name; value = "/usr"; }) [
  "bash" "coreutils" "curl" "gawk" "gitMinimal" "gnused" "nodejs" "wget" "nix" "openbao"
]) // { writeText = name: text: text; writeShellScript = name: text: text; };
in (%s) { inherit pkgs; lib.mkForce = value: value; }
"""


@pytest.fixture(scope="module")
def bao() -> Iterator[BaoServer]:
    with BaoServer() as server:
        server.namespace("team")
        yield server


@pytest.fixture
def role(bao: BaoServer, tmp_path: Path) -> Path:
    return deliver(bao, tmp_path / "approle")


def deliver(bao: BaoServer, directory: Path, namespace: str | None = None) -> Path:
    """A role that may read the host's entries, and its credentials in files."""
    policy = 'path "secret/data/hosts/nix-cache02/*" { capabilities = ["read"] }'
    bao.api("PUT", "sys/policies/acl/host", {"policy": policy}, namespace=namespace)
    bao.api("POST", "auth/approle/role/host", {"token_policies": ["host"]}, namespace=namespace)
    role_id = bao.api("GET", "auth/approle/role/host/role-id", namespace=namespace)["data"]["role_id"]
    secret_id = bao.api("POST", "auth/approle/role/host/secret-id", namespace=namespace)["data"]["secret_id"]
    directory.mkdir()
    (directory / "role-id").write_text(role_id)
    (directory / "secret-id").write_text(secret_id)
    return directory


def put(bao: BaoServer, path: str, namespace: str | None = None, **data: str) -> None:
    bao.api("POST", f"secret/data/{path}", {"data": data}, namespace=namespace)


def service(
    bao: BaoServer, role: Path, out: Path, runner: dict[str, Any] | None = None, *, vault: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The rendered unit's ``serviceConfig``, with its files below ``out`` and the credentials in ``role``."""
    fields = runner or {}
    token = {"path": PATH, "key": "token", **fields.get("token", {})}
    document = inventory(
        {**fields, "token_file": str(out / "token"), "token": token},
        vault={"address": bao.address, **(vault or {})},
    )
    entry = document.hosts[HOST].model_copy(update={"approle_dir": str(role)})
    document = document.model_copy(update={"hosts": {HOST: entry}})
    text = render_runner(document, HOST, ACTIONS2, facts())[0].text
    done = subprocess.run(
        ["nix-instantiate", "--eval", "--strict", "--json", "-"],
        input=STUB % text,
        capture_output=True,
        text=True,
        check=True,
    )
    config: dict[str, Any] = json.loads(done.stdout)["systemd"]["services"]["nixops-secret-actions2"]["serviceConfig"]
    return config


def run_agent(config: dict[str, Any], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run what ``ExecStart`` says, with next to no environment, as a unit has."""
    file = tmp_path / "agent.json"
    file.write_text(config["ExecStart"].partition(" -config=")[2])
    environment = {"HOME": "/nonexistent", "PATH": "/nonexistent"}
    command = [str(find_bao()), "agent", f"-config={file}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=40, check=False)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    place = tmp_path / "secrets"
    place.mkdir()
    return place


def test_the_agent_writes_the_older_modules_environment_file_for_root_only(
    bao: BaoServer, role: Path, out: Path, tmp_path: Path
) -> None:
    put(bao, PATH, token=TOKEN)
    config = service(bao, role, out)
    for _ in range(2):
        done = run_agent(config, tmp_path)
        assert done.returncode == 0, done.stdout
        assert (out / "token").read_text() == f"TOKEN={TOKEN}\n"
        assert (out / "token").stat().st_mode & 0o777 == 0o400
        assert (role / "secret-id").exists(), "it is needed at the next boot"
        assert TOKEN not in done.stdout + done.stderr
    put(bao, PATH, token="rotated-token")
    assert run_agent(config, tmp_path).returncode == 0
    assert (out / "token").read_text() == "TOKEN=rotated-token\n"


def test_the_agent_writes_the_newer_modules_bare_tokens_one_for_each_connection(
    bao: BaoServer, role: Path, out: Path, tmp_path: Path
) -> None:
    for name in ("torjus-nixos", "torjus-nixos-servers"):
        put(bao, f"{PATH}-{name}", token=f"{TOKEN}-{name}", uuid="not this")
    config = service(bao, role, out, forgejo(trusted=["torjus/nixos", "torjus/nixos-servers"]))
    done = run_agent(config, tmp_path)
    assert done.returncode == 0, done.stdout
    assert {p.name: p.read_text() for p in out.iterdir()} == {
        f"token-{name}": f"{TOKEN}-{name}" for name in ("torjus-nixos", "torjus-nixos-servers")
    }


def test_the_agent_works_in_a_namespace(bao: BaoServer, out: Path, tmp_path: Path) -> None:
    put(bao, PATH, token="of the root namespace")
    put(bao, PATH, namespace="team", token="of-the-team")
    role = deliver(bao, tmp_path / "team", namespace="team")
    done = run_agent(service(bao, role, out, vault={"namespace": "team"}), tmp_path)
    assert done.returncode == 0, done.stdout
    assert (out / "token").read_text() == "TOKEN=of-the-team\n"


def test_a_key_that_is_no_name_is_found_and_a_missing_one_is_an_error(
    bao: BaoServer, role: Path, out: Path, tmp_path: Path
) -> None:
    """Never a file that says ``<no value>``, whichever way the key has to be looked up."""
    put(bao, PATH, **{"runner-token.v2": TOKEN})
    done = run_agent(service(bao, role, out, {"token": {"key": "runner-token.v2"}}), tmp_path)
    assert done.returncode == 0, done.stdout
    assert (out / "token").read_text() == f"TOKEN={TOKEN}\n"
    (out / "token").unlink()
    for key in ("absent", "absent-key"):
        done = run_agent(service(bao, role, out, {"token": {"key": key}}), tmp_path)
        assert done.returncode != 0
        assert list(out.iterdir()) == []


@pytest.mark.parametrize("path", ["hosts/nix-cache02/absent", "hosts/other/token"])
def test_an_entry_that_is_absent_or_forbidden_ends_the_agent_at_once(
    bao: BaoServer, role: Path, out: Path, tmp_path: Path, path: str
) -> None:
    put(bao, "hosts/other/token", token=TOKEN)
    done = run_agent(service(bao, role, out, {"token": {"path": path}}), tmp_path)
    assert done.returncode != 0
    assert list(out.iterdir()) == []


def test_a_wrong_secret_id_ends_the_agent_and_leaves_the_old_file(
    bao: BaoServer, role: Path, out: Path, tmp_path: Path
) -> None:
    put(bao, PATH, token=TOKEN)
    config = service(bao, role, out)
    assert run_agent(config, tmp_path).returncode == 0
    (role / "secret-id").write_text("00000000-0000-0000-0000-000000000000")
    assert run_agent(config, tmp_path).returncode != 0
    assert (out / "token").read_text() == f"TOKEN={TOKEN}\n"


def test_the_directory_is_made_only_where_it_is_missing(bao: BaoServer, role: Path, out: Path) -> None:
    script = service(bao, role, out)["ExecStartPre"].rpartition(" ")[0]
    fresh = out / "run" / "secrets"
    for place, mode in ((fresh, 0o751), (out, out.stat().st_mode & 0o777)):
        subprocess.run(["/bin/sh", "-c", script, "sh", place], env={"PATH": "/nonexistent"}, check=True)
        assert place.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(("kind", "form"), [({}, f"TOKEN={TOKEN}\n"), (forgejo(trusted=["torjus/nixos"]), TOKEN)])
def test_our_script_makes_the_runners_form_of_the_bare_value(
    bao: BaoServer, role: Path, out: Path, kind: dict[str, Any], form: str
) -> None:
    command = service(bao, role, out, {**kind, "secret": "vault.secrets"})["ExecStart"]
    script, _, words = command.rpartition("done\n")
    (out / "token.value").write_text(TOKEN + "\n")
    (out / "token.value").chmod(0o400)
    for _ in range(2):
        run = ["bash", "-c", script + "done", "bash", *words.split()]
        subprocess.run(run, env={"PATH": "/nonexistent"}, check=True, executable="/bin/bash")
        assert (out / "token").read_text() == form
        assert (out / "token").stat().st_mode & 0o777 == 0o400
    assert {p.name for p in out.iterdir()} == {"token", "token.value"}


def test_our_script_refuses_an_empty_value(bao: BaoServer, role: Path, out: Path) -> None:
    command = service(bao, role, out, {"secret": "vault.secrets"})["ExecStart"]
    script, _, words = command.rpartition("done\n")
    (out / "token.value").write_text("\n")
    run = ["bash", "-c", script + "done", "bash", *words.split()]
    done = subprocess.run(run, env={"PATH": os.defpath}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "empty" in done.stderr
    assert not (out / "token").exists()
