"""The Nix store: readable, built into through the daemon only, and the runner is no trusted user of it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Final

from nixops.errors import Undecided
from nixops.values import StorePath
from nixops.verify.model import Check, Subject, Trial, Trying, failed, passed
from nixops.verify.packages import brings_nix
from nixops.verify.settings import FEATURES
from nixops.verify.tools import TOOLS_PATH

# Writing is tried, not asked about: where a try would harm, the kernel's own answer (access(2)) is taken.
_WRITE: Final = """
[ -r /nix/store ] && [ -x /nix/store ] && echo readable
system=$(readlink -f /run/current-system) && [ -r "$system" ] && [ -x "$system" ] && echo system
for d in /nix/store /nix/var/nix/db /nix/var/nix/profiles /nix/var/nix/gcroots; do
    if mkdir "$d/.nixops-verify-$$" 2> /dev/null; then rmdir "$d/.nixops-verify-$$"; echo "write $d"; fi
done
[ -w /nix/var/nix/db/db.sqlite ] && echo "write /nix/var/nix/db/db.sqlite"
true
"""

# The host's own nix, should the runner have none: a job can bring one. The daemon's word counts, whichever asks.
_ASK_DAEMON: Final = f"""
nix=$(command -v nix) || {{ echo none; return 0; }}
HOME=$(mktemp -d) NIX_REMOTE=daemon; export HOME NIX_REMOTE
answer=$("$nix" {FEATURES} store info --json 2>&1) || answer=$("$nix" {FEATURES} store ping 2>&1)
code=$?
case $answer in
    *'"trusted":true'* | *'"trusted":1'* | *'Trusted: 1'*) echo trusted ;;
    *'not allowed to connect'*) echo refused ;;
    *'"trusted":false'* | *'"trusted":0'* | *'Trusted: 0'*) echo untrusted ;;
    *) if [ $code = 0 ]; then echo silent; else echo "error $(printf %s "$answer" | tail -n 1)"; fi ;;
esac
rm -rf "$HOME"
"""

# nix-build needs no experimental feature. The derivation is new each time, so that the daemon really builds it, and
# asks no substituter, which without a network costs a minute.
_EXPRESSION: Final = (
    'derivation {{ name = "nixops-verify-{nonce}"; system = builtins.currentSystem; builder = "/bin/sh"; '
    'args = [ "-c" "echo {nonce} > $out" ]; allowSubstitutes = false; preferLocalBuild = true; }}'
)
_BUILD: Final = f"""
HOME=$(mktemp -d) NIX_REMOTE=daemon; export HOME NIX_REMOTE
PATH=$RUNNER_PATH
if command -v nix-build > /dev/null; then
    out=$(nix-build --no-out-link --option substitute false -E "$1" 2> "$HOME/log")
else
    out=$(nix {FEATURES} build --no-link --json --impure --option substitute false --expr "$1" 2> "$HOME/log")
fi
code=$?
PATH=$RUNNER_PATH:{TOOLS_PATH}
out=$(printf %s "$out" | grep -o '/nix/store/[a-z0-9]\\{{32\\}}-nixops-verify-[0-9a-f]*\\(.drv\\)\\?' |
    grep -v '[.]drv$' | tail -n 1)
if [ $code = 0 ] && [ "$(cat "$out")" = "$2" ]; then
    echo "built $out"
    nix-store --delete "$out" "$(nix-store --query --deriver "$out")" > /dev/null 2>&1
else
    echo "failed $code"
    grep -v '^[[:space:]]*$' "$HOME/log" | tail -n 1 | sed 's/^[[:space:]]*//'
fi
rm -rf "$HOME"
"""


def store_not_writable(subject: Subject) -> Trying:
    """The store can be read, and neither it nor Nix's database nor a profile can be written past the daemon."""
    del subject
    lines = yield Trial(_WRITE)
    if "readable" not in lines or "system" not in lines:
        return failed(
            expected="/nix/store and the running system readable to the runner's user",
            found="no access",
            todo="remove InaccessiblePaths or a RootDirectory that hides /nix from the unit",
        )
    written = [line.removeprefix("write ") for line in lines if line.startswith("write ")]
    if written:
        return failed(
            expected="no way to write past the daemon",
            found=", ".join(written) + " writable",
            todo="give /nix/store back to root:nixbld 1775 and the rest to root 0755; check what was put there",
        )
    return passed("the store is readable; store, database and profiles are not writable directly")


def _names(words: Iterable[str], user: str, groups: Iterable[str]) -> list[str]:
    """Which words of a ``trusted-users``-like setting mean the runner's user."""
    meant = {"*", user, *(f"@{g}" for g in groups)}
    return [word for word in words if word in meant]


def nix_trust(subject: Subject) -> Trying:
    """The runner is no trusted user of the daemon (that is root), and is allowed to use it at all.

    Both the settings are read and the daemon itself is asked as the runner's user: a daemon that has not been
    restarted still follows older settings.
    """
    settings = subject.nix_settings
    if "allowed-users" not in settings.values:
        raise Undecided(
            f"the Nix settings of {subject.host_name} could not be read",
            hint="`nix config show` (or `nix show-config`) must work there as root",
            detail=settings.said[-500:],
        )
    user, groups = subject.facts.get("User"), subject.facts.groups
    trusted = _names(settings.words("trusted-users"), user, groups)
    lines = yield Trial(_ASK_DAEMON)
    answer = lines[-1] if lines else "none"
    if trusted or answer == "trusted":
        return failed(
            expected=f"{user} not among Nix's trusted-users, who can become root",
            found=f"trusted-users names {' '.join(trusted)}" if trusted else "the daemon trusts it",
            todo="take it out of nix.settings.trusted-users and restart nix-daemon",
        )
    if not _names(settings.words("allowed-users"), user, groups) or answer == "refused":
        return failed(
            expected=f"{user} admitted by Nix's allowed-users",
            found=f"allowed-users = {settings.values['allowed-users']}",
            todo=f'add "{user}" to nix.settings.allowed-users',
        )
    if answer.startswith("error"):
        raise Undecided(f"the Nix daemon could not be asked as {user}", detail=answer.removeprefix("error "))
    said = {"untrusted": "the daemon says so too", "silent": "this daemon does not say"}.get(
        answer, "no nix to ask with"
    )
    return passed(f"not a trusted user ({said}), and allowed to use the daemon")


def store_build(subject: Subject) -> Trying:
    """A job can build: a derivation made up for this check goes through the daemon, with the runner's own nix."""
    del subject
    nonce = secrets.token_hex(8)
    lines = yield Trial(_BUILD, (_EXPRESSION.format(nonce=nonce), nonce), timeout=120.0)
    head = lines[0] if lines else ""
    if head.startswith("built "):
        try:
            return passed(f"built {StorePath(head.removeprefix('built '))} through the daemon")
        except ValueError as error:
            raise Undecided(f"the build answered something else than a store path: {error}") from None
    return failed(
        expected="a derivation built through the Nix daemon by the runner's user",
        found=" / ".join(lines[1:]) or head or "nothing",
        todo="check that nix is among host_packages, that nix-daemon runs and that allowed-users admits the user",
    )


CHECKS = (
    Check("store-not-writable", store_not_writable),
    Check("nix-trust", nix_trust),
    Check("store-build", store_build, applies=lambda _host, _name, runner: brings_nix(runner.packages)),
)
