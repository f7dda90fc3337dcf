"""Signals for a process group, on this machine and on hosts: one shell text for what has to end.

TERM is for the group: a Nix that takes it stops its builders itself. Some never take it: an interrupt that strikes
while one of Nix's destructors runs is thrown there, ignored, and never thrown again ("error (ignored): error:
interrupted by the user", NixOS/nix#7245). Then only KILL is left, which leaves Nix no time for its builders, and each
of those leads a session of its own. So KILL is for the group and for all that descends from it.
"""

from __future__ import annotations

from nixops.transport.command import Command

# $1 is a signal's name, or 0 to ask whether there is anybody, and $2 the group's number. Only builtins: a host's PATH
# may be empty. Where there is no /proc, KILL is for the group alone. A build starts programs all the time, so the
# search is bounded; what was started behind its back is in the group or in a session that was found.
SIGNAL_GROUP = """\
signal=$1 group=$2 found=' ' sessions=' '
look() {
  passes=0 more=yes
  while [ "$more" ] && [ "$passes" -lt "$1" ]; do
    more= passes=$((passes + 1))
    for stat in /proc/[0-9]*/stat; do
      read -r line <"$stat" || continue
      pid=${line%% *}
      case $found in *" $pid "*) continue ;; esac
      line=${line##*) } line=${line#* }
      parent=${line%% *} line=${line#* }
      its_group=${line%% *} line=${line#* }
      session=${line%% *}
      case $found in *" $parent "*) parent= ;; esac
      case $sessions in *" $session "*) parent= ;; esac
      [ -z "$parent" ] || [ "$its_group" = "$group" ] || continue
      found="$found$pid " more=yes
      [ "$pid" != "$session" ] || sessions="$sessions$pid "
    done
  done
} 2>/dev/null
if [ "$signal" != KILL ] || [ ! -r /proc/$$/stat ]; then
  kill -s "$signal" -- "-$group"
  exit
fi
look 8
kill -s KILL -- "-$group"
code=$?
for again in 1 2 3 4; do
  [ "$found" = ' ' ] || kill -s KILL -- $found 2>/dev/null
  before=$found
  look 1
  [ "$found" != "$before" ] || break
done
kill -s KILL -- "-$group" 2>/dev/null
exit "$code"
"""


def signal_group(group: int, name: str, *, root: bool = False) -> Command:
    """The command that sends a signal to a process group, and KILL also to all that descends from it.

    :param group: its number.
    :param name: TERM or KILL; 0 asks whether there is anybody.
    :param root: the group is root's.
    :returns: a command that ends with 0 where there was somebody to signal.
    """
    return Command(("sh", "-c", SIGNAL_GROUP, "sh", name, str(group)), root=root, timeout=10.0, title=f"kill -{name}")
