"""Reading Nix's ``--log-format internal-json``: progress while it runs, and what went wrong afterwards.

The format is Nix's own and undocumented; the numbers below are those of ``ActivityType`` and ``ResultType`` in
its ``logging.hh``, the same from Nix 2.4 on. Lines that are not its (ssh's, a substituter's) are kept as they are.
"""

from __future__ import annotations

import json
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from nixops.errors import (
    BuildFailed,
    ConnectionLost,
    HostFault,
    HostKeyChanged,
    HostKeyUnknown,
    LoginRefused,
    NixopsError,
    Unreachable,
    printable,
)
from nixops.transport.command import LineSink

_ACTIVITY_COPY_PATH = 100
_ACTIVITY_BUILD = 105
_RESULT_BUILD_LOG = 101
_RESULT_POST_BUILD_LOG = 107
_LEVEL_ERROR = 0
_LEVEL_WARN = 1
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_DRV = re.compile(r"/nix/store/[0-9a-z]{32}-[A-Za-z0-9+._?=-]+\.drv")
# How many lines of a derivation's log are kept, and shown.
KEPT = 200
SHOWN = 25


@dataclass(frozen=True)
class FailedDerivation:
    """A derivation that did not build. ``message`` is Nix's error, ``lines`` the end of the derivation's log."""

    drv: str
    message: str
    lines: tuple[str, ...]

    @property
    def reason(self) -> str:
        """The first line of the message, without Nix's prefix; from Nix 2.31 on the reason has a line of its own."""
        first, *rest = self.message.splitlines()
        given = next((line.strip() for line in rest if line.strip().startswith("Reason:")), "")
        return f"{first.removeprefix('error: ').rstrip(';:. ')}{given and '; ' + given.rstrip('.')}"


class NixLog:
    """Takes lines one by one; knows in the end what failed.

    :param on_line: gets progress in words: which derivation builds, which path is copied, warnings.
    """

    def __init__(self, on_line: LineSink | None = None) -> None:
        self._sink = on_line
        self._building: dict[str, str] = {}
        self._logs: dict[str, deque[str]] = {}
        self._errors: list[str] = []
        self._foreign: deque[str] = deque(maxlen=KEPT)
        self._said: deque[str] = deque(maxlen=SHOWN)

    def feed(self, line: str) -> None:
        """One line of nix's stderr."""
        if not line.startswith("@nix "):
            if line.strip():
                self._foreign.append(plain(line))
                self._say(plain(line))
            return
        try:
            event = json.loads(line[5:])
        except ValueError:
            self._foreign.append(plain(line))
            return
        if isinstance(event, dict):
            self._event(event)

    @property
    def errors(self) -> tuple[str, ...]:
        """Nix's error messages, in order, without colours."""
        return tuple(self._errors)

    @property
    def foreign(self) -> tuple[str, ...]:
        """The last lines that were not nix's own, such as ssh's."""
        return tuple(self._foreign)

    @property
    def said(self) -> tuple[str, ...]:
        """The last lines of progress, as ``on_line`` gets them."""
        return tuple(self._said)

    def failed(self) -> tuple[FailedDerivation, ...]:
        """The derivations that nix says it could not build, each once, those with a log first."""
        found: dict[str, FailedDerivation] = {}
        for error in self._errors:
            for drv in _DRV.findall(error):
                if drv not in found:
                    found[drv] = FailedDerivation(drv, error.strip(), tuple(self._logs.get(drv, ())))
        return tuple(sorted(found.values(), key=lambda failure: not failure.lines))

    def _event(self, event: dict[str, Any]) -> None:
        action, kind, number = event.get("action"), event.get("type"), str(event.get("id"))
        given = event.get("fields")
        fields = given if isinstance(given, list) and given else [""]
        if action == "start" and kind == _ACTIVITY_BUILD:
            drv = str(fields[0])
            self._building[number] = drv
            self._logs.setdefault(drv, deque(maxlen=KEPT))
            self._say(f"building {name_of(drv)}")
        elif action == "start" and kind == _ACTIVITY_COPY_PATH:
            self._say(f"copying {name_of(str(fields[0]))}")
        elif action == "stop":
            self._building.pop(number, None)
        elif action == "result" and kind in (_RESULT_BUILD_LOG, _RESULT_POST_BUILD_LOG):
            builder = self._building.get(number)
            if builder is not None:
                text = plain(str(fields[0]))
                self._logs[builder].append(text)
                self._say(f"{name_of(builder)}> {text}")
        elif action == "msg":
            # ``msg`` is the whole of it; ``raw_msg`` of an evaluation error lacks the trace.
            text = plain(str(event.get("msg", "")))
            if event.get("level") == _LEVEL_ERROR:
                self._errors.append(text)
            elif event.get("level") == _LEVEL_WARN:
                self._say(text)

    def _say(self, text: str) -> None:
        self._said.append(printable(text))
        if self._sink is not None:
            self._sink(self._said[-1])


