"""What keeps a deploy from beginning, or stops it before the activation: the exit code, one line, nothing half done."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nixops.lab.lab import HostSpec
from nixops.lab.setting import Invoked, Setting
from tests.lab.deploying import changing_requests


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """A host on its first generation; no test of this module gets as far as another one."""
    directory = tmp_path_factory.mktemp("refusals")
    hosts = [HostSpec("nix-cache02", disk_mib=1024)]
    with Setting(directory, name=f"refuse-{os.getpid()}", hosts=hosts) as made:
        yield made


@pytest.fixture
def before(setting: Setting) -> Iterator[dict[str, str]]:
    """The state before the test; at its end everything must be as it was."""
    state = setting.snapshot()
    yield state
    setting.forge.clear_faults()
    assert setting.snapshot() == state


def inventory(setting: Setting, change: Any) -> str:
    """The setting's inventory with a change, in a file beside it."""
    document = yaml.safe_load(setting.repo.inventory_file.read_text())
    change(document)
    file = setting.repo.inventory_file.with_name("changed.yml")
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return str(file)


def deploy(setting: Setting, *args: str, environ: dict[str, str] | None = None) -> Invoked:
    """`invoke deploy-runner --yes`, which must show no traceback and no secret whatever happens."""
    done = setting.invoke("deploy-runner", "--yes", *args, environ=environ)
    said = done.out + done.err
    assert "Traceback" not in said and "a defect in nixops" not in said, said
    for secret in (*setting.forge.issued, setting.bao.root_token.reveal()):
        assert secret not in said
    return done


def deploy_with(setting: Setting, change: Any, environ: dict[str, str] | None = None) -> Invoked:
    file = inventory(setting, change)
    done = setting.invoke("deploy-runner", "--yes", "--inventory", file, environ=environ)
    assert "Traceback" not in done.err and "a defect in nixops" not in done.err, done
    return done


def host(document: Any) -> Any:
    return document["hosts"]["nix-cache02"]


def test_a_host_that_is_down_ends_with_3(setting: Setting, before: dict[str, str]) -> None:
    """An address of the lab's network where nobody is: the hop that failed is named, and nothing was begun."""
    gateway = setting.lab.gateway.rsplit(".", 1)[0]
    done = deploy_with(setting, lambda d: host(d).update(address=f"{gateway}.250", ssh={"connect_timeout": 2}))
    assert done.code == 3 and "nix-cache02" in done.err, done


def test_an_unknown_host_key_ends_with_3_and_prints_the_fingerprint(setting: Setting, before: dict[str, str]) -> None:
    """Without a pinned key nobody is trusted: the error names the offered key and the command that would pin it."""
    done = deploy_with(setting, lambda d: host(d).pop("host_key"))
    assert done.code == 3 and "SHA256:" in done.err and "invoke trust nix-cache02" in done.err, done


def test_a_changed_host_key_ends_with_3_and_is_louder(setting: Setting, before: dict[str, str]) -> None:
    """Another key than the pinned one is not the same error as no key, and names both."""
    other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGbPhiQgg0ElaKp5DRJfWTLFWXYoXFNPkHcW4PfFgSWM"
    done = deploy_with(setting, lambda d: host(d).update(host_key=other))
    assert done.code == 3 and len(re.findall("SHA256:", done.err)) >= 2, done


def test_a_refused_login_ends_with_3(setting: Setting, before: dict[str, str], tmp_path: Path) -> None:
    """A key that the host does not accept."""
    import subprocess

    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    done = deploy_with(setting, lambda d: host(d).update(ssh={"identity_file": str(tmp_path / "key")}))
    assert done.code == 3 and "login" in done.err.lower(), done


def test_a_rendered_file_that_git_ignores_ends_with_2_before_anything_is_registered(
    setting: Setting, before: dict[str, str]
) -> None:
    """The flake would not see the file: named while nothing has been asked for, neither a token nor a version."""
    exclude = setting.repo.path / ".git/info/exclude"
    was = exclude.read_text() if exclude.exists() else ""
    exclude.parent.mkdir(exist_ok=True)
    exclude.write_text("nixops-*\n")
    setting.forge.forget_requests()
    try:
        done = deploy(setting)
    finally:
        exclude.write_text(was)
    assert done.code == 2 and "git ignores hosts/nix-cache02/nixops-actions2.nix" in done.err, done
    assert "registering" not in done.err and not changing_requests(setting), done


def test_a_checkout_that_nix_cannot_name_ends_with_2_before_anything_is_registered(
    setting: Setting, before: dict[str, str], tmp_path: Path
) -> None:
    """A path with a space in it: a copy of it could be evaluated, and the checkout itself could not."""
    moved = tmp_path / "a space" / setting.repo.path.name
    shutil.copytree(setting.repo.path, moved, symlinks=True)
    setting.forge.forget_requests()
    done = deploy_with(setting, lambda d: d["config"].update(flake=str(moved)))
    assert done.code == 2 and "cannot be named to Nix" in done.err, done
    assert "registering" not in done.err and not changing_requests(setting), done


