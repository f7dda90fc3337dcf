"""Shell text for the far end of a connection: a keeper that ends what we started there when we are gone, and the
wrapper that tells a command's own output and exit code from what ssh and a login shell say.

POSIX sh and coreutils are all that is needed.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace

from nixops.transport.command import Command
from nixops.transport.group import SIGNAL_GROUP

# How long the keeper gives a process group between TERM and KILL, seconds.
STOP_GRACE = 5.0

# Reads lines from stdin: "add GROUP", "del GROUP", "stop GROUP" (answered by "heard GROUP", then "gone GROUP"); any
# other is a sign of life. At the end of stdin, or without a line for $2 seconds, it stops every group that was added
# (by SIGNAL_GROUP, its $3) and then hangs up the connection it came by ($PPID is its sshd), whose other sessions end
# with it: a nix-daemon notices that. A group is a number, or sudo:NUMBER where only root may signal it.
KEEPER = """\
token=$1 patience=$2 signal_group=$3 groups=' ' timer= parent= over=
send() {
  case $2 in
    sudo:*) sudo -n -- sh -c "$signal_group" sh "$1" "${2#sudo:}" ;;
    *) sh -c "$signal_group" sh "$1" "$2" ;;
  esac </dev/null >/dev/null 2>&1
}
stop() {
  for group; do send TERM "$group"; done
  for group; do
    case $group in sudo:*) step=1 count=5 ;; *) step=0.1 count=50 ;; esac
    while [ "$count" -gt 0 ] && send 0 "$group"; do
      sleep "$step"
      count=$((count - 1))
    done
    [ "$count" -gt 0 ] || send KILL "$group"
  done
}
finish() {
  trap '' HUP PIPE
  stop $groups
  read -r parent 2>/dev/null </proc/$PPID/comm
  case $parent in sshd* | dropbear*) kill -s HUP "$PPID" ;; esac
}
wait_for_life() {
  trap 'over=yes' TERM
  sleep "$patience" &
  sleeper=$!
  trap 'kill -s KILL "$sleeper"; exit 0' TERM
  [ -z "$over" ] || { kill -s KILL "$sleeper"; exit 0; }
  wait "$sleeper" || return
  finish
  kill -s KILL "$$"
}
alive() {
  [ -z "$timer" ] || kill "$timer" 2>/dev/null
  wait_for_life </dev/null >/dev/null 2>&1 &
  timer=$!
}
trap '' HUP PIPE
alive
echo "$token"
while read -r verb group; do
  case $verb in
    add) groups="$groups$group " ;;
    del) case $groups in *" $group "*) groups="${groups%%" $group "*} ${groups#*" $group "}" ;; esac ;;
    stop) echo "heard $group"; { stop "$group"; echo "gone $group"; } </dev/null 2>/dev/null & ;;
  esac
  alive
done
kill "$timer" 2>/dev/null
finish
"""

# Says on both outputs where the command's own begins (what came before is a login shell's or ssh's), with the process
# group for the keeper, and on stderr with which code it ended: ssh's own 255 can then be no command's. It stays its
# session's leader; sshd has made one for it. Where nobody hears it any more, the command is not run.
_WRAPPER = """\
group=$$
[ ! -r /proc/$$/stat ] || read -r a b c d group e </proc/$$/stat
echo "$0 $group" && echo "$0 $group" >&2 || exit
"$@"
code=$?
echo "$0 end $code" >&2
exit $code"""


def keeper_line(token: str, patience: float) -> str:
    """What the login shell runs to become the keeper; it prints ``token`` on a line once it is there.

    :param patience: seconds without a sign of life, after which it gives us up.
    """
    seconds = str(max(1, round(patience)))
    command = Command.of("sh", "-c", KEEPER, "nixops-keeper", token, seconds, SIGNAL_GROUP)
    # The login shell must not stay in between: the keeper's parent is then its sshd, and its group its own.
    return f"exec {command.shell_line()}"


def new_token() -> str:
    """A word that nobody else's output contains."""
    return f"nixops-{secrets.token_hex(8)}"


@dataclass(frozen=True)
class Wrapped:
    """A command as the host's login shell gets it.

    :ivar line: the command line.
    """

    token: str
    line: str
    through_sudo: bool

    @classmethod
    def of(cls, command: Command, *, through_sudo: bool) -> Wrapped:
        """``command`` with its beginning and its end marked; through ``sudo -n`` where asked for."""
        token = new_token()
        inner = ("env", *(f"{k}={v}" for k, v in command.env.items()), *command.argv) if command.env else command.argv
        sudo = ("sudo", "-n", "--") if through_sudo else ()
        outer = replace(command, argv=(*sudo, "sh", "-c", _WRAPPER, token, *inner), env={})
        return cls(token, f"exec {outer.shell_line()}", through_sudo)

    @property
    def begin(self) -> re.Pattern[bytes]:
        """What marks the beginning, on either output; its group is the process group's number."""
        return re.compile(rb"%s (\d+)\n" % self.token.encode())

    @property
    def end(self) -> re.Pattern[bytes]:
        """What marks the end, on stderr; its group is the exit code."""
        return re.compile(rb"%s end (\d+)\n" % self.token.encode())
