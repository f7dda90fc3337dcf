"""SshRunner against real hosts: OpenSSH's sshd, real sudo, real signals, a cable that can be pulled."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nixops.errors import (
    CommandTimeout,
    ConnectionLost,
    HostKeyChanged,
    HostKeyUnknown,
    Interrupted,
    LoginRefused,
    Unreachable,
)
from nixops.lab.lab import HostSpec, Lab, LabHost
from nixops.lab.recipe import TOOLS, sudo_password
from nixops.secret import Secret
from nixops.transport.command import Command
from nixops.transport.exec import Cancellation, cancellable
from nixops.transport.fleet import fan_out
from nixops.transport.local import LocalRunner
from nixops.transport.openssh import OpenSshFiles
from nixops.transport.ssh import SshRunner, fingerprint, offered_host_key, reachable
from tests.lab.reaching import eventually, processes, runner_of, target_of, wait_for

MIB = 1024 * 1024


@pytest.fixture(params=["root", "sudo with a password", "sudo without a password"])
def elevated(request: pytest.FixtureRequest, lab: Lab) -> LabHost:
    """Each way to be root on a host."""
    if request.param == "root":
        return lab.hosts["nix-cache02"]
    host = lab.hosts["gunter"]
    host.sudo_mode("password" if "with a" in request.param else "nopasswd")
    request.addfinalizer(lambda: host.sudo_mode("password"))
    return host


def test_a_command_runs_as_root_however_root_is_reached(elevated: LabHost) -> None:
    """Proves: uid 0, stdin, variables, outputs and exit code are the payload's, on real sshd and sudo."""
    script = 'id -u; cat; printf %s "$V"; echo err >&2; exit 3'
    with runner_of(elevated) as runner:
        result = runner.run(
            Command.of("sh", "-c", script, stdin="first line\nsecond", env={"V": "a 'b' $c"}, root=True)
        )
        assert result.out == "0\nfirst line\nseconda 'b' $c"
        assert (result.code, result.err) == (3, "err\n")
        assert runner.run(Command.of("sh", "-c", "kill -SEGV $$", root=True)).code == -signal.SIGSEGV


def test_a_hundred_mebibytes_go_through_both_ways(elevated: LabHost) -> None:
    """Proves: no deadlock and not one byte lost or added, with sudo and its password line in front of the data."""
    data = os.urandom(MIB) * 100
    with runner_of(elevated) as runner:
        result = runner.run(Command.of("cat", stdin=data, root=True, timeout=120))
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()


def test_the_password_is_in_no_argument_and_no_environment_on_the_host(awkward: LabHost) -> None:
    """Proves: while sudo runs the payload, no process of the host carries the password where others could read it."""
    with runner_of(awkward) as runner:
        thread = threading.Thread(target=runner.run, args=(Command.of("sleep", "4.321", root=True),))
        thread.start()
        assert eventually(lambda: bool(processes(awkward, "sleep 4.321")))
        seen = awkward.exec("sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null; true").stdout
        thread.join()
    assert b"sleep" in seen
    assert sudo_password().encode() not in seen


def test_a_wrong_sudo_password_is_tried_once(awkward: LabHost) -> None:
    """Proves: real sudo asks three times, we answer once, and later commands do not ask again (no lock-out)."""
    with SshRunner(target_of(awkward), sudo_password=lambda: Secret("not-the-password")) as runner:
        with pytest.raises(LoginRefused, match="did not take the password"):
            runner.run(Command.of("true", root=True))
        started = time.monotonic()
        with pytest.raises(LoginRefused, match="did not take the password"):
            runner.run(Command.of("true", root=True))
        assert time.monotonic() - started < 0.1
        # sudo itself says how often it was answered, once it has noticed that nobody is there any more.
        said = eventually(lambda: b"1 incorrect password attempt" in journal(awkward))
    assert said, journal(awkward)[-2000:]
    assert b"2 incorrect password attempts" not in journal(awkward)


def journal(host: LabHost) -> bytes:
    return host.exec("journalctl", "-q", "--no-pager", "-t", "sudo", check=False).stdout


def test_a_sudo_that_wants_a_password_nobody_gave_says_where_to_put_it(awkward: LabHost) -> None:
    """Proves: without sudo_password in the inventory the command ends at once, with the way out."""
    with SshRunner(target_of(awkward)) as runner, pytest.raises(LoginRefused, match="set sudo_password of gunter"):
        runner.run(Command.of("true", root=True))


