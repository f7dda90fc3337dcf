"""The operator's side of the guard (``guard.sh``): start it, follow its state, give the verdict."""

from __future__ import annotations

import math
import secrets
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Final

from nixops.deploy.host import HOST_PATH, DeployRecord, HostFacts
from nixops.errors import CommandTimeout, HostFault, HostStateUnknown, NixopsError, Unreachable, printable
from nixops.transport.command import Command, Runner
from nixops.values import StorePath

DEPLOYS: Final = "/var/lib/nixops/deploys"
FINAL: Final = frozenset({"committed", "rolled-back", "rollback-failed", "refused"})
# How many deploys a host remembers.
KEEP: Final = 20

# The exit code of a start that changed nothing.
NOTHING_BEGAN: Final = 20

# stdin: the guard's text (its length is an argument), then the parameters: no secret is an argument, and nothing is
# quoted twice. The watchdog is started first, so that there is no moment in which a guard has none. A full disk
# shows here, where nothing is done yet: the reserve is what a later roll-back may use up.
_START: Final = f"""
PATH={HOST_PATH}; export PATH
set -eu; umask 077
id=$1; old=$2; new=$3; tools=$4; size=$5; rest=$6
d={DEPLOYS}/$id
mkdir -p {DEPLOYS} || exit {NOTHING_BEGAN}
ls {DEPLOYS} | sort | head -n -{KEEP} | while read -r past; do
    s=$(cat "{DEPLOYS}/$past/state" 2>/dev/null) || s=
    case $s in
    '' | committed | rolled-back | refused)
        rm -rf "{DEPLOYS}/$past" "/nix/var/nix/gcroots/nixops-$past-old" "/nix/var/nix/gcroots/nixops-$past-new"
        ;;
    esac
done || true
mkdir "$d" || exit {NOTHING_BEGAN}
forget() {{
    [ -e "$d/state" ] || rm -rf "$d" # with one, it was fenced off
    rm -f "/nix/var/nix/gcroots/nixops-$id-old" "/nix/var/nix/gcroots/nixops-$id-new"
    exit {NOTHING_BEGAN}
}}
trap forget EXIT
head -c "$size" >"$d/guard.sh"
cat >"$d/params"
[ "$(wc -c <"$d/params")" -eq "$rest" ] || {{ echo "the connection ended in the middle of the guard" >&2; exit 1; }}
: >"$d/lock"
head -c 1048576 /dev/urandom >"$d/reserve"
ln -sfn "$old" "/nix/var/nix/gcroots/nixops-$id-old"
ln -sfn "$new" "/nix/var/nix/gcroots/nixops-$id-new"
[ -x "$new/bin/switch-to-configuration" ] || {{ echo "there is no $new/bin/switch-to-configuration" >&2; exit 1; }}
loader=$("$tools/sh" "$d/guard.sh" facts "$d")
printf "loader='%s'\\n" "$loader" >>"$d/params"
read -r up _ </proc/uptime; echo $((${{up%%.*}} + 600)) >"$d/deadline"
sync "$d/guard.sh" "$d/params" "$d/deadline" "$d/reserve" "$d"
(set -C; echo prepared >"$d/state")
sync "$d/state" "$d"
trap - EXIT
run() {{
    systemd-run --quiet --collect --unit="$1" -p Type=exec -p OOMScoreAdjust=-900 -p KillMode=control-group \\
        -p WorkingDirectory=/ -E "PATH=$tools" "$tools/sh" "$d/guard.sh" "$2" "$d"
}}
if ! run "nixops-watchdog-$id" watch; then
    echo refused >"$d/state"
    exit {NOTHING_BEGAN}
fi
run "nixops-guard-$id" run
echo "loader=$loader"
"""

# Whether a start that was cut off began; if not, it never will: of the two, one alone gets to write the first state.
_FENCE: Final = f"""
PATH={HOST_PATH}; export PATH
umask 077; d={DEPLOYS}/$1
mkdir -p "$d"
(set -C; echo refused >"$d/state") 2>/dev/null && echo "$2" >"$d/reason"
exit 0
"""

# Waits on the host, so that a change of state is seen at once and costs one round trip.
_WAIT: Final = f"""
PATH=$2:{HOST_PATH}; export PATH
d={DEPLOYS}/$1; tenths=$3; known=$4
while [ "$tenths" -gt 0 ]; do
    s=; [ -e "$d/state" ] && read -r s <"$d/state"
    [ "$s" != "$known" ] && break
    sleep 0.1; tenths=$((tenths - 1))
done
cat "$d/state" || exit 1
cat /proc/sys/kernel/random/boot_id
head -n 1 "$d/reason" 2>/dev/null
exit 0
"""

