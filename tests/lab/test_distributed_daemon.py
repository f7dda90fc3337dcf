"""`invoke build --distributed` where a nix daemon builds, which logs in as root and knows nothing of us."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nixops.build.distributed import build_distributed
from nixops.build.machines import Worker, machines_file, store_facts
from nixops.build.model import Probe
from nixops.errors import BuildFailed, HostFault, NoBuilder
from nixops.lab.lab import HostSpec, Lab, LabHost
from nixops.transport.command import Command, LineSink, Result
from nixops.values import AttrPath, FlakeRef
from tests.lab.caching import dead_entry, host_entry, inventory, make_flake, session_of
from tests.lab.reaching import SYSTEM, processes, wait_for

FLAKE = "/var/tmp/operator/flake"


@pytest.fixture(scope="module")
def hosts(lab_factory: Callable[..., Lab]) -> Lab:
    """Two builders, and a machine of an operator who is no root: ``trusted`` may name machines, ``other`` may not.

    The builders' names are no other lab's: this machine's nix counts what it gives a builder by its name, whoever runs.
    """
    made = lab_factory(HostSpec("east"), HostSpec("west"), HostSpec("operator"))
    operator = made.hosts["operator"]
    operator.exec("useradd", "-m", "trusted")
    operator.exec("useradd", "-m", "other")
    script = "sed -i 's/^trusted-users.*/trusted-users = root trusted/' /etc/nix/nix.conf; systemctl restart nix-daemon"
    operator.exec("sh", "-c", script)
    return made


@dataclass(frozen=True)
class Inside:
    """Runs commands on a lab host as one of its users."""

    machine: LabHost
    user: str
    host: str = "localhost"

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        variables = [f"{name}={value}" for name, value in command.env.items()]
        argv = ("runuser", "-u", self.user, "--", "env", f"HOME=/home/{self.user}", *variables, *command.argv)
        done = self.machine.exec(*argv, stdin=command.stdin_bytes, check=False, timeout=120)
        for line in done.stderr.decode().splitlines():
            if on_line is not None:
                on_line(line)
        return Result(command, done.returncode, done.stdout, done.stderr)


@pytest.fixture
def operator(hosts: Lab, monkeypatch: pytest.MonkeyPatch) -> LabHost:
    """The operator's machine, with our private directories in it: under the same names as on this machine."""
    machine = hosts.hosts["operator"]
    here = machine.root / "var/tmp/operator"
    make_flake(here / "flake")
    script = 'mkdir -p "$1" && ln -sfn / "$1/root" && cat >"$2" && chmod 600 "$2"'
    key = hosts.identity_file.read_bytes()
    machine.exec("sh", "-c", script, "sh", machine.root.parent, hosts.identity_file, stdin=key)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(here))
    return machine


def test_a_trusted_user_of_a_newer_nix_builds_through_the_daemon(hosts: Lab, operator: LabHost, tmp_path: Path) -> None:
    """Proves: with Nix 2.26 and its daemon, as a user who is no root: the daemon takes the machines with address, key
    and pinned host key, both builders build, a dead one is left out, and a failed build is told with its log.
    """
    entries = {name: host_entry(hosts.hosts[name], builder={"max_jobs": 1}) for name in ("east", "west")}
    entries["dead"] = dead_entry(hosts, builder={})
    loaded = inventory(tmp_path, entries, build={"probe_timeout": 6.0, "min_free": 0})
    said: list[str] = []
    with session_of(loaded, tmp_path, said) as session:
        session.local = Inside(operator, "trusted")  # type: ignore[assignment]  # a runner for this machine's
        assert store_facts(session.local).worker is Worker.DAEMON
        result = build_distributed(FlakeRef(FLAKE), AttrPath("quick"), session, on_event=said.append)
        built = operator.exec("cat", result.outputs[0].path).stdout.decode().split()
        assert set(built) == {"east", "west"} == set(result.builders)
        assert [out.builder for out in result.left_out] == ["dead"]
        with pytest.raises(BuildFailed, match="exit code 3"):
            build_distributed(FlakeRef(FLAKE), AttrPath("bad"), session)
    assert not list((operator.root / "var/tmp/operator").glob("nixops-*"))


def test_a_host_key_that_is_not_the_pinned_one_is_refused_by_the_daemon_too(
    hosts: Lab, operator: LabHost, tmp_path: Path
) -> None:
    """Proves: the daemon's ssh is told the pinned key: a machine with another is not built on, though our own probe
    was let through here.
    """
    wrong = host_entry(hosts.hosts["east"], builder={})
    loaded = inventory(tmp_path, {"east": wrong}, build={"probe_timeout": 30.0, "min_free": 0})
    with session_of(loaded, tmp_path, []) as session:
        session.local = Inside(operator, "trusted")  # type: ignore[assignment]  # as above
        assert session.pool.probe()[0].usable
        (builder,) = session.builders
        other = hosts.hosts["west"].host_key
        object.__setattr__(builder.target, "host_keys", (other,))
        begin = time.monotonic()
        with pytest.raises(NoBuilder, match="no builder of the pool can be used by the nix daemon") as caught:
            build_distributed(FlakeRef(FLAKE), AttrPath(f"both.{SYSTEM}"), session, timeout=30.0)
        assert "east: the nix daemon cannot connect to it" in str(caught.value)
        assert "logs in as root" in str(caught.value.hint)
        assert time.monotonic() - begin < 30.0
    assert not processes(hosts.hosts["east"], "hostname")


