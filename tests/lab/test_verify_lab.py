"""The checks on real hosts: systemd's own dynamic users, mounts and credentials, a real Nix daemon, real SSH."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from nixops.errors import Unreachable
from nixops.inventory import model
from nixops.lab.host import LabHost
from nixops.lab.lab import HostSpec, Lab
from nixops.lab.recipe import TOOLS, sudo_password
from nixops.secret import Secret
from nixops.transport.ssh import SshRunner
from nixops.values import RunnerName
from nixops.verify.backend import connect
from nixops.verify.model import CheckResult, Patience
from nixops.verify.run import verify_runner
from tests.lab.reaching import target_of, wait_for
from tests.lab.verify_setup import CONNECTIONS, DROP_IN, SETUP, inventory_host

# Tests restart it more often than systemd's start limit would have it.
RESTART_DAEMON = "systemctl reset-failed nix-daemon.service nix-daemon.socket; systemctl restart nix-daemon.service"

pytestmark = pytest.mark.lab


@dataclass(frozen=True)
class Site:
    """A lab host with a runner on it, and the open connection to it."""

    host: LabHost
    transport: SshRunner

    def shell(self, script: str, *args: str) -> str:
        return self.host.exec("sh", "-s", "--", *args, stdin=script.encode(), timeout=120).stdout.decode()

    def logins(self) -> int:
        """How many logins sshd has let in since the host was booted."""
        words = "journalctl --sync; journalctl -q --no-pager -g 'Accepted publickey' | wc -l"
        return int(self.shell(words))

    def make_good(self) -> None:
        self.shell(SETUP, TOOLS)

    def verify(self, transport: SshRunner | None = None, **runner: object) -> dict[str, CheckResult]:
        results = verify_runner(
            transport or self.transport,
            host_name=self.host.name,
            host=inventory_host(self.host.address, **runner),
            runner_name=RunnerName("actions2"),
            forge_url="http://forge.lab:3000",
            patience=Patience(settle=1.0, settle_restarted=6.0, start=15.0, forge=8.0, interval=0.25),
        )
        return {r.name: r for r in results}

    def verify_connections(
        self, forge: Callable[[], tuple[Listed, ...]] | None = None, *, patience: float = 20.0
    ) -> dict[str, CheckResult]:
        """The same for ``actions2`` as an instance of the newer module."""
        runner = inventory_host(
            self.host.address,
            module="forgejo-runner",
            scope=None,
            trusted=["torjus/nixos"],
            limits={},
            token={"path": "hosts/nix-cache02/forgejo-actions2"},
        )
        other = model.UnmanagedRunner(managed=False, module=model.RunnerModule.FORGEJO)
        results = verify_runner(
            self.transport,
            host_name=self.host.name,
            host=runner.model_copy(update={"runners": {**runner.runners, RunnerName("actions1"): other}}),
            runner_name=RunnerName("actions2"),
            forge=forge,
            patience=Patience(settle=1.0, forge=patience, interval=0.25),
        )
        return {r.name: r for r in results}

    def failures(self, **runner: object) -> dict[str, str]:
        return {r.name: r.detail for r in self.verify(None, **runner).values() if not r.ok}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab.up([HostSpec("plain", "plain"), HostSpec("awkward", "awkward")], name=f"verify-{os.getpid()}") as lab:
        yield lab


@pytest.fixture(scope="module")
def site(lab: Lab) -> Iterator[Site]:
    host = lab.hosts["plain"]
    with SshRunner(target_of(host)) as transport:
        site = Site(host, transport)
        site.make_good()
        yield site


def test_a_good_host_passes_every_check(site: Site) -> None:
    """Proves that no check fails without a reason: fourteen of them hold on a host that is as it should be."""
    results = site.verify()
    assert {n: r.detail for n, r in results.items() if not r.ok} == {}
    assert sum(not name.startswith("risk-") for name in results) == 14


def test_all_checks_share_the_connection_that_is_open(site: Site) -> None:
    """Proves that checks need no login of their own, where one ssh process each would take long."""
    site.verify()
    before = site.logins()
    begin = time.monotonic()
    assert not site.failures()
    assert time.monotonic() - begin < 8  # the machine may be busy; alone it takes about 0.5 s
    assert site.logins() == before > 0


def test_nothing_is_left_on_the_host(site: Site) -> None:
    """Proves that a run of the checks leaves no unit, no file in other instances' state and no store path."""
    before = site.shell("ls /nix/store; ls -aR /var/lib/private /run/secrets; cat /var/lib/vault/approle/*")
    assert not site.failures()
    assert site.shell("ls /nix/store; ls -aR /var/lib/private /run/secrets; cat /var/lib/vault/approle/*") == before
    left = "systemctl list-units --all --no-legend 'nixops-verify-*'"
    wait_for(lambda: site.shell(left) == "", 20, "systemd has let go of the unit of the trials")


