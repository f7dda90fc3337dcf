"""Following a distributed build: which machine builds what, and whose fault it is when it fails."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nixops.nix.log import NixLog
from nixops.values import HostName

_ACTIVITY_BUILD = 105
# Nix's words (2.8 to 2.3x) for what a machine itself reported, as opposed to a machine that went away.
_REPORTED = re.compile(
    r"build of '(?P<drv>/nix/store/[^'^]+\.drv)[^']*' on '(?P<uri>[^']*)' failed:\s*(?P<why>.*)", re.S
)
# A builder that is shut down in good order says this of what it was building.
_STOPPED = re.compile(r"interrupted by the user|daemon disconnected|end-of-file")
# The builder's end as well as the derivation's own, or of a machine that is short of memory.
_KILLED = re.compile(r"failed due to signal|was killed by signal")
_UNFIT = re.compile(
    r"Failed to find a machine for remote build!.*?required \(system, features\): \((?P<need>[^\n]*)\)", re.S
)
# Said of a machine that nix could not connect to when it was to build; it then tries the next.
_UNREACHED = re.compile(r"cannot build on '(?P<uri>[^']*)':\s*(?:error:\s*)?(?P<why>[^\n]*)")
_RESTRICTED = re.compile(r"ignoring the (?:user|client)-specified setting '(?:builders|max-jobs)'")


@dataclass(frozen=True)
class Reported:
    """A derivation that a machine says it could not build.

    :ivar builder: the machine, by its name here.
    :ivar stopped: the machine rather stopped building.
    :ivar killed: a signal ended it: either.
    """

    drv: str
    builder: str
    stopped: bool
    killed: bool


class Watch:
    """Takes the lines of nix's stderr.

    :param names: a builder's name for each store URI in the machines file.
    :param say: gets progress in words, with the machine that builds.
    """

    def __init__(self, names: Mapping[str, HostName], say: Callable[[str], None]) -> None:
        self._names = dict(names)
        self._say = say
        self._said: list[str] = []
        self._machine: str | None = None
        self._again = False
        self.log = NixLog(self._heard)
        self.builders: dict[str, str] = {}

    def feed(self, line: str) -> None:
        """One line."""
        drv, uri = _building(line)
        self._machine = None
        # The machine's own report that it builds follows ours that it was told to.
        self._again = bool(drv) and not uri and drv in self.builders
        if drv and uri:
            self._machine = self.name(uri)
            self.builders[drv] = self._machine
        self.log.feed(line)
        self._again = False

    def name(self, uri: str) -> str:
        """What a machine is called here."""
        return str(self._names.get(uri.split("?")[0], uri))

    def counts(self) -> dict[str, int]:
        """How many derivations each machine was given."""
        found: dict[str, int] = {}
        for name in self.builders.values():
            found[name] = found.get(name, 0) + 1
        return found

    def reported(self) -> Reported | None:
        """The derivation that a machine reported as failed; one that was not merely stopped comes first."""
        matches = [found for error in self.log.errors if (found := _REPORTED.search(error))]
        reports = [
            Reported(m["drv"], self.name(m["uri"]), bool(_STOPPED.search(m["why"])), bool(_KILLED.search(m["why"])))
            for m in matches
        ]
        return min(reports, key=lambda report: (report.stopped, report.killed), default=None)

    def broken_off(self) -> tuple[str, ...]:
        """The machines that ended what they were building without a word: lost, whatever nix makes of it."""
        if self.reported() is not None:
            return ()
        return tuple(sorted({self.builders[f.drv] for f in self.log.failed() if f.drv in self.builders}))

    def unfit(self) -> str | None:
        """The system and features that nix found no machine for."""
        found = _UNFIT.search(self._all)
        return found["need"].replace("[", "").replace("]", "").strip(", ") if found else None

    @property
    def restricted(self) -> bool:
        """Whether a daemon did not let this user name machines."""
        return _RESTRICTED.search(self._all) is not None

    def unreached(self) -> dict[str, str]:
        """The machines that nix could not connect to, and what it says of that."""
        return {self.name(found["uri"]): found["why"].strip() for found in _UNREACHED.finditer(self._all)}

    @property
    def _all(self) -> str:
        # Through a daemon, warnings come as errors.
        return "\n".join((*self._said, *self.log.errors, *self.log.foreign))

    def _heard(self, text: str) -> None:
        if self._again:
            return
        if text.startswith(("Failed to find a machine", "warning: ignoring", "ignoring", "cannot build on")):
            self._said.append(text)
        self._say(f"{text} on {self._machine}" if self._machine and text.startswith("building ") else text)


def _building(line: str) -> tuple[str, str]:
    """The derivation and the machine's URI of a line that says that a build begins; else two empty texts."""
    if not line.startswith("@nix ") or f'"type":{_ACTIVITY_BUILD}' not in line:
        return "", ""
    try:
        event = json.loads(line[5:])
        if event["action"] != "start" or event["type"] != _ACTIVITY_BUILD:
            return "", ""
        return str(event["fields"][0]), str(event["fields"][1])
    except (ValueError, KeyError, IndexError, TypeError):
        return "", ""
