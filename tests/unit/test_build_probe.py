"""The probe: what a builder's answer means, the script that gives it, and the one deadline for all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixops.build.model import PoolBuilder, Probe
from nixops.build.probe import MAX_ANSWER, NOT_WAITED_FOR, probe_all, read_answer, reason_of, script
from nixops.errors import CommandTimeout, HostKeyChanged, Interrupted, Unreachable
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.exec import Cancellation, ChunkSink, StreamRunner, cancellable, raise_if_cancelled
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName, System

X86, ARM = System("x86_64-linux"), System("aarch64-linux")
GOOD = """\
begin=1
cores=8
load=0.25
step=disk
disk=4096 1000000 500000 1000 900
step=processes
building=2
step=nix
step=store
code=0
store={"trusted":1,"url":"local","version":"2.26.3"}
end=1
"""


def builder(name: str = "b", **given: object) -> PoolBuilder:
    made = PoolBuilder(SshTarget(HostName(name), Address("192.0.2.1"), host_keys=("ssh-ed25519 AAAA",)), (X86,))
    return replace(made, **given)  # type: ignore[arg-type]  # a field of PoolBuilder


# -- what an answer means -------------------------------------------------------------------------------------


def test_an_answer_is_read_in_full() -> None:
    probe = read_answer(builder(), GOOD, "", 0)
    assert probe == Probe(builder(), nix=(2, 26), cores=8, load=0.25, free=500000 * 4096, building=2)


def test_older_nix_says_its_version_in_another_way() -> None:
    text = GOOD.replace(
        'code=0\nstore={"trusted":1,"url":"local","version":"2.26.3"}',
        "code=1\nstore=warning: $HOME is not yours\nstore=nix-store (Nix) 2.8.0\n"
        "store=error: path '/nix/store/00000000000000000000000000000000-nixops' is not valid",
    )
    probe = read_answer(builder(), text, "", 0)
    assert (probe.reason, probe.nix) == (None, (2, 8))


def test_a_version_that_is_not_a_number_is_not_guessed() -> None:
    assert read_answer(builder(), GOOD.replace("2.26.3", "unknown"), "", 0).nix is None
    assert read_answer(builder(), GOOD.replace("2.26.3", "2.92.0-devpre20250101_abc"), "", 0).nix == (2, 92)


def store(*lines: str, code: int = 1) -> str:
    kept = [line for line in GOOD.splitlines() if not line.startswith(("store=", "code=", "end="))]
    return "\n".join([*kept, f"code={code}", *(f"store={line}" for line in lines), "end=1"])


REASONS = {
    "no nix": (
        GOOD.replace("step=store", "missing=nix\nmissing=nix-store\nmissing=nix-daemon"),
        "it has no Nix on the PATH of this login (nix, nix-store, nix-daemon not found)",
    ),
    "daemon gone": (
        store("error: cannot connect to socket at '/nix/var/nix/daemon-socket/socket': Connection refused"),
        "its nix-daemon is not there: cannot connect to socket",
    ),
    "daemon crashes": (
        store("error:", "       … while opening", "error: Nix daemon disconnected unexpectedly (maybe it crashed?)"),
        "its nix-daemon is not there: Nix daemon disconnected unexpectedly",
    ),
    "daemon hangs": (store(code=124), "its Nix store did not answer in time (is its nix-daemon alive?)"),
    "database": (
        store("error: opening Nix database '/nix/var/nix/db/db.sqlite': unable to open database file"),
        "its Nix store cannot be used: opening Nix database",
    ),
    "disk full as the store opens": (
        store("error: writing to file: No space left on device"),
        "its disk is full: writing to file",
    ),
    "space": (GOOD.replace("500000 1000", "100 1000"), "its store is full: 0 MiB free, less than the 1024 MiB of"),
    "inodes": (GOOD.replace("1000 900", "1000 0"), "its store is full: no inodes are free"),
    "no store": (GOOD.replace("disk=4096", "none=4096"), "how much its store has free cannot be found out"),
    "no shell": ("This account is currently not available.\n", "its login does not run commands as a POSIX shell does"),
    "cut": (GOOD.replace("end=1\n", ""), "its answer to the probe is not whole (exit code 0)"),
    "emulation": (
        GOOD.replace("end=1", "platforms=riscv64-linux\nend=1"),
        "its Nix builds for riscv64-linux and not for x86_64-linux",
    ),
}


@pytest.mark.parametrize("case", list(REASONS))
def test_each_fault_has_a_reason_of_its_own(case: str) -> None:
    text, reason = REASONS[case]
    probe = read_answer(builder(), text, "", 0, min_free=1 << 30)
    assert probe.reason is not None and probe.reason.startswith(reason)


def test_no_two_faults_have_the_same_reason() -> None:
    found = [read_answer(builder(), text, "", 0, min_free=1 << 30).reason for text, _ in REASONS.values()]
    assert len(set(found)) == len(REASONS)


def test_a_probe_that_was_killed_there_says_so_with_its_code() -> None:
    assert read_answer(builder(), GOOD.replace("end=1\n", ""), "", 137).reason == (
        "its answer to the probe is not whole (exit code 137)"
    )


def test_a_login_that_runs_something_else_shows_what_it_said() -> None:
    reason = read_answer(builder(), "", "Welcome\n\x1b[2JThis account is disabled", 1).reason
    assert reason is not None and "This account is disabled" in reason


def test_inodes_of_a_file_system_that_counts_none_are_no_fault() -> None:
    assert read_answer(builder(), GOOD.replace("1000 900", "0 0"), "", 0).usable


def test_df_takes_the_place_of_stat_where_stat_is_another() -> None:
    text = GOOD.replace(
        "disk=4096 1000000 500000 1000 900",
        "df=Filesystem 1024-blocks Used Available Capacity Mounted on\ndf=/dev/disk 3 s1 4194304 2420 4191884 1% /nix",
    )
    assert read_answer(builder(), text, "", 0).free == 4191884 * 1024


def test_systems_that_its_nix_does_not_build_are_taken_out() -> None:
    both = builder(systems=(X86, ARM))
    text = GOOD.replace("end=1", "platforms=i686-linux\nplatforms=x86_64-linux\nend=1")
    assert read_answer(both, text, "", 0).builder.systems == (X86,)
    text = text.replace("i686-linux", "i686-linux aarch64-linux")
    assert read_answer(both, text, "", 0).builder.systems == (X86, ARM)


@given(st.text())
def test_whatever_comes_back_is_a_reason_and_never_an_exception(text: str) -> None:
    assert read_answer(builder(), text, text, 0).reason is not None


@given(st.lists(st.sampled_from(GOOD.splitlines()[1:-1])), st.text(max_size=20))
def test_odd_values_of_known_keys_never_raise(lines: list[str], odd: str) -> None:
    keys = {line.split("=")[0] for line in lines}
    text = "\n".join(["begin=1", *(f"{key}={odd}" for key in keys), "end=1"])
    probe = read_answer(builder(), text, "", 0)
    assert probe.cores is None or probe.cores >= 0


def test_a_reason_is_one_error_in_words_without_what_to_do_next() -> None:
    assert reason_of(HostKeyChanged("THE KEY\x1b[0m CHANGED", hint="do", detail="d")) == "THE KEY\\x1b[0m CHANGED"


# -- the script -----------------------------------------------------------------------------------------------


def run_script(
    directory: Path,
    programs: dict[str, str],
    *,
    shell: str = "sh",
    systems: tuple[str, ...] = (X86,),
    seconds: str = "20",
) -> str:
    """``probe.sh`` with coreutils and only the given programs of Nix, each a shell script."""
    for name in ("uname", "nproc", "stat", "df", "cat", "timeout", "sleep"):
        found = shutil.which(name)
        if found is not None and not (directory / name).exists():
            (directory / name).symlink_to(found)
    for name, text in programs.items():
        (directory / name).write_text(f"#!/bin/sh\n{text}\n")
        (directory / name).chmod(0o755)
    done = subprocess.run(
        [f"/bin/{shell}", "-s", "--", seconds, *systems],
        input=script(),
        capture_output=True,
        text=True,
        env={"PATH": str(directory)},
        timeout=30,
        check=True,
    )
    return done.stdout


INFO = """echo '{"trusted":1,"url":"local","version":"2.26.3"}'"""
NIX = {"nix": INFO, "nix-store": "exit 1", "nix-daemon": "exit 1"}


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_script_needs_nothing_but_a_shell_and_coreutils(tmp_path: Path, shell: str) -> None:
    probe = read_answer(builder(), run_script(tmp_path, NIX, shell=shell), "", 0)
    assert probe.reason is None
    assert (probe.nix, probe.cores) == ((2, 26), len(os.sched_getaffinity(0)))
    assert probe.load is not None and probe.building is not None
    assert probe.free is not None and abs(probe.free - shutil.disk_usage("/nix/store").free) < 2**30


def test_a_host_without_nix_is_told_by_the_script(tmp_path: Path) -> None:
    reason = read_answer(builder(), run_script(tmp_path, {}), "", 0).reason
    assert reason == "it has no Nix on the PATH of this login (nix, nix-store, nix-daemon not found)"


def test_a_store_that_hangs_is_told_by_the_script_and_not_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    text = run_script(tmp_path, {**NIX, "nix": "exec sleep 60"}, seconds="0.5")
    assert read_answer(builder(), text, "", 0).reason == (
        "its Nix store did not answer in time (is its nix-daemon alive?)"
    )
    assert time.monotonic() - began < 10


def test_a_nix_that_heeds_no_signal_to_end_is_not_left_running_on_the_builder(tmp_path: Path) -> None:
    """Proves: the probe ends, and so does what it started there, children too."""
    stubborn = f"trap '' TERM; echo $$ >>{tmp_path}/pids; sleep 61 & echo $! >>{tmp_path}/pids; wait; sleep 61"
    text = run_script(tmp_path, {**NIX, "nix": stubborn}, seconds="0.5")
    assert read_answer(builder(), text, "", 0).reason == (
        "its Nix store did not answer in time (is its nix-daemon alive?)"
    )
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    end = time.monotonic() + 5
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, pids
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("store", '{"version":' + "[" * 40_000),
        ("disk", "9" * 5_000 + " 1 1 1 1"),
        ("disk", "9" * 30 + " 1 " + "9" * 30 + " 9 9"),
        ("df", "x " + "9" * 4_000 + " 1 1 1% /"),
    ],
)
def test_an_answer_without_measure_is_one_that_tells_nothing(key: str, value: str) -> None:
    """Proves: JSON too deep to read and numbers of thousands of digits are no exception and no number."""
    lines = [line for line in GOOD.splitlines() if key == "store" or not line.startswith("disk=")]
    text = "\n".join(f"{key}={value}" if line.startswith(f"{key}=") else line for line in lines)
    probe = read_answer(builder(), text.replace("begin=1", f"begin=1\n{key}={value}") + "\n", "", 0)
    assert (probe.nix if key == "store" else probe.free) is None


def test_an_old_nix_is_asked_in_the_old_way(tmp_path: Path) -> None:
    old = """[ $1 = --version ] && echo 'nix-store (Nix) 2.8.0' && exit
