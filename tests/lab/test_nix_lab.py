"""Nix against real hosts: Nix here (2.8 and newer) with the stores of Nix 2.26 there, through real SSH."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nixops.errors import (
    BuildFailed,
    ConnectionLost,
    HostFault,
    HostKeyChanged,
    Interrupted,
    LoginRefused,
    Unreachable,
)
from nixops.lab.lab import HostSpec, Lab, LabHost
from nixops.lab.recipe import sudo_password
from nixops.nix.closure import closure_diff, requisites
from nixops.nix.copy import import_closure, missing_paths
from nixops.nix.store_uri import StoreUri
from nixops.nix.verbs import Nix
from nixops.transport.command import Command
from nixops.transport.exec import Cancellation, cancellable
from nixops.transport.local import LocalRunner
from nixops.transport.openssh import OpenSshFiles
from nixops.values import StorePath
from tests.lab.reaching import OFFLINE, eventually, has, processes, runner_of, target_of, write_flake

FLAKE = """\
{
  outputs = { self }: let
    make = name: script: derivation {
      inherit name script;
      system = "@system@";
      builder = "/bin/sh";
      args = [ "-c" script ];
      PATH = "/opt/lab/tools:/usr/bin:/bin";
      salt = "@salt@";
    };
    library = make "library-1.0" "echo library > $out";
  in {
    good = make "tool-1.0" "echo building the tool >&2; echo ${library} > $out";
    newer = make "tool-1.1" "echo ${library} > $out; head -c 100000 /dev/zero >> $out";
    bad = make "bad-0.1" "echo one; echo two >&2; exit 3";
    slow = make "slow-1" "sleep 77101; echo > $out";
    heavy = make "heavy-1" "head -c 300000000 /dev/zero > $out";
    filling = make "filling-1" "head -c 300000000 /dev/zero > $out";
    broken = throw "this does not evaluate";
  };
}
"""


@dataclass(frozen=True)
class Bench:
    """A flake, the operator's nix with the lab's hosts as stores, and a runner for each host."""

    flake: str
    nix: Nix
    local: LocalRunner
    lab: Lab

    def store(self, name: str) -> StoreUri:
        return StoreUri.ssh_ng(target_of(self.lab.hosts[name]))

    def attr(self, name: str) -> str:
        return f"{self.flake}#{name}"


@pytest.fixture
def heavy() -> Iterator[Callable[[Bench], StorePath]]:
    """Builds a path of 300 MB here; it is deleted again, as every run makes another."""
    made: list[StorePath] = []

    def build(bench: Bench) -> StorePath:
        made.append(bench.nix.build(bench.attr("heavy"), timeout=60).out)
        return made[-1]

    yield build
    subprocess.run(["nix-store", "--delete", *made], check=True, capture_output=True)


@pytest.fixture
def bench(lab: Lab, tmp_path: Path) -> Iterator[Bench]:
    with OpenSshFiles([target_of(host) for host in lab.hosts.values()]) as files:
        yield make_bench(lab, tmp_path, files)


def make_bench(lab: Lab, directory: Path, files: OpenSshFiles) -> Bench:
    local = LocalRunner()
    return Bench(write_flake(directory, FLAKE), Nix(local, env={**OFFLINE, **files.nix_env()}), local, lab)


def builds(host: LabHost) -> bool:
    """Whether the builder of ``slow`` runs on the host."""
    return "sleep 77101" in processes(host)


# -- building on the target -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nix-cache02", "gunter"])
def test_a_build_happens_in_the_hosts_store_and_not_here(bench: Bench, name: str) -> None:
    """Proves: evaluated here, built there: as root, and as a login that is no trusted user, on a host without the
    experimental features; the outputs are valid there and absent here.
    """
    lines: list[str] = []
    built = bench.nix.build(bench.attr("good"), store=bench.store(name), timeout=60, on_line=lines.append)
    assert has(bench.lab.hosts[name], built.out)
    assert bench.nix.path_info([built.out]) == ()
    assert "building tool-1.0" in lines
    assert "tool-1.0> building the tool" in lines
    assert [info.path for info in bench.nix.path_info([built.out], store=bench.store(name))] == [built.out]


def test_a_failed_build_there_gives_the_end_of_its_log(bench: Bench) -> None:
    """Proves: BuildFailed with the builder's own lines, from a remote store, and not an infrastructure fault."""
    with pytest.raises(BuildFailed) as caught:
        bench.nix.build(bench.attr("bad"), store=bench.store("nix-cache02"), timeout=60)
    assert "failed with exit code 3" in str(caught.value)
    assert "bad-0.1> one\nbad-0.1> two" in str(caught.value)