def test_openbao_sealed_ends_with_1(setting: Setting, before: dict[str, str]) -> None:
    """A sealed OpenBao: said as such, before anything is registered."""
    setting.bao.seal()
    try:
        done = deploy(setting)
    finally:
        setting.bao.unseal()
    assert done.code == 1 and "sealed" in done.err, done


def test_openbao_permission_denied_ends_with_1(setting: Setting, before: dict[str, str]) -> None:
    """A token that may do nothing: the path and what it would need are named."""
    token = setting.bao.api("POST", "auth/token/create", {"policies": ["default"]})["auth"]["client_token"]
    done = deploy(setting, environ={"BAO_TOKEN": token})
    assert done.code == 1 and "permission" in done.err.lower() and token not in done.err, done


def test_openbao_that_lets_read_but_not_write_takes_everything_back(setting: Setting, before: dict[str, str]) -> None:
    """The write is refused in the middle: what Forgejo had registered is deleted again."""
    policy = (
        'path "secret/*" { capabilities = ["read", "list"] }\n'
        'path "sys/policies/acl/*" { capabilities = ["read", "list", "create", "update", "delete"] }\n'
        'path "auth/approle/*" { capabilities = ["read", "list", "create", "update", "delete"] }\n'
        'path "sys/*" { capabilities = ["read", "list"] }'
    )
    setting.bao.api("PUT", "sys/policies/acl/reader", {"policy": policy})
    try:
        token = setting.bao.api("POST", "auth/token/create", {"policies": ["reader"]})["auth"]["client_token"]
        done = deploy_with(setting, _newer_module, environ={"BAO_TOKEN": token})
        assert done.code == 1 and "deleted the registration" in done.err, done
    finally:
        setting.bao.api("DELETE", "sys/policies/acl/reader")


def _newer_module(document: Any) -> None:
    runner = host(document)["runners"]["actions2"]
    runner["module"] = "forgejo-runner"
    for key in ("scope", "accept_wider_scope"):
        runner.pop(key)
    runner["cache"].pop("dir", None)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, b'{"message":"user does not exist [uid: 0, name: ]","url":"x"}'),
        (403, b'{"message":"token does not have at least one of required scope(s): [write:repository]","url":"x"}'),
        (404, b'{"message":"GetRepoByName: not found","url":"x","errors":null}'),
        (422, b'{"message":"[Name]: Required","url":"x"}'),
        (500, b"<html>oops</html>"),
        (503, b""),
    ],
)
def test_forgejo_refusing_the_second_registration_deletes_the_first(
    setting: Setting, before: dict[str, str], status: int, body: bytes
) -> None:
    """With one connection per repository the second POST fails: exit 1, and no registration is left over."""
    setting.forge.fault(r".*/torjus/nixos-exporter/actions/runners$", method="POST", status=status, body=body, times=9)
    done = deploy_with(setting, _newer_module)
    assert done.code == 1 and "Forgejo" in done.err, done


def test_forgejo_that_does_not_answer_ends_with_1_in_time(setting: Setting, before: dict[str, str]) -> None:
    """A server that keeps the connection and says nothing: the time-out is ours, not the kernel's."""

    def change(document: Any) -> None:
        document["forge"]["timeout"] = 1

    setting.forge.fault(r".*/version$", delay=8.0, times=9)
    done = deploy_with(setting, change)
    assert done.code == 1 and "Forgejo" in done.err, done


def test_a_wrong_forgejo_token_is_not_echoed(setting: Setting, before: dict[str, str]) -> None:
    """Forgejo 15 echoes a bad token in its 401: it must not reach the terminal."""
    bad = "0123456789abcdef0123456789abcdef01234567"
    done = deploy(setting, environ={"FORGEJO_TOKEN": bad})
    assert done.code == 1 and bad not in done.err + done.out, done


def test_a_wider_scope_that_nobody_accepted_ends_with_2_and_names_the_others(
    setting: Setting, before: dict[str, str]
) -> None:
    """The registration would admit torjus/dotfiles too."""
    done = deploy_with(setting, lambda d: host(d)["runners"]["actions2"].update(accept_wider_scope=False))
    assert done.code == 2 and "torjus/dotfiles" in done.err, done


def test_a_toplevel_that_does_not_build_ends_with_1_and_shows_the_end_of_its_log(
    setting: Setting, before: dict[str, str]
) -> None:
    """A derivation that says why and fails: its last lines are shown."""
    nix = (
        'environment.etc."broken".source = derivation { name = "broken"; system = pkgs.bash.system; '
        'builder = "/bin/sh"; args = [ "-c" "echo the-reason-of-it >&2; exit 1" ]; };'
    )
    setting.repo.configure("nix-cache02", nix)
    try:
        done = deploy(setting)
        assert done.code == 1 and "the-reason-of-it" in done.err, done
    finally:
        setting.repo.configure("nix-cache02", "")