# What is done to the host, and exactly which checks must notice, each with a word of what it must say.
FILES = {
    "a secret that anybody may read": (
        "chmod 0444 /run/secrets/deep/backup",
        {"secrets-unreadable": "/run/secrets/deep/backup (read)"},
    ),
    "an open cache signing key": (
        "chmod 0644 /run/secrets/cache-secret",
        {"cache-key-unreadable": "cache-secret (read)", "secrets-unreadable": "cache-secret (read)"},
    ),
    "an open token file": (
        "chmod 0444 /run/secrets/runner-token",
        {"secret-files": "0444 root:root", "secrets-unreadable": "runner-token (read)"},
    ),
    "a token file that everybody may write": (
        "chmod 0602 /run/secrets/runner-token",
        {"secret-files": "0602 root:root"},
    ),
    "a token without its prefix": (
        "printf '0123456789abcdef' > /run/secrets/runner-token",
        {"secret-files": "another format"},
    ),
    "a token the agent left empty": (
        "printf 'TOKEN=<no value>\\n' > /run/secrets/runner-token",
        {"secret-files": "another format"},
    ),
    "a secret of somebody else": (
        "chown 1000:1000 /run/secrets/runner-token",
        {"secret-files": "0400"},
    ),
    "an AppRole directory that others may enter": (
        "chmod 0711 /var/lib/vault/approle",
        {"approle-closed": "/var/lib/vault/approle 0711"},
    ),
    "a world-readable AppRole": (
        "chmod 0755 /var/lib/vault/approle; chmod 0444 /var/lib/vault/approle/secret-id",
        {"approle-closed": "secret-id 0444"},
    ),
    "no AppRole": ("rm -r /var/lib/vault", {"approle-closed": "no directory"}),
    "a registration under another name": (
        "sed -i 's/nix-cache02-native/old-name/' /var/lib/private/gitea-runner-actions2/actions2/.runner",
        {"registered": "one as old-name"},
    ),
    "no registration": (
        "rm /var/lib/private/gitea-runner-actions2/actions2/.runner",
        {"registered": "none beside the running daemon"},
    ),
    "a protected file that is missing": (
        "rm /run/secrets/cache-secret",
        {"cache-key-unreadable": "no /run/secrets/cache-secret"},
    ),
    "an account of the dynamic user's name": (
        "echo 'gitea-runner-actions2:x:70000:70000::/:/bin/false' >> /etc/passwd",
        {"dynamic-user": "/etc/passwd"},
    ),
    "the runner's user in docker's group": (
        "echo 'docker:x:70001:gitea-runner-actions2' >> /etc/group",
        {"root-groups": "docker"},
    ),
}


@pytest.fixture
def mended(site: Site) -> Iterator[Site]:
    """The host, put right again after the test."""
    site.shell("cp -a /etc/passwd /etc/group /etc/nix/nix.conf /root/")
    yield site
    site.shell(
        "cat /root/passwd > /etc/passwd; cat /root/group > /etc/group; cat /root/nix.conf > /etc/nix/nix.conf;"
        "chmod 1775 /nix/store;" + RESTART_DAEMON
    )
    site.make_good()


