"""Asking all builders at once whether they can be used, with one deadline for all of them.

One round trip each: ``probe.sh`` goes over on stdin, ``key=value`` lines come back. Its answer is parsed strictly: what
does not fit is a reason not to use the builder, never a guess. A builder that cannot be used says so in ``reason``,
in words that name the hop or the part that failed, and none of them keeps the others waiting.
"""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from importlib import resources
from typing import Protocol

from nixops.build.model import PoolBuilder, Probe
from nixops.errors import CommandTimeout, Interrupted, NixopsError, printable
from nixops.nix.log import full_disk
from nixops.transport.command import Command
from nixops.transport.exec import (
    Cancellation,
    Deadline,
    StreamRunner,
    cancellable,
    current_cancellation,
    raise_if_cancelled,
)
from nixops.values import HostName, System

# An answer is some dozens of lines; what is longer is not one.
MAX_ANSWER = 64 * 1024
# The reason of one that was only wanted if there was no other.
NOT_WAITED_FOR = "not waited for: another can be used"
# How much earlier than all others the connection gives up, seconds.
_MARGIN = 0.4
# Nix has this much of what is left, seconds less, so that its silence is still told by the script.
_SPARE = 0.4
_WAITING = {
    "disk": "its file system does not answer",
    "processes": "its file system does not answer",
    "nix": "its file system does not answer",
    "store": "its Nix store does not answer (is its nix-daemon alive?)",
}


class Connector(Protocol):
    """What a probe needs of :class:`nixops.transport.mux.SshPool`."""

    def connect(self, name: HostName, *, timeout: float) -> StreamRunner:
        """A connection to the builder, within ``timeout`` seconds for name, route, key and login together."""
        ...


def probe_all(
    builders: Sequence[PoolBuilder],
    ssh: Connector,
    *,
    deadline: float,
    systems: Collection[System] | None = None,
    min_free: int = 0,
    last: Collection[HostName] = (),
    enough: Callable[[Collection[Probe]], bool] | None = None,
    on_probe: Callable[[Probe], None] | None = None,
) -> tuple[Probe, ...]:
    """Ask every builder at once, each in a thread of its own.

    :param deadline: seconds for all of them together. Who has not answered by then has a reason that says so.
    :param systems: leave out builders that build for none of these.
    :param min_free: bytes that a store must have free.
    :param last: builders that are not waited for once all others have answered, and are enough.
    :param enough: whether these answers are; by default when one of them can be used.
    :param on_probe: is told each answer as it comes, in the caller's thread.
    :returns: one probe for each builder asked, in the order of ``builders``.
    :raises Interrupted: the operator interrupted; what ran has been stopped.
    """
    asked = [b for b in builders if systems is None or set(b.systems) & set(systems)]
    found: dict[HostName, Probe] = {}
    enough = enough or any_usable

    def take(probe: Probe) -> None:
        found[probe.builder.name] = probe
        if on_probe is not None:
            on_probe(probe)

    def satisfied() -> bool:
        return all(b.name in found or b.name in last for b in asked) and enough(found.values())

    for builder in asked:
        if builder.excluded is not None:
            take(Probe(builder, builder.excluded))
    waiting = [builder for builder in asked if builder.excluded is None]
    switch = Cancellation(current_cancellation())
    began = time.monotonic()
    end = Deadline(deadline)
    answers: queue.SimpleQueue[Probe] = queue.SimpleQueue()
    talks = {builder.name: _Talk(builder, ssh, end, deadline, min_free) for builder in waiting}

    def ask(talk: _Talk) -> None:
        with cancellable(switch):
            answers.put(talk.probe())

    for talk in talks.values():
        # A copy of the caller's context each, so that what the caller runs under holds there too.
        threading.Thread(target=copy_context().run, args=(ask, talk), name="nixops-probe", daemon=True).start()
    try:
        while len(found) < len(asked) and not end.passed and not satisfied():
            try:
                probe = answers.get(timeout=end.tick())
            except queue.Empty:
                raise_if_cancelled()
                continue
            # Whoever was stopped answers too, and at once: that is no answer.
            raise_if_cancelled()
            take(probe)
        # Who answered while the caller was busy with another's answer did so in time.
        while not answers.empty():
            probe = answers.get_nowait()
            raise_if_cancelled()
            take(probe)
    finally:
        # Also in the usual case: who has not answered by now is not heard any more.
        switch.cancel()
    seconds = time.monotonic() - began
    for builder in waiting:
        if builder.name not in found:
            reason = talks[builder.name].silence() if end.passed else NOT_WAITED_FOR
            take(Probe(builder, reason, seconds=seconds))
    return tuple(found[builder.name] for builder in asked)


