# Asked of a builder in one round trip: lines `key=value` on stdout, and always `end=` as the last.
# Needs a POSIX sh and what coreutils has; a value that cannot be found out is left out.
# $1: seconds that Nix has for its answer. The others: the systems that the inventory says it builds for.
LC_ALL=C
export LC_ALL

# Each line of $2 under the key $1. No pipe: twenty builders that fork less answer sooner.
lines() {
    while IFS= read -r line; do printf '%s=%s\n' "$1" "$line"; done <<EOF
$2
EOF
}

# coreutils has timeout; where there is none, the operator's own deadline must do. It makes a process group of its own,
# which nobody stops from outside: so it has to kill what does not heed it.
if command -v timeout >/dev/null 2>&1; then
    bounded() { timeout -k 1 "$@"; }
else
    bounded() { shift; "$@"; }
fi

printf 'begin=1\n'
seconds=$1
shift
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null) && printf 'cores=%s\n' "$cores"
if [ -r /proc/loadavg ]; then read -r load rest </proc/loadavg && printf 'load=%s\n' "$load"; fi

printf 'step=disk\n'
# Block size, blocks and blocks that a user has free, inodes and free inodes; df(1) where stat(1) is not coreutils'.
if disk=$(stat -f -c '%S %b %a %c %d' /nix/store 2>/dev/null); then
    printf 'disk=%s\n' "$disk"
else
    lines df "$(df -P -k /nix/store 2>/dev/null)"
fi

# How many derivations are built at the moment. With build users each build has one to itself: count those that have
# a process. Without, count the processes that a Nix process has started and that are no Nix of their own. Where the
# processes of others are hidden (hidepid), nothing is said.
printf 'step=processes\n'
if [ -d /proc/1 ] && [ -r /proc/self/stat ]; then
    users=" "
    group=
    while IFS=: read -r name x id rest; do [ "$name" = nixbld ] && group=$id; done </etc/group
    while IFS=: read -r name x id gid rest; do
        if [ -n "$group" ] && [ "$gid" = "$group" ]; then users="$users$id "; fi
    done </etc/passwd
    count=0
    if [ "$users" != " " ]; then
        seen=" "
        for id in $(stat -c %u /proc/[0-9]* 2>/dev/null); do
            case $users in *" $id "*) ;; *)
                # auto-allocate-uids: from 872415232 on, a block of 65536 for each build.
                [ "$id" -ge 872415232 ] && [ "$id" -lt 880803840 ] || continue
                id=block$(((id - 872415232) / 65536)) ;;
            esac
            case $seen in *" $id "*) ;; *) seen="$seen$id " count=$((count + 1)) ;; esac
        done
    else
        # PID (COMM) STATE PPID …, where COMM may hold anything.
        daemons=" "
        others=
        while IFS= read -r line; do
            comm=${line#*\(} && comm=${comm%\)*}
            rest=${line##*\) } && rest=${rest#? } && parent=${rest%% *}
            case $comm in
                nix | nix-*) daemons="$daemons${line%% *} " ;;
                *) others="$others $parent" ;;
            esac
        done <<EOF
$(cat /proc/[0-9]*/stat 2>/dev/null)
EOF
        for parent in $others; do
            case $daemons in *" $parent "*) count=$((count + 1)) ;; esac
        done
    fi
    printf 'building=%s\n' "$count"
fi

# The store is asked as a build will ask it: by this login, through the daemon where that is the way.
printf 'step=nix\n'
for program in nix nix-store nix-daemon; do
    command -v "$program" >/dev/null 2>&1 || printf 'missing=%s\n' "$program"
done
if command -v nix-store >/dev/null 2>&1; then
    printf 'step=store\n'
    answer=$(bounded "$seconds" nix --extra-experimental-features nix-command store info --json 2>&1)
    code=$?
    case $answer in
        *'"version"'*) ;;
        *)
            if [ "$code" -ne 124 ] && [ "$code" -ne 137 ]; then
                # Older than Nix 2.19, or a store that does not open: two commands that every Nix has tell which.
                answer=$(nix-store --version 2>&1 && bounded "$seconds" nix-store --check-validity \
                    /nix/store/00000000000000000000000000000000-nixops 2>&1)
                code=$?
            fi ;;
    esac
    printf 'code=%s\n' "$code"
    lines store "$answer"
    # A machine builds for its own kind; for another only as its nix.conf says (extra-platforms), and asking costs 30 ms.
    native=$(uname -m -s 2>/dev/null)
    case $native in
        'Linux '*) native=${native#Linux }-linux ;;
        'Darwin arm64') native=aarch64-darwin ;;
        'Darwin '*) native=${native#Darwin }-darwin ;;
    esac
    for system in "$@"; do
        [ "$system" = "$native" ] && continue
        for verb in 'config show' show-config; do
            answer=$(bounded "$seconds" nix --extra-experimental-features nix-command $verb 2>/dev/null) && break
        done
        while IFS= read -r line; do
            case $line in 'system = '* | 'extra-platforms = '*) printf 'platforms=%s\n' "${line#*= }" ;; esac
        done <<EOF
$answer
EOF
        break
    done
fi
printf 'end=1\n'