_VERDICT: Final = f"""
PATH={HOST_PATH}; export PATH
umask 077; d={DEPLOYS}/$1
read -r nonce; read -r why
printf '%s %s %s\\n' "$2" "$nonce" "$why" >"$d/verdict.new" || exit 1
sync "$d/verdict.new"; mv -f "$d/verdict.new" "$d/verdict"
"""

_LOG: Final = f"""
PATH={HOST_PATH}; export PATH
d={DEPLOYS}/$1
for log in activation rollback commit boot; do
    [ -s "$d/$log.log" ] && {{ echo "-- $log"; tail -n 15 "$d/$log.log" | head -c 4000; }}
done
exit 0
"""


class NotBegun(HostFault):
    """The host could not take the guard, and is as it was."""


@dataclass(frozen=True)
class GuardState:
    """A state of the transaction as the host gives it."""

    name: str
    reason: str = ""

    @property
    def final(self) -> bool:
        return self.name in FINAL


@dataclass(frozen=True)
class GuardedDeploy:
    """One transaction on one host."""

    id: str
    nonce: str
    old: StorePath
    new: StorePath
    tools: str
    boot_id: str
    activation_seconds: float
    confirm_seconds: float

    @property
    def longest_seconds(self) -> float:
        """How long the host may take to decide by itself, where nothing on it hangs."""
        return self.activation_seconds * 3 + self.confirm_seconds + 30


def prepare(id: str, facts: HostFacts, new: StorePath, activation: float, confirm: float) -> GuardedDeploy:
    """The transaction as a value; nothing is done yet.

    :param activation: seconds one activation may take; :param confirm: seconds the host waits for the verdict.
    :raises HostFault: the host lacks a program that the guard needs.
    """
    if facts.missing:
        raise HostFault(
            f"the running system lacks {', '.join(facts.missing)}, which the guard needs",
            hint="add them to environment.systemPackages",
        )
    return GuardedDeploy(id, secrets.token_hex(16), facts.running, new, facts.tools, facts.boot_id, activation, confirm)


def start(runner: Runner, deploy: GuardedDeploy, facts: HostFacts) -> None:
    """Send the guard and start it and its watchdog as transient units. The boot default is not moved.

    :raises NotBegun: nothing was started. :raises HostFault: something went wrong, and a unit may have been started.
    """
    text = resources.files("nixops.deploy").joinpath("guard.sh").read_bytes()
    parameters = {
        "id": deploy.id,
        "nonce": deploy.nonce,
        "tools": deploy.tools,
        "old": deploy.old,
        "new": deploy.new,
        "profile": facts.profile,
        "generation": str(facts.generation),
        "boot_id": facts.boot_id,
        "activation_seconds": str(math.ceil(deploy.activation_seconds)),  # `timeout 0` would be none at all
        "confirm_seconds": str(math.ceil(deploy.confirm_seconds)),
    }
    params = "".join(f"{k}={shlex.quote(v)}\n" for k, v in parameters.items()).encode()
    argv = ("sh", "-c", _START, "sh", deploy.id, deploy.old, deploy.new, deploy.tools, str(len(text)), str(len(params)))
    command = Command(argv, stdin=text + params, root=True, title="starting the guard")
    result = runner.run(command)
    if result.code == NOTHING_BEGAN:
        raise NotBegun(f"the guard could not be started on {runner.host}", detail=result.tail())
    if not result.ok:
        raise HostFault(f"the guard could not be started on {runner.host}", detail=result.tail())


def fence(runner: Runner, deploy: GuardedDeploy, why: str) -> None:
    """After a start whose end was not seen: one that has not begun by now never will."""
    why = " ".join(printable(why).split())[:300]
    runner.run(Command.script(_FENCE, deploy.id, why, root=True, title="looking whether the guard began")).check()


def wait_change(runner: Runner, deploy: GuardedDeploy, known: str, seconds: float = 10.0) -> GuardState:
    """The state once it is no longer ``known``, or after ``seconds`` whatever it is then."""
    result = runner.run(
        Command.script(
            _WAIT,
            deploy.id,
            deploy.tools,
            str(max(1, int(seconds * 10))),
            known,
            root=True,
            timeout=seconds + 30,
            title="following the activation",
        )
    )
    lines = result.out.splitlines()
    if not result.ok or len(lines) < 2:
        raise HostStateUnknown(
            f"{runner.host} does not say how deploy {deploy.id} stands", hint="look at the host", detail=result.tail()
        )
    state = GuardState(lines[0].strip(), printable(lines[2].strip()) if len(lines) > 2 else "")
    if lines[1].strip() != deploy.boot_id and not state.final:
        # The host restarted, and the guard is gone with what was in its memory: bring it to an end as any next run
        # would.
        return recover(runner, DeployRecord(deploy.id, state.name, state.reason))
    return state


