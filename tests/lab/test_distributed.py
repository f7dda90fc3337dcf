"""`invoke build --distributed`: Nix's own distributed builds over real hosts, of which some die."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nixops.build.distributed import Distributed, build_distributed
from nixops.build.session import BuildSession
from nixops.errors import BuildFailed, Interrupted, NoBuilder, UsageError
from nixops.lab.lab import HostSpec, Lab, LabHost
from nixops.transport.exec import Cancellation, cancellable
from nixops.values import AttrPath, FlakeRef, System
from tests.lab.caching import dead_entry, host_entry, inventory, make_flake, session_of
from tests.lab.reaching import SYSTEM, eventually, processes

pytestmark = pytest.mark.usefixtures("nix_of_the_lab")

ONE = {"builder": {"max_jobs": 1}}
OTHER = {"builder": {"max_jobs": 2, "features": ["kvm"], "systems": [SYSTEM, "aarch64-linux"]}}


@pytest.fixture(scope="module")
def hosts(lab_factory: Callable[..., Lab]) -> Lab:
    """Three builders; ``other`` also builds for another architecture, and ``small`` has next to no disk."""
    made = lab_factory(HostSpec("one"), HostSpec("other"), HostSpec("small", disk_mib=64))
    other = made.hosts["other"]
    config = "extra-platforms = aarch64-linux\nsystem-features = kvm\n"
    other.exec("sh", "-c", "cat >>/etc/nix/nix.conf; systemctl restart nix-daemon", stdin=config.encode())
    return made


class Bench:
    """A flake, a pool and what was said."""

    def __init__(self, directory: Path, session: BuildSession, said: list[str]) -> None:
        self.flake = FlakeRef(str(make_flake(directory / "flake")))
        self.session = session
        self.said = said

    def build(self, attribute: str, **options: object) -> Distributed:
        return build_distributed(
            self.flake,
            AttrPath(attribute),
            self.session,
            on_event=self.said.append,
            **options,  # type: ignore[arg-type]  # each test names its own
        )


@contextmanager
def once(host: LabHost, words: str, act: Callable[[], object]) -> Iterator[None]:
    """Do something to a build when a process of it runs on the host; also where none comes, so that the build ends."""
    over = threading.Event()
    came = threading.Event()

    def look() -> bool:
        if processes(host, words):
            came.set()
        return came.is_set() or over.is_set()

    def run() -> None:
        try:
            eventually(look, 90)
        finally:
            if not over.is_set():
                act()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert came.is_set(), f"{words} did not run on {host.name}"


@pytest.fixture
def bench(hosts: Lab, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """``bench(name=settings, …)`` makes a pool of those of the lab's hosts; ``dead`` is one that is not there."""
    sessions: list[BuildSession] = []

    def make(**entries: dict[str, object]) -> Bench:
        listed = {
            name: dead_entry(hosts, **more) if name == "dead" else host_entry(hosts.hosts[name], **more)
            for name, more in entries.items()
        }
        said: list[str] = []
        # Only a builder that is not there makes a probe last that long.
        timeout = 2.0 if set(entries) == {"dead"} else 6.0 if "dead" in entries else 30.0
        loaded = inventory(tmp_path, listed, build={"probe_timeout": timeout, "min_free": 0})
        sessions.append(session_of(loaded, tmp_path, said).__enter__())
        return Bench(tmp_path, sessions[-1], said)

    yield make
    for session in sessions:
        session.__exit__(None, None, None)


def test_a_graph_is_shared_out_and_its_result_is_here(bench: Callable[..., Bench], tmp_path: Path) -> None:
    """Proves: no part is built here, both builders take some, the result is in this machine's store with a root; a
    builder that is not there is left out with a word and costs no more than the probe.
    """
    made = bench(one=ONE, other=OTHER, dead=ONE)
    begin = time.monotonic()
    result = made.build("quick", out_link=tmp_path / "result")
    assert time.monotonic() - begin < 6.0 + 13  # the probe's time, and what it may take without
    assert not any("cannot build on" in line for line in made.said)
    (output,) = result.outputs
    assert set(output.path and Path(output.path).read_text().split()) == {"one", "other"}
    assert (tmp_path / "result").resolve() == Path(output.path)
    assert sum(result.builders.values()) == 5 and set(result.builders) == {"one", "other"}
    document = result.document()
    assert document["schema"] == "nixops/build/1" and document["outputs"][0]["builder"] in ("one", "other")
    assert [tried["builder"] for tried in document["tried"]] == ["dead"]
    assert any(line.startswith("dead is left out: ") for line in made.said)
    assert any(line.startswith("building part-1-0.2 on ") for line in made.said)
    assert result.rows() == [(SYSTEM, output.builder, output.path)]
    # Again: nothing is built, and that is said.
    again = made.build("quick")
    assert (again.builders, again.rows()[0][1]) == ({}, "was there")


def test_a_system_and_a_feature_go_to_the_builder_that_has_them(bench: Callable[..., Bench]) -> None:
    """Proves: Nix is told of each builder's systems and features; several systems at once are one build."""
    made = bench(one=ONE, other=OTHER)
    assert made.build("kvm").builders == {"other": 1}
    result = made.build("both.{system}", systems=[System("aarch64-linux"), System(SYSTEM)])
    assert {output.system for output in result.outputs} == {"aarch64-linux", SYSTEM}
    by_system = {output.system: Path(output.path).read_text().strip() for output in result.outputs}
    assert by_system[System("aarch64-linux")] == "other"
    assert made.build("other", systems=[System("aarch64-linux")]).builders == {"other": 1}
    with pytest.raises(UsageError, match="one attribute, and 2 systems"):
        made.build("both", systems=[System("aarch64-linux"), System(SYSTEM)])


