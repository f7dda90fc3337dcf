"""Trying things as the runner's own user, in a transient unit with the runner's own properties.

What a file's mode says is one thing; what a job can open is another, once user, groups, mounts and capabilities
have their say. So the checks try, on the host, and only the outcome leaves it: a secret is read into /dev/null.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from nixops.errors import Undecided
from nixops.transport.command import Command
from nixops.verify.model import Subject
from nixops.verify.tools import PREAMBLE, TOOLS_PATH
from nixops.verify.unit import SANDBOX, UnitFacts

# A property whose empty value means "nothing", where others' means "the default".
_EMPTY_IS_A_VALUE: Final = frozenset({"CapabilityBoundingSet"})
# What systemctl prints for nothing at all (an empty deny list), and for what it cannot print.
_NOT_GIVEN: Final = frozenset({"", "~", "[not set]", "[unprintable]"})

# Before anything is tried, the probe shows that it can read at all: a missing `cat` must not look like a closed
# file. The shell reads its script from stdin, so the body gets another one.
_FRAME: Final = """
RUNNER_PATH={runner_path}
PATH={tools}${{RUNNER_PATH:+:$RUNNER_PATH}}; export PATH
set -- {args}
probe() {{
{body}
}}
cat /proc/self/status > /dev/null && stat -Lc %d:%i / > /dev/null && ls -A / > /dev/null || exit 3
while read -r key value rest; do
    if [ "$key" = Uid: ]; then echo "@uid $value"; fi
done < /proc/self/status
probe "$@" < /dev/null
echo "@end"
"""

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


def as_runner(subject: Subject, body: str, args: Iterable[str] = (), *, timeout: float = 60.0) -> list[str]:
    """Run the shell text ``body`` with ``args`` as ``$1``… where the runner's jobs run, and return its lines.

    ``$RUNNER_PATH`` is the PATH of the running service; on PATH it follows the host's own tools.

    :param timeout: seconds; the host itself ends the probe then, whatever becomes of the connection.
    :raises Undecided: the probe did not run to its end, or not as the service's user.
    """
    facts = subject.facts
    if not facts.exists:
        raise Undecided(f"{subject.unit} is not a unit of {subject.host_name}: nothing can be tried as its user")
    script = _FRAME.format(
        runner_path=shlex.quote(":".join(facts.process.path) if facts.process else ""),
        tools=TOOLS_PATH,
        args=" ".join(shlex.quote(a) for a in args),
        body=body,
    )
    properties = [p for value in sandbox(facts) for p in ("-p", value)]
    result = subject.transport.run(
        Command.of(
            *("sh", "-c", PREAMBLE + 'exec "$@"', "sh"),
            *("systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--service-type=exec"),
            *("--unit=nixops-verify-" + secrets.token_hex(6), "-p", f"RuntimeMaxSec={timeout:.0f}", *properties),
            *("--", "/bin/sh"),
            stdin=script.encode(errors="surrogateescape"),
            root=True,
            timeout=timeout + 10,
            title="trying as the runner's user",
        )
    )
    lines = result.out.splitlines()
    if "@end" not in lines:
        raise Undecided(
            f"could not try as the runner's user on {subject.host_name} (exit code {result.code})",
            hint="systemd-run must be able to start a unit with the properties of " + subject.unit,
            detail=result.tail(5),
        )
    uid = next((line.split()[1] for line in lines if line.startswith("@uid ")), "")
    if facts.process is not None and uid != str(facts.process.uid):
        raise Undecided(f"the probe ran as uid {uid}, the runner as {facts.process.uid}: what it found proves nothing")
    return [line for line in lines if line and not line.startswith("@")]


def try_to_open(subject: Subject, targets: Sequence[Target]) -> tuple[Access, ...]:
    """What of ``targets`` the runner's user can read, list or write. Their content goes nowhere.

    :raises Undecided: as :func:`as_runner`.
    """
    if not targets:
        return ()
    found: list[Access] = []
    for line in as_runner(subject, _TRY, [t.path for t in targets]):
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
