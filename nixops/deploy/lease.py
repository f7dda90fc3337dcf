"""The host's lease: taken before the first effect, renewed by signs of life, given up at the end."""

from __future__ import annotations

import getpass
import json
import secrets
import socket
import threading
from collections.abc import Callable
from importlib import resources
from types import TracebackType
from typing import Final, Self

from nixops.deploy.host import HOST_PATH
from nixops.errors import Leased, NixopsError, printable
from nixops.transport.command import Command, Runner

# The exit code of a sign of life for a lease that is no longer ours.
_LOST: Final = 9
# How long a sign of life that is on its way is waited for, seconds.
_JOIN: Final = 2.0

_ACQUIRE: Final = f"""
PATH={HOST_PATH}; export PATH
set -u; umask 077
nonce=$1; seconds=$2; size=$3
mkdir -p /run/nixops; chmod 700 /run/nixops
head -c "$size" >"/run/nixops/lease.sh.$nonce"
# sudo drops SSH_CONNECTION: the shell it was called from has it.
from=${{SSH_CONNECTION-}}; process=$$
while [ -z "$from" ] && [ "${{process:-1}}" -gt 1 ]; do
    from=$(tr '\\0' '\\n' <"/proc/$process/environ" 2>/dev/null | sed -n 's/^SSH_CONNECTION=//p')
    process=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$process/status" 2>/dev/null)
done
{{
    IFS= read -r offer
    printf '%s,"since":"%s","from":"%s"}}\\n' "$offer" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "${{from%% *}}"
}} >"/run/nixops/offer.$nonce"
tools=$(readlink -f /run/current-system/sw/bin)
tries=30
systemctl reset-failed nixops-lease.service 2>/dev/null
if systemd-run --quiet --collect --unit=nixops-lease -p Type=exec -E "PATH=$tools" \\
    -p "ExecStopPost=$tools/rm -f /run/nixops/lease /run/nixops/alive" \\
    "$tools/sh" "/run/nixops/lease.sh.$nonce" "$nonce" "$seconds" "$tools" 2>"/run/nixops/error.$nonce"; then
    while [ $tries -gt 0 ]; do
        if grep -q "$nonce" /run/nixops/lease 2>/dev/null; then
            rm -f "/run/nixops/lease.sh.$nonce" "/run/nixops/error.$nonce"
            echo held
            exit 0
        fi
        systemctl is-active --quiet nixops-lease.service || break
        sleep 0.1; tries=$((tries - 1))
    done
fi
cat "/run/nixops/error.$nonce" >&2
rm -f "/run/nixops/lease.sh.$nonce" "/run/nixops/offer.$nonce" "/run/nixops/error.$nonce"
echo refused
head -c 2000 /run/nixops/lease 2>/dev/null
exit 0
"""

_ALIVE: Final = f"""
PATH={HOST_PATH}; export PATH
grep -q "$1" /run/nixops/lease || exit {_LOST}
read -r up _ </proc/uptime; echo "${{up%%.*}}" >"/run/nixops/alive.$1"; mv -f "/run/nixops/alive.$1" /run/nixops/alive
"""

# A guard that is still at work keeps the lease: it ends by itself after it.
_RELEASE: Final = f"""
PATH={HOST_PATH}; export PATH
grep -q "$1" /run/nixops/lease 2>/dev/null || exit 0
for d in /var/lib/nixops/deploys/*/; do
    [ -e "$d/lock" ] || continue
    case $(cat "$d/state") in committed | rolled-back | rollback-failed | refused) continue ;; esac
    flock -n "$d/lock" true || exit 0
done
systemctl stop nixops-lease.service
"""

_UPGRADE: Final = f"""
PATH={HOST_PATH}; export PATH
for unit in nixos-upgrade nixos-rebuild-switch-to-configuration; do
    state=$(systemctl show -P ActiveState "$unit.service")
    case $state in active | activating) echo "$unit.service is $state" ;; esac
done
exit 0
"""


def describe(text: str) -> str:
    """Who holds a lease and since when, from what stands in the lease file; fit to print."""
    try:
        held = json.loads(text)
        return printable(
            f"{held['who']} from {held['from'] or 'the host itself'} since {held['since']}, doing {held['doing']}"
        )
    except (ValueError, KeyError, TypeError):
        return "someone who left no name"


class Lease:
    """Held inside a ``with`` block. A thread gives the signs of life over the connection that is already open.

    :param doing: what for, as the next who asks will read it.
    :param warn: is told when it could not be given up.
    :param seconds: without a sign of life for this long the host ends it by itself.
    :raises Leased: another holds it, or ``nixos-upgrade`` is at work.
    """

    def __init__(self, runner: Runner, *, doing: str, seconds: float, warn: Callable[[str], None]) -> None:
        self._runner = runner
        self._doing = doing
        self._warn = warn
        self._seconds = seconds
        self._nonce = secrets.token_hex(8)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        text = resources.files("nixops.deploy").joinpath("lease.sh").read_bytes()
        offer = json.dumps(
            {"nonce": self._nonce, "who": f"{_user()}@{socket.gethostname()}", "doing": self._doing},
        )[:-1]
        argv = ("sh", "-c", _ACQUIRE, "sh", self._nonce, str(int(self._seconds)), str(len(text)))
        result = self._runner.run(
            Command(argv, stdin=text + offer.encode() + b"\n", root=True, title="taking the host's lease")
        ).check()
        first, _, rest = result.out.partition("\n")
        if first.strip() != "held":
            raise Leased(
                f"{self._runner.host} is leased by {describe(rest)}",
                hint="wait until it is done; a lease without a sign of life ends by itself",
            )
        self._thread = threading.Thread(target=self._live, name="nixops-lease", daemon=True)
        self._thread.start()
        try:
            upgrade = self._runner.run(Command.script(_UPGRADE, root=True)).out.strip()
        except BaseException:
            self._release()
            raise
        if upgrade:
            self._release()
            raise Leased(
                f"{self._runner.host} is being switched already: {printable(upgrade.splitlines()[0])}",
                hint="wait until it is done",
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._release()

    def use(self, runner: Runner) -> None:
        """Give the signs of life over another connection from now on, after the first one was lost."""
        self._runner = runner

    def check(self) -> None:
        """Make sure that it is still ours, before what must not be done by two.

        :raises Leased: it ended by itself, for want of a sign of life.
        """
        if self._runner.run(Command.script(_ALIVE, self._nonce, root=True, timeout=30)).code == _LOST:
            raise Leased(
                f"the lease of {self._runner.host} ended in the meantime: there was no sign of life from here for "
                f"{self._seconds:.0f} s",
                hint="run it again; deploy.lease_timeout sets how long it stands",
            )

    def _release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            # A sign of life that is on its way would be written after the end. It does not hang for long, or nothing
            # else over this connection would come through either.
            self._thread.join(_JOIN)
        try:
            self._runner.run(Command.script(_RELEASE, self._nonce, root=True, timeout=30)).check()
        except NixopsError as error:
            self._warn(
                f"the lease of {self._runner.host} could not be given up ({error}); "
                f"it ends by itself within {self._seconds:.0f} s"
            )

    def _live(self) -> None:
        while not self._stop.wait(self._seconds / 5):
            try:
                self._runner.run(Command.script(_ALIVE, self._nonce, root=True, timeout=30))
            except NixopsError:
                continue


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
