"""The lab itself: that its hosts are what the other tests take them for, and that nothing of it stays behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nixops.errors import CommandFailed, CommandTimeout, HostFault, NixopsError, Unreachable, UsageError
from nixops.lab import recipe, state
from nixops.lab.lab import HostSpec, Lab, LabHost, describe

LabFactory = Callable[..., Lab]


def login(
    host: LabHost, tmp: Path, command: str, *, user: str | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Log in the way an operator does: by key, with the host's key pinned."""
    known_hosts = tmp / "known_hosts"
    known_hosts.write_text(f"{host.address} {host.host_key}\n")
    options = ["BatchMode=yes", "StrictHostKeyChecking=yes", f"UserKnownHostsFile={known_hosts}", "IdentitiesOnly=yes"]
    return subprocess.run(
        [
            *("ssh", "-F", "/dev/null", "-i", str(host.identity_file)),
            *(word for option in options for word in ("-o", option)),
            *(f"{user or host.user}@{host.address}", command),
        ],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


def text(host: LabHost, *argv: str) -> str:
    return host.exec(*argv).stdout.decode().strip()


@pytest.mark.parametrize("name", ["nix-cache02", "gunter"])
def test_a_host_runs_its_own_systemd_and_lets_the_operator_in_by_key(lab: Lab, tmp_path: Path, name: str) -> None:
    """Proves that either shape boots without a failed unit and can be logged in to with a pinned host key."""
    host = lab.hosts[name]
    assert text(host, "systemctl", "is-system-running", "--wait") == "running"
    done = login(host, tmp_path, "id -un; uname -n; cat /proc/1/comm")
    assert done.stdout.split() == [host.user, host.name, "systemd"], done.stderr


@pytest.mark.parametrize("name", ["nix-cache02", "gunter"])
def test_the_tools_are_in_the_tools_directory_and_in_the_running_system(lab: Lab, tmp_path: Path, name: str) -> None:
    """Proves that every program the lab's packages link to is there, on both shapes, and runs for the login."""
    host = lab.hosts[name]
    tools = ("bash", "curl", "gawk", "git", "sed", "node", "wget", "nix", "systemctl", "python3", "sudo", "bao")
    for directory in ("/opt/lab/tools", "/run/current-system/sw/bin"):
        found = login(host, tmp_path, " && ".join(f"test -x {directory}/{tool}" for tool in tools))
        assert found.returncode == 0, (directory, found.stderr)
    versions = " && ".join(f"/opt/lab/tools/{tool} --version" for tool in tools if tool not in ("sudo",))
    done = login(host, tmp_path, versions)
    assert done.returncode == 0, done.stderr
    assert "OpenBao v" in done.stdout and "nix (Nix) 2.26" in done.stdout


def test_an_awkward_host_has_no_tools_where_they_usually_are(awkward: LabHost, tmp_path: Path) -> None:
    """Proves that the guard cannot lean on /usr/bin: only sh and env, also for root and for a transient unit."""
    assert text(awkward, "ls", "/usr/bin").split() == ["env", "sh"]
    assert text(awkward, "ls", "/bin/").split() == ["env", "sh"]
    assert text(awkward, "ls", "/usr/sbin").split() == ["unix_chkpwd"]
    done = login(awkward, tmp_path, "echo $PATH")
    assert done.stdout.strip() == "/run/wrappers/bin:/run/current-system/sw/bin"
    unit = awkward.exec("systemd-run", "--wait", "--pipe", "--quiet", "/bin/sh", "-c", "ls /; mktemp", check=False)
    assert unit.returncode == 127
    assert b"ls: not found" in unit.stderr and b"mktemp: not found" in unit.stderr


def test_an_awkward_host_refuses_root_and_gives_sudo_its_two_modes(awkward: LabHost, tmp_path: Path) -> None:
    """Proves that the login must go through sudo, with its password on stdin or without one."""
    refused = login(awkward, tmp_path, "true", user="root")
    assert refused.returncode == 255 and "Permission denied" in refused.stderr

    awkward.sudo_mode("password")
    assert login(awkward, tmp_path, "sudo -n true").returncode == 1
    wrong = login(awkward, tmp_path, "sudo -k -S -p '' id -u", stdin="not the password\n")
    assert wrong.returncode == 1 and wrong.stdout == ""
    right = login(awkward, tmp_path, "sudo -k -S -p '' id -u", stdin=recipe.sudo_password() + "\n")
    assert right.stdout == "0\n", right.stderr

    awkward.sudo_mode("nopasswd")
    try:
        assert login(awkward, tmp_path, "sudo -n id -u").stdout == "0\n"
    finally:
        awkward.sudo_mode("password")
    assert login(awkward, tmp_path, "sudo -n true").returncode == 1


def test_a_plain_host_has_no_sudo_mode(plain: LabHost) -> None:
    """Proves that a test cannot believe it has taken a right away that the login, root, never loses."""
    with pytest.raises(NixopsError, match="no sudo mode"):
        plain.sudo_mode("password")


def test_the_awkward_login_is_no_trusted_user_and_has_no_experimental_features(
    plain: LabHost, awkward: LabHost, tmp_path: Path
) -> None:
    """Proves that unsigned paths are refused from the login though not from root, and that the new command line must
    be asked for."""
    assert "disabled" in login(awkward, tmp_path, "nix eval --expr 1").stderr
    done = login(awkward, tmp_path, "nix --extra-experimental-features nix-command store info --json")
    assert json.loads(done.stdout)["trusted"] == 0
    expression = (
        'derivation { name = "t"; system = builtins.currentSystem; builder = "/bin/sh"; args = ["-c" "echo >$out"]; }'
    )
    path = plain.exec("nix-build", "--no-out-link", "-E", expression).stdout.decode().strip()
    unsigned = tmp_path / "export"
    unsigned.write_bytes(plain.exec("nix-store", "--export", path).stdout)
    (awkward.root / "home/admin/export").write_bytes(unsigned.read_bytes())
    refused = login(awkward, tmp_path, "nix-store --import <export")
    assert refused.returncode != 0
    assert "lacks a signature by a trusted key" in refused.stderr
    awkward.sudo_mode("nopasswd")
    try:
        assert login(awkward, tmp_path, "sudo nix-store --import <export").stdout.strip() == path
    finally:
        awkward.sudo_mode("password")


@pytest.mark.parametrize("name", ["nix-cache02", "gunter"])
def test_a_dynamic_user_keeps_state_reads_its_credential_and_builds_through_the_daemon(lab: Lab, name: str) -> None:
    """Proves that the unit features a runner stands on are real here: none of them is a stand-in."""
    host = lab.hosts[name]
    host.exec("sh", "-c", "umask 077; echo s3cret >/root/credential")
    script = """
        set -e
        export HOME=$STATE_DIRECTORY
        cd "$STATE_DIRECTORY"
        id -un; cat "$CREDENTIALS_DIRECTORY/token"
        echo 'derivation { name = "built"; system = builtins.currentSystem; builder = "/bin/sh";
                           args = [ "-c" "echo made by the daemon >$out" ]; }' >x.nix
        cat "$(nix-build --no-out-link x.nix)"
        cat /root/credential 2>/dev/null || echo credential closed
    """
    properties = (
        "DynamicUser=yes",
        "User=gitea-runner",
        "StateDirectory=gitea-runner",
        "LoadCredential=token:/root/credential",
        "Environment=PATH=/opt/lab/tools",
    )
    done = host.exec(
        *("systemd-run", "--wait", "--pipe", "--quiet"),
        *(word for setting in properties for word in ("-p", setting)),
        *("/bin/sh", "-c", script),
    )
    assert done.stdout.decode().split("\n") == [
        "gitea-runner",
        "s3cret",
        "made by the daemon",
        "credential closed",
        "",
    ]
    assert host.exec("test", "-e", "/var/lib/private/gitea-runner/x.nix").returncode == 0


def test_two_hosts_do_not_share_their_units(lab: Lab, plain: LabHost) -> None:
    """Proves that stopping a unit on one host leaves the same unit of another alone: each has its control group."""
    other = lab.hosts["builder01"]
    before = text(other, "systemctl", "show", "-p", "MainPID", "--value", "nix-daemon")
    plain.exec("systemctl", "stop", "nix-daemon.socket", "nix-daemon")
    try:
        assert text(other, "systemctl", "show", "-p", "MainPID", "--value", "nix-daemon") == before
        assert other.exec("kill", "-0", before).returncode == 0
    finally:
        plain.exec("systemctl", "start", "nix-daemon.socket", "nix-daemon")


def test_hosts_reach_each_other_and_the_operator_but_nothing_else(lab: Lab, plain: LabHost) -> None:
    """Proves that servers on the operator's side serve the lab's hosts, and that no traffic leaves the machine."""
    probe = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3).close()"
    with socket.create_server((lab.gateway, 0)) as server:
        port = str(server.getsockname()[1])
        assert plain.exec("python3", "-c", probe, "operator", port).returncode == 0
    assert plain.exec("python3", "-c", probe, "builder01", "22").returncode == 0
    outside = plain.exec("python3", "-c", probe, "192.0.2.1", "80", check=False)
    assert b"Network is unreachable" in outside.stderr