# For what is broken in files alone, no unit has to be started again.
KEEP_FILES = """\
set -e
rm -rf /root/whole
mkdir /root/whole
cp -a /etc/passwd /etc/group /run/secrets /var/lib/vault "$1/.runner" /root/whole
"""
PUT_BACK = """\
set -e
cd /root/whole
cat passwd > /etc/passwd
cat group > /etc/group
rm -rf /run/secrets /var/lib/vault
cp -a secrets /run
cp -a vault /var/lib
cp -a .runner "$1"
"""
STATE = "/var/lib/private/gitea-runner-actions2/actions2"


@pytest.fixture
def files(site: Site) -> Iterator[Site]:
    """The host, its files put back after the test."""
    site.shell(KEEP_FILES, STATE)
    yield site
    site.shell(PUT_BACK, STATE)


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_not_as_it_should_be_is_found(files: Site, what: str) -> None:
    """Proves that exactly the checks whose subject was broken fail, and say what they found."""
    script, expected = FILES[what]
    files.shell("set -e; " + script)
    _assert_found(files.failures(), expected)


UNITS = {
    "a crash loop that is active for a moment": (
        "ExecStart=\nExecStart=/bin/sh -c 'cd /var/lib/gitea-runner/actions2; sleep 1; exit 1'\nRestart=always",
        {"unit-active": "journalctl"},
    ),
    "a memory limit that is not set": ("MemoryMax=infinity", {"limits-in-force": "MemoryMax=infinity"}),
    "another CPU quota": ("CPUQuota=100%", {"limits-in-force": "CPUQuota=1s"}),
    "a package that is not on the PATH": (
        "Environment=PATH=/opt/verify/bin",
        {"host-packages": "no sign of nodejs (node);"},
    ),
    "all instances with one user and one state directory": (
        "User=gitea-runner\nStateDirectory=\nStateDirectory=gitea-runner\nBindPaths=\nTemporaryFileSystem=",
        {"instances-separate": "gitea-runner/actions1/.runner (read)"},
    ),
    "capabilities that pass over file modes": (
        "AmbientCapabilities=CAP_DAC_READ_SEARCH",
        {
            "cache-key-unreadable": "cache-secret (read)",
            "secrets-unreadable": "deep/backup (read)",
            "instances-separate": "/run/secrets/actions1-token (read)",
        },
    ),
    "a static user": (
        "DynamicUser=no\nUser=nobody\nStateDirectory=\nStateDirectory=static-runner\nBindPaths=\n"
        "BindPaths=/var/lib/static-runner:/var/lib/gitea-runner",
        {"dynamic-user": "DynamicUser=no"},
    ),
    "docker's group by SupplementaryGroups": ("SupplementaryGroups=docker", {"root-groups": "docker"}),
}


@pytest.mark.parametrize("what", UNITS)
def test_a_unit_that_is_not_as_it_should_be_is_found(mended: Site, what: str) -> None:
    """Proves the same of the unit: what a changed property opens is found by trying, as the unit's own user."""
    drop_in, expected = UNITS[what]
    mended.shell("grep -q ^docker: /etc/group || echo 'docker:x:70001:' >> /etc/group")
    mended.shell(DROP_IN, drop_in)
    looping = what.startswith("a crash loop")
    if looping:
        # Until its first end it is a process like another.
        restarts = ("systemctl", "show", "-P", "NRestarts", "gitea-runner-actions2.service")
        wait_for(lambda: mended.host.exec(*restarts).stdout.strip() != b"0", 60, "it was started again")
    failures = mended.failures()
    if looping:
        # Its process comes and goes under the other checks too; what counts is that it does not pass as active.
        failures = {k: v for k, v in failures.items() if k == "unit-active"}
    _assert_found(failures, expected)