def test_an_evaluation_that_fails_is_a_build_failure_wherever_it_should_have_built(bench: Bench) -> None:
    """Proves: an evaluation error is told as such, with Nix's words, not as a fault of the host."""
    with pytest.raises(BuildFailed, match="this does not evaluate"):
        bench.nix.eval_json(bench.attr("broken"))


@pytest.mark.parametrize("name", ["nix-cache02", "gunter"])
def test_an_interrupted_remote_build_is_gone_from_the_host(bench: Bench, name: str) -> None:
    """Proves: when nix here is stopped (as by Ctrl-C), the builder on the host ends too, where the login is root and
    where the daemon builds for it.
    """
    host = bench.lab.hosts[name]
    switch = Cancellation()

    def interrupt() -> None:
        if eventually(lambda: builds(host), 20):
            switch.cancel()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with cancellable(switch), pytest.raises(Interrupted):
        bench.nix.build(bench.attr("slow"), store=bench.store(name), timeout=60)
    thread.join()
    assert eventually(lambda: not builds(host))


def test_a_builder_that_is_lost_in_the_middle_is_no_failed_build(
    lab_factory: Callable[..., Lab], tmp_path: Path
) -> None:
    """Proves: power loss during a build is ConnectionLost (so that another builder may be tried), and a store on a
    host that is off is Unreachable.
    """
    lab = lab_factory(HostSpec("doomed"))
    host = lab.hosts["doomed"]
    with OpenSshFiles([target_of(host)]) as files:
        bench = make_bench(lab, tmp_path, files)

        def cut() -> None:
            eventually(lambda: builds(host), 20)
            host.power_off()

        threading.Thread(target=cut).start()
        with pytest.raises(ConnectionLost, match="the store of doomed was lost"):
            bench.nix.build(bench.attr("slow"), store=bench.store("doomed"), timeout=60)
        with pytest.raises(Unreachable) as caught:
            bench.nix.build(bench.attr("good"), store=bench.store("doomed"), timeout=60)
        assert not isinstance(caught.value, LoginRefused | ConnectionLost)


def test_nix_refuses_a_host_whose_key_is_not_the_pinned_one(lab: Lab, tmp_path: Path) -> None:
    """Proves: nix's own ssh has the same trust policy as ours: a changed key is HostKeyChanged, nothing is built."""
    host = lab.hosts["nix-cache02"]
    swapped = replace(target_of(host), host_keys=target_of(lab.hosts["builder01"]).host_keys)
    with OpenSshFiles([swapped]) as files:
        bench = make_bench(lab, tmp_path, files)
        with pytest.raises(HostKeyChanged, match="invoke trust nix-cache02"):
            bench.nix.build(bench.attr("good"), store=bench.store("nix-cache02"), timeout=60)


def test_nix_tells_a_refused_login(lab: Lab, tmp_path: Path) -> None:
    """Proves: a key that the host does not know ends nix's build with LoginRefused."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "id"], check=True)
    with OpenSshFiles([replace(target_of(lab.hosts["nix-cache02"]), identity_file=tmp_path / "id")]) as files:
        bench = make_bench(lab, tmp_path, files)
        with pytest.raises(LoginRefused):
            bench.nix.build(bench.attr("good"), store=bench.store("nix-cache02"), timeout=60)


# -- copying --------------------------------------------------------------------------------------------------


def test_root_takes_a_closure_that_nobody_signed(bench: Bench) -> None:
    """Proves: ``nix copy`` to a trusted login, with the reference; what is copied is readable from the host by us."""
    built = bench.nix.build(bench.attr("good"), timeout=60)
    bench.nix.copy([built.out], to=bench.store("nix-cache02"), timeout=60)
    infos = bench.nix.path_info([built.out], recursive=True, store=bench.store("nix-cache02"))
    assert {info.path.name for info in infos} == {"tool-1.0", "library-1.0"}
    assert {reference.name for info in infos for reference in info.references} == {"library-1.0"}
    assert all(info.nar_size > 0 for info in infos)


def test_a_login_that_nix_does_not_trust_is_told_the_other_way(bench: Bench) -> None:
    """Proves: ``nix copy`` of unsigned paths to an untrusted login is refused, with a hint, and changes nothing."""
    built = bench.nix.build(bench.attr("good"), timeout=60)
    with pytest.raises(HostFault, match="does not take unsigned paths from this login"):
        bench.nix.copy([built.out], to=bench.store("gunter"), timeout=60)
    assert not has(bench.lab.hosts["gunter"], built.out)


def test_an_untrusted_login_imports_through_root(bench: Bench) -> None:
    """Proves: what ``nix copy`` may not do, export and root's import can, by sudo with a password; only what is missing
    is sent, references first, and a second time nothing is.
    """
    host = bench.lab.hosts["gunter"]
    first = bench.nix.build(bench.attr("good"), timeout=60).out
    second = bench.nix.build(bench.attr("newer"), timeout=60).out
    with runner_of(host) as remote:
        sent = import_closure(bench.local, remote, [first])
        assert [path.name for path in sent.paths] == ["library-1.0", "tool-1.0"]
        assert has(host, first)
        assert import_closure(bench.local, remote, [second]).paths == (second,)
        assert import_closure(bench.local, remote, [first, second]).paths == ()
        assert missing_paths(remote, [first, second]) == ()
        before, after = requisites(remote, first), requisites(remote, second)
    difference = closure_diff(before, after)
    assert difference.changed == ("tool: 1.0 → 1.1, +97.7 KiB",)


BIG = """\
import resource, sys
from pathlib import Path
from nixops.nix.copy import import_closure
from nixops.secret import Secret
from nixops.transport.exec import Cancellation, cancellable
from nixops.transport.local import LocalRunner
from nixops.transport.ssh import SshRunner
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName, StorePath

