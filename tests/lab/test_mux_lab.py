"""SshPool against real hosts: one login for our commands and nix, by real sshd, sudo, Nix 2.8 here and 2.26 there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nixops.errors import (
    BuildFailed,
    CommandTimeout,
    ConnectionLost,
    Interrupted,
    LoginRefused,
    NixopsError,
    Unreachable,
)
from nixops.lab.lab import HostSpec, Lab, LabHost
from nixops.nix.store_uri import StoreUri
from nixops.nix.verbs import Nix
from nixops.secret import Secret
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.exec import Cancellation, cancellable
from nixops.transport.fleet import fan_out
from nixops.transport.local import LocalRunner
from nixops.transport.mux import SshPool
from nixops.values import HostName, StorePath
from tests.lab.reaching import OFFLINE, eventually, processes, target_of, wait_for, write_flake

PLAIN, AWKWARD = HostName("nix-cache02"), HostName("gunter")

FLAKE = """\
{
  outputs = { self }: let
    make = name: script: extra: derivation ({
      inherit name script;
      system = "@system@";
      builder = "/bin/sh";
      args = [ "-c" script ];
      PATH = "/opt/lab/tools:/usr/bin:/bin";
      salt = "@salt@";
    } // extra);
    library = make "library-1.0" "echo library > $out" { };
  in {
    good = make "tool-1.0" "echo building the tool >&2; echo ${library} > $out; cat ${./flake.nix} >> $out" { };
    documents = make "documents-1" "echo > $doc" { outputs = [ "doc" ]; };
    halves = make "halves-1" "echo > $left; echo > $right" { outputs = [ "left" "right" ]; };
    quoting = make "quoting-1" @quoted@ { };
    slow = make "slow-1" "sleep 78101; echo > $out" { };
    thrown = throw "unexpected end-of-file; Connection refused; Nix daemon disconnected unexpectedly";
  };
}
"""
# What a failed build's log may quote without being a fault of the builder.
QUOTED = (
    "\"for w in 'Connection refused' 'Broken pipe' 'error: cannot connect to socket at x' 'Permission denied (key)'"
    " 'error: Nix daemon disconnected unexpectedly' 'Host key verification failed.'; do echo \\\"$w\\\"; done; exit 9\""
)


def make_flake(directory: Path) -> str:
    return write_flake(directory, FLAKE.replace("@quoted@", QUOTED))


@dataclass(frozen=True)
class Bench:
    """A flake, a pool over the lab's hosts, and the operator's nix over it."""

    flake: str
    pool: SshPool
    nix: Nix
    lab: Lab

    def store(self, name: HostName) -> StoreUri:
        return StoreUri.ssh_ng(target_of(self.lab.hosts[name]))

    def drv(self, attribute: str) -> StorePath:
        return StorePath(self.nix.eval_json(f"{self.flake}#{attribute}.drvPath"))


@pytest.fixture
def bench(lab: Lab, tmp_path: Path) -> Iterator[Bench]:
    with SshPool([target_of(host) for host in lab.hosts.values()]) as pool:
        yield Bench(make_flake(tmp_path), pool, Nix(LocalRunner(), env={**OFFLINE, **pool.nix_env()}), lab)


@pytest.fixture
def nopasswd(lab: Lab) -> Iterator[LabHost]:
    """The awkward host, whose login may use sudo without a password."""
    host = lab.hosts[AWKWARD]
    host.sudo_mode("nopasswd")
    yield host
    host.sudo_mode("password")


def logins(host: LabHost) -> int:
    """How many logins sshd has let in since the host was booted."""
    host.exec("journalctl", "--sync")
    said = host.exec("journalctl", "-q", "--no-pager", "-g", "Accepted publickey", check=False).stdout
    return len(said.splitlines())


@contextmanager
def max_sessions(host: LabHost, number: int) -> Iterator[None]:
    """Let the host's sshd take only so many sessions on a connection."""
    settings = host.root / "etc/ssh/sshd_config.d/lab.conf"
    former = settings.read_text()
    settings.write_text(former.replace("MaxSessions 100", f"MaxSessions {number}"))
    reload_sshd(host)
    try:
        yield
    finally:
        settings.write_text(former)
        reload_sshd(host)


def reload_sshd(host: LabHost) -> None:
    """Have the host's sshd read its settings, and wait until it has: for a moment it listens no more."""

    def listening() -> int:
        host.exec("journalctl", "--sync")
        said = host.exec(
            "journalctl", "-q", "--no-pager", "-u", "ssh", "-g", r"Server listening on 0\.0\.0\.0", check=False
        )
        return len(said.stdout.splitlines())

    before = listening()
    host.exec("systemctl", "reload", "ssh")
    wait_for(lambda: listening() > before, 10, "sshd listens again")


# -- one login ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [PLAIN, AWKWARD])
def test_commands_and_nix_share_one_login(bench: Bench, name: HostName) -> None:
    """Proves: thirty commands, some at once, and three runs of nix over ssh-ng are one login in sshd's journal; as root
    and as a login that Nix does not trust.
    """
    host = bench.lab.hosts[name]
    before = logins(host)
    runner = bench.pool.connect(name, timeout=20)
    outcomes = fan_out(range(30), lambda n: runner.run(Command.of("sh", "-c", f"sleep 0.05; echo {n}")).out, limit=30)
    assert [outcome.unwrap() for outcome in outcomes] == [f"{n}\n" for n in range(30)]
    built = bench.nix.build_derivation(bench.drv("good"), store=bench.store(name), timeout=60)
    again = bench.nix.build(f"{bench.flake}#good", store=bench.store(name), timeout=60)
    assert again == built
    assert [info.path for info in bench.nix.path_info([built.out], store=bench.store(name))] == [built.out]
    assert logins(host) - before == 1


def test_a_stock_sshd_with_ten_sessions_takes_what_we_ask_of_it(bench: Bench) -> None:
    """Proves: under MaxSessions 10, forty commands at once and a remote build beside them need no second login."""
    host = bench.lab.hosts[PLAIN]
    with max_sessions(host, 10):
        before = logins(host)
        runner = bench.pool.connect(PLAIN, timeout=20)
        drv = bench.drv("good")
        works: list[Callable[[], object]] = [
            lambda: runner.run(Command.of("sleep", "0.2")).check(),
            lambda: bench.nix.build_derivation(drv, store=bench.store(PLAIN), timeout=60),
        ]
        outcomes = fan_out([works[1], *works[:1] * 40], lambda work: work(), limit=41)
        assert [outcome.error for outcome in outcomes if not outcome.ok] == []
        assert logins(host) - before == 1


def test_a_host_that_refuses_multiplexing_works_with_a_login_for_each(bench: Bench) -> None:
    """Proves: under MaxSessions 1 commands and nix still work, and a command past its time is still stopped."""
    host = bench.lab.hosts[PLAIN]
    with max_sessions(host, 1):
        runner = bench.pool.connect(PLAIN, timeout=20)
        assert runner.run(Command.of("cat", stdin="in")).out == "in"
        bench.nix.build_derivation(bench.drv("good"), store=bench.store(PLAIN), timeout=60)
        with pytest.raises(CommandTimeout):
            runner.run(Command.of("sleep", "78102", timeout=1.0))
        assert eventually(lambda: not processes(host, "sleep 78102"), 3)


def test_a_login_shell_that_talks_does_not_mix_with_the_commands_output(bench: Bench) -> None:
    """Proves: what .bashrc prints on both outputs, with and without a line's end, is no part of a result."""
    rc = bench.lab.hosts[PLAIN].root / "root/.bashrc"
    former = rc.read_bytes()
    rc.write_text("echo welcome; printf 'no end'; echo warning >&2; printf half >&2\n")
    try:
        lines: list[str] = []
        result = bench.pool.connect(PLAIN, timeout=20).run(
            Command.of("sh", "-c", "cat; echo e1 >&2; printf e2 >&2; exit 7", stdin="in"), lines.append
        )
    finally:
        rc.write_bytes(former)
    assert (result.code, result.out, result.err, lines) == (7, "in", "e1\ne2", ["e1", "e2"])


def test_root_is_reached_through_sudo_that_asks_nothing(nopasswd: LabHost) -> None:
    """Proves: uid 0, stdin, variables and exit code are the payload's, through real ``sudo -n``; stopped, it is gone;
    and where sudo wants a password the error says what to set.
    """
    with SshPool([target_of(nopasswd)]) as pool:
        runner = pool.runner(AWKWARD)
        result = runner.run(
            Command.of("sh", "-c", 'id -u; cat; echo "$V"; exit 3', stdin="x", env={"V": "v"}, root=True)
        )
        assert (result.code, result.out) == (3, "0\nxv\n")
        with pytest.raises(CommandTimeout):
            runner.run(Command.of("sleep", "78103", timeout=1.0, root=True))
        assert eventually(lambda: not processes(nopasswd, "sleep 78103"), 3)
        nopasswd.sudo_mode("password")
        with pytest.raises(LoginRefused, match="without a password"):
            runner.run(Command.of("id", root=True))


def test_a_key_that_only_our_agent_has_logs_in_and_lets_nix_in(lab: Lab, tmp_path: Path) -> None:
    """Proves: with the private key as a Secret, commands and nix log in, also where nix makes a login of its own; no
    process on this machine has the key in its arguments or environment meanwhile, and no file has it.
    """
    host = lab.hosts[PLAIN]
    key = host.identity_file.read_text()
    with SshPool([replace(target_of(host), identity_file=None)], identity=Secret(key)) as pool:
        assert pool.runner(PLAIN).run(Command.of("echo", "hi")).out == "hi\n"
        nix = Nix(LocalRunner(), env={**OFFLINE, **pool.nix_env()})
        store = StoreUri.ssh_ng(target_of(host))
        flake = make_flake(tmp_path)
        nix.build(f"{flake}#good", store=store, timeout=60)
        pool.drop(PLAIN)
        nix.build(f"{flake}#good", store=store, timeout=60)
        line = key.splitlines()[2].encode()
        files = [*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")]
        files += [path for path in pool.files.directory.rglob("*") if path.is_file()]
        assert not [path for path in files if line in read(path)]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # gone meanwhile


# -- however the operator ends --------------------------------------------------------------------------------

OPERATOR = """\
import sys
from pathlib import Path
from nixops.nix.store_uri import StoreUri
from nixops.nix.verbs import Nix
from nixops.transport.command import Command
from nixops.transport.local import LocalRunner
from nixops.transport.mux import SshPool
from nixops.transport.muxsession import Session
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName

name, address, user, key, identity, flake, deaf = sys.argv[1:]
target = SshTarget(HostName(name), Address(address), user=user, host_keys=(key,), identity_file=Path(identity))
if deaf:
    Session._begin = lambda self, number: self._begun.set()  # ended before it could tell the keeper
with SshPool([target]) as pool:
    runner = pool.runner(target.name)
    print(pool.files.directory, flush=True)
    if flake:
        nix = Nix(LocalRunner(), env={"NIX_CONFIG": "substituters =", **pool.nix_env()})
        nix.build(f"{flake}#slow", store=StoreUri.ssh_ng(target), timeout=100)
    else:
        runner.run(Command.of("sleep", "78101", root=True, timeout=None))
"""


@contextmanager
def operator(host: LabHost, flake: str = "", *, deaf: bool = False) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process of an operator of its own that runs something long on the host, and its pool's directory.

    :param deaf: it never hears that its command has begun, so its keeper is not told of it.
    """
    target = target_of(host)
    key, private = target.host_keys[0], host.identity_file
    arguments = (target.name, target.address, target.user, key, private, flake, "deaf" if deaf else "")
    process = subprocess.Popen(
        [sys.executable, "-c", OPERATOR, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        directory = Path(process.stdout.readline().decode().strip())
        assert eventually(lambda: "sleep 78101" in " ".join(processes(host, "sleep 78101")), 90)
        yield process, directory
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ours(directory: Path) -> list[str]:
    """Processes on this machine that name the pool's directory."""
    out = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    return [line for line in out.splitlines() if str(directory) in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("what", ["a command", "a command through sudo", "a build", "a build by the daemon"])
def test_nothing_survives_the_operators_process(
    lab: Lab, nopasswd: LabHost, tmp_path: Path, what: str, number: signal.Signals
) -> None:
    """Proves: whatever ends the operator's process, what it ran is gone from the host (for a build: the builder, and
    the nix-daemon that ran it), so is the keeper there, and here every ssh and the private directory.
    """
    host = nopasswd if what.endswith(("sudo", "daemon")) else lab.hosts[PLAIN]
    flake = make_flake(tmp_path) if "build" in what else ""
    with operator(host, flake) as (process, directory):
        assert ours(directory)
        process.send_signal(number)
        process.wait(20)
        for words in ("sleep 78101", "nixops-keeper", "nix-daemon --stdio"):
            assert eventually(lambda words=words: not processes(host, words)), words  # type: ignore[misc]  # mypy infers no lambda with a default
        assert eventually(lambda: not directory.exists(), 5)
        assert eventually(lambda: not ours(directory), 5), ours(directory)


@pytest.mark.parametrize("how", ["shared", "a login for each"])
@pytest.mark.parametrize("what", ["a command", "a command through sudo"])
def test_nothing_survives_an_operator_who_is_killed_before_it_heard_of_its_command(
    lab: Lab, nopasswd: LabHost, what: str, how: str
) -> None:
    """Proves: a command whose beginning was on its way when the operator's process was killed is gone too."""
    host = nopasswd if what.endswith("sudo") else lab.hosts[PLAIN]
    with max_sessions(host, 1) if how != "shared" else nullcontext(), operator(host, deaf=True) as (process, _):
        process.kill()
        for words in ("sleep 78101", "nixops-keeper"):
            assert eventually(lambda words=words: not processes(host, words)), words  # type: ignore[misc]  # as above


@pytest.mark.parametrize("name", [PLAIN, AWKWARD])
def test_a_cancelled_build_is_gone_from_the_host_and_the_connection_goes_on(bench: Bench, name: HostName) -> None:
    """Proves: cancelling nix over the shared connection ends the builder there, and leaves the connection as it was."""
    host = bench.lab.hosts[name]
    runner = bench.pool.connect(name, timeout=20)
    before = logins(host)
    switch = Cancellation()

    def interrupt() -> None:
        if eventually(lambda: bool(processes(host, "sleep 78101")), 90):
            switch.cancel()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with cancellable(switch), pytest.raises(Interrupted):
        bench.nix.build_derivation(bench.drv("slow"), store=bench.store(name), timeout=120)
    thread.join()
    assert eventually(lambda: not processes(host, "sleep 78101"))
    assert runner.run(Command.of("echo", "on")).out == "on\n"
    assert logins(host) == before


@pytest.mark.parametrize("root", [False, True], ids=["a command", "through sudo"])
def test_a_command_that_is_cancelled_while_it_starts_is_gone(
    bench: Bench, nopasswd: LabHost, root: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves: at no moment between the login shell and the command's first word does a cancelled one go on."""
    monkeypatch.setattr("nixops.transport.exec.TICK", 0.001)  # as soon as Ctrl-C strikes the main thread
    runner = bench.pool.connect(AWKWARD, timeout=20)
    runner.run(Command.of("true", root=root))
    for number in range(12):
        switch = Cancellation()
        timer = threading.Timer(0.003 * number, switch.cancel)
        timer.start()
        with cancellable(switch), pytest.raises(Interrupted):
            runner.run(Command.of("sleep", "78102", root=root))
        timer.join()
    assert eventually(lambda: not processes(nopasswd, "sleep 78102"), 3), processes(nopasswd, "sleep 78102")


# -- a network that goes --------------------------------------------------------------------------------------


def test_a_host_that_is_cut_off_is_told_in_time_and_stops_what_ran(
    lab_factory: Callable[..., Lab], tmp_path: Path
) -> None:
    """Proves: with the cable pulled, a command and a build end with ConnectionLost after three missed signs of life,
    connecting anew is Unreachable within its time, the host stops both by itself though no packet reaches it, and
    with the cable back the same runner works.
    """
    lab = lab_factory(HostSpec("cable"))
    host, name = lab.hosts["cable"], HostName("cable")
    with SshPool([target_of(host)]) as pool:
        runner = pool.runner(name)
        nix = Nix(LocalRunner(), env={**OFFLINE, **pool.nix_env()})
        flake = make_flake(tmp_path)

        began: list[float] = []

        def cut() -> None:
            assert eventually(lambda: processes(host, "sleep 78101") and processes(host, "sleep 78104"), 90)
            began.append(time.monotonic())
            host.partition(True)

        works: list[Callable[[], object]] = [
            cut,
            lambda: runner.run(Command.of("sleep", "78104", timeout=120)),
            lambda: nix.build(f"{flake}#slow", store=StoreUri.ssh_ng(target_of(host)), timeout=120),
        ]
        cutting, command, build = fan_out(works, lambda work: work())
        cutting.unwrap()
        assert time.monotonic() - began[0] < 25
        assert isinstance(command.error, ConnectionLost), command.error
        assert isinstance(build.error, ConnectionLost), build.error
        with pytest.raises(Unreachable, match="cannot be reached"):
            pool.connect(name, timeout=1.0)
        assert eventually(lambda: not processes(host, "sleep 7810"), 15)
        host.partition(False)
        assert runner.run(Command.of("echo", "back")).out == "back\n"


def test_a_host_that_is_off_is_lost_and_then_unreachable(lab_factory: Callable[..., Lab]) -> None:
    """Proves: power loss in the middle is ConnectionLost, the next command Unreachable, and dropping it is quick."""
    host = lab_factory(HostSpec("dark")).hosts["dark"]
    with SshPool([replace(target_of(host), connect_timeout=1.0, login_timeout=1.0)]) as pool:
        runner = pool.connect(HostName("dark"), timeout=20)
        power = threading.Timer(0.5, host.power_off)
        power.start()
        with pytest.raises(ConnectionLost):
            runner.run(Command.of("sleep", "78105"))
        power.join()
        with pytest.raises(Unreachable) as caught:
            runner.run(Command.of("true"))
        assert not isinstance(caught.value, LoginRefused | ConnectionLost)
        began = time.monotonic()
        pool.drop(HostName("dark"))
        assert time.monotonic() - began < 0.5


# -- nix ------------------------------------------------------------------------------------------------------


def check_verbs(bench: Bench, name: HostName) -> None:
    """Building a derivation of this store in another without evaluating it again, and reading it."""
    drv = bench.drv("good")
    known = bench.nix.derivation(drv, recursive=True)
    (library,) = known[drv].input_drvs
    assert known[drv].input_drvs[library] == ("out",)
    assert library.name == "library-1.0.drv" and library in known
    assert [source.name for source in known[drv].input_srcs] == ["flake.nix"]
    assert known[drv].env["name"] == "tool-1.0"
    built = bench.nix.build_derivation(drv, store=bench.store(name), timeout=60)
    assert (built.drv, built.out) == (drv, known[drv].outputs["out"])
    assert bench.nix.build_derivation(drv, store=bench.store(name), timeout=60) == built
    documents = bench.drv("documents")
    assert bench.nix.build_derivation(documents, store=bench.store(name), timeout=60).out.name == "documents-1-doc"
    with pytest.raises(BuildFailed, match="does not have wanted outputs"):
        bench.nix.build_derivation(bench.drv("halves"), store=bench.store(name), timeout=60)
    with pytest.raises(BuildFailed, match="failed with exit code 9") as caught:
        bench.nix.build_derivation(bench.drv("quoting"), store=bench.store(name), timeout=60)
    assert "quoting-1> Host key verification failed." in str(caught.value)
    absent = StorePath("/nix/store/00000000000000000000000000000000-absent.drv")
    for ask in (
        lambda: bench.nix.derivation(absent),
        lambda: bench.nix.build_derivation(absent, store=bench.store(name), timeout=60),
    ):
        with pytest.raises(BuildFailed, match=r"is not (a )?valid"):
            ask()
    with pytest.raises(BuildFailed, match="unexpected end-of-file; Connection refused"):
        bench.nix.build(f"{bench.flake}#thrown", store=bench.store(name), timeout=60)


@pytest.mark.parametrize("name", [PLAIN, AWKWARD])
def test_a_derivation_of_this_store_is_built_in_another(bench: Bench, name: HostName) -> None:
    """Proves, with this machine's Nix: build_derivation and derivation for inputs, sources, single other outputs and
    absent derivations; and a failed build or evaluation that quotes every word of a lost connection is BuildFailed.
    """
    bench.pool.connect(name, timeout=20)
    check_verbs(bench, name)


class Inside:
    """Runs commands inside a lab host: an operator's machine with the Nix of the lab's tree."""

    host = "localhost"

    def __init__(self, machine: LabHost) -> None:
        self._machine = machine

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        env = [f"{name}={value}" for name, value in command.env.items()]
        done = self._machine.exec("env", *env, *command.argv, stdin=command.stdin_bytes, check=False, timeout=60)
        for line in done.stderr.decode().splitlines():
            if on_line is not None:
                on_line(line)
        return Result(command, done.returncode, done.stdout, done.stderr)


@pytest.fixture
def newer(lab: Lab) -> Iterator[Bench]:
    """As ``bench``, with builder01's Nix (2.26) as the operator's, on builder01's own disk. The pool's files are in a
    directory that has the same name on that host and here.
    """
    machine = lab.hosts["builder01"]
    place = Path(f"/var/tmp/nixops-{os.getpid()}")
    there = machine.root / str(place)[1:]
    there.mkdir(parents=True)
    place.symlink_to(there)
    key = place / "id"
    shutil.copyfile(machine.identity_file, key)
    key.chmod(0o600)
    try:
        targets = [replace(target_of(host), identity_file=key) for host in lab.hosts.values()]
        with SshPool(targets, runtime=place) as pool:
            flake = make_flake(place / "flake")
            own, _, _ = pool.nix_env()["PATH"].partition(":")
            env = {**OFFLINE, **pool.nix_env(), "PATH": f"{own}:/usr/bin:/bin"}
            yield Bench(flake, pool, Nix(Inside(machine), env=env), lab)
    finally:
        place.unlink()
        shutil.rmtree(there)


def test_a_newer_nix_as_the_operators_does_the_same(newer: Bench) -> None:
    """Proves, with Nix 2.26: the same as above; it neither waits for the word of an ssh that has said it already nor
    reads that word as the daemon's; and all of it is the one login.
    """
    assert newer.nix.version() >= (2, 26)
    newer.pool.connect(PLAIN, timeout=20)
    before = logins(newer.lab.hosts[PLAIN])
    check_verbs(newer, PLAIN)
    assert logins(newer.lab.hosts[PLAIN]) == before


def test_a_newer_nix_works_without_a_shared_connection_too(newer: Bench) -> None:
    """Proves, with Nix 2.26: a login of its own where there is none to share, and where the session is refused."""
    drv = newer.drv("good")
    built = newer.nix.build_derivation(drv, store=newer.store(PLAIN), timeout=60)
    with max_sessions(newer.lab.hosts[PLAIN], 1):
        newer.pool.connect(PLAIN, timeout=20)
        assert newer.nix.build_derivation(drv, store=newer.store(PLAIN), timeout=60) == built


def test_a_daemon_that_is_gone_is_a_fault_of_the_host(bench: Bench) -> None:
    """Proves: where the login's store is the daemon's and that is down, it is Unreachable, with what to look at."""
    host = bench.lab.hosts[AWKWARD]
    bench.pool.connect(AWKWARD, timeout=20)
    host.exec("systemctl", "stop", "nix-daemon.socket", "nix-daemon.service")
    try:
        with pytest.raises(NixopsError) as caught:
            bench.nix.build(f"{bench.flake}#good", store=bench.store(AWKWARD), timeout=60)
    finally:
        host.exec("systemctl", "start", "nix-daemon.socket")
    assert type(caught.value) is Unreachable, caught.value
    assert "the store of gunter cannot be opened" in str(caught.value)
    assert "systemctl status nix-daemon.socket" in str(caught.value)