def give_verdict(runner: Runner, deploy: GuardedDeploy, word: str, why: str = "") -> None:
    """Write ``confirm`` or ``abort``. It counts only with this deploy's nonce, so a stale one confirms nothing."""
    why = " ".join(printable(why).split())[:300]
    # On stdin, where `read` takes them: no argument shows them to the host's other users.
    command = Command(
        ("sh", "-c", _VERDICT, "sh", deploy.id, word),
        stdin=f"{deploy.nonce}\n{why}\n",
        root=True,
        title=f"giving the verdict {word}",
    )
    runner.run(command).check()


def follow(
    connect: Callable[[], Runner],
    runner: Runner,
    deploy: GuardedDeploy,
    until: Callable[[GuardState], bool],
    on_state: Callable[[GuardState], None],
    seconds: float,
    known: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> tuple[GuardState, Runner]:
    """Follow the state until ``until`` holds, over lost connections too.

    :param connect: opens a new connection to the same host.
    :param seconds: give up after this long without an answer that satisfies ``until``.
    :return: the state, and the connection that works now.
    :raises HostStateUnknown: the time is up and the host did not say.
    """
    end = clock() + seconds
    last = known
    while True:
        try:
            state = wait_change(runner, deploy, last, min(10.0, max(0.2, end - clock())))
            if state.name != last:
                last = state.name
                on_state(state)
            if until(state):
                return state, runner
        except (Unreachable, CommandTimeout, HostFault, HostStateUnknown) as error:
            # Also an answer that is none: in the middle of an activation a shell or sudo may be gone for a moment.
            on_state(GuardState("unreachable", str(error)))
            if clock() < end:
                time.sleep(1.0)
                runner = connect()
        if clock() >= end:
            raise HostStateUnknown(
                f"{runner.host} did not say within {seconds:.0f} s how deploy {deploy.id} ended (last seen: {last})",
                hint=f"without a confirmation the host rolls back by itself; read {DEPLOYS}/{deploy.id}/state there",
            )


def logs(runner: Runner, deploy: GuardedDeploy) -> str:
    """The ends of the activation's logs on the host, fit to print; empty when the host cannot be asked."""
    try:
        return printable(runner.run(Command.script(_LOG, deploy.id, root=True)).out)
    except NixopsError:
        return ""


# A unit of its own, as the guard is: the roll-back must not end with the connection that asked for it. An answer
# of systemd that is none (it may be executing itself again) is no end.
_RECOVER: Final = f"""
PATH={HOST_PATH}; export PATH
d={DEPLOYS}/$1; left=$2; unit=nixops-recover-$1.service
tools=$(. "$d/params" && echo "$tools") && [ -x "$tools/sh" ] || tools=$(readlink -f /run/current-system/sw/bin)
systemd-run --quiet --collect --unit="$unit" -p Type=exec -p OOMScoreAdjust=-900 -p WorkingDirectory=/ \\
    -E "PATH=$tools" "$tools/sh" "$d/guard.sh" recover "$d" ||
    [ "$(systemctl show -P ActiveState "$unit")" = active ] || exit 1
while [ "$left" -gt 0 ]; do
    case $(systemctl show -P ActiveState "$unit" 2>/dev/null) in inactive | failed) break ;; esac
    sleep 0.2; left=$((left - 1))
done
cat "$d/state"; head -n 1 "$d/reason" 2>/dev/null
exit 0
"""


def recover(runner: Runner, record: DeployRecord, seconds: float = 1800.0) -> GuardState:
    """Finish or undo a deploy that a crash left unfinished; to be called only while holding the lease.

    A guard that lives is asked to end, and made to at its deadline.

    :raises HostStateUnknown: the host does not say that it came to an end.
    """
    command = Command.script(
        _RECOVER,
        record.id,
        str(int(seconds * 5)),
        root=True,
        timeout=seconds + 60,
        title="recovering an earlier deploy",
    )
    result = runner.run(command)
    lines = result.out.splitlines()
    state = GuardState(lines[0].strip() if lines else "", printable(lines[1]) if len(lines) > 1 else "")
    if not result.ok or not state.final:
        raise HostStateUnknown(
            f"deploy {record.id} on {runner.host} was left in state {record.state} and could not be brought to an end",
            hint=f"look at {DEPLOYS}/{record.id} there",
            detail=result.tail(),
        )
    return state