def test_power_loss_ends_every_process_keeps_the_disk_and_boots_anew(lab_factory: LabFactory, tmp_path: Path) -> None:
    """Proves that a power cycle is one: no process survives, /run is fresh, the disk is as it was, the boot id new."""
    lab = lab_factory(HostSpec("phoenix"))
    host = lab.hosts["phoenix"]
    kept = ("/var/lib/kept", "/etc/kept", "/nix/var/kept", "/boot/loader/kept")
    for path in (*kept, "/run/lost"):
        host.exec("touch", path)
    host.exec("systemd-run", "--unit=lingering", "sleep", "1000")
    before = host.boot_id()
    inits = state.host_group(lab.name, host.name).pids()
    host.power_off()
    assert not host.running
    assert not [pid for pid in inits if Path(f"/proc/{pid}/root").exists() and _inside(pid, host.root)]
    with pytest.raises(HostFault, match="is off"):
        host.boot_id()
    with pytest.raises(Unreachable):
        host.wait_ready(0.5)

    host.power_on()
    host.wait_ready()
    assert host.boot_id() != before
    for path in kept:
        assert host.exec("test", "-e", path, check=False).returncode == 0, path
    assert host.exec("test", "-e", "/run/lost", check=False).returncode == 1
    assert host.exec("systemctl", "is-active", "lingering", check=False).stdout == b"inactive\n"
    assert login(host, tmp_path, "true").returncode == 0
    with pytest.raises(HostFault, match="running already"):
        host.power_on()

    second = host.boot_id()
    host.exec("systemctl", "reboot", check=False)
    deadline = time.monotonic() + 30
    while _boot_id_now(host) in (None, second) and time.monotonic() < deadline:
        time.sleep(0.1)
    host.wait_ready()
    assert host.boot_id() not in (before, second), "a reboot from inside is a new boot too"
    lab.down()