def test_a_runner_that_is_yet_to_start_is_waited_for(mended: Site) -> None:
    """Proves that systemd's own queue counts: after a boot the runner's start waits for what comes before it."""
    mended.shell(
        "systemctl stop gitea-runner-actions2.service; mkdir -p /etc/systemd/system/gitea-runner-actions2.service.d;"
        "printf '[Service]\nType=oneshot\nExecStart=/bin/sleep 3\n' > /run/systemd/system/slow.service;"
        "printf '[Unit]\nWants=slow.service\nAfter=slow.service\n'"
        " > /etc/systemd/system/gitea-runner-actions2.service.d/slow.conf;"
        "systemctl daemon-reload; systemctl start --no-block gitea-runner-actions2.service"
    )
    assert mended.shell("systemctl show -P ActiveState gitea-runner-actions2.service") == "inactive\n"
    assert mended.failures() == {}
    mended.shell("rm /run/systemd/system/slow.service")


def test_state_shared_with_a_reason_is_an_accepted_risk(mended: Site) -> None:
    """Proves that isolate: false passes with the inventory's reason shown, and with what it opens."""
    mended.shell(DROP_IN, UNITS["all instances with one user and one state directory"][0])
    result = mended.verify(accepted_risks={"shared-state": "one owner"}, isolate=False)["instances-separate"]
    assert result.ok
    assert result.accepted == "one owner"
    assert "/proc/" in result.detail


NIX = {
    "everybody trusted": ("trusted-users = root *", {"nix-trust": "trusted-users names *"}),
    "the runner's user trusted": (
        "trusted-users = root gitea-runner-actions2",
        {"nix-trust": "trusted-users names gitea-runner-actions2"},
    ),
    "the runner's user locked out": (
        "allowed-users = root",
        {"nix-trust": "allowed-users = root", "store-build": "expected a derivation built"},
    ),
}


@pytest.mark.parametrize("what", NIX)
def test_settings_of_the_nix_daemon_are_found(mended: Site, what: str) -> None:
    """Proves that a runner that is root-equivalent through Nix, or cannot use it, is found."""
    line, expected = NIX[what]
    mended.shell(
        'sed -i "/^${1%% *} /d" /etc/nix/nix.conf; echo "$1" >> /etc/nix/nix.conf; ' + RESTART_DAEMON,
        line,
    )
    _assert_found(mended.failures(), expected)


def test_a_daemon_that_still_follows_older_settings_is_found(mended: Site) -> None:
    """Proves that the daemon itself is asked: the file says no, but the daemon was not restarted since it said yes."""
    mended.shell(
        "printf 'trusted-users = root *\\n' >> /etc/nix/nix.conf;" + RESTART_DAEMON + ";"
        # Asked once, so that it has read its settings before they change.
        "NIX_REMOTE=daemon nix --extra-experimental-features nix-command store info;"
        "cat /root/nix.conf > /etc/nix/nix.conf"
    )
    _assert_found(mended.failures(), {"nix-trust": "the daemon trusts it"})


def test_a_store_that_can_be_written_past_the_daemon_is_found(mended: Site) -> None:
    """Proves that the store's protection is tried from inside the unit's own mounts."""
    mended.shell("chmod 1777 /nix/store")
    mended.shell(DROP_IN, "ReadWritePaths=/nix/store")
    _assert_found(mended.failures(), {"store-not-writable": "/nix/store writable"})


def test_a_unit_that_is_not_there_is_told_as_such(mended: Site) -> None:
    """Proves that nothing passes by default where there is nothing to look at."""
    mended.shell(
        "systemctl stop gitea-runner-actions2; rm /etc/systemd/system/gitea-runner-actions2.service;"
        "systemctl daemon-reload"
    )
    failures = mended.failures()
    assert "not-found" in failures["unit-active"]
    assert {"dynamic-user", "host-packages", "secrets-unreadable", "nix-trust", "store-build"} <= set(failures)


