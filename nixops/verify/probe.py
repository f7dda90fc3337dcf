"""Trying things as the runner's own user, in a transient unit with the runner's own properties.

What a file's mode says is one thing; what a job can open is another, once user, groups, mounts and capabilities
have their say. So the checks try, on the host, and only the outcome leaves it: a secret is read into /dev/null.
All that the checks want to have tried is tried in one unit: to make it ready costs a host more than the rest.
"""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from nixops.errors import Undecided
from nixops.transport.command import Command
from nixops.verify.model import Subject, Trial
from nixops.verify.tools import PREAMBLE, TOOLS_PATH
from nixops.verify.unit import SANDBOX, UnitFacts

# A property whose empty value means "nothing", where others' means "the default".
_EMPTY_IS_A_VALUE: Final = frozenset({"CapabilityBoundingSet"})
# What systemctl prints for nothing at all (an empty deny list), and for what it cannot print.
_NOT_GIVEN: Final = frozenset({"", "~", "[not set]", "[unprintable]"})

# Before anything is tried, the probe shows that it can read at all: a missing `cat` must not look like a closed file.
# The shell reads its script from stdin, so what is tried gets another one.
_FRAME: Final = """
RUNNER_PATH={runner_path}
PATH={tools}${{RUNNER_PATH:+:$RUNNER_PATH}}; export RUNNER_PATH PATH
cat /proc/self/status > /dev/null && stat -Lc %d:%i / > /dev/null && ls -A / > /dev/null && timeout 9 true || exit 3
while read -r key value rest; do
    if [ "$key" = Uid: ]; then echo "{mark} uid $value"; fi
done < /proc/self/status
"""

# Each in a shell of its own: what one changes, ends or does not end is nothing to the others. That it came to its end
# is said by an exit code, and in words only by the shell around it, which alone knows the mark. An empty line goes
# before each of those, since what was tried may have been stopped within a line.
_ENDED: Final = 77
_TRIAL: Final = """
echo; echo "{mark} begin {number}"
timeout -k 5 {seconds:.0f} /bin/sh -c {text} sh {args} < /dev/null
[ $? != {ended} ] || {{ echo; echo "{mark} end {number}"; }}
"""
_TEXT: Final = """
probe() {{
{body}
}}
probe "$@"
exit {ended}
"""
# All of a round together may take so much longer than its longest trial alone, and no longer than each its time (s).
_ROUND: Final = 60.0

_TRY: Final = """
i=0
for f do
    if [ -d "$f" ]; then
        if ls -A -- "$f" > /dev/null 2>&1; then echo "list $i $(stat -Lc %d:%i -- "$f")"; fi
        if mkdir -- "$f/.nixops-verify-$$" 2> /dev/null; then
            echo "write $i $(stat -Lc %d:%i -- "$f")"
            rmdir -- "$f/.nixops-verify-$$"
        fi
    else
        if cat -- "$f" > /dev/null 2>&1; then echo "read $i $(stat -Lc %d:%i -- "$f")"; fi
        if [ -e "$f" ] && (: >> "$f") 2> /dev/null; then echo "write $i $(stat -Lc %d:%i -- "$f")"; fi
    fi
    i=$((i + 1))
done
"""


@dataclass(frozen=True)
class Target:
    """Something to try to open.

    :ivar identity: ``device:inode`` as root sees it. In the runner's mounts the same name may be another file
        (its own state, say): only this one counts. ``None`` counts whatever has the name.
    """

    path: str
    identity: str | None = None


@dataclass(frozen=True)
class Access:
    """What the runner could do: ``how`` is ``read``, ``list`` or ``write``."""

    path: str
    how: str


def sandbox(facts: UnitFacts) -> tuple[str, ...]:
    """``Property=value`` assignments that give a transient unit the runner's view of the host."""
    given: list[str] = []
    for name in SANDBOX:
        for value in facts.properties.get(name, ()):
            if value not in _NOT_GIVEN or (not value and name in _EMPTY_IS_A_VALUE):
                given.append(f"{name}={value}")
    if facts.credentials:
        # A unit with a credential sees its own directory of /run/credentials; one without sees none. The probe
        # gets the same shape with a credential of its own: the runner's secret is not loaded again.
        given.append("SetCredential=nixops-verify:none")
    return tuple(given)