def test_a_command_past_its_time_is_gone_from_the_host_even_if_it_ignores_term(elevated: LabHost) -> None:
    """Proves: the time-out stops the process group there, by TERM or by KILL, as root and through sudo."""
    with runner_of(elevated) as runner:
        with pytest.raises(CommandTimeout):
            runner.run(Command.of("sleep", "77001", timeout=1.0, root=True))
        assert eventually(lambda: not processes(elevated, "sleep 77001"), 3)
        with pytest.raises(CommandTimeout):
            script = "trap '' TERM; while :; do sleep 77002; done"
            runner.run(Command.of("sh", "-c", script, timeout=1.0, root=True))
        assert eventually(lambda: not processes(elevated, "77002"), 3)
        assert runner.run(Command.of("echo", "still here")).out == "still here\n"


OPERATOR = """\
import sys
from pathlib import Path
from nixops.secret import Secret
from nixops.transport.command import Command
from nixops.transport.ssh import SshRunner
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName

name, address, user, key, identity, *argv = sys.argv[1:]
password = sys.stdin.readline().strip()
target = SshTarget(HostName(name), Address(address), user=user, host_keys=(key,), identity_file=Path(identity))
with SshRunner(target, sudo_password=lambda: Secret(password)) as runner:
    runner.run(Command.of(*argv, root=True, timeout=None))
"""


