"""The scripts that :mod:`.deliver` sends to a host. POSIX sh; every ``nixops_`` variable is set in front of them.

No secret is an argument of a program here: ``printf`` must be the shell's own, which has no process and no argv,
and what it prints goes through a pipe. Here-documents are avoided, since some shells keep them in files.
"""

from __future__ import annotations

from enum import IntEnum


class Ended(IntEnum):
    """Exit codes of the scripts, apart from what a shell, ssh or sudo gives."""

    TOOLS = 71
    PLACE = 72
    FOREIGN = 73
    NETWORK = 74
    HTTP = 75
    USED = 76
    ANSWER = 77
    DISK = 78
    SUBSTITUTED = 79


_COMMON = f"""
set -u
umask 077
LC_ALL=C
PATH="${{PATH:-/usr/bin:/bin}}:/run/current-system/sw/bin:/run/wrappers/bin:/usr/bin:/bin:$nixops_search"
fail() {{ printf '%s\\n' "$2" >&2; exit "$1"; }}
need() {{
  for tool in "$@"; do
    command -v "$tool" >/dev/null 2>&1 || fail {Ended.TOOLS:d} "there is no $tool on this host"
  done
}}
[ "$(command -v printf)" = printf ] || fail {Ended.TOOLS:d} "printf is no builtin of this host's sh"
need id stat cat
[ "$(id -u)" = 0 ] || fail {Ended.PLACE:d} "this needs root"
dir=$nixops_directory
"""

DELIVER = f"""{_COMMON}
need curl sed dirname mkdir mktemp chmod chown cp mv rm rmdir sync wc
created= tmp= moving=
leave() {{
  [ -z "$tmp" ] || rm -rf -- "$tmp"
  [ -z "$tmp" ] || [ -n "$moving" ] || rm -rf -- "$dir/.previous"
  [ -z "$created" ] || rmdir -- "$dir" 2>/dev/null
}}
trap leave EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# The place. What is not root's, or is somebody else's AppRole, is left alone.
[ ! -L "$dir" ] || fail {Ended.PLACE:d} "$dir is a symbolic link"
if [ -e "$dir" ]; then
  [ -d "$dir" ] || fail {Ended.PLACE:d} "$dir is not a directory"
  owner=$(stat -c %u -- "$dir")
  [ "$owner" = 0 ] || fail {Ended.PLACE:d} "$dir belongs to user id $owner, not to root"
  if [ ! -s "$dir/secret-id-accessor" ]; then
    if [ -s "$dir/role-id" ]; then
      [ "$(cat -- "$dir/role-id")" = "$nixops_role_id" ] || fail {Ended.FOREIGN:d} "another role-id is there"
    elif [ -e "$dir/secret-id" ]; then
      fail {Ended.FOREIGN:d} "a secret-id without a role-id is there"
    fi
  fi
  chmod 0700 -- "$dir" || fail {Ended.PLACE:d} "$dir cannot be closed"
else
  parent=$(dirname -- "$dir")
  said=$( (umask 022 && mkdir -p -- "$parent") 2>&1 && mkdir -m 0700 -- "$dir" 2>&1) || fail {Ended.DISK:d} "$said"
  created=yes
fi
# What a run that was killed in the middle left.
rm -rf -- "$dir"/.nixops.??????
tmp=$(mktemp -d "$dir/.nixops.XXXXXX" 2>&1) || {{ said=$tmp; tmp=; fail {Ended.DISK:d} "$said"; }}

# Unwrap. The token is in curl's configuration, which is on its stdin; -q: no ~/.curlrc.
configuration() {{
  printf 'url = "%s/v1/sys/wrapping/unwrap"\\n' "$nixops_address"
  printf 'request = "POST"\\nheader = "X-Vault-Token: %s"\\n' "$nixops_token"
  printf 'header = "Content-Type: application/json"\\ndata = "{{}}"\\n'
  [ -z "$nixops_namespace" ] || printf 'header = "X-Vault-Namespace: %s"\\n' "$nixops_namespace"
  [ -z "$nixops_ca_file" ] || printf 'cacert = "%s"\\n' "$nixops_ca_file"
}}
unset nixops_answer nixops_status nixops_secret
nixops_answer=$(configuration | curl -q --silent --show-error --proto =http,https --connect-timeout 10 \\
  --max-time "$nixops_seconds" --write-out '\\n%{{http_code}}' --config - 2>"$tmp/said") ||
  fail {Ended.NETWORK:d} "$(sed -n 1p "$tmp/said")"
nixops_status=$(printf '%s\\n' "$nixops_answer" | sed -n '$p')
field() {{
  printf '%s\\n' "$nixops_answer" | sed -n "s/.*\\"$1\\" *: *\\"\\([A-Za-z0-9._-]*\\)\\".*/\\1/p" | sed -n 1p
}}
case $nixops_status in
  200) ;;
  400 | 403)
    case $nixops_answer in
      *"wrapping token is not valid"*) fail {Ended.USED:d} "the wrapping token was used before, or ran out" ;;
    esac
    fail {Ended.HTTP:d} "HTTP $(printf '%s\\n' "$nixops_answer" | sed -n '1,5p')" ;;
  *) fail {Ended.HTTP:d} "HTTP $nixops_status" ;;
esac
nixops_secret=$(field secret_id)
[ -n "$nixops_secret" ] || fail {Ended.ANSWER:d} "the answer holds no secret id"
[ "$(field secret_id_accessor)" = "$nixops_accessor" ] || fail {Ended.SUBSTITUTED:d} "it is another secret id"

# Write all, then move all: what is in place is always complete. The accessor comes last and says it is done.
keep() {{
  printf %s "$2" 2>/dev/null >"$tmp/$1" && [ "$(wc -c <"$tmp/$1")" -eq "${{#2}}" ] &&
    chown 0:0 "$tmp/$1" && chmod 0400 "$tmp/$1" && sync "$tmp/$1" ||
    fail {Ended.DISK:d} "$1 cannot be written: is the disk full?"
}}
keep secret-id "$nixops_secret"
keep role-id "$nixops_role_id"
keep secret-id-accessor "$nixops_accessor"
# What is there now is kept beside it, for a deploy that is rolled back.
rm -rf -- "$dir/.previous"
if [ -s "$dir/secret-id" ]; then
  mkdir -m 0700 "$tmp/previous" || fail {Ended.DISK:d} "the old files cannot be kept: is the disk full?"
  for file in secret-id role-id secret-id-accessor; do
    [ ! -e "$dir/$file" ] || cp -p -- "$dir/$file" "$tmp/previous/$file" 2>/dev/null ||
      fail {Ended.DISK:d} "the old files cannot be kept: is the disk full?"
  done
  mv -- "$tmp/previous" "$dir/.previous" || fail {Ended.DISK:d} "the old files cannot be kept"
fi
replaced=
[ ! -s "$dir/secret-id-accessor" ] || replaced=$(sed -n 1p "$dir/secret-id-accessor")
moving=yes
for file in secret-id role-id secret-id-accessor; do
  mv -f -- "$tmp/$file" "$dir/$file" || fail {Ended.DISK:d} "$dir/$file cannot be put in place"
  created=
done
sync "$dir"
printf 'replaced=%s\\n' "$replaced"
"""