name, address, user, key, identity, path = sys.argv[1:]
password = sys.stdin.readline().strip()
target = SshTarget(HostName(name), Address(address), user=user, host_keys=(key,), identity_file=Path(identity))
with SshRunner(target, sudo_password=lambda: Secret(password)) as remote:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert import_closure(LocalRunner(), remote, [StorePath(path)]).paths == (path,)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_closure_streams_and_is_not_held_in_memory(bench: Bench, heavy: Callable[[Bench], StorePath]) -> None:
    """Proves: importing a 300 MB path takes the operator's process less than 100 MB more memory at its peak."""
    host = bench.lab.hosts["gunter"]
    target = target_of(host)
    path = heavy(bench)
    arguments = (host.name, host.address, host.user, target.host_keys[0], host.identity_file, path)
    done = subprocess.run(
        [sys.executable, "-c", BIG, *map(str, arguments)],
        input=f"{sudo_password()}\n",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert has(host, path)
    assert int(done.stdout) * 1024 < 100_000_000  # ru_maxrss counts KiB
    host.exec("nix-store", "--delete", path)


# -- a full disk ----------------------------------------------------------------------------------------------


def test_a_full_disk_on_the_host_is_a_fault_of_the_host(
    lab_factory: Callable[..., Lab], tmp_path: Path, heavy: Callable[[Bench], StorePath]
) -> None:
    """Proves: building, copying and importing onto a full disk are each HostFault that names the host, not a failed
    build; the half-taken path is not valid afterwards.
    """
    lab = lab_factory(HostSpec("small", disk_mib=64))
    host = lab.hosts["small"]
    with OpenSshFiles([target_of(host)]) as files, runner_of(host) as remote:
        bench = make_bench(lab, tmp_path, files)
        path = heavy(bench)
        with pytest.raises(HostFault, match="the disk of small is full"):
            bench.nix.copy([path], to=bench.store("small"), timeout=60)
        with pytest.raises(HostFault, match="the disk of small is full"):
            import_closure(bench.local, remote, [path])
        with pytest.raises(HostFault, match="the disk of small is full"):
            bench.nix.build(bench.attr("filling"), store=bench.store("small"), timeout=60)
        assert not has(host, path)


def test_what_a_host_does_not_have_is_a_fault_that_names_it(plain: LabHost) -> None:
    """Proves: asking for the closure of an absent path is a HostFault with Nix's words, not a traceback."""
    absent = StorePath("/nix/store/00000000000000000000000000000000-absent")
    with runner_of(plain) as remote, pytest.raises(HostFault, match="could not tell what"):
        requisites(remote, absent)


def test_the_hosts_own_nix_answers_over_the_same_seam(plain: LabHost, awkward: LabHost) -> None:
    """Proves: version and JSON of a newer Nix are read as well, on the host itself, without features in its config."""
    for host in (plain, awkward):
        with runner_of(host) as remote:
            nix = Nix(remote)
            assert nix.version() >= (2, 18)
            path = StorePath(remote.run(Command.of("nix-store", "--add", "/etc/hostname")).check().out.strip())
            (info,) = nix.path_info([path])
            assert (info.path, info.nar_size > 0) == (path, True)
