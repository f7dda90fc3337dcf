"""The pool against real hosts: each way in which a builder can be of no use has its own words, within one deadline."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nixops.build.claims import Claims
from nixops.build.failover import with_failover
from nixops.build.model import PoolBuilder, Probe, Tried
from nixops.build.pool import Pool
from nixops.build.probe import probe_all
from nixops.build.quarantine import Quarantine
from nixops.build.show import pool_rows
from nixops.errors import BuildFailed, ExitCode, NoBuilder
from nixops.lab.lab import HostSpec, Lab, LabHost
from nixops.lab.process import free_port
from nixops.nix.store_uri import StoreUri
from nixops.nix.verbs import Nix
from nixops.transport.local import LocalRunner
from nixops.transport.mux import SshPool
from nixops.values import Address, HostName, StorePath, System
from tests.lab.reaching import OFFLINE, SYSTEM, eventually, target_of, write_flake

X86, ARM = System("x86_64-linux"), System("aarch64-linux")
HERE = System(SYSTEM)
DEADLINE = 15.0  # for a dozen logins at once, on a machine that may have much else to do
_MIB = 1 << 20

FLAKE = """\
{
  outputs = { self }: let
    make = name: script: derivation {
      inherit name;
      system = "@system@";
      builder = "/bin/sh";
      args = [ "-c" script ];
      PATH = "/opt/lab/tools:/usr/bin:/bin";
      salt = "@salt@";
    };
  in {
    quick = make "quick" "echo built on $(cat /etc/hostname) > $out";
    slow = make "slow" "i=0; while [ $i -lt 60 ]; do sleep 0.1; i=$((i + 1)); done; cat /etc/hostname > $out";
    broken = make "broken" "echo this is wrong >&2; exit 3";
  };
}
"""


def builder_of(host: LabHost, **given: object) -> PoolBuilder:
    # Longer than any deadline here, so that it is the probe's that counts.
    target = replace(target_of(host), connect_timeout=20.0, login_timeout=40.0)
    made = PoolBuilder(target, (HERE,), max_jobs=2)
    return replace(made, **given)  # type: ignore[arg-type]  # a field of PoolBuilder


def ask(*builders: PoolBuilder, deadline: float = DEADLINE, **given: object) -> dict[str, Probe]:
    """Each probe by its name, over connections of their own."""
    with SshPool([builder.target for builder in builders]) as ssh:
        probes = probe_all(builders, ssh, deadline=deadline, **given)  # type: ignore[arg-type]  # as probe_all has them
    return {str(probe.builder.name): probe for probe in probes}


def renamed(builder: PoolBuilder, name: str, **given: object) -> PoolBuilder:
    target = replace(builder.target, name=HostName(name), **given)  # type: ignore[arg-type]  # a field of SshTarget
    return replace(builder, target=target)


@contextmanager
def deaf() -> Iterator[int]:
    """A port here that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield server.getsockname()[1]


# -- one probe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nix-cache02", "gunter"])
def test_a_probe_tells_what_the_host_itself_says(lab: Lab, name: str) -> None:
    """Proves: version, cores and free space agree with the host's own, also for a login that is not root, on a host
    with no programs in the usual places.
    """
    host = lab.hosts[name]
    probe = ask(builder_of(host))[name]
    assert probe.reason is None
    said = host.exec("nix-store", "--version").stdout.decode().split()[-1].split(".")
    assert probe.nix == (int(said[0]), int(said[1]))
    assert probe.cores == int(host.exec("nproc").stdout)
    free = int(host.exec("stat", "-f", "-c", "%a", "/nix/store").stdout) * 4096
    assert probe.free is not None and abs(probe.free - free) < 64 * _MIB
    assert probe.load is not None and probe.building == 0


@pytest.mark.parametrize("name", ["nix-cache02", "gunter"])
def test_a_running_build_is_counted_whoever_runs_it(lab: Lab, name: str) -> None:
    """Proves: ``building`` is 0, then 2 while two derivations build there (each of several processes), then 0 again;
    seen by root, and by a login that sees no more than any user.
    """
    host = lab.hosts[name]
    expression = (
        'derivation {{ name = "counted-{0}"; system = "{1}"; builder = "/bin/sh"; salt = "{2}"; '
        'PATH = "/opt/lab/tools:/usr/bin:/bin"; args = [ "-c" "sleep 5 & sleep 5; wait; echo > $out" ]; }}'
    )

    def build(number: int) -> None:
        text = expression.format(number, HERE, os.urandom(6).hex())
        host.exec("nix-build", "--no-out-link", "-E", text)

    builder = builder_of(host)
    threads = [threading.Thread(target=build, args=(n,)) for n in (1, 2)]
    with SshPool([builder.target]) as ssh:

        def building() -> int | None:
            (probe,) = probe_all([builder], ssh, deadline=DEADLINE)
            return probe.building

        assert building() == 0
        for thread in threads:
            thread.start()
        assert eventually(lambda: building() == 2, 15), building()
        for thread in threads:
            thread.join()
        assert building() == 0