def _boot_id_now(host: LabHost) -> str | None:
    """None while it goes down: its first process may end between being found and being entered."""
    try:
        return host.boot_id()
    except (HostFault, CommandFailed):
        return None


def _inside(pid: int, root: Path) -> bool:
    try:
        return Path(f"/proc/{pid}/root").samefile(root)
    except OSError:
        return False


def test_a_host_boots_what_its_loader_says(lab_factory: LabFactory) -> None:
    """Proves that a power cycle really boots the loader's default, and that its init has run before sshd answers."""
    lab = lab_factory(HostSpec("loader", "awkward"))
    host = lab.hosts["loader"]
    assert text(host, "readlink", "/run/booted-system", "/run/current-system").split() == ["/opt/lab/bootstrap"] * 2

    def generation(number: int) -> None:
        system = host.root / f"opt/lab/generation-{number}"
        system.mkdir()
        (system / "sw").symlink_to("/opt/lab/bootstrap/sw")
        init = system / "init"
        init.write_text(f"#!/bin/sh\nsleep=/opt/lab/tools/sleep; $sleep 1; echo {number} >/run/activated\n")
        init.chmod(0o755)
        entry = host.root / f"boot/loader/entries/nixos-generation-{number}.conf"
        entry.write_text(f"title NixOS\noptions init=/opt/lab/generation-{number}/init loglevel=4\n")

    def boot(default: str) -> str:
        (host.root / "boot/loader/loader.conf").write_text(f"timeout 5\ndefault {default}\nconsole-mode keep\n")
        host.power_off()
        host.power_on()
        host.wait_ready()
        return text(host, "readlink", "/run/booted-system")

    generation(9)
    generation(10)
    assert boot("nixos-generation-9.conf") == "/opt/lab/generation-9"
    assert text(host, "cat", "/run/activated") == "9"
    assert boot("nixos-generation-77.conf") == "/opt/lab/generation-10", "without its entry, the newest is booted"
    (host.root / "opt/lab/generation-10/init").write_text("#!/bin/sh\nexit 3\n")
    assert boot("nixos-generation-10.conf") == "/opt/lab/generation-10"
    assert text(host, "systemctl", "is-failed", "nixops-lab-boot.service") == "failed", "an init that fails is seen"

    (host.root / "opt/lab/generation-10/init").unlink()
    host.power_off()
    host.power_on()
    with pytest.raises(Unreachable, match="did not answer"):
        host.wait_ready(3)  # a default that is not there does not boot
    assert host.running
    lab.down()