def test_what_no_builder_fits_says_what_it_needs_and_what_there_is(bench: Callable[..., Bench]) -> None:
    """Proves: exit 3 with the system that is missing and each builder's own, at once and not after a stall."""
    made = bench(one=ONE, dead=ONE)
    for attribute, options, need in (
        ("kvm", {}, "kvm"),
        ("none", {"systems": [System("riscv64-linux")]}, "riscv64-linux"),
    ):
        with pytest.raises(NoBuilder) as caught:
            made.build(attribute, **options)
        assert need in caught.value.message
        assert f"one: builds {SYSTEM}; features: none" in str(caught.value)
        assert "dead: " in str(caught.value)
        assert caught.value.exit_code == 3


def test_all_dead_is_told_within_the_probes_deadline(bench: Callable[..., Bench]) -> None:
    """Proves: exit 3 with the reason, within the deadline and not after nix's own time-outs."""
    made = bench(dead=ONE)
    made.session.ssh  # noqa: B018 - made beforehand: its own start is no part of the deadline
    begin = time.monotonic()
    with pytest.raises(NoBuilder, match="no builder of the pool can be used"):
        made.build("quick")
    assert time.monotonic() - begin < 4.0


def test_a_failed_build_is_no_builders_fault(bench: Callable[..., Bench]) -> None:
    """Proves: the end of its log is shown, it is not tried elsewhere, and no builder is left out for it, though the
    log speaks of a refused connection.
    """
    made = bench(one=ONE, other=OTHER)
    with pytest.raises(BuildFailed) as caught:
        made.build("bad")
    assert "exit code 3" in caught.value.message
    assert "bad> two: Connection refused" in str(caught.value)
    assert not any("left out" in line for line in made.said)
    assert not made.session.quarantine.names()
    with pytest.raises(BuildFailed, match="nothing"):
        made.build("nothing")


def test_a_full_disk_moves_the_build_to_the_next(bench: Callable[..., Bench]) -> None:
    """Proves: no space on one builder is that builder's fault: the other builds it, and the first is left out."""
    fast = {"builder": {"max_jobs": 1, "speed_factor": 100}}
    made = bench(small=fast, one=ONE)
    result = made.build("fills")
    assert result.outputs[0].builder == "one"
    assert [out.builder for out in result.left_out] == ["small"]
    assert "the disk of small is full" in result.left_out[0].reason
    assert made.session.quarantine.names() == {"small"}


def test_a_builder_that_dies_in_the_middle_does_not_end_the_build(
    lab_factory: Callable[..., Lab], tmp_path: Path
) -> None:
    """Proves: power loss on one of two: the graph is finished on the other, what was built stays built, and it is said
    who was lost; when the last one dies too, that is exit 3 and no failed build.
    """
    mortal = lab_factory(HostSpec("first"), HostSpec("second"))
    entries = {name: host_entry(host, builder={"max_jobs": 2}) for name, host in mortal.hosts.items()}
    said: list[str] = []
    loaded = inventory(tmp_path, entries, build={"probe_timeout": 20.0, "min_free": 0})
    with session_of(loaded, tmp_path, said) as session:
        made = Bench(tmp_path, session, said)

        first, second = mortal.hosts["first"], mortal.hosts["second"]
        with once(first, "sleep 5", first.power_off):
            result = made.build("slow")
        assert Path(result.outputs[0].path).read_text().split().count("second") >= 3
        assert [out.builder for out in result.left_out] == ["first"]
        assert any(line.startswith("first is left out: ") for line in said)
        assert session.quarantine.names() == {"first"}

        # The last one is lost another way: its cable is pulled, so nobody closes the connection.
        with once(second, "sleep 77202", lambda: second.partition(True)), pytest.raises(NoBuilder) as caught:
            made.build("endless")
        assert "first: " in str(caught.value) and "second: " in str(caught.value)


def test_a_builder_that_stops_in_the_middle_and_answers_again_is_asked_once_more(
    bench: Callable[..., Bench], hosts: Lab
) -> None:
    """Proves: a daemon that is killed while it builds is no failed build: the graph is finished on the same builder."""
    made = bench(one={"builder": {"max_jobs": 4}})
    one = hosts.hosts["one"]
    kill = (
        "for f in /proc/[0-9]*; do case $(tr '\\0' ' ' <$f/cmdline 2>/dev/null) in "
        "'nix-daemon --stdio '*) kill -9 ${f#/proc/};; esac; done; true"
    )

    with once(one, "sleep 5", lambda: one.exec("sh", "-c", kill)):
        result = made.build("slow")
    assert result.outputs[0].builder == "one" and not result.left_out
    assert "one was lost in the middle, and answers again: once more" in made.said


def test_an_interrupt_leaves_no_builder_process(bench: Callable[..., Bench], hosts: Lab) -> None:
    """Proves: when the operator interrupts, what runs on the builder ends too."""
    made = bench(one=ONE)
    switch = Cancellation()
    one = hosts.hosts["one"]
    with once(one, "sleep 77202", switch.cancel), cancellable(switch), pytest.raises(Interrupted):
        made.build("endless")
    assert eventually(lambda: not processes(one, "sleep 77202"), 20)
