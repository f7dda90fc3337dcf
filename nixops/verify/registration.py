"""The runner is known to Forgejo: listed and not offline (15 and later), or registered as its own files say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from nixops.errors import ForgeError, Undecided
from nixops.inventory.model import RunnerModule
from nixops.transport.command import Command
from nixops.verify.model import Check, RegisteredRunner, Subject, Verdict, failed, passed
from nixops.verify.tools import PREAMBLE

# The files are read through the process' own root and directory, since the unit may have mounts of its own. Beside
# the three fields named here they hold the runner's token, which stays where it is.
_LOOK: Final = r"""
process=/proc/$1
for file in "$process/cwd/.runner" "$process/root$2/.runner"; do
    if [ -f "$file" ]; then
        echo '@registration'
        grep -oE '"(uuid|name|address)"[[:space:]]*:[[:space:]]*"([^"\\]|\\.)*"' "$file"
        break
    fi
done
config=$(tr '\0' '\n' < "$process/cmdline" | sed -n -e 's/^--config=//p' -e '/^\(-c\|--config\)$/{n;p;}' | head -n 1)
if [ -n "$config" ]; then
    echo '@config'
    case $config in
        /*) config=$process/root$config ;;
        *) config=$process/cwd/$config ;;
    esac
    grep -oE 'uuid.?[[:space:]]*:[[:space:]]*.?[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}' "$config"
fi
echo '@declared'
journalctl --quiet --no-pager --output=cat "_SYSTEMD_INVOCATION_ID=$3" 2> /dev/null |
    grep -cE 'declared? successfully|skipping declaring'
echo '@end'
"""


@dataclass(frozen=True)
class Registration:
    """What the runner's own files say, without its token.

    :ivar file: the ``.runner`` file's fields, ``None`` where there is no such file.
    :ivar uuids: of the connections in the daemon's configuration.
    :ivar declared: how often the daemon has logged, since its start, that the forge took its declaration.
    """

    file: dict[str, str] | None
    uuids: tuple[str, ...]
    declared: int


def read_registration(subject: Subject) -> Registration:
    """Ask the host.

    :raises Undecided: there is no process to look at, or the answer was cut off.
    """
    facts = subject.facts
    if facts.process is None:
        raise Undecided(f"{subject.unit} does not run: its registration cannot be told", hint="start the unit")
    directory = facts.get("WorkingDirectory").lstrip("-!")
    result = subject.transport.run(
        Command.script(
            PREAMBLE + _LOOK,
            *(str(facts.process.pid), directory, facts.get("InvocationID")),
            root=True,
            timeout=30.0,
            title="reading the registration",
        )
    )
    if not result.out.rstrip().endswith("@end"):
        raise Undecided(f"the registration on {subject.host_name} could not be read", detail=result.tail(5))
    parts: dict[str, list[str]] = {}
    current: list[str] = []
    for line in result.out.splitlines():
        if line.startswith("@"):
            current = parts.setdefault(line, [])
        else:
            current.append(line)
    file: dict[str, str] | None = None
    if "@registration" in parts:
        try:
            file = json.loads("{" + ",".join(parts["@registration"]) + "}")
        except ValueError:
            raise Undecided(f"the .runner file of {subject.unit} is not JSON", hint="remove it and restart") from None
    uuids = [line[-36:].lower() for line in parts.get("@config", ())]
    declared = next(iter(parts.get("@declared", ())), "0")
    return Registration(file, tuple(dict.fromkeys(uuids)), int(declared) if declared.isdigit() else 0)


def registered(subject: Subject) -> Verdict:
    """Registered: with the right forge and name on the host's side, and listed and alive on the forge's."""
    registration = _settled(subject)
    if subject.runner.module is RunnerModule.GITEA:
        wrong = _file_is_wrong(subject, registration)
        if wrong is not None:
            return wrong
        uuids: tuple[str, ...] = ((registration.file or {}).get("uuid", "").lower(),)
    else:
        uuids, wanted = registration.uuids, len(subject.runner.trusted)
        if len(uuids) != wanted:
            return failed(
                expected=f"{wanted} connections, one for each trusted repository",
                found=f"{len(uuids)} in the daemon's configuration",
                todo="deploy again",
            )
    if subject.forge is not None:
        return _listed(subject, uuids)
    if subject.runner.module is RunnerModule.GITEA:
        return passed(f"registered as {subject.runner.name} (this forge cannot list its runners)")
    if registration.declared < len(uuids):
        return failed(
            expected=f"{len(uuids)} connections declared to the forge",
            found=f"{registration.declared} in the journal since the service started",
            todo=f"look at `journalctl -u '{subject.unit}'`",
        )
    return passed(f"{len(uuids)} connections declared to the forge")


def _settled(subject: Subject) -> Registration:
    """What the files say once there is nothing more to come, or as they are when ``patience.forge`` is over."""
    patience = subject.patience
    deadline = patience.clock() + patience.forge
    while True:
        registration = read_registration(subject)
        if subject.runner.module is RunnerModule.GITEA:
            complete = bool((registration.file or {}).get("uuid"))
        else:
            # A daemon declares one connection after the other.
            complete = subject.forge is not None or registration.declared >= len(registration.uuids)
        if complete or patience.clock() >= deadline:
            return registration
        patience.sleep(patience.interval)


def _file_is_wrong(subject: Subject, registration: Registration) -> Verdict | None:
    file, name, url = registration.file, subject.runner.name, subject.forge_url
    todo = "rotate the token (`invoke rotate-token`), so that the runner registers again"
    if file is None:
        return failed(expected="a registration file (.runner)", found="none beside the running daemon", todo=todo)
    if file.get("name") != name:
        return failed(expected=f"a registration as {name}", found=f"one as {file.get('name')}", todo=todo)
    if not file.get("uuid"):
        return failed(expected="a registration with a uuid", found="one without", todo=todo)
    if url is not None and file.get("address", "").rstrip("/") != url.rstrip("/"):
        return failed(expected=f"a registration with {url}", found=f"one with {file.get('address')}", todo=todo)
    return None


def _listed(subject: Subject, uuids: tuple[str, ...]) -> Verdict:
    """Poll the forge until every registration is there and alive: a daemon takes a moment to be heard of."""
    assert subject.forge is not None  # the caller's condition; narrows the type
    patience = subject.patience
    deadline = patience.clock() + patience.forge
    while True:
        try:
            runners: tuple[RegisteredRunner, ...] = subject.forge()
        except ForgeError as error:
            raise Undecided(f"the forge could not be asked: {error.message}", hint=error.hint) from None
        verdict = _judge(subject, uuids, runners)
        if verdict.ok or patience.clock() >= deadline:
            return verdict
        patience.sleep(patience.interval)


def _judge(subject: Subject, uuids: tuple[str, ...], runners: tuple[RegisteredRunner, ...]) -> Verdict:
    by_uuid = {r.uuid.lower(): r for r in runners}
    unknown = [uuid for uuid in uuids if uuid not in by_uuid]
    if unknown:
        return failed(
            expected="the runner in the forge's list",
            found=f"no runner with uuid {', '.join(unknown)} among {len(runners)}",
            todo="its registration was deleted: rotate the token (`invoke rotate-token`)",
        )
    ours = [by_uuid[uuid] for uuid in uuids]
    offline = [r for r in ours if r.status == "offline"]
    if offline:
        return failed(
            expected="the runner in touch with the forge",
            found=f"{', '.join(r.name for r in offline)} offline",
            todo=f"see that {subject.host_name} reaches the forge, and look at `journalctl -u '{subject.unit}'`",
        )
    wanted = {label.split(":", 1)[0] for label in subject.runner.labels}
    for runner in ours:
        # Null until the daemon has declared them, which comes before its first contact as idle.
        seen = {label.split(":", 1)[0] for label in runner.labels or ()}
        if seen and not wanted <= seen:
            return failed(
                expected=f"the labels {', '.join(sorted(wanted))}",
                found=f"{', '.join(sorted(seen))} on {runner.name}",
                todo="deploy again, so that the daemon declares them",
            )
    left = [r for r in runners if r.name in {o.name for o in ours} and r.uuid.lower() not in uuids]
    note = f"; {len(left)} older registration of that name is left: delete it in the forge" if left else ""
    return passed(", ".join(f"{r.name} is {r.status}" for r in ours) + note)


CHECKS = (Check("registered", registered),)
