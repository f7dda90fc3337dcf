"""How much a builder holds already, and work whose value is wanted later."""

from __future__ import annotations

import threading
import time

import pytest

from nixops.build.holding import MOST_PATHS, held_by, nearest
from nixops.build.later import Later
from nixops.build.model import Evaluated, PoolBuilder, Probe, Shape
from nixops.errors import HostFault, Interrupted
from nixops.nix.derivation import Derivation
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.exec import Cancellation, cancellable
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName, StorePath, System

X86 = System("x86_64-linux")


def path(number: int, name: str = "x") -> StorePath:
    return StorePath(f"/nix/store/{number:032d}-{name}")


EVALUATED = Evaluated(X86, "/srv/app#docker", path(1, "a.drv"), path(2), Shape.COPY_TO)


def probe(name: str, *, systems: tuple[System, ...] = (X86,), reason: str | None = None) -> Probe:
    return Probe(PoolBuilder(SshTarget(HostName(name), Address("192.0.2.1")), systems), reason)


class Store:
    """A builder whose store lacks some paths."""

    def __init__(self, name: str, lacking: tuple[StorePath, ...], code: int = 0) -> None:
        self.host = name
        self._lacking = lacking
        self._code = code

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        asked = command.stdin_bytes.decode().splitlines()
        assert on_line is None and command.stdin_bytes.endswith(b"\n")
        return Result(command, self._code, f"{sum(p not in self._lacking for p in asked)}\n".encode(), b"")


def test_each_builders_share_is_asked_of_it_where_there_is_a_choice() -> None:
    inputs = (path(2), path(3), path(4), path(5))
    stores = {
        "one": Store("one", inputs),
        "two": Store("two", inputs[:1]),
        "old": Store("old", (), code=1),
    }
    probes = [probe("one"), probe("two"), probe("old"), probe("dead", reason="refused"), probe("arm", systems=())]
    assert held_by(EVALUATED, lambda: inputs, probes, lambda name: stores[name]) == {
        "one": 0.0,
        "two": 0.75,
        "old": 0.0,
    }


def test_nothing_is_asked_where_there_is_no_choice_or_nothing_known() -> None:
    def never(name: HostName) -> Store:
        raise AssertionError(name)

    assert held_by(EVALUATED, lambda: (path(2),), [probe("one"), probe("dead", reason="x")], never) == {}
    assert held_by(EVALUATED, tuple, [probe("one"), probe("two")], never) == {}


def test_the_nearest_outputs_come_first_each_once_and_no_more_than_asked_for() -> None:
    known = {
        path(1, "a.drv"): Derivation(X86, {"out": path(2)}, {path(3, "b.drv"): ("out",), path(4, "c.drv"): ("out",)}),
        path(3, "b.drv"): Derivation(X86, {"out": path(5), "dev": None}, {path(6, "d.drv"): ("out",)}, (path(9),)),
        path(4, "c.drv"): Derivation(X86, {"out": path(7)}, {path(3, "b.drv"): ("out",), path(6, "d.drv"): ("out",)}),
        path(6, "d.drv"): Derivation(X86, {"out": path(8)}, {path(99, "unknown.drv"): ("out",)}),
    }
    assert nearest(EVALUATED, known) == (path(2), path(5), path(7), path(8))
    deep = {
        path(n, "a.drv"): Derivation(X86, {"out": path(10_000 + n)}, {path(n + 1, "a.drv"): ("out",)})
        for n in range(1, 1000)
    }
    found = nearest(EVALUATED, deep)
    assert len(found) == MOST_PATHS and found[0] == path(10_001)


def test_later_gives_the_value_or_raises_what_the_work_raised() -> None:
    def fault() -> int:
        raise HostFault("full")

    assert Later(lambda: 3).value() == 3
    later = Later(fault)
    for _ in range(2):
        with pytest.raises(HostFault, match="full"):
            later.value()


def test_whoever_waits_for_later_can_be_interrupted_though_the_work_cannot() -> None:
    switch, never = Cancellation(), threading.Event()
    with cancellable(switch):
        later = Later(never.wait)
        threading.Timer(0.1, switch.cancel).start()
        began = time.monotonic()
        with pytest.raises(Interrupted):
            later.value()
    assert time.monotonic() - began < 2.0
    later.join(0.01)
    never.set()
    later.join(5.0)