def name_of(path: str) -> str:
    """``hello-2.12`` of ``/nix/store/<hash>-hello-2.12.drv``."""
    return path.removesuffix(".drv")[44:] or path


def plain(text: str) -> str:
    """``text`` without colours."""
    return _ANSI.sub("", text)


def explain(log: NixLog, what: str, host: str) -> NixopsError:
    """The error of a ``nix`` that ended with another code than 0.

    Nix ends with 1 for a failed build and for a lost builder alike; its log tells them apart.

    :param what: what was being done, such as ``building …#toplevel``.
    :param host: whose store it worked on.
    :returns: :class:`Unreachable` (or a subclass) when the store could not be reached or was lost,
        :class:`HostFault` for a full disk, :class:`BuildFailed` for everything else.
    """
    fault = _full_disk(log, what, host) or _connection(log, what, host)
    if fault is not None:
        return fault
    failed = log.failed()
    if not failed:
        return BuildFailed(f"{what} failed", detail=_tail("\n".join(log.errors or log.foreign)))
    worst = failed[0]
    lines = [f"{name_of(worst.drv)}> {line}" for line in worst.lines[-SHOWN:]]
    others = [f"also: {failure.reason}" for failure in failed[1:6]]
    more = "\n".join([*lines, *others]) or _tail("\n".join(worst.message.splitlines()[1:]))
    return BuildFailed(
        f"{what} failed: {worst.reason}",
        hint=f"its whole log, on {host}: nix log {worst.drv}" if worst.lines else None,
        detail=more or None,
    )


# What ssh says on its stderr → the error it means. In the order of the hops; the first that matches.
_SSH_FAULTS: tuple[tuple[str, type[Unreachable], str], ...] = (
    (r"Could not resolve hostname", Unreachable, "its address does not resolve"),
    (r"Connection refused", Unreachable, "connection refused"),
    (r"No route to host|Network is unreachable", Unreachable, "no route to it"),
    (r"kex_exchange_identification|banner exchange|Bad packet length", Unreachable, "what answers does not speak SSH"),
    (r"Connection timed out|Operation timed out", Unreachable, "no answer in time"),
    (r"IDENTIFICATION HAS CHANGED", HostKeyChanged, "IT OFFERS A KEY OTHER THAN THE PINNED ONE"),
    (r"no matching host key type", HostKeyChanged, "IT OFFERS NO KEY OF THE PINNED TYPE"),
    (r"Host key verification failed|No \S+ host key is known", HostKeyUnknown, "no key of it is pinned"),
    (r"Permission denied \(|Too many authentication failures", LoginRefused, "it refused the login"),
)
# What Nix (2.8 to 2.3x) itself says of a store that it cannot open, or that went away in the middle: at the beginning
# of a line, as an evaluation or a builder may quote anything further on.
_OWN = r"^(?:\s*error:)*\s*"
_NO_CONNECTION = re.compile(
    _OWN + r"(?:failed to start SSH connection|cannot open connection to remote store|error connecting to"
    r"|cannot connect to (?:socket|daemon)|opening a connection to remote store)",
    re.MULTILINE,
)
_LOST = re.compile(
    _OWN + r"(?:unexpected (?:end-of-file|EOF)(?: reading a line)?$|Nix daemon disconnected unexpectedly \("
    r"|(?:writing to|reading from) (?:file|daemon|connection)[^:\n]*: (?:Broken pipe|Connection \w+|Input/output))",
    re.MULTILINE | re.IGNORECASE,
)
# What ssh says of a connection that ended.
_SSH_LOST = re.compile(
    r"client_loop: send disconnect|Timeout, server \S+ not responding|Connection to \S+ closed by remote host"
    r"|(?:mux_client|ssh_packet|Read from|Write to)[^\n]*(?:Broken pipe|Connection reset)"
)
# A line of a builder's log in Nix's own error.
_QUOTED = re.compile(r"^\s+>.*$", re.MULTILINE)
_RAN_AND_FAILED = re.compile(r"builder (?:for .* )?failed|hash mismatch|failed due to signal|timed out after")