def test_a_build_without_build_users_is_counted_too(lab: Lab) -> None:
    """Proves: where Nix has no users of its own for builds, as in a single-user installation, each build counts once,
    though it has several processes of the login's own.
    """
    host = lab.hosts["builder01"]
    host.exec("sh", "-c", "cp /etc/group /etc/group.saved && sed -i 's/^nixbld:/former:/' /etc/group")
    text = (
        f'derivation {{ name = "single"; system = "{HERE}"; builder = "/bin/sh"; salt = "{os.urandom(6).hex()}"; '
        'PATH = "/usr/bin:/bin"; args = [ "-c" "sleep 4 & sleep 4; wait; echo > $out" ]; }'
    )
    options = ("--option", "build-users-group", "")
    thread = threading.Thread(target=host.exec, args=("nix-build", "--no-out-link", *options, "-E", text))
    builder = builder_of(host)
    try:
        with SshPool([builder.target]) as ssh:

            def building() -> int | None:
                (probe,) = probe_all([builder], ssh, deadline=DEADLINE)
                return probe.building

            assert building() == 0
            thread.start()
            assert eventually(lambda: building() == 1, 15), building()
            thread.join()
            assert building() == 0
    finally:
        host.exec("mv", "/etc/group.saved", "/etc/group")


# -- every way of being of no use -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(lab_factory: Callable[..., Lab]) -> Lab:
    return lab_factory(
        HostSpec("cut"), HostSpec("full", disk_mib=64), HostSpec("bare"), HostSpec("dead-daemon", "awkward"),
        HostSpec("stopped-daemon", "awkward"), HostSpec("off"), HostSpec("no-shell"),
    )  # fmt: skip


def test_each_fault_has_its_own_words_within_the_one_deadline(lab: Lab, zoo: Lab, tmp_path: Path) -> None:
    """Proves: sixteen builders, fourteen of no use, each for another reason, asked at once: one deadline for all, the
    two good ones are found, and no reason stands for two faults.
    """
    good, other = builder_of(lab.hosts["nix-cache02"]), builder_of(lab.hosts["gunter"])
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "id"], check=True)
    zoo.hosts["cut"].partition(cut=True)
    zoo.hosts["off"].power_off()
    zoo.hosts["bare"].exec("sh", "-c", "mkdir /away && mv /usr/bin/nix* /away/")
    zoo.hosts["dead-daemon"].exec("systemctl", "stop", "nix-daemon.socket", "nix-daemon.service")
    zoo.hosts["stopped-daemon"].exec("systemctl", "start", "nix-daemon.service")
    zoo.hosts["stopped-daemon"].exec("systemctl", "kill", "--signal=SIGSTOP", "nix-daemon.service")
    zoo.hosts["no-shell"].exec("usermod", "--shell", "/usr/sbin/nologin", "root")
    with deaf() as port:
        builders = [
            good,
            other,
            renamed(good, "unresolved", address=Address("no-such-builder.invalid")),
            renamed(good, "refused", address=Address("127.0.0.1"), port=free_port("127.0.0.1")),
            renamed(good, "deaf", address=Address("127.0.0.1"), port=port),
            renamed(good, "changed", host_keys=(lab.hosts["builder01"].host_key,)),
            replace(renamed(good, "unpinned", host_keys=()), excluded="no host key is pinned (invoke trust unpinned)"),
            renamed(good, "stranger", identity_file=tmp_path / "id"),
            renamed(good, "no-identity", identity_file=tmp_path / "none"),
            *(builder_of(host) for host in zoo.hosts.values()),
        ]
        with SshPool([builder.target for builder in builders]) as ssh:
            began = time.monotonic()
            probes = probe_all(builders, ssh, deadline=DEADLINE, min_free=256 * _MIB)
            seconds = time.monotonic() - began
    reasons = {str(probe.builder.name): probe.reason for probe in probes}
    words = {
        "nix-cache02": None,
        "gunter": None,
        "unresolved": "does not resolve",
        "refused": "refused",
        "deaf": "took the connection, and the SSH handshake was not done",
        "changed": "THE HOST KEY OF changed HAS CHANGED",
        "unpinned": "no host key is pinned",
        "stranger": "refused the login",
        "no-identity": "is not there",
        "cut": "no answer within",
        "off": "cannot be reached",
        "full": "its store is full",
        "bare": "it has no Nix on the PATH of this login",
        "dead-daemon": "its nix-daemon is not there",
        "stopped-daemon": "is its nix-daemon alive?",  # whoever of the host and us notices first
        "no-shell": "let us in and runs no command",
    }
    assert reasons.keys() == words.keys()
    for name, expected in words.items():
        reason = reasons[name]
        if expected is not None:
            assert reason is not None and expected in reason, (name, reasons)
    assert reasons["nix-cache02"] is None and reasons["gunter"] is None
    told = [reason for reason in reasons.values() if reason is not None]
    assert len(set(told)) == len(told) == 14
    assert seconds < DEADLINE + 1.0
    # The table has a row for each, with the reason in its last column.
    header, rows = pool_rows(probes)
    assert {row[0]: row[-1] for row in rows} == {name: reason or "-" for name, reason in reasons.items()}
    assert all(len(row) == len(header) for row in rows)


