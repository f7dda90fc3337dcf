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
#
# Who is killed while a command begins cannot add it any more. So in the end, once that sshd has gone (it is not our
# parent any more; where /proc shows nobody else's processes, that is all there is to see of it), all commands are
# stopped that have the connection's mark ($4) in the first line of their arguments, where the keeper has none. One
# that begins later finds nobody to hear it, and does not run. Others can read the mark and show it too: so the group
# must be the process' own, and the process ours, or the group's leader where it is root's through sudo.
KEEPER = """\
token=$1 patience=$2 signal_group=$3 mark=${4:?} groups=' ' timer= parent= over=
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
unheard() {
  found=' '
  set -- /proc/[0-9]*/cmdline
  # A shell may read byte by byte.
  ! command -v grep >/dev/null || set -- $(grep -l -s -e "$mark" "$@")
  for file; do
    said= place=${file%/cmdline}
    read -r stat <"$place/stat" || continue
    set -- ${stat##*) }
    [ "/proc/$3" = "$place" ] || continue
    read -r said <"$file"
    case $said in
      *"sudo:$mark"*) found="${found}sudo:$3 " ;;
      *"$mark"*) [ ! -O "$place" ] || found="$found$3 " ;;
    esac
  done
} 2>/dev/null
has_parent() {
  read -r stat </proc/$$/stat || return
  set -- ${stat##*) }
  [ "$2" = "$PPID" ] || return
  parent=
  read -r parent </proc/$PPID/comm
  case $parent in
    sshd* | dropbear*) kill -s HUP "$PPID" ;;
    ?*) return 1 ;;
  esac
} 2>/dev/null
finish() {
  trap '' HUP PIPE TERM
  stop $groups
  count=50
  while [ "$count" -gt 0 ] && has_parent; do
    sleep 0.1
    count=$((count - 1))
  done
  unheard
  stop $found
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
# session's leader; sshd has made one for it. Where nobody hears it any more, the command is not run. The first line is
# for the keeper.
_WRAPPER = """\
: {mark}
group=$$
[ ! -r /proc/$$/stat ] || read -r a b c d group e </proc/$$/stat
echo "$0 $group" && echo "$0 $group" >&2 || exit
{wait}"$@"
code=$?
echo "$0 end $code" >&2
exit $code"""
# The ssh of a connection for one command, which the keeper cannot hang up, hears it for somebody who has gone. So the
# command waits for a line from him who has told the keeper.
_WAIT = "read -r line || exit\n"


def keeper_line(token: str, patience: float, mark: str) -> str:
    """What the login shell runs to become the keeper; it prints ``token`` on a line once it is there.

    :param patience: seconds without a sign of life, after which it gives us up.
    :param mark: what the connection's commands carry; a word of :func:`new_token`.
    """
    seconds = str(max(1, round(patience)))
    command = Command.of("sh", "-c", KEEPER, "nixops-keeper", token, seconds, SIGNAL_GROUP, mark)
    # The login shell must not stay in between: the keeper's parent is then its sshd, and its group its own.
    return f"exec {command.shell_line()}"


def new_token() -> str:
    """A word that nobody else's output contains."""
    return f"nixops-{secrets.token_hex(8)}"


@dataclass(frozen=True)
class Wrapped:
    """A command as the host's login shell gets it.

    :ivar line: the command line.
    :ivar waits: its stdin begins with a line of ours, before which it does not run.
    """

    token: str
    line: str
    through_sudo: bool
    waits: bool

    @classmethod
    def of(cls, command: Command, *, mark: str, through_sudo: bool, waits: bool = False) -> Wrapped:
        """``command`` with its beginning and its end marked; through ``sudo -n`` where asked for.

        :param mark: the one that the connection's keeper was given.
        """
        token = new_token()
        inner = ("env", *(f"{k}={v}" for k, v in command.env.items()), *command.argv) if command.env else command.argv
        sudo = ("sudo", "-n", "--") if through_sudo else ()
        text = _WRAPPER.format(mark=f"sudo:{mark}" if through_sudo else mark, wait=_WAIT if waits else "")
        outer = replace(command, argv=(*sudo, "sh", "-c", text, token, *inner), env={})
        return cls(token, f"exec {outer.shell_line()}", through_sudo, waits)

    @property
    def begin(self) -> re.Pattern[bytes]:
        """What marks the beginning, on either output; its group is the process group's number."""
        return re.compile(rb"%s (\d+)\n" % self.token.encode())

    @property
    def end(self) -> re.Pattern[bytes]:
        """What marks the end, on stderr; its group is the exit code."""
        return re.compile(rb"%s end (\d+)\n" % self.token.encode())