def ssh_fault(text: str, host: str, what: str) -> Unreachable | None:
    """The error that ssh's own words mean, or ``None``: they speak of no hop on the way to ``host``.

    :param text: what ssh wrote to its stderr.
    :param what: what was being done, such as ``a login``.
    """
    for pattern, kind, words in _SSH_FAULTS:
        if re.search(pattern, text):
            # ssh's own advice on keys names files of ours that are gone by the time it is read.
            about_key = kind in (HostKeyChanged, HostKeyUnknown)
            return kind(
                f"{host} cannot be reached for {what}: {words}",
                hint=f"compare the key with the host's console, then: invoke trust {host}" if about_key else None,
                detail=None if about_key else _tail(text, 6),
            )
    return None


def _connection(log: NixLog, what: str, host: str) -> Unreachable | None:
    """The store's fault, if it is one. Nix must have said so itself: what a derivation printed, what an evaluation
    threw and what the fetcher of a flake's input met speaks of connections too.
    """
    if any(failure.lines or _RAN_AND_FAILED.search(failure.message) for failure in log.failed()):
        return None  # a derivation ran and failed, so the store was there
    own = _QUOTED.sub("", "\n".join(log.errors))
    foreign = "\n".join(log.foreign)
    no_connection, lost = _NO_CONNECTION.search(own), _LOST.search(own)
    if not no_connection and not lost and (own or not foreign):
        return None
    said = f"{own}\n{foreign}".strip()
    if re.search(r"cannot connect to (?:socket|daemon)", said):
        return Unreachable(
            f"the Nix daemon of {host} does not answer; {what} cannot be done there",
            hint=f"on {host}: systemctl status nix-daemon.socket nix-daemon.service",
            detail=_tail(said, 6),
        )
    fault = ssh_fault(foreign, host, what)
    if fault is not None:
        return fault
    if re.search(r"command not found|nix-daemon: not found|[Uu]nknown command: nix-daemon", foreign):
        return Unreachable(
            f"{host} has no nix on the PATH of this login; {what} cannot be done there", detail=_tail(said, 6)
        )
    if no_connection:
        return Unreachable(
            f"the store of {host} cannot be opened for {what}",
            hint=f"ssh lets us in: does Nix's daemon run there? On {host}: systemctl status nix-daemon.socket",
            detail=_tail(said, 6),
        )
    if lost or _SSH_LOST.search(foreign):
        return ConnectionLost(
            f"the store of {host} was lost during {what}",
            hint="look at the host before you conclude anything; then run it again",
            detail=_tail(said, 6),
        )
    return None


def _full_disk(log: NixLog, what: str, host: str) -> HostFault | None:
    failed = log.failed()
    logged = [line for failure in failed for line in failure.lines[-SHOWN:]]
    for line in (*log.errors, *log.foreign, *logged):
        if full_disk(line):
            return HostFault(
                f"the disk of {host} is full: {what} failed",
                hint=f"make room on {host} (nix-collect-garbage, or a larger disk)",
                detail=_tail(line, 6),
            )
    return None


def full_disk(text: str) -> bool:
    """Whether some tool said, in ``text``, that a disk, its inodes or a quota is used up."""
    return any(
        words in text for words in ("No space left on device", "Disk quota exceeded", "database or disk is full")
    )


def _tail(text: str, lines: int = SHOWN) -> str:
    return printable("\n".join(text.strip().splitlines()[-lines:]))