def test_a_user_whom_the_daemon_does_not_trust_is_told_so(hosts: Lab, operator: LabHost, tmp_path: Path) -> None:
    """Proves: exit 1 with what to do, before any builder is asked."""
    loaded = inventory(tmp_path, {"dead": dead_entry(hosts, builder={})})
    with session_of(loaded, tmp_path, []) as session:
        session.local = Inside(operator, "other")  # type: ignore[assignment]  # as above
        with pytest.raises(HostFault, match="does not let this user name the machines") as caught:
            build_distributed(FlakeRef(FLAKE), AttrPath("quick"), session)
    assert "trusted-users" in str(caught.value.hint)


# -- a daemon of this machine's nix -----------------------------------------------------------------------------


def listens(address: str | tuple[str, int]) -> bool:
    """Whether somebody takes connections at a path, or at an address and a port."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as connection:
        connection.settimeout(5)
        return connection.connect_ex(address) == 0


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch, nix_of_the_lab: None) -> Iterator[subprocess.Popen[bytes]]:
    """A nix daemon of this machine's own (2.8 on Debian 12), which our nix then uses."""
    with tempfile.TemporaryDirectory(prefix="nixd-") as directory:
        path = Path(directory, "socket")
        monkeypatch.setenv("NIX_DAEMON_SOCKET_PATH", str(path))
        process = subprocess.Popen(["nix-daemon"], stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: listens(str(path)), 60, "the daemon listens")
            monkeypatch.setenv("NIX_REMOTE", "daemon")
            yield process
        finally:
            process.terminate()
            process.wait(10)


def test_a_key_that_is_a_secret_reaches_the_daemons_ssh_from_memory(
    hosts: Lab, daemon: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves: with the builders' key in a store of secrets only, a daemon's root logs in with it; while it does, the
    key is in no file of the private directories, and afterwards nowhere.
    """
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("HOME", str(tmp_path))
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_bytes(hosts.identity_file.read_bytes())
    entries = {}
    for name in ("east", "west"):
        entries[name] = host_entry(hosts.hosts[name], builder={"max_jobs": 2})
        del entries[name]["ssh"]["identity_file"]
    loaded = inventory(tmp_path, entries, build={"ssh_key": {"file": str(key)}, "probe_timeout": 30.0, "min_free": 0})
    flake = make_flake(tmp_path / "flake")
    seen: list[str] = []

    def look(text: str) -> None:
        if text.startswith("building part-1"):
            seen.extend(file.read_text() for file in runtime.rglob("machines"))
            body = key.read_bytes().splitlines()[2]
            assert not [f for f in runtime.rglob("*") if f.is_file() and body in f.read_bytes()]

    with session_of(loaded, tmp_path, []) as session:
        assert store_facts(session.local).worker is Worker.DAEMON
        result = build_distributed(FlakeRef(str(flake)), AttrPath("quick"), session, on_event=look)
    assert set(Path(result.outputs[0].path).read_text().split()) <= {"east", "west"}
    assert sum(result.builders.values()) == 5
    (machines,) = seen
    used = {line.split()[2] for line in machines.splitlines()}
    assert {name.rpartition("/")[0] for name in used} == {f"/proc/{os.getpid()}/fd"}
    assert not any(Path(name).exists() and "nixops-key" in str(Path(name).readlink()) for name in used)
    assert list(runtime.iterdir()) == []


def test_a_port_that_the_machines_file_cannot_say_is_told(
    hosts: Lab, daemon: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Proves: with a daemon of a Nix before 2.31, a builder on another port is left out with the reason; nix itself,
    which uses our configuration, builds on it.
    """
    east = hosts.hosts["east"]
    east.exec("sh", "-c", "mkdir -p /run/sshd; $(command -v sshd || echo /usr/sbin/sshd) -p 2222")
    # It goes into the background before it listens.
    wait_for(lambda: listens((east.address, 2222)), 60, "sshd listens on the other port")
    entry = host_entry(east, builder={}) | {"port": 2222}
    loaded = inventory(tmp_path, {"east": entry}, build={"probe_timeout": 30.0, "min_free": 0})
    flake = FlakeRef(str(make_flake(tmp_path / "flake")))
    with session_of(loaded, tmp_path, []) as session:
        with pytest.raises(NoBuilder, match="port 2222"):
            build_distributed(flake, AttrPath("both." + SYSTEM), session)
        os.environ.pop("NIX_REMOTE")
        assert build_distributed(flake, AttrPath("both." + SYSTEM), session).builders == {"east": 1}


def test_the_machines_file_is_private_and_gone_at_the_end(hosts: Lab, tmp_path: Path) -> None:
    """Proves: 0700 around it, and nothing is left of it, also after an exception."""
    loaded = inventory(tmp_path, {"east": host_entry(hosts.hosts["east"], builder={"features": ["kvm"]})})
    with session_of(loaded, tmp_path, []) as session:
        probes = [Probe(builder) for builder in session.builders]
    kept: Path | None = None
    with pytest.raises(KeyError), machines_file(probes, Worker.DAEMON) as file:
        kept = file
        assert file.parent.stat().st_mode & 0o777 == 0o700
        fields = file.read_text().split()
        assert fields[0] == f"ssh-ng://root@{hosts.hosts['east'].address}" and fields[5:7] == ["kvm", "-"]
        assert Path(fields[2]).read_bytes() == hosts.identity_file.read_bytes()
        raise KeyError
    assert kept is not None and not kept.parent.exists()
