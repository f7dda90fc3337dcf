"""`invoke deploy-runner` on a host as awkward as the field's: a login with sudo, no trusted user, no tools in /bin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nixops.lab.lab import HostSpec
from nixops.lab.setting import TRUSTED, Setting
from tests.lab.deploying import (
    HOST,
    NAME,
    call,
    change,
    deploy,
    deployed,
    host_file,
    is_unchanged,
    runs_a_job,
    setting_for,
    the_host,
)
from tests.lab.reaching import wait_for

UNIT = "gitea-runner-actions2.service"
SECRET = "/run/secrets/forgejo-runner-token-native"


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """A host with the runner deployed through sudo and its password; every test leaves it so."""
    hosts = [HostSpec(HOST, "awkward")]
    with setting_for(tmp_path_factory.mktemp("awkward"), "awkward", hosts=hosts) as made:
        yield made


@pytest.fixture
def ready(setting: Setting) -> Iterator[Setting]:
    """The setting with the runner deployed, also where a test is run alone."""
    if setting.running() == setting.base[HOST]:
        deployed(setting)
    yield setting
    setting.host.sudo_mode("password")
    setting.repo.configure(HOST, "")


def note(setting: Setting, text: str) -> None:
    """A harmless change of the host's configuration."""
    setting.repo.configure(HOST, f'environment.etc."note".text = "{text}";')


def refusals(setting: Setting) -> int:
    """How often sudo's PAM has refused a password, by the host's own journal."""
    said = setting.host.exec("journalctl", "--quiet", "--output=cat", "_COMM=sudo", "_COMM=unix_chkpwd").stdout.decode()
    return said.count("authentication failure;")


def test_a_deploy_through_sudo_with_a_password_holds_and_a_second_one_changes_nothing(setting: Setting) -> None:
    """Proves the whole way for a login that Nix does not trust and that has to give a password for root."""
    assert setting.host.user == "admin" and setting.running() == setting.base[HOST]
    deployed(setting)
    runs_a_job(setting, TRUSTED[0])
    done = call(setting, "verify-runner")
    assert done.code == 0 and "FAILED" not in done.out, done
    is_unchanged(setting)
    assert refusals(setting) == 0


def test_where_sudo_asks_for_no_password_none_is_given_to_anybody(ready: Setting) -> None:
    """NOPASSWD: the inventory still has the password, and it must not become the first line of a script."""
    ready.host.sudo_mode("nopasswd")
    is_unchanged(ready)
    note(ready, "without a password")
    deployed(ready)
    assert host_file(ready, "/etc/note") == "without a password"


def test_a_unit_that_fails_is_rolled_back(ready: Setting) -> None:
    """Exit 4, and everything is as it was: host, boot default, Forgejo, OpenBao, AppRole files."""
    before = ready.snapshot()
    ready.repo.configure(HOST, "lab.failingUnit = true;")
    done = deploy(ready)
    assert done.code == 4 and "this unit fails on purpose" in done.err, done
    ready.repo.configure(HOST, "")
    assert ready.snapshot() == before
    assert call(ready, "verify-runner").code == 0


def test_the_toplevel_is_built_on_the_target(ready: Setting) -> None:
    """Its daemon does not trust the login and has no experimental features; what is built there needs no copy."""
    change(ready, lambda d: the_host(d).update(deploy={"build": "target"}))
    note(ready, "built on the target")
    try:
        result = deployed(ready)
        assert any("(target)" in step["name"] for step in result["steps"])
        assert host_file(ready, "/etc/note") == "built on the target"
    finally:
        change(ready, lambda d: the_host(d).pop("deploy"))


def test_a_power_cycle_boots_the_generation_that_was_committed(ready: Setting) -> None:
    """The loader's default is followed for real: the runner is up again, with secrets that were fetched again."""
    note(ready, "before the power cycle")
    running = deployed(ready)["to"]
    boot, secret = ready.host.boot_id(), host_file(ready, SECRET)
    ready.host.power_off()
    ready.host.power_on()
    ready.host.wait_ready()
    assert ready.host.boot_id() != boot
    booted = ready.host.exec("readlink", "-f", "/run/booted-system").stdout.decode().strip()
    assert booted == running == ready.running() == ready.boot_default()
    assert host_file(ready, "/etc/note") == "before the power cycle"
    wait_for(
        lambda: ready.host.exec("systemctl", "is-active", UNIT, check=False).stdout == b"active\n",
        30,
        "the runner is active again",
    )
    # /run is empty after a boot: the agent has logged in with the AppRole on the disk.
    assert host_file(ready, SECRET) == secret != ""
    (runner,) = [r for r in ready.forge.runners if r.name == NAME]
    runs_a_job(ready, TRUSTED[0])
    assert runner.uuid in {r.uuid for r in ready.forge.runners}
    is_unchanged(ready)


def test_a_wrong_sudo_password_ends_with_3_after_one_try(ready: Setting) -> None:
    """A second try, or a third, would lock accounts; and the password is shown nowhere."""
    wrong = "not-The-passw0rd"
    password = the_password(ready)
    change(ready, lambda d: the_host(d).update(sudo_password={"env": "OPERATORS_SUDO"}))
    before, tried = ready.snapshot(), refusals(ready)
    try:
        done = deploy(ready, environ={"OPERATORS_SUDO": wrong})
        assert done.code == 3 and "sudo did not take the password" in done.err and wrong not in done.err, done
        assert ready.snapshot() == before and refusals(ready) == tried + 1
    finally:
        change(ready, lambda d: the_host(d).update(sudo_password=password))


def the_password(setting: Setting) -> object:
    found: list[object] = []
    change(setting, lambda d: found.append(the_host(d)["sudo_password"]))
    return found[0]
