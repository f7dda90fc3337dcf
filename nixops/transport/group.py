"""Signals for a process group, on this machine and on hosts: one shell text, so that KILL means the same everywhere.

TERM is for the group: a Nix that takes it stops its builders itself. Some never take it: an interrupt that strikes
while one of Nix's destructors runs is thrown there, ignored, and never thrown again ("error (ignored): error:
interrupted by the user", NixOS/nix#7245). Then only KILL is left, which leaves Nix no time for its builders, and each
of those leads a session of its own. So KILL is for the group and for all that descends from it.
"""

from __future__ import annotations

from nixops.transport.command import Command

# $1 is a signal's name, or 0 to ask whether there is anybody, and $2 the group's number. Only builtins: a host's PATH
# may be empty. Where there is no /proc, KILL is for the group alone.
SIGNAL_GROUP = """\
signal=$1 group=$2
members() {
  found=' ' more=yes
  while [ "$more" ]; do
    more=
    for stat in /proc/[0-9]*/stat; do
      read -r line <"$stat" || continue
      pid=${line%% *}
      case $found in *" $pid "*) continue ;; esac
      line=${line##*) } line=${line#* }
      parent=${line%% *} line=${line#* }
      case "${line%% *}:$found" in "$group:"* | *" $parent "*) found="$found$pid " more=yes ;; esac
    done
  done
} 2>/dev/null
if [ "$signal" = KILL ] && [ -r /proc/$$/stat ]; then
  members
  [ "$found" = ' ' ] || { kill -s KILL -- $found; exit; }
fi
kill -s "$signal" -- "-$group"
"""


def signal_group(group: int, name: str, *, root: bool = False) -> Command:
    """The command that sends a signal to a process group, and KILL also to all that descends from it.

    :param group: its number.
    :param name: TERM or KILL; 0 asks whether there is anybody.
    :param root: the group is root's.
    :returns: a command that ends with 0 where there was somebody to signal.
    """
    return Command(("sh", "-c", SIGNAL_GROUP, "sh", name, str(group)), root=root, timeout=10.0, title=f"kill -{name}")