def run_trials(subject: Subject, trials: Sequence[Trial]) -> list[tuple[str, ...] | Undecided]:
    """Run every trial, one after the other, in one transient unit where the runner's jobs run.

    :return: for each the lines that it said, or why it is not known what it would have said: it did not end in its
        time, which the host itself sees to whatever becomes of the connection.
    :raises Undecided: nothing was tried: there is no unit like the runner's, or it had another user.
    """
    facts = subject.facts
    if not facts.exists:
        raise Undecided(f"{subject.unit} is not a unit of {subject.host_name}: nothing can be tried as its user")
    # Of this round alone: nothing that a trial passes on is taken for what is said about it.
    mark = f"@{secrets.token_hex(8)}"
    each = [trial.timeout for trial in trials]
    seconds = min(sum(each), max(each) + _ROUND)
    properties = [p for value in sandbox(facts) for p in ("-p", value)]
    result = subject.transport.run(
        Command.of(
            *("sh", "-c", PREAMBLE + 'exec "$@"', "sh"),
            *("systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--service-type=exec"),
            *("--unit=nixops-verify-" + secrets.token_hex(6), "-p", f"RuntimeMaxSec={seconds:.0f}", *properties),
            *("--", "/bin/sh"),
            stdin=_script(facts, mark, trials).encode(errors="surrogateescape"),
            root=True,
            timeout=seconds + 10,
            title="trying as the runner's user",
        )
    )
    uid, said = _said(result.out.splitlines(), mark)
    errors = replace(result, stdout=b"").tail(5)  # what was said on stdout is for the checks
    if uid is None:
        raise Undecided(
            f"could not try as the runner's user on {subject.host_name} (exit code {result.code})",
            hint="systemd-run must be able to start a unit with the properties of " + subject.unit,
            detail=errors,
        )
    if facts.process is not None and uid != str(facts.process.uid):
        raise Undecided(f"the probe ran as uid {uid}, the runner as {facts.process.uid}: what it found proves nothing")
    return [
        said[number]
        if number in said
        else Undecided(
            f"could not try as the runner's user on {subject.host_name}: it did not come to its end, for which it had "
            f"{trial.timeout:.0f} s",
            detail=errors,
        )
        for number, trial in enumerate(trials)
    ]


def _script(facts: UnitFacts, mark: str, trials: Sequence[Trial]) -> str:
    runner_path = shlex.quote(":".join(facts.process.path) if facts.process else "")
    return _FRAME.format(runner_path=runner_path, tools=TOOLS_PATH, mark=mark) + "".join(
        _TRIAL.format(
            mark=mark,
            number=number,
            seconds=trial.timeout,
            ended=_ENDED,
            text=shlex.quote(_TEXT.format(body=trial.body, ended=_ENDED)),
            args=" ".join(shlex.quote(a) for a in trial.args),
        )
        for number, trial in enumerate(trials)
    )


def _said(lines: Iterable[str], mark: str) -> tuple[str | None, dict[int, tuple[str, ...]]]:
    """The uid that it ran as, and by its number what each trial said that came to its end."""
    uid: str | None = None
    said: dict[int, tuple[str, ...]] = {}
    now, of_now = "", list[str]()
    about = re.compile(rf"{mark} (uid|begin|end) (\d+)", re.ASCII)
    for line in lines:
        found = about.fullmatch(line)
        if found is None:
            of_now += [line] if line else []
        elif found[1] == "uid":
            uid = found[2]
        elif found[1] == "begin":
            now, of_now = found[2], []
        elif found[2] == now:
            said[int(now)] = tuple(of_now)
    return uid, said


def try_to_open(targets: Sequence[Target]) -> Generator[Trial, Sequence[str], tuple[Access, ...]]:
    """What of ``targets`` the runner's user can read, list or write. Their content goes nowhere."""
    if not targets:
        return ()
    found: list[Access] = []
    for line in (yield Trial(_TRY, tuple(t.path for t in targets))):
        how, index, identity = (*line.split(" "), "")[:3]
        target = targets[int(index)]
        if target.identity is None or target.identity == identity:
            found.append(Access(target.path, how))
    return tuple(found)


def told(accesses: Sequence[Access], most: int = 5) -> str:
    """``/run/secrets/x (read), …``: what was read before what was only listed, and not more than ``most`` of it."""
    ordered = sorted(accesses, key=lambda a: ("read", "write", "list").index(a.how))
    words = [f"{a.path} ({a.how})" for a in ordered]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