def any_usable(probes: Collection[Probe]) -> bool:
    """Whether one of them can be used."""
    return any(probe.usable for probe in probes)


class _Talk:
    """One builder's probe, as far as it has come; another thread may ask how far that is."""

    def __init__(self, builder: PoolBuilder, ssh: Connector, end: Deadline, deadline: float, min_free: int) -> None:
        self._builder = builder
        self._ssh = ssh
        self._end = end
        self._deadline = deadline
        self._min_free = min_free
        self._connected = False
        self._answer = b""

    def probe(self) -> Probe:
        """Ask, and never raise: whatever went wrong is the reason."""
        began = time.monotonic()
        try:
            probe = self._ask()
        except (CommandTimeout, Interrupted):
            probe = Probe(self._builder, self.silence())
        except NixopsError as error:
            probe = Probe(self._builder, reason_of(error))
        except Exception as error:  # noqa: BLE001 - a defect in one probe must not take the others' answers along
            probe = Probe(self._builder, f"it could not be asked: {type(error).__name__}")
        return replace(probe, seconds=time.monotonic() - began)

    def silence(self) -> str:
        """Why it has not answered, as far as it came."""
        within = f"within {self._deadline:g} s"
        if not self._connected:
            return f"no answer {within}: the connection did not stand"
        steps = re.findall(r"^step=(\w+)$", self._answer.decode(errors="replace"), re.MULTILINE)
        where = _WAITING.get(steps[-1] if steps else "", "it took the login and then ran nothing")
        return f"no answer {within}: {where}"

    def _ask(self) -> Probe:
        # A little less than there is, so that its words for the hop that hangs are still in time.
        margin = min(_MARGIN, self._deadline / 10)
        runner = self._ssh.connect(self._builder.name, timeout=max(0.001, (self._end.left() or 0.0) - margin))
        self._connected = True
        left = self._end.left() or 0.001
        command = Command.script(
            script(), f"{max(0.2, left - _SPARE):.1f}", *self._builder.systems, timeout=left, title="the probe"
        )
        result = runner.stream(command, stdin=[command.stdin_bytes], stdout=self._take)
        return read_answer(
            self._builder, self._answer.decode(errors="replace"), result.tail(3), result.code, min_free=self._min_free
        )

    def _take(self, piece: bytes) -> None:
        if len(self._answer) < MAX_ANSWER:
            self._answer += piece


def script() -> str:
    """The text of ``probe.sh``."""
    return (resources.files("nixops.build") / "probe.sh").read_text(encoding="utf-8")


def reason_of(error: NixopsError) -> str:
    """An error as one line: what happened, without what to do next and without a log."""
    return printable(error.message)


# -- the answer -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """The lines of an answer by their key."""

    values: dict[str, list[str]]

    def one(self, key: str) -> str | None:
        return self.values.get(key, [None])[-1]

    def number(self, key: str) -> float | None:
        text = self.one(key)
        return float(text) if text is not None and re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text) else None


def read_answer(builder: PoolBuilder, text: str, said: str, code: int, *, min_free: int = 0) -> Probe:
    """What a builder's answer means.

    :param text: the script's stdout.
    :param said: the end of its stderr, for a reason.
    :param code: its exit code.
    :param min_free: bytes that a store must have free.
    """
    answer = _Answer(_values(text))
    if answer.one("begin") != "1":
        saying = f" (it said: {said.splitlines()[-1][:200]})" if said.strip() else ""
        return Probe(builder, f"its login does not run commands as a POSIX shell does{saying}")
    if answer.one("end") != "1":
        return Probe(builder, f"its answer to the probe is not whole (exit code {code})")
    free, inodes = _disk(answer)
    cores, building = answer.number("cores"), answer.number("building")
    probe = Probe(
        builder,
        nix=_version(answer.values.get("store", [])),
        cores=int(cores) if cores else None,
        load=answer.number("load"),
        free=free,
        building=None if building is None else int(building),
    )
    fault = _nix_fault(answer) or _store_fault(probe, inodes, min_free)
    if fault is not None:
        return replace(probe, reason=fault)
    return _fit(probe, answer)