def test_credentials_of_another_instance_stay_closed(mended: Site) -> None:
    """Proves that LoadCredential of the neighbour and of the runner itself is no way in, and that both are tried."""
    mended.shell(
        "mkdir -p /etc/systemd/system/gitea-runner-actions1.service.d;"
        "printf '[Service]\\nLoadCredential=token:/run/secrets/deep/backup\\n'"
        " > /etc/systemd/system/gitea-runner-actions1.service.d/credential.conf"
    )
    mended.shell(DROP_IN, "LoadCredential=token:/run/secrets/runner-token")
    mended.shell("systemctl restart gitea-runner-actions1.service")
    assert mended.failures() == {}
    tried = mended.verify()["instances-separate"].detail
    assert int(tried.split(" ")[0]) >= 9


@dataclass(frozen=True)
class Listed:
    """A runner as a forge lists it."""

    id: int = 7
    uuid: str = "22222222-2222-2222-2222-222222222222"
    name: str = "nix-cache02-native"
    status: str = "idle"
    labels: tuple[str, ...] = ("native",)


def test_instances_of_the_newer_module_are_checked_too(mended: Site) -> None:
    """Proves the same of units without User=, with nested state directories and with credentials, and that their
    connections are told by the uuids in the daemon's own configuration."""
    mended.shell(CONNECTIONS)
    results = mended.verify_connections()
    assert {n: r.detail for n, r in results.items() if not r.ok} == {}
    assert results["registered"].detail == "1 connections declared to the forge"
    assert int(results["instances-separate"].detail.split(" ")[0]) >= 5
    assert mended.verify_connections(lambda: (Listed(),))["registered"].ok
    absent = mended.verify_connections(lambda: (Listed(uuid="12222222-2222-2222-2222-222222222222"),), patience=1.0)
    assert "no runner with uuid 22222222" in absent["registered"].detail

    mended.shell("printf '\\n' >> /run/secrets/forgejo-actions2-torjus-nixos")
    failures = {n: r.detail for n, r in mended.verify_connections().items() if not r.ok}
    _assert_found(failures, {"secret-files": "another format"})
    mended.shell("systemctl stop 'forgejo-runner-*'; rm /etc/systemd/system/forgejo-runner-*; systemctl daemon-reload")


@pytest.mark.parametrize("password", [False, True])
def test_a_host_reached_through_sudo_is_checked_as_well(lab: Lab, password: bool) -> None:
    """Proves that the checks need neither a root login nor a tool in /usr/bin, with and without sudo's password."""
    host = lab.hosts["awkward"]
    host.sudo_mode("password" if password else "nopasswd")
    with SshRunner(target_of(host), sudo_password=lambda: Secret(sudo_password())) as transport:
        site = Site(host, transport)
        site.make_good()
        assert site.failures() == {}
        assert connect(transport).run("exit 255").rc == 255
        site.shell("chmod 0444 /run/secrets/deep/backup")
        _assert_found(site.failures(), {"secrets-unreadable": "deep/backup (read)"})


def test_a_lost_host_is_unreachable_and_no_list_of_failures(lab: Lab, site: Site) -> None:
    """Proves that a connection lost between the checks is not mistaken for checks that failed."""
    # A partitioned host does not answer at all; that is waited for.
    with SshRunner(replace(target_of(lab.hosts["plain"]), connect_timeout=2.0)) as transport:
        site.verify(transport)
        transport.close()
        lab.hosts["plain"].partition(True)
        try:
            with pytest.raises(Unreachable):
                site.verify(transport)
        finally:
            lab.hosts["plain"].partition(False)


def _assert_found(failures: dict[str, str], expected: dict[str, str]) -> None:
    assert set(failures) == set(expected), failures
    for name, word in expected.items():
        assert word in failures[name], failures[name]
        assert "averysecrettoken" not in failures[name]
        assert "0123456789abcdef" not in failures[name]
