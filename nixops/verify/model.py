"""What a check is, what it is given and what comes of it."""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from nixops.inventory import model
from nixops.transport.command import Runner
from nixops.values import RunnerName
from nixops.verify.settings import NixSettings

if TYPE_CHECKING:
    from testinfra.backend.base import CommandResult

    from nixops.verify.unit import UnitFacts


@dataclass(frozen=True)
class CheckResult:
    """What came of one check.

    :ivar name: its stable id, such as ``unit-active``.
    :ivar ok: it holds, or what was found is an accepted risk.
    :ivar detail: what was found; of a failure also what was expected and what to do. Fit to print.
    :ivar accepted: the inventory's reason, where this is a risk that the operator accepted.
    """

    name: str
    ok: bool
    detail: str
    accepted: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A check's own finding, before accepted risks are looked at."""

    ok: bool
    detail: str


def passed(detail: str) -> Verdict:
    """The check holds; ``detail`` says what was seen."""
    return Verdict(True, detail)


def failed(*, expected: str, found: str, todo: str) -> Verdict:
    """The check does not hold."""
    return Verdict(False, f"expected {expected}; found {found}; {todo}")


class RemoteFile(Protocol):
    """testinfra's File, as far as the checks use it. Links are followed."""

    @property
    def is_file(self) -> bool: ...
    @property
    def is_directory(self) -> bool: ...
    @property
    def mode(self) -> int: ...
    @property
    def user(self) -> str: ...
    @property
    def group(self) -> str: ...
    def contains(self, pattern: str) -> bool: ...


class Remote(Protocol):
    """testinfra's ``host`` object, as far as the checks use it (:func:`nixops.verify.backend.connect`)."""

    def file(self, path: str) -> RemoteFile: ...
    def run(self, command: str, *args: str) -> CommandResult: ...


class RegisteredRunner(Protocol):
    """A runner as the forge lists it (:class:`nixops.forge` gives these)."""

    @property
    def id(self) -> int: ...
    @property
    def uuid(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...


# Lists the runners of every scope that matters; raises ForgeError. None where the forge cannot list (before 15).
ForgeListing = Callable[[], tuple[RegisteredRunner, ...]]


@dataclass(frozen=True)
class Patience:
    """How long a check waits for a host to settle, seconds.

    :ivar settle: how long a service must have run in one piece to count as up.
    :ivar settle_restarted: the same for one that systemd has restarted before, since a crash loop looks up between
        two crashes.
    :ivar start: how long a service may take to come up.
    :ivar forge: how long until the forge must have heard of the daemon.
    """

    settle: float = 5.0
    settle_restarted: float = 15.0
    start: float = 45.0
    forge: float = 15.0
    interval: float = 1.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class Subject:
    """What a check is given.

    :ivar remote: testinfra's host object, as root on the host.
    :ivar transport: the connection under it, for what needs stdin.
    :ivar facts: the runner's unit and process as first seen.
    :ivar others: the same of the host's other runner instances, by name.
    """

    host_name: str
    host: model.Host
    runner_name: RunnerName
    runner: model.ManagedRunner
    unit: str
    transport: Runner
    remote: Remote
    facts: UnitFacts
    others: dict[str, UnitFacts]
    forge: ForgeListing | None = None
    forge_url: str | None = None
    patience: Patience = field(default_factory=Patience)

    _asking: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def nix_settings(self) -> NixSettings:
        """The settings of the host's Nix, asked for when a first check wants to know one, and once."""
        with self._asking:
            return self._nix_settings

    @functools.cached_property
    def _nix_settings(self) -> NixSettings:
        return NixSettings.read(self.remote)


@dataclass(frozen=True)
class Trial:
    """What a check wants to have tried where the runner's jobs run (:mod:`nixops.verify.probe` says how).

    :ivar body: shell text, as of a function: ``return`` ends it. ``$RUNNER_PATH`` is the PATH of the running service;
        on PATH it follows the host's own tools. What it says on stdout are the lines that the check is given.
    :ivar args: its ``$1``…
    :ivar timeout: seconds.
    """

    body: str
    args: tuple[str, ...] = ()
    timeout: float = 60.0


# A check that has to have something tried: it yields a trial, is given the lines, and returns its verdict. What the
# checks of a runner yield is tried together, since a unit for each costs more than all that is tried in it.
Trying = Generator[Trial, Sequence[str], Verdict]


def _always(host: model.Host, name: RunnerName, runner: model.ManagedRunner) -> bool:
    del host, name, runner
    return True


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    :ivar run: decides it, at once or by trials; raises :class:`Undecided` (a failure), or Unreachable when the host is
        gone.
    :ivar applies: whether the inventory asks for it at all; no host is needed to say.
    :ivar risk: the key of ``accepted_risks`` that accepts its failure. Most have none: they are boundaries.
    """

    name: str
    run: Callable[[Subject], Verdict | Trying]
    applies: Callable[[model.Host, RunnerName, model.ManagedRunner], bool] = _always
    risk: str | None = None

    @property
    def tries(self) -> bool:
        """Whether it may have something tried before it is decided."""
        return inspect.isgeneratorfunction(self.run)