def test_when_all_are_dead_the_error_comes_within_the_deadline_with_the_reason_of_each(
    lab: Lab, zoo: Lab, tmp_path: Path
) -> None:
    """Proves: exit 3 within the probe's deadline, also the second time, when those that did not answer are left out."""
    good = builder_of(lab.hosts["nix-cache02"])
    zoo.hosts["cut"].partition(cut=True)
    with deaf() as port:
        builders = [
            builder_of(zoo.hosts["cut"]),
            renamed(good, "deaf", address=Address("127.0.0.1"), port=port),
            renamed(good, "refused", address=Address("127.0.0.1"), port=free_port("127.0.0.1")),
        ]
        for _ in range(2):
            with SshPool([b.target for b in builders]) as ssh:
                pool = Pool(builders, ssh, Quarantine(tmp_path / "q.json", 300), deadline=3.0)
                began = time.monotonic()
                pool.candidates(HERE)(frozenset())
                assert time.monotonic() - began < 4.0
                with pytest.raises(NoBuilder) as caught:
                    with_failover(
                        pool.candidates(HERE),
                        lambda _probe: None,
                        system=HERE,
                        order=pool.order(HERE),
                        claims=Claims(tmp_path / "claims"),
                        quarantine=pool.quarantine,
                    )
            assert caught.value.exit_code == ExitCode.UNREACHABLE
            lines = (caught.value.detail or "").splitlines()
            assert [line.split(":")[0] for line in lines] == ["cut", "deaf", "refused"]
            assert "refused" in lines[2] and "handshake" in lines[1]
        assert pool.quarantine.names() == {HostName("cut"), HostName("deaf")}


def test_a_system_that_only_the_inventory_claims_is_found_out_before_anything_is_built(lab: Lab) -> None:
    """Proves: Nix itself is asked; with ``extra-platforms`` in its nix.conf the builder takes the other system too."""
    host = lab.hosts["builder01"]
    other = ARM if HERE == X86 else X86
    claimed = ask(builder_of(host, systems=(other,)))[host.name].reason
    assert claimed is not None and "its Nix builds for" in claimed and f"and not for {other}" in claimed
    assert ask(builder_of(host, systems=(HERE, other)))[host.name].builder.systems == (HERE,)
    host.exec(
        "sh", "-c", f"cp /etc/nix/nix.conf /etc/nix/saved && echo 'extra-platforms = {other}' >> /etc/nix/nix.conf"
    )
    try:
        probe = ask(builder_of(host, systems=(HERE, other)))[host.name]
        assert (probe.reason, probe.builder.systems) == (None, (HERE, other))
    finally:
        host.exec("sh", "-c", "mv /etc/nix/saved /etc/nix/nix.conf")


# -- failing over ---------------------------------------------------------------------------------------------


