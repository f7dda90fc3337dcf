"""What moves a build to the next builder, and what does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nixops.build.claims import Claims
from nixops.build.failover import doubtful, infrastructure_fault, no_builder, with_failover
from nixops.build.model import PoolBuilder, Probe, Tried
from nixops.build.quarantine import Quarantine
from nixops.build.rank import rank
from nixops.errors import (
    BuildFailed,
    CommandTimeout,
    ConnectionLost,
    ExitCode,
    HostFault,
    HostKeyChanged,
    Interrupted,
    LoginRefused,
    NixopsError,
    NoBuilder,
    RegistryError,
    Unreachable,
)
from nixops.nix.log import NixLog, explain
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName, System

X86 = System("x86_64-linux")


def answer(name: str, **given: object) -> Probe:
    builder = PoolBuilder(SshTarget(HostName(name), Address("192.0.2.1")), (X86,), max_jobs=4)
    return replace(Probe(builder, nix=(2, 26), cores=4, load=0.0, free=10**12, building=0), **given)  # type: ignore[arg-type]  # a field of Probe


class Site:
    """A pool whose answers a test sets, and a record of what was asked."""

    def __init__(self, directory: Path, *probes: Probe) -> None:
        self.probes = list(probes)
        self.claims = Claims(directory / "claims")
        self.quarantine = Quarantine(directory / "quarantine.json", 300)
        self.asked: list[frozenset[HostName]] = []
        self.tried: list[Tried] = []
        self.chosen: list[str] = []

    def candidates(self, excluded: frozenset[HostName]) -> Sequence[Probe]:
        self.asked.append(excluded)
        return [probe for probe in self.probes if probe.builder.name not in excluded]

    def run(
        self,
        work: Callable[[Probe], str],
        ask_again: Callable[[Probe], Probe] | None = None,
        features: frozenset[str] = frozenset(),
    ) -> tuple[str, tuple[Tried, ...]]:
        return with_failover(
            self.candidates,
            work,
            system=X86,
            order=lambda probes: rank(probes, X86, features),
            claims=self.claims,
            quarantine=self.quarantine,
            ask_again=ask_again,
            on_chosen=lambda probe: self.chosen.append(str(probe.builder.name)),
            on_tried=self.tried.append,
        )


def failing(errors: dict[str, NixopsError]) -> Callable[[Probe], str]:
    def work(probe: Probe) -> str:
        name = str(probe.builder.name)
        if name in errors:
            raise errors[name]
        return f"built on {name}"

    return work


UNFIT = "a 'aarch64-linux' with features {} is required to build '/nix/store/x.drv', but I am a 'x86_64-linux' with {}"
UNFIT_NEW = "Cannot build '/nix/store/x.drv'.\nReason: platform mismatch\nRequired system: 'aarch64-linux'"
FULL = HostFault("the disk of a is full: building x failed", detail="error: writing: No space left on device")


@pytest.mark.parametrize(
    "error",
    [
        Unreachable("connection refused"),
        ConnectionLost("the store of a was lost"),
        LoginRefused("it refused the login"),
        HostKeyChanged("ANOTHER KEY"),
        FULL,
        HostFault("a opens no further session"),
        BuildFailed("building x failed", detail=UNFIT),
        BuildFailed("building x failed", detail=UNFIT_NEW),
    ],
    ids=lambda e: f"{type(e).__name__}: {e.message}" if isinstance(e, NixopsError) else "",
)
def test_an_infrastructure_fault_moves_the_work_to_the_next_builder(tmp_path: Path, error: NixopsError) -> None:
    site = Site(tmp_path, answer("a"), answer("b"))
    value, tried = site.run(failing({"a": error}))
    assert value == "built on b"
    assert tried == (Tried("a", X86, error.message),) == tuple(site.tried)
    assert site.chosen == ["a", "b"]
    # The second choice is by fresh answers, without the first builder, which stays out for others too.
    assert site.asked == [frozenset(), frozenset({HostName("a")})]
    assert site.quarantine.names() == {HostName("a")}
    assert site.claims.count(HostName("a")) == site.claims.count(HostName("b")) == 0


@pytest.mark.parametrize(
    "error",
    [
        BuildFailed("building x failed: builder failed with exit code 1", detail="x> No space in my program"),
        HostFault("nix is not installed on this machine"),
        HostFault("git on this machine, and not on a: No space left on device"),
        HostFault("the disk of b-a is full", detail="No space left on device"),
        HostFault("/home/op/.local/state/nixops/claims cannot be written: No space left on device"),
        RegistryError("503"),
        Interrupted("stopped"),
        CommandTimeout("nix build on a ran past its 7200 s"),
        NoBuilder("another pool is empty"),
    ],
    ids=lambda e: f"{type(e).__name__}: {e.message}" if isinstance(e, NixopsError) else "",
)
def test_a_failure_of_the_work_is_raised_at_once_and_blames_no_builder(tmp_path: Path, error: NixopsError) -> None:
    site = Site(tmp_path, answer("a"), answer("b"))
    with pytest.raises(type(error)) as caught:
        site.run(failing({"a": error}))
    assert caught.value is error
    assert (site.chosen, site.tried, site.quarantine.names()) == (["a"], [], frozenset())


def test_a_real_log_of_nix_with_a_wrong_platform_is_the_builders_fault() -> None:
    log = NixLog()
    log.feed(
        '@nix {"action":"msg","level":0,"msg":"error: a \'aarch64-linux\' with features {} is required to build '
        "'/nix/store/mp0vjc4dyfwrnhb8p2ql5pn8f5lmn7a9-x.drv', but I am a 'x86_64-linux' with features {benchmark}\"}"
    )
    assert infrastructure_fault(explain(log, "building x", "a"), HostName("a"))


def test_a_log_that_only_quotes_a_wrong_platform_is_the_builds_fault_when_nix_says_exit_code() -> None:
    log = NixLog()
    drv = "/nix/store/mp0vjc4dyfwrnhb8p2ql5pn8f5lmn7a9-x.drv"
    events = [
        {"action": "start", "id": 1, "type": 105, "fields": [drv]},
        {"action": "result", "id": 1, "type": 101, "fields": ["a 'x' is required to build y, but I am a poet"]},
        {"action": "result", "id": 1, "type": 101, "fields": ["failed due to signal 9"]},
        {"action": "msg", "level": 0, "msg": f"error: builder for '{drv}' failed with exit code 1"},
    ]
    for event in events:
        log.feed("@nix " + json.dumps(event))
    error = explain(log, "building x", "a")
    assert "but I am a poet" in str(error)
    assert not infrastructure_fault(error, HostName("a")) and not doubtful(error)


@pytest.mark.parametrize(
    "error",
    [
        CommandTimeout("nix build on a ran past its 7200 s"),
        BuildFailed("building x failed: builder for x failed due to signal 9 (Killed)"),
    ],
    ids=["time-out", "signal"],
)
def test_a_doubtful_failure_is_decided_by_asking_the_builder_again(tmp_path: Path, error: NixopsError) -> None:
    assert doubtful(error)
    site = Site(tmp_path, answer("a"), answer("b"))
    with pytest.raises(type(error)):
        site.run(failing({"a": error}), ask_again=lambda probe: probe)
    value, tried = site.run(failing({"a": error}), ask_again=lambda probe: replace(probe, reason="no answer in 5 s"))
    assert value == "built on b"
    assert tried[0].reason == f"{error.message}; asked again: no answer in 5 s"


def test_when_all_are_lost_the_error_has_the_reason_of_each_and_ends_with_3(tmp_path: Path) -> None:
    site = Site(tmp_path, answer("a"), answer("b"), answer("c", reason="connection refused"))
    with pytest.raises(NoBuilder) as caught:
        site.run(failing({"a": ConnectionLost("lost a"), "b": HostFault("the disk of b is full")}))
    assert caught.value.exit_code == ExitCode.UNREACHABLE
    assert "no builder for x86_64-linux can be used" in str(caught.value)
    assert caught.value.detail == "a: lost a\nb: the disk of b is full\nc: connection refused"


def test_each_builder_is_tried_once_even_if_it_is_still_listed(tmp_path: Path) -> None:
    site = Site(tmp_path, answer("a"))
    site.candidates = lambda _excluded: site.probes  # type: ignore[method-assign,assignment]  # a source that ignores it
    with pytest.raises(NoBuilder, match="lost"):
        site.run(failing({"a": ConnectionLost("lost")}))
    assert site.chosen == ["a"]


def test_two_builds_at_once_take_different_builders(tmp_path: Path) -> None:
    site = Site(tmp_path, answer("a"), answer("b"))
    together = threading.Barrier(2, timeout=20)
    used: list[str] = []

    def work(probe: Probe) -> str:
        together.wait()
        used.append(str(probe.builder.name))
        return ""

    threads = [threading.Thread(target=site.run, args=(work,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(used) == ["a", "b"]


def test_a_builder_that_works_again_is_no_longer_left_out(tmp_path: Path) -> None:
    site = Site(tmp_path, answer("a"))
    site.quarantine.add(HostName("a"), "lost")
    site.run(failing({}))
    assert site.quarantine.names() == frozenset()


def test_an_exception_that_is_no_error_of_ours_is_a_defect_and_goes_through(tmp_path: Path) -> None:
    site = Site(tmp_path, answer("a"), answer("b"))

    def work(_probe: Probe) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        site.run(work)
    assert site.claims.count(HostName("a")) == 0


def test_no_builder_says_why_for_each_kind_of_unfitness() -> None:
    kvm = replace(answer("kvm"), builder=replace(answer("kvm").builder, mandatory_features=frozenset({"kvm"})))
    arm = replace(answer("arm"), builder=replace(answer("arm").builder, systems=(System("aarch64-linux"),)))
    detail = no_builder(X86, [kvm, arm, answer("dead", reason="connection refused")]).detail
    assert detail == (
        "kvm: does not fit the derivation's features (it has kvm; it takes only what asks for kvm)\n"
        "arm: builds for aarch64-linux only\n"
        "dead: connection refused"
    )
    nobody = no_builder(X86, [])
    assert nobody.message == "no builder of the pool builds for x86_64-linux"
    assert nobody.hint is not None and "`system: x86_64-linux`" in nobody.hint
