# Pushes one image from the builder that built it. Sent as the text of `sh -c`; holds no secret itself.
#
#   push.sh SHAPE OUTPUT PROGRAM DESTINATION TLS SECONDS SILENCE ROOT
#
# SHAPE is copyTo, or unknown for an output that is looked at here. PROGRAM is the name of the program in OUTPUT/bin,
# or empty. DESTINATION is registry/repository:tag. TLS is tls, or plain for a registry without. SECONDS bounds the
# push. After SILENCE seconds without a line on stdin the push is stopped. ROOT is a symbolic link that keeps the
# output from garbage collection, removed after a push; or empty.
#
# stdin: first the registry's login as one line of JSON, then its authority as one line of base64 (or empty), then a
# line every now and then for as long as the push is wanted. Whatever ends that (the operator's process, machine or
# network) ends the push and takes the login away.
#
# stdout: `shape …`, `digest …` (when the program told it), `code …` or `refused …`, and `end`. What the program says goes
# to stderr.
set -u
umask 077
shape=$1 output=$2 program=$3 destination=$4 tls=$5 seconds=$6 silence=$7 root=$8

say() { printf '%s\n' "$*" >&2; }
finish() { # finish code N, or finish refused WHY: the last that is said
  printf '%s %s\nend\n' "$1" "$2"
  exit 0
}

# -- what to run ----------------------------------------------------------------------------------------------

if [ ! -e "$output" ]; then
  say "$output is not there any more"
  finish refused gone
fi
case $shape in
  copyTo)
    if [ -z "$program" ] && [ -x "$output/bin/copy-to" ]; then
      program=copy-to
    fi
    if [ -z "$program" ]; then
      set -- "$output"/bin/*
      if [ $# -ne 1 ] || [ ! -x "$1" ]; then
        say "$output has no bin/copy-to, and more or less than one other program"
        finish refused shape
      fi
      program=${1##*/}
    fi
    if [ ! -x "$output/bin/$program" ]; then
      say "$output has no program bin/$program"
      finish refused shape
    fi
    ;;
  *)
    if [ -f "$output/oci-layout" ] && [ -f "$output/index.json" ]; then
      shape=oci-layout source=oci:$output
    elif [ -f "$output" ] && [ ! -x "$output" ]; then
      shape=docker-archive source=docker-archive:$output
    else
      say "$output is neither an OCI layout (oci-layout, index.json) nor a docker archive (a tar file)"
      finish refused shape
    fi
    if ! command -v skopeo >/dev/null; then
      say "skopeo: command not found: it is needed to push what has no copyTo of its own"
      finish refused skopeo
    fi
    ;;
esac
printf 'shape %s\n' "$shape"

# -- a place for the login: memory, never a disk ----------------------------------------------------------------

private=
for place in "${XDG_RUNTIME_DIR:-}" "/run/user/$(id -u)" /run /dev/shm; do
  if [ -z "$place" ] || [ ! -d "$place" ] || [ ! -w "$place" ]; then
    continue
  fi
  case $(stat -f -c %T "$place") in tmpfs | ramfs) ;; *) continue ;; esac
  # What a push left whose processes were all killed at once.
  for left in "$place"/nixops-push.??????????; do
    if [ -O "$left" ] && [ ! -L "$left" ] && [ -f "$left/pid" ] && ! kill -0 "$(cat "$left/pid")" 2>/dev/null; then
      rm -rf "$left"
    fi
  done
  if private=$(mktemp -d "$place/nixops-push.XXXXXXXXXX"); then
    # A login cut short would be taken for a wrong one: there must be room for all that goes there.
    # Whole at once: without its number a directory is taken for what a killed push left.
    if echo $$ >"$private/pid.new" && mv "$private/pid.new" "$private/pid" && head -c 262144 /dev/zero >"$private/room"; then
      break
    fi
    rm -rf "$private"
  fi
  private=
done
if [ -z "$private" ]; then
  say "there is no tmpfs with room that this login may write to: the registry's login would be on a disk"
  finish refused memory