def _values(text: str) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and re.fullmatch(r"[a-z]{1,12}", key):
            values.setdefault(key, []).append(value.strip())
    return values


# Blocks of 1 KiB: all, used, available, and the percentage by which they are found, since names may hold spaces.
_DF = re.compile(r" (\d{1,18}) +(\d{1,18}) +(\d{1,18}) +(\d+%|-)(?: |$)")


def _disk(answer: _Answer) -> tuple[int | None, int | None]:
    """Bytes and inodes that are free; None for what is not known, or not counted, as btrfs does its inodes."""
    stat = re.fullmatch(r"(\d{1,18}) (\d{1,18}) (\d{1,18}) (\d{1,18}) (\d{1,18})", answer.one("disk") or "")
    if stat is not None:
        size, _, free, inodes, free_inodes = map(int, stat.groups())
        return free * size, free_inodes if inodes else None
    df = _DF.search((answer.one("df") or "")[:4096])
    return (int(df[3]) * 1024 if df else None), None


def _version(lines: Sequence[str]) -> tuple[int, int] | None:
    """``(2, 26)`` out of ``nix store info --json`` or of ``nix-store --version``."""
    for line in lines:
        text = ""
        if line.startswith("{"):
            try:
                text = str(json.loads(line).get("version", ""))
            except (ValueError, AttributeError, RecursionError):
                continue
        elif line.startswith("nix-store ("):
            text = line.rsplit(")", 1)[-1].strip()
        if found := re.match(r"(\d{1,4})\.(\d{1,4})", text):
            return int(found[1]), int(found[2])
    return None


def _nix_fault(answer: _Answer) -> str | None:
    missing = answer.values.get("missing", [])
    if "nix-store" in missing or "nix-daemon" in missing:
        return f"it has no Nix on the PATH of this login ({', '.join(missing)} not found)"
    lines = answer.values.get("store", [])
    if answer.one("code") in ("124", "137"):
        return "its Nix store did not answer in time (is its nix-daemon alive?)"
    said = "\n".join(lines)
    if any(line.startswith("{") for line in lines) or "is not valid" in said:
        return None
    last = next((line for line in reversed(lines) if line.strip()), "nothing")
    words = printable(last.removeprefix("error: ")[:200])
    if full_disk(said):
        return f"its disk is full: {words}"
    if re.search(r"cannot connect to (?:socket|daemon)|daemon-socket|daemon disconnected|end-of-file", said):
        return f"its nix-daemon is not there: {words}"
    return f"its Nix store cannot be used: {words}"


def _store_fault(probe: Probe, inodes: int | None, min_free: int) -> str | None:
    if probe.free is None:
        return "how much its store has free cannot be found out (is there a /nix/store?)"
    if probe.free < min_free:
        return f"its store is full: {_mib(probe.free)} MiB free, less than the {_mib(min_free)} MiB of build.min_free"
    if inodes == 0:
        return "its store is full: no inodes are free"
    return None


def _mib(size: int) -> int:
    return size // (1 << 20)


def _fit(probe: Probe, answer: _Answer) -> Probe:
    """The probe with those of the declared systems that its Nix builds; the script asks about other kinds than its own.

    A system that only the inventory claims for it would end each build there with Nix's words for a wrong platform.
    """
    builds = [system for line in answer.values.get("platforms", []) for system in line.split()]
    if not builds:
        return probe
    declared = probe.builder.systems
    kept = tuple(system for system in declared if system in builds)
    if not kept:
        claimed = ", ".join(declared)
        return replace(probe, reason=f"its Nix builds for {', '.join(builds[:4])} and not for {claimed}")
    return replace(probe, builder=replace(probe.builder, systems=kept))