def operator(host: LabHost, *argv: str) -> subprocess.Popen[bytes]:
    """A process of an operator of its own, that runs ``argv`` as root on the host."""
    target = target_of(host)
    arguments = (target.name, target.address, target.user, target.host_keys[0], host.identity_file)
    process = subprocess.Popen(
        [sys.executable, "-c", OPERATOR, *map(str, arguments), *argv], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(f"{sudo_password()}\n".encode())
    return process


def test_interrupting_the_operator_stops_what_runs_on_the_host(elevated: LabHost) -> None:
    """Proves: Ctrl-C (SIGINT to the operator's process) ends a remote command, as root and through sudo."""
    process = operator(elevated, "sleep", "77003")
    try:
        assert eventually(lambda: bool(processes(elevated, "sleep 77003")))
        process.send_signal(signal.SIGINT)
        process.wait(15)
        assert eventually(lambda: not processes(elevated, "sleep 77003"), 3)
    finally:
        process.kill()
        process.wait()


def test_an_interrupt_is_heard_although_the_host_is_cut_off(elevated: LabHost) -> None:
    """Proves: at a host that does not answer any more, Ctrl-C waits seconds for the stop there, and not for ever."""
    process = operator(elevated, "sleep", "77010")
    try:
        assert eventually(lambda: "sleep 77010" in processes(elevated), 20)
        elevated.partition(True)
        process.send_signal(signal.SIGINT)
        process.wait(15)
    finally:
        elevated.partition(False)
        process.kill()
        process.wait()
        elevated.exec(f"{TOOLS}/pkill", "-KILL", "-f", "sleep 77010", check=False)


SLOW = """\
derivation {
  name = "slow"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/opt/lab/tools";
  args = [ "-c" "sleep 77004" ]; salt = "%s";
}
"""


@pytest.mark.parametrize("moment", ["its client is there", "its builder runs"])
def test_interrupting_the_operator_stops_a_build_on_the_host(elevated: LabHost, moment: str) -> None:
    """Proves: the builder that a remote ``nix-build`` has the daemon run is gone after Ctrl-C, not only its client."""
    expression = SLOW % os.urandom(8).hex()
    process = operator(elevated, "nix-build", "--no-out-link", "--option", "sandbox", "false", "-E", expression)
    try:
        # The client has these words among its arguments before there is a builder, whose whole line they are.
        seen = (lambda line: line == "sleep 77004") if "builder" in moment else bool
        assert eventually(lambda: any(map(seen, processes(elevated, "sleep 77004"))), 20)
        process.send_signal(signal.SIGINT)
        process.wait(15)
        # TERM, and after a grace of 5 s KILL, over a second login on a machine that the other tests keep busy.
        assert eventually(lambda: not processes(elevated, "sleep 77004"), 20)
    finally:
        process.kill()
        process.wait()


def test_what_is_cancelled_while_it_starts_runs_whole_or_not_at_all_and_is_gone(
    elevated: LabHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves: at no moment between sudo's password and the payload's first word does a cancelled command go on, and
    none ever takes the end of a stdin that was cut off for an empty one.
    """
    monkeypatch.setattr("nixops.transport.exec.TICK", 0.001)  # as soon as Ctrl-C strikes the main thread

    def given() -> list[str]:
        return elevated.exec("cat", "/run/given", check=False).stdout.decode().split()

    def once_read(switch: Cancellation, former: list[str]) -> None:
        eventually(lambda: given() != former)
        switch.cancel()

    script = 'given=$(cat); echo "<$given>" >>/run/given; sleep 77011'
    with runner_of(elevated) as runner:
        runner.run(Command.of("true", root=True))
        for seconds in (0.0, 0.006, 0.012, 0.018, 0.024, 0.03, 0.04, None):
            switch = Cancellation()
            timer: threading.Thread
            if seconds is None:
                timer = threading.Thread(target=once_read, args=(switch, given()))
            else:
                timer = threading.Timer(seconds, switch.cancel)
            timer.start()
            with cancellable(switch), pytest.raises(Interrupted):
                runner.run(Command.of("sh", "-c", script, stdin="whole", root=True))
            timer.join()
        assert eventually(lambda: not processes(elevated, "sleep 77011"), 3), processes(elevated, "77011")
    assert set(given()) == {"<whole>"}
    elevated.exec("rm", "/run/given")


def test_a_command_that_takes_no_term_is_killed_with_what_it_put_into_another_session(elevated: LabHost) -> None:
    """Proves: the builder of a Nix that does not hear an interrupt (NixOS/nix#7245) does not outlive it."""
    script = "trap '' TERM; setsid sleep 77007 & while :; do sleep 77008; done"
    with runner_of(elevated) as runner, pytest.raises(CommandTimeout):
        runner.run(Command.of("sh", "-c", script, timeout=0.5, root=True))
    assert eventually(lambda: not processes(elevated, "sleep 7700"), 3)


def test_many_commands_at_once_stay_within_what_sshd_allows(plain: LabHost) -> None:
    """Proves: 40 commands from 40 threads over one connection all run, though sshd takes ten sessions."""
    with runner_of(plain) as runner:
        outcomes = fan_out(
            range(40), lambda n: runner.run(Command.of("sh", "-c", f"sleep 0.1; echo {n}")).out, limit=40
        )
    assert [outcome.unwrap() for outcome in outcomes] == [f"{n}\n" for n in range(40)]


def test_commands_that_end_without_reading_their_stdin_do_not_end_the_connection(plain: LabHost) -> None:
    """Proves that nothing follows a channel's CLOSE, which OpenSSH answers by ending the whole connection."""
    stdin = b"x" * 100_000
    with runner_of(plain) as runner:
        # $PPID of the shell is the session's own process: the same for all means one connection carried them all.
        commands = [Command.of("sh", "-c", "echo $PPID; exit 3", stdin=stdin, timeout=60.0) for _ in range(400)]
        outcomes = fan_out(commands, runner.run, limit=16)
    assert [o.error for o in outcomes if not o.ok] == []
    assert {o.unwrap().code for o in outcomes} == {3} and len({o.unwrap().out for o in outcomes}) == 1


def test_a_dead_network_is_noticed_in_the_middle_of_a_command(lab_factory: Callable[..., Lab]) -> None:
    """Proves: with the cable pulled, a silent command ends with ConnectionLost after three missed signs of life, a new
    connection says that there is no answer, and after plugging it in again the same runner works.
    """
    host = lab_factory(HostSpec("cable")).hosts["cable"]
    with runner_of(host) as runner:
        runner.run(Command.of("true")).check()
        pulled: list[float] = []

        def pull() -> None:
            wait_for(lambda: "sleep 77005" in processes(host), 60, "it runs")
            host.partition(True)
            pulled.append(time.monotonic())

        cable = threading.Thread(target=pull)
        cable.start()
        with pytest.raises(ConnectionLost, match="cable was lost while sleep ran"):
            runner.run(Command.of("sleep", "77005", timeout=120))
        cable.join()
        assert time.monotonic() - pulled[0] < 15
        with pytest.raises(Unreachable, match="cannot be reached on port 22"):
            reachable(replace(target_of(host), connect_timeout=2.0))
        host.partition(False)
        assert runner.run(Command.of("echo", "back")).out == "back\n"


def test_a_host_that_is_off_is_unreachable_and_says_so(lab_factory: Callable[..., Lab]) -> None:
    """Proves: power loss in the middle of a command is ConnectionLost, and a login to the dead host is Unreachable."""
    host = lab_factory(HostSpec("dark")).hosts["dark"]
    with runner_of(host) as runner:
        runner.run(Command.of("true")).check()

        def pull() -> None:
            wait_for(lambda: "sleep 77006" in processes(host), 60, "it runs")
            host.power_off()

        power = threading.Thread(target=pull)
        power.start()
        with pytest.raises(ConnectionLost):
            runner.run(Command.of("sleep", "77006", timeout=120))
        power.join()  # of a host's processes the sshd that listens need not be the first to end
    with pytest.raises(Unreachable, match="cannot be reached on port 22") as caught:
        reachable(replace(target_of(host), connect_timeout=2.0))
    assert not isinstance(caught.value, LoginRefused)


def test_host_keys_of_a_real_sshd_are_pinned(plain: LabHost, lab: Lab) -> None:
    """Proves: unknown and changed keys are two errors with the fingerprints that ``ssh-keygen`` shows on the host,
    and while a key is being replaced, both may be pinned.
    """
    target = target_of(plain)
    offered = offered_host_key(replace(target, host_keys=()))
    with pytest.raises(HostKeyUnknown) as unknown:
        reachable(replace(target, host_keys=()))
    assert fingerprint(offered) in str(unknown.value)
    other = " ".join(lab.hosts["builder01"].host_key.split()[:2])
    with pytest.raises(HostKeyChanged) as changed:
        reachable(replace(target, host_keys=(other,)))
    assert fingerprint(other) in str(changed.value)
    assert fingerprint(target.host_keys[0]) in str(changed.value)
    shown = plain.exec("ssh-keygen", "-l", "-f", "/etc/ssh/ssh_host_ed25519_key.pub").stdout.decode()
    assert fingerprint(target.host_keys[0]) == shown.split()[1]
    reachable(replace(target, host_keys=(other, target.host_keys[0])))


def test_a_login_that_the_host_refuses_names_the_key(plain: LabHost, tmp_path: Path) -> None:
    """Proves: a key that sshd does not know is LoginRefused with that key's fingerprint."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "id"], check=True)
    with pytest.raises(LoginRefused) as caught:
        reachable(replace(target_of(plain), identity_file=tmp_path / "id"))
    assert fingerprint((tmp_path / "id.pub").read_text()) in str(caught.value)


def test_openssh_reaches_the_hosts_with_the_generated_files_only(lab: Lab, tmp_path: Path) -> None:
    """Proves: ``ssh -F`` with our files logs in to each host by its inventory name, whatever the user's own files say,
    and refuses a changed key and a host that is not in them.
    """
    hosts = list(lab.hosts.values())
    local = LocalRunner(env={"HOME": str(tmp_path)})
    with OpenSshFiles([target_of(host) for host in hosts]) as files:
        for host in hosts:
            ran = local.run(Command.of("ssh", "-F", files.config, host.name, "hostname")).check()
            assert ran.out.strip() == host.name
        stranger = local.run(Command.of("ssh", "-F", files.config, hosts[0].address, "true"))
        assert stranger.code == 255
        assert "Host key verification failed" in stranger.err
    swapped = replace(target_of(hosts[0]), host_keys=target_of(hosts[1]).host_keys)
    with OpenSshFiles([swapped]) as files:
        changed = local.run(Command.of("ssh", "-F", files.config, hosts[0].name, "true"))
    assert changed.code == 255
    assert "IDENTIFICATION HAS CHANGED" in changed.err


def test_an_interrupt_leaves_none_of_the_generated_files(tmp_path: Path) -> None:
    """Proves: the private directory is gone when the operator's process ends by SIGINT in the middle of its use."""
    script = textwrap.dedent("""\
        import time
        from nixops.transport.openssh import OpenSshFiles
        files = OpenSshFiles([])
        files.__enter__()
        print(files.directory, flush=True)
        time.sleep(60)
    """)
    environment = {**os.environ, "TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert process.stdout is not None
    directory = Path(process.stdout.readline().decode().strip())
    assert directory.is_dir()
    process.send_signal(signal.SIGINT)
    process.wait(10)
    assert not directory.exists()