fi
pushing= saying= reading= watching=
cleared() {
  trap '' HUP INT TERM PIPE
  rm -rf "$private"
  for each in $pushing $saying $reading $watching; do
    kill -TERM "$each" 2>/dev/null
  done
}
trap cleared EXIT
trap 'exit 1' HUP INT TERM PIPE
rm -f "$private/room"

# Both are built into the shell: neither value is ever an argument of a process, or in an environment.
case $(command -v printf) in /*)
  say "the shell of this login has no printf of its own: the registry's login would be an argument of a process"
  finish refused printf ;;
esac
IFS= read -r login || finish refused silence
IFS= read -r authority || finish refused silence
printf '%s\n' "$login" >"$private/auth.json" || finish refused memory
login=
# An asynchronous command's stdin is /dev/null, whatever it is given of number 0.
exec 3<&0 </dev/null
set -- --digestfile "$private/digest"
if [ "$tls" = plain ]; then
  set -- "$@" --dest-tls-verify=false
elif [ -n "$authority" ]; then
  mkdir "$private/certs"
  printf '%s\n' "$authority" | base64 -d >"$private/certs/ca.crt" || finish refused memory
  set -- "$@" --dest-cert-dir "$private/certs"
fi

# -- the push, and the two who watch it -----------------------------------------------------------------------

REGISTRY_AUTH_FILE=$private/auth.json
export REGISTRY_AUTH_FILE
# What the program says goes through a pipe: with our own stderr, a process that it leaves behind would hold the
# connection for as long as it lives.
mkfifo "$private/said" || finish refused memory
# Between the start of each and its number in hand, nothing may end us: it would outlive us.
late=
trap 'late=yes' HUP INT TERM PIPE
cat "$private/said" 3<&- >&2 &
saying=$!
# timeout makes a process group of its own, and gives it whatever signal it gets itself: so no child of the program
# is left behind.
case $shape in
  copyTo) timeout -k 3 "$seconds" "$output/bin/$program" "docker://$destination" "$@" 3<&- >"$private/said" 2>&1 & ;;
  *)
    timeout -k 3 "$seconds" skopeo --insecure-policy copy "$source" "docker://$destination" "$@" \
      3<&- >"$private/said" 2>&1 &
    ;;
esac
pushing=$!

stopped() { # the login goes first: it must be gone whatever becomes of the rest
  rm -rf "$private"
  kill -TERM "$pushing" 2>/dev/null
  sleep 4
  kill -KILL "-$pushing" "$saying" 2>/dev/null
}
{
  while IFS= read -r beat; do
    echo "$beat" >"$private/beat" || break
  done
  stopped
} <&3 >/dev/null 2>&1 &
reading=$!
{
  quiet=0 before=
  # $$ is the main shell here too: should that be killed, nobody else would clean up.
  while sleep 1; do
    now=$(cat "$private/beat")
    if [ "$now" != "$before" ]; then
      quiet=0 before=$now
    else
      quiet=$((quiet + 1))
    fi
    if [ "$quiet" -ge "$silence" ] || ! kill -0 $$; then
      break
    fi
  done
  stopped
} 3<&- >/dev/null 2>&1 &
watching=$!
trap 'exit 1' HUP INT TERM PIPE
[ -z "$late" ] || exit 1

wait "$pushing"
code=$?
# What it has left running in the background is not waited for, and one that left the group keeps no more than the pipe.
kill -KILL "-$pushing" 2>/dev/null
pushing=
{
  sleep 2
  kill -KILL "$saying"
} 3<&- >/dev/null 2>&1 &
watching="$watching $!"
wait "$saying"
saying=
if [ ! -d "$private" ]; then
  say "the push was stopped: there was no sign of life from the operator"
  finish refused silence
fi
if [ "$code" -eq 0 ]; then
  digest=$(head -c 71 "$private/digest" 2>/dev/null)
  case $digest in
    '' | *[!a-z0-9:]*) ;;
    *) printf 'digest %s\n' "$digest" ;;
  esac
  if [ -n "$root" ]; then
    rm -f "$root"
  fi
fi
finish code "$code"