class Building:
    """Real builds through the pool."""

    def __init__(self, directory: Path, ssh: SshPool, builders: list[PoolBuilder]) -> None:
        self.flake = write_flake(directory, FLAKE)
        self.nix = Nix(LocalRunner(), env={**OFFLINE, **ssh.nix_env()})
        self.pool = Pool(builders, ssh, Quarantine(directory / "q.json", 300), deadline=DEADLINE, min_free=16)
        self.claims = Claims(directory / "claims")
        self.told: list[Tried] = []
        self.begun = threading.Event()

    def work(self, attribute: str, probe: Probe) -> tuple[str, StorePath]:
        def line(text: str) -> None:
            if text.startswith("building"):
                self.begun.set()

        store = StoreUri.ssh_ng(probe.builder.target)
        built = self.nix.build(f"{self.flake}#{attribute}", store=store, timeout=60, on_line=line)
        return str(probe.builder.name), built.out

    def run(self, attribute: str) -> tuple[tuple[str, StorePath], tuple[Tried, ...]]:
        order = self.pool.order(HERE)
        return with_failover(
            self.pool.candidates(HERE),
            lambda probe: self.work(attribute, probe),
            system=HERE,
            # The load is this machine's, which each lab host has read at another moment: it tells none from another.
            order=lambda probes: order([replace(probe, load=None) for probe in probes]),
            claims=self.claims,
            quarantine=self.pool.quarantine,
            ask_again=self.pool.again,
            on_tried=self.told.append,
        )


def test_a_builder_that_loses_power_in_the_middle_of_a_build_is_replaced(
    lab: Lab, lab_factory: Callable[..., Lab], tmp_path: Path
) -> None:
    """Proves: the build finishes on the other builder, the log says why, and the lost one is left out from then on."""
    doomed = lab_factory(HostSpec("doomed")).hosts["doomed"]
    builders = [builder_of(doomed, speed_factor=100), builder_of(lab.hosts["nix-cache02"])]
    with SshPool([b.target for b in builders]) as ssh:
        building = Building(tmp_path, ssh, builders)

        def cut() -> None:
            assert building.begun.wait(30)
            doomed.power_off()

        thread = threading.Thread(target=cut)
        thread.start()
        (name, out), tried = building.run("slow")
        thread.join()
        assert name == "nix-cache02"
        assert lab.hosts["nix-cache02"].exec("cat", out).stdout == b"nix-cache02\n"
        assert [t.builder for t in tried] == ["doomed"] and tried == tuple(building.told)
        assert "doomed" in tried[0].reason and "lost" in tried[0].reason
        reason = building.pool.quarantine.reason(HostName("doomed"))
        assert reason is not None and tried[0].reason in reason
        # The next build does not try it first.
        (name, _), tried = building.run("quick")
        assert (name, tried) == ("nix-cache02", ())


def test_a_build_that_fails_is_not_tried_elsewhere(lab: Lab, tmp_path: Path) -> None:
    """Proves: BuildFailed at once with the end of the log; no builder is blamed."""
    builders = [builder_of(lab.hosts[name]) for name in ("nix-cache02", "builder01")]
    with SshPool([b.target for b in builders]) as ssh:
        building = Building(tmp_path, ssh, builders)
        with pytest.raises(BuildFailed, match="this is wrong"):
            building.run("broken")
        assert building.told == [] and building.pool.quarantine.names() == frozenset()


def test_a_full_disk_moves_the_build_to_the_next_builder(
    lab: Lab, lab_factory: Callable[..., Lab], tmp_path: Path
) -> None:
    """Proves: a disk that fills only while it builds is the builder's fault, with words for it."""
    small = lab_factory(HostSpec("small", disk_mib=64)).hosts["small"]
    builders = [builder_of(small, speed_factor=100), builder_of(lab.hosts["nix-cache02"])]
    with SshPool([b.target for b in builders]) as ssh:
        building = Building(tmp_path, ssh, builders)
        text = (tmp_path / "flake.nix").read_text()
        more = 'heavy = make "heavy" "head -c 200000000 /dev/zero > $out";\n    quick ='
        (tmp_path / "flake.nix").write_text(text.replace("quick =", more))
        (name, out), tried = building.run("heavy")
        assert name == "nix-cache02"
        assert [(t.builder, "the disk of small is full" in t.reason) for t in tried] == [("small", True)]
        # The daemon that built it may still hold it for a moment.
        host = lab.hosts["nix-cache02"]
        assert eventually(lambda: host.exec("nix-store", "--delete", out, check=False).returncode == 0)


def test_two_builds_at_once_spread_over_the_pool(lab: Lab, tmp_path: Path) -> None:
    """Proves: of two equal builders each gets one of two builds that begin together."""
    builders = [builder_of(lab.hosts[name], max_jobs=1) for name in ("nix-cache02", "builder01")]
    used: list[str] = []
    with SshPool([b.target for b in builders]) as ssh:
        building = Building(tmp_path, ssh, builders)
        building.pool.probe([HERE])
        threads = [threading.Thread(target=lambda: used.append(building.run("slow")[0][0])) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(used) == ["builder01", "nix-cache02"]