def test_a_configuration_that_does_not_evaluate_ends_with_1_and_says_where(
    setting: Setting, before: dict[str, str]
) -> None:
    """An option that does not exist."""
    setting.repo.configure("nix-cache02", "services.no-such-thing.enable = true;")
    try:
        done = deploy(setting)
        assert done.code in (1, 2) and "no-such-thing" in done.err, done
    finally:
        setting.repo.configure("nix-cache02", "")


def test_a_full_disk_on_the_host_ends_with_1_and_takes_everything_back(
    setting: Setting, before: dict[str, str]
) -> None:
    """The closure does not fit: the registration, the secret and the files are taken back."""
    nix = (
        'environment.etc."large".source = derivation { name = "large"; system = pkgs.bash.system; '
        'builder = "/bin/sh"; PATH = "/opt/lab/tools:/usr/bin:/bin"; '
        'args = [ "-c" "head -c 300000000 /dev/urandom >$out" ]; };'
    )
    setting.repo.configure("nix-cache02", nix)
    setting.host.exec(
        "sh", "-c", "df --output=avail -k / | tail -n 1 | { read n; fallocate -l $((n - 120000))k /filler; }"
    )
    try:
        done = deploy(setting)
        assert done.code == 1 and ("disk" in done.err.lower() or "space" in done.err.lower()), done
    finally:
        setting.host.exec("rm", "-f", "/filler")
        setting.repo.configure("nix-cache02", "")


def test_a_template_with_an_undefined_name_ends_with_2_and_says_where(
    setting: Setting, before: dict[str, str], tmp_path: Path
) -> None:
    """The operator's own template takes the place of a shipped one and asks for something that is not there."""
    shipped = (Path(__file__).parents[2] / "templates/workflow.yml.j2").read_text()
    (tmp_path / "workflow.yml.j2").write_text(shipped + "x: {{ no_such_name }}\n")
    done = deploy(setting, "--templates", str(tmp_path))
    line = len(shipped.splitlines()) + 1
    assert done.code == 2 and "no_such_name" in done.err and f"workflow.yml.j2:{line}" in done.err, done


def test_an_entry_written_by_somebody_else_in_the_meantime_is_not_lost(
    setting: Setting, before: dict[str, str]
) -> None:
    """While Forgejo takes its time, another writes the KV entry: exit 1, theirs stands, ours is taken back."""
    path = "secret/data/hosts/nix-cache02/forgejo-runner-token-native"
    setting.forge.fault(r".*/user/actions/runners/registration-token$", delay=3.0)
    process = setting.start("deploy-runner", "--yes")
    end = time.monotonic() + 30
    # The lease is taken right before the first credential is asked for.
    while setting.host.exec("test", "-e", "/run/nixops/lease", check=False).returncode:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    setting.bao.api("POST", path, {"data": {"token": "theirs-and-not-ours"}})
    _, err = process.communicate(timeout=60)
    kept = setting.bao.api("GET", path)["data"]
    setting.bao.api("POST", path.replace("/data/", "/destroy/"), {"versions": [kept["metadata"]["version"]]})
    assert process.returncode == 1 and kept["data"] == {"token": "theirs-and-not-ours"}, err
    assert "version" in err and "Traceback" not in err, err


def test_nobody_to_ask_ends_with_2(setting: Setting, before: dict[str, str]) -> None:
    """Without --yes and without a terminal."""
    done = setting.invoke("deploy-runner")
    assert done.code == 2 and "--yes" in done.err, done


def test_the_json_document_says_what_failed(setting: Setting, before: dict[str, str]) -> None:
    """stdout holds one JSON document, also for a failure; progress is elsewhere."""
    setting.forge.fault(r".*/version$", status=503, times=9)
    done = deploy(setting, "--format", "json")
    assert done.code == 1
    document = done.document
    assert document["schema"] == "nixops/deploy/1" and document["outcome"] == "failed"
    assert "Forgejo" in document["hosts"][0]["error"]


def test_a_plan_as_json_names_secrets_by_path_and_version_only(setting: Setting, before: dict[str, str]) -> None:
    """The plan's document has what the issue of a plan is: files, secrets, closure, checks; and no value."""
    done = setting.invoke("deploy-runner", "--plan", "--format", "json")
    assert done.code == 0, done
    plan = done.document["hosts"][0]["plan"]
    assert plan["changes"] and plan["secrets"][0]["to_version"] == plan["secrets"][0]["version"] + 1
    assert plan["wider_scope"] == ["torjus/dotfiles"]
    assert plan["checks"] and plan["closure"]["lines"] and {f["status"] for f in plan["files"]} == {"new"}