LOOK = f"""{_COMMON}
need sed
if [ ! -s "$dir/role-id" ] || [ ! -s "$dir/secret-id" ]; then
  printf 'there=no\\n'
  exit 0
fi
closed=yes
[ "$(stat -L -c %u:%a -- "$dir")" = 0:700 ] || closed=no
for file in role-id secret-id; do
  [ "$(stat -L -c %u:%a -- "$dir/$file")" = 0:400 ] || closed=no
done
printf 'there=yes\\nclosed=%s\\nrole_id=%s\\n' "$closed" "$(sed -n 1p "$dir/role-id")"
[ ! -s "$dir/secret-id-accessor" ] || printf 'accessor=%s\\n' "$(sed -n 1p "$dir/secret-id-accessor")"
"""

_IF_OURS = """
if [ ! -s "$dir/secret-id-accessor" ] || [ "$(sed -n 1p "$dir/secret-id-accessor")" != "$nixops_accessor" ]; then
  printf 'done=no\\n'
  exit 0
fi
"""

# The accessor comes last: until then it is still this delivery's, and the script can be run again.
WITHDRAW = f"""{_COMMON}
need rm rmdir sed cp mv sync
{_IF_OURS}
for file in secret-id role-id secret-id-accessor; do
  if [ -e "$dir/.previous/$file" ]; then
    cp -p -- "$dir/.previous/$file" "$dir/.previous/new" && mv -f -- "$dir/.previous/new" "$dir/$file" ||
      fail {Ended.DISK:d} "$file cannot be put back: is the disk full?"
  elif [ "$file" = secret-id-accessor ] || [ ! -d "$dir/.previous" ]; then
    rm -f -- "$dir/$file" || fail {Ended.DISK:d} "$dir/$file cannot be removed"
  fi
done
rm -rf -- "$dir/.previous"
sync "$dir"
rmdir -- "$dir" 2>/dev/null
printf 'done=yes\\n'
"""

SETTLE = f"""{_COMMON}
need rm sed
{_IF_OURS}
rm -rf -- "$dir/.previous" || fail {Ended.PLACE:d} "$dir/.previous cannot be removed"
printf 'done=yes\\n'
"""