def test_a_partition_cuts_the_host_off_and_heals(plain: LabHost, tmp_path: Path) -> None:
    """Proves that a cut cable is silence, not a refusal, and that what ran on the host goes on."""
    boot = plain.boot_id()
    plain.partition(True)
    try:
        with pytest.raises(TimeoutError):
            socket.create_connection((plain.address, 22), timeout=1.5)
        assert plain.boot_id() == boot
    finally:
        plain.partition(False)
    plain.wait_ready(20)
    assert login(plain, tmp_path, "true").returncode == 0


def test_a_full_disk_is_full(lab_factory: LabFactory) -> None:
    """Proves that a host's disk has the size that was asked for, so that "disk full" can be tried."""
    lab = lab_factory(HostSpec("small", disk_mib=24))
    done = lab.hosts["small"].exec("dd", "if=/dev/zero", "of=/var/big", "bs=1M", "count=64", check=False)
    assert b"No space left on device" in done.stderr
    lab.down()


def test_exec_reports_failures_in_one_line(plain: LabHost) -> None:
    """Proves that a test's preparation that goes wrong says where and how."""
    with pytest.raises(CommandFailed, match=r"sh inside the lab host nix-cache02 failed with exit code 3\n.*oh no"):
        plain.exec("sh", "-c", "echo oh no >&2; exit 3")
    with pytest.raises(CommandTimeout, match=r"ran past its 0\.3 s"):
        plain.exec("sleep", "10", timeout=0.3)
    assert plain.exec("cat", stdin=b"in and out").stdout == b"in and out"


def test_another_process_finds_the_lab_and_sees_the_same(lab: Lab) -> None:
    """Proves that a lab can be used from a process that did not put it up (demo, tasks, several tests at once)."""
    found = Lab.attach(lab.name)
    assert describe(found) == describe(lab)
    assert all(host["running"] for host in describe(found)["hosts"])
    with pytest.raises(UsageError, match="no lab named"):
        Lab.attach("nobodys")


def test_a_lab_in_use_is_not_taken_down_by_another_of_its_name(lab: Lab) -> None:
    """Proves that two runs at once cannot destroy each other's hosts."""
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        Lab.up([HostSpec("x")], name=lab.name)
    assert lab.hosts["gunter"].running