echo "error: path '$2' is not valid" >&2; exit 1"""
    text = run_script(
        tmp_path, {**NIX, "nix": "echo \"error: 'info' is not a recognised command\" >&2; exit 1", "nix-store": old}
    )
    probe = read_answer(builder(), text, "", 0)
    assert (probe.reason, probe.nix) == (None, (2, 8))


def test_a_dead_daemon_is_told_in_its_own_words(tmp_path: Path) -> None:
    dead = "echo \"error: cannot connect to socket at '/nix/var/nix/x': Connection refused\" >&2; exit 1"
    text = run_script(
        tmp_path,
        {**NIX, "nix": dead, "nix-store": f"[ $1 = --version ] && echo 'nix-store (Nix) 2.26.3' || {{ {dead}; }}"},
    )
    reason = read_answer(builder(), text, "", 0).reason
    assert reason is not None and reason.startswith("its nix-daemon is not there: cannot connect to socket")


def test_nix_is_asked_for_its_platforms_only_where_another_kind_is_declared(tmp_path: Path) -> None:
    config = "echo 'extra-platforms = aarch64-linux i686-linux'; echo 'system = x86_64-linux'"
    asked = f"""case "$*" in *"config show"*) {config};; *) {INFO};; esac"""
    native = f"{os.uname().machine}-linux"
    assert "platforms=" not in run_script(tmp_path, {**NIX, "nix": asked}, systems=(native,))
    text = run_script(tmp_path, {**NIX, "nix": asked}, systems=(native, "aarch64-linux", "riscv64-linux"))
    both = builder(systems=(X86, ARM, System("riscv64-linux")))
    assert read_answer(both, text, "", 0).builder.systems == (X86, ARM)


# -- all at once ----------------------------------------------------------------------------------------------


class FakeRunner:
    """Answers as a test says; knows how to be stopped."""

    def __init__(self, name: str, text: str, hang: str | None) -> None:
        self.host = name
        self._text = text
        self._hang = hang

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        return self.stream(command, on_line=on_line)

    def stream(
        self,
        command: Command,
        *,
        stdin: Iterable[bytes] | None = None,
        stdout: ChunkSink | None = None,
        on_line: LineSink | None = None,  # noqa: ARG002 - the seam has it
    ) -> Result:
        assert stdout is not None and stdin is not None and b"".join(stdin) == script().encode()
        if self._hang is not None:
            stdout(self._hang.encode())
            wait(command.timeout or 60)
            raise CommandTimeout("the probe ran past its time")
        stdout(self._text.encode())
        return Result(command, 0, b"", b"", host=self.host)


def wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        raise_if_cancelled()
        time.sleep(0.01)


class Site:
    """An SshPool whose hosts behave as a test says."""

    def __init__(self, **hosts: Callable[[float], StreamRunner]) -> None:
        self.hosts = hosts
        self.stopped: list[str] = []

    def connect(self, name: HostName, *, timeout: float) -> StreamRunner:
        try:
            return self.hosts[name.replace("-", "_")](timeout)
        except Interrupted:
            self.stopped.append(name)
            raise

    @property
    def builders(self) -> list[PoolBuilder]:
        return [builder(name.replace("_", "-")) for name in self.hosts]


def good(_timeout: float) -> StreamRunner:
    return FakeRunner("good", GOOD, None)


def refused(_timeout: float) -> StreamRunner:
    raise Unreachable("connection refused")


def deaf(_timeout: float) -> StreamRunner:
    """Does not keep to its time-out."""
    wait(30)
    raise AssertionError("nobody stopped it")


def hanging(answered: str) -> Callable[[float], StreamRunner]:
    return lambda _timeout: FakeRunner("hanging", "", answered)


def defective(_timeout: float) -> StreamRunner:
    raise ZeroDivisionError


def test_one_that_hangs_keeps_nobody_beyond_the_one_deadline() -> None:
    site = Site(deaf=deaf, good=good, refused=refused, slow=deaf)
    began = time.monotonic()
    probes = probe_all(site.builders, site, deadline=0.6)
    assert 0.5 < time.monotonic() - began < 1.5
    reasons = {str(p.builder.name): p.reason for p in probes}
    silent = "no answer within 0.6 s: the connection did not stand"
    assert reasons == {"deaf": silent, "good": None, "refused": "connection refused", "slow": silent}
    assert [str(p.builder.name) for p in probes] == ["deaf", "good", "refused", "slow"]


def test_whoever_is_late_is_stopped() -> None:
    site = Site(deaf=deaf, good=good)
    probe_all(site.builders, site, deadline=0.3)
    end = time.monotonic() + 5
    while not site.stopped and time.monotonic() < end:
        time.sleep(0.01)
    assert site.stopped == ["deaf"]


@pytest.mark.parametrize(
    ("answered", "reason"),
    [
        ("", "it took the login and then ran nothing"),
        ("begin=1\nstep=disk\n", "its file system does not answer"),
        ("begin=1\nstep=disk\nstep=processes\nstep=nix\nstep=store\n", "its Nix store does not answer"),
    ],
)
def test_how_far_a_silent_builder_came_is_told(answered: str, reason: str) -> None:
    site = Site(b=hanging(answered))
    (probe,) = probe_all(site.builders, site, deadline=0.5)
    assert probe.reason is not None and probe.reason.startswith(f"no answer within 0.5 s: {reason}")


def test_a_builder_that_is_excluded_or_of_another_system_is_not_asked() -> None:
    site = Site(good=good)
    arm = builder("arm", systems=(ARM,))
    unpinned = builder("unpinned", excluded="no host key is pinned")
    probes = probe_all([*site.builders, arm, unpinned], site, deadline=5, systems=[X86])
    assert [(str(p.builder.name), p.reason) for p in probes] == [("good", None), ("unpinned", "no host key is pinned")]


def test_those_that_are_last_are_not_waited_for_when_another_can_be_used() -> None:
    site = Site(deaf=deaf, good=good)
    began = time.monotonic()
    probes = probe_all(site.builders, site, deadline=10, last={HostName("deaf")})
    assert time.monotonic() - began < 5
    assert [p.reason for p in probes] == [NOT_WAITED_FOR, None]


def test_those_that_are_last_are_waited_for_when_there_is_no_other() -> None:
    def late(_timeout: float) -> StreamRunner:
        wait(0.3)
        return FakeRunner("late", GOOD, None)

    site = Site(late=late, refused=refused)
    probes = probe_all(site.builders, site, deadline=10, last={HostName("late")})
    assert [p.reason for p in probes] == [None, "connection refused"]


def test_a_defect_in_one_probe_does_not_take_the_others_along() -> None:
    site = Site(defective=defective, good=good)
    probes = probe_all(site.builders, site, deadline=5)
    assert [p.reason for p in probes] == ["it could not be asked: ZeroDivisionError", None]


def test_each_answer_is_told_as_it_comes() -> None:
    told: list[str] = []
    site = Site(good=good, refused=refused)
    probe_all(site.builders, site, deadline=5, on_probe=lambda p: told.append(str(p.builder.name)))
    assert sorted(told) == ["good", "refused"]


def test_more_than_sixty_four_are_asked_at_once() -> None:
    together = threading.Barrier(80, timeout=20)

    def meet(_timeout: float) -> StreamRunner:
        together.wait()
        return FakeRunner("b", GOOD, None)

    site = Site(**{f"b{n}": meet for n in range(80)})
    assert all(p.usable for p in probe_all(site.builders, site, deadline=20))


def test_an_interrupt_stops_all_of_them_at_once() -> None:
    site = Site(deaf=deaf, other=deaf)
    switch = Cancellation()
    threading.Timer(0.2, switch.cancel).start()
    began = time.monotonic()
    with cancellable(switch), pytest.raises(Interrupted):
        probe_all(site.builders, site, deadline=30)
    assert time.monotonic() - began < 5


def test_an_endless_answer_is_not_kept() -> None:
    class Endless(FakeRunner):
        def stream(self, command: Command, **given: object) -> Result:
            sink = given["stdout"]
            for _ in range(100):
                sink(b"x" * MAX_ANSWER)  # type: ignore[operator]  # a ChunkSink
            return Result(command, 0, b"", b"")

    site = Site(b=lambda _timeout: Endless("b", "", None))
    (probe,) = probe_all(site.builders, site, deadline=5)
    assert probe.reason == "its login does not run commands as a POSIX shell does"


def test_nobody_to_ask_is_no_wait() -> None:
    assert probe_all([], Site(), deadline=30) == ()
