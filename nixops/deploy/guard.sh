#!/bin/sh
# The guard: carries one activation through on the host, outliving the SSH session and the operator.
#
#   guard.sh run DIR       the transaction: activate, wait for the verdict, commit or roll back
#   guard.sh watch DIR     the second unit: keeps the deadline when the first hangs or dies
#   guard.sh recover DIR   run by the next deploy: finishes or undoes what a crash left
#   guard.sh facts DIR     prints what the boot loader starts next
#
# DIR holds `params` (written by the operator's side, every value checked there), and gets `state`, `journal`,
# `deadline`, the logs, and from the operator `verdict`. Clocks are /proc/uptime: a step of the wall clock moves
# no deadline. No tool is taken through /run/current-system, which moves during the activation: PATH is the
# resolved directory of the old generation.
#
# Only who holds the flock on DIR/lock changes anything. It also tells who lives: systemd cannot be asked while an
# activation executes it again, and a guard that is taken for dead then would have two of us at work.
set -u
umask 077
mode=$1
D=$2

id='' nonce='' tools='' old='' new='' profile='' generation='' loader='' boot_id=''
activation_seconds='' confirm_seconds=''
root='' # where the host's own tree begins; only a test sets it, in `params`
# shellcheck disable=SC1091
. "$D/params"
PATH=$tools
HOME=/root
LC_ALL=C.UTF-8
export PATH HOME LC_ALL
SYSTEM=$root/nix/var/nix/profiles/system

now() {
    read -r up _ </proc/uptime
    echo "${up%%.*}"
}

journal() {
    printf '%s %s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(now)" "$*" >>"$D/journal"
    sync "$D/journal"
}

put() { # put FILE TEXT: the old content or the new one, never half; false when the disk does not take it
    printf '%s\n' "$2" >"$D/$1.$mode" && sync "$D/$1.$mode" && mv -f "$D/$1.$mode" "$D/$1" && sync "$D"
}

state() { # state NAME [REASON]; false when it could not be written
    journal "state $1 ${2-}"
    [ -n "${2-}" ] && put reason "$2"
    put state "$1"
}

deadline() { put deadline "$(($(now) + $1))"; }

current_state() {
    s=none
    [ -e "$D/state" ] && read -r s <"$D/state"
    echo "$s"
}

running() { readlink -f "$root/run/current-system"; }

profile_now() { readlink -f "$SYSTEM"; }

boot_default() { # the toplevel that the boot loader starts next; `unknown` where its configuration is not readable
    for esp in /boot /efi /boot/efi; do
        [ -e "$root$esp/loader/loader.conf" ] || continue
        entry=$(sed -n 's/^default[[:space:]]\{1,\}//p' "$root$esp/loader/loader.conf" | head -n 1)
        case $entry in
        '' | */* | *[*?[]*) continue ;;
        *.conf) ;;
        *) entry=$entry.conf ;;
        esac
        # loader.conf is on the ESP; the entries are on /boot where that is a partition of its own (XBOOTLDR).
        for where in "$esp" /boot; do
            init=$(sed -n 's|^options[[:space:]]\(.*[[:space:]]\)\{0,1\}init=\(/nix/store/[^/[:space:]]*\)/init.*|\2|p' \
                "$root$where/loader/entries/$entry" 2>/dev/null | head -n 1)
            [ -n "$init" ] && echo "$root$init" && return
        done
    done
    for cfg in /boot/grub/grub.cfg /boot/extlinux/extlinux.conf; do
        [ -e "$root$cfg" ] || continue
        init=$(grep -o 'init=/nix/store/[^/ ]*' "$root$cfg" | head -n 1)
        [ -n "$init" ] && echo "$root${init#init=}" && return
    done
    echo unknown
}

unroot() { # the garbage collector may have the generation that lost; the one that runs has the profile's root
    rm -f "$root/nix/var/nix/gcroots/nixops-$id-old" "$root/nix/var/nix/gcroots/nixops-$id-new"
}

activate() { # activate TOPLEVEL ACTION LOG: its exit code, 124 when it ran past its time
    # A log that cannot be opened would keep the activation from being run at all.
    log=$D/$3
    true >>"$log" || log=/dev/null # (`:` would end the shell)
    timeout -k 10 "$activation_seconds" "$1/bin/switch-to-configuration" "$2" >>"$log" 2>&1 </dev/null 8>&-
    ended=$?
    # The status of a failed unit shows its processes, and the older runner module has its token among their arguments.
    [ "$log" = /dev/null ] || sed -i 's/\(--token[= ]\)[^ ]*/\1***/g' "$log" 2>/dev/null
    return $ended
}

failed_units() { systemctl list-units --state=failed --no-legend --plain --full 2>/dev/null | sed 's/[[:space:]].*//'; }

newly_failed() { # prints the units that failed since `failed` was written
    failed_units | while read -r unit; do
        grep -qxF -- "$unit" "$D/failed" 2>/dev/null || echo "$unit"
    done
}

set_profile() { # set_profile LOG ARGUMENT...
    log=$D/$1
    shift
    true >>"$log" || log=/dev/null # (`:` would end the shell)
    timeout -k 10 "$activation_seconds" nix-env -p "$SYSTEM" "$@" >>"$log" 2>&1 </dev/null 8>&-
}

undo_profile() { # put the profile and the loader back to what was recorded; false when that fails
    [ "$(profile_now)" = "$profile" ] && [ "$(boot_default)" = "$loader" ] && return 0
    if [ "$(profile_now)" != "$profile" ]; then
        set_profile rollback.log --switch-generation "$generation" || return 1
        [ "$(profile_now)" = "$profile" ] || return 1
        # The generation that lost must not be what `nix-env --rollback` or the boot menu offers next.
        if [ -e "$D/made" ] && read -r number <"$D/made" && [ "$(readlink -f "$SYSTEM-$number-link")" = "$new" ]; then
            set_profile rollback.log --delete-generations "$number"
        fi
    fi
    if [ "$loader" = unknown ]; then
        # Nothing but the exit code tells how it went.
        activate "$profile" boot rollback.log
        return
    fi
    # The loader may have started something else than the profile before.
    from=$loader
    [ -x "$from/bin/switch-to-configuration" ] || from=$profile
    activate "$from" boot rollback.log
    [ "$(boot_default)" = "$loader" ]
}

foreign() { # somebody else activated a third system in the meantime
    was=$(running)
    [ -n "$was" ] && [ -e "$was" ] && [ "$was" != "$old" ] && [ "$was" != "$new" ]
}

roll_back() { # roll_back REASON profile|none
    rm -f "$D/reserve" # gives a full disk room for what follows
    deadline "$((activation_seconds * 3 + 90))"
    if foreign; then
        state rollback-failed "$1; someone else activated $was in the meantime, which is left as it is"
        return
    fi
    state rolling-back "$1"
    profile_ok=yes
    case $2 in
    profile) undo_profile || profile_ok=no ;;
    esac
    activate "$old" test rollback.log
    code=$?
    journal "rollback exit $code, running $(running)"
    # 4: activated, but units failed. The old generation may have had failed units before; what it did not
    # survive is the operator's to see, so it is said.
    if [ "$(running)" = "$old" ] && [ $profile_ok = yes ] && { [ $code = 0 ] || [ $code = 4 ]; }; then
        why=$1
        [ $code = 4 ] && why="$1; the old generation is active again, with failed units"
        state rolled-back "$why"
        unroot
    elif [ $profile_ok = no ]; then
        state rollback-failed "$1; the profile or the boot default could not be put back"
    else
        state rollback-failed "$1; the roll-back ended with $code"
    fi
}

committed() {
    state committed
    rm -f "$D/reserve"
    unroot
}

commit() {
    deadline "$((activation_seconds * 3 + 90))"
    # Without it a crash would be taken for one before the commit, and the profile be left moved.
    state committing || { roll_back "the state could not be written to $D" none; return; }
    if foreign || [ "$(running)" != "$new" ]; then
        roll_back "the running system was changed by someone else in the meantime" none
        return
    fi
    if [ "$(profile_now)" != "$profile" ]; then
        roll_back "the system profile was changed by someone else in the meantime" none
        return
    fi
    links=$(echo "$SYSTEM"-*-link)
    if ! set_profile commit.log --set "$new" || [ "$(profile_now)" != "$new" ]; then
        roll_back "the system profile could not be set" profile
        return
    fi
    # nix-env takes the newest generation again where it is the same; only a new one is ours to delete.
    link=$(readlink "$SYSTEM")
    case " $links " in
    *"/$link "*) ;;
    *)
        number=${link#"${SYSTEM##*/}-"}
        put made "${number%-link}"
        ;;
    esac
    activate "$new" boot boot.log
    code=$?
    # A full /boot can end with 0 (nixpkgs #189966): believe the loader's own configuration only.
    default=$(boot_default)
    if [ $code != 0 ] || { [ "$default" != "$new" ] && [ "$loader" != unknown ]; }; then
        roll_back "the boot loader did not take the new generation (exit $code)" profile
        return
    fi
    committed
}

verdict() { # sets word and why; a verdict without this deploy's nonce is none
    word='' given='' why=''
    [ -e "$D/verdict" ] && read -r word given why <"$D/verdict"
    [ "$given" = "$nonce" ] || word=''
    why=${why:-the operator aborted}
}

run() {
    # The watchdog and a recovery hold it for a moment only, unless they have already decided.
    flock -w 10 8 || return
    [ "$(current_state)" = prepared ] || return
    if [ "$(running)" != "$old" ]; then
        state refused "the running system is no longer $old"
        unroot
        return
    fi
    verdict
    if [ "$word" = abort ]; then
        state refused "$why"
        unroot
        return
    fi
    if ! deadline "$((activation_seconds + 15))" || ! state activating; then
        rm -f "$D/reserve"
        state refused "the state could not be written to $D"
        unroot
        return
    fi
    failed_units >"$D/failed"
    activate "$new" test activation.log
    code=$?
    journal "activation exit $code"
    case $code in
    0) ;;
    4)
        # A unit that failed before fails again at each activation; it says nothing of the new generation, and the
        # checks are to come.
        units=$(newly_failed | tr '\n' ' ')
        if [ -n "$units" ] || [ ! -s "$D/failed" ]; then
            roll_back "activated, but units failed: ${units:-see the log}" none
            return
        fi
        journal 'units that had failed before failed again'
        ;;
    124 | 137) roll_back "the activation ran past $activation_seconds s" none; return ;;
    *) roll_back "the activation ended with $code" none; return ;;
    esac
    until=$(($(now) + confirm_seconds))
    deadline "$((confirm_seconds + 15))"
    state awaiting-confirm
    while :; do
        verdict
        case $word in
        confirm) commit; return ;;
        abort) roll_back "$why" none; return ;;
        esac
        if [ "$(now)" -ge "$until" ]; then
            roll_back "no confirmation within $confirm_seconds s" none
            return
        fi
        sleep 0.2
    done
}

finished() {
    case $(current_state) in
    committed | rolled-back | rollback-failed | refused) return 0 ;;
    esac
    return 1
}

stop_others() { # stop_others NAME…: end units of ours with all they started; the lock is ours then, or it is false
    for unit in "$@"; do
        systemctl kill --signal=KILL "nixops-$unit-$id.service" 2>/dev/null
        timeout 120 systemctl stop "nixops-$unit-$id.service" 2>/dev/null
    done
    flock -w 60 8
}

watch() { # started before the guard, so that there is no moment without it
    patience=$(($(now) + 30))
    while ! finished; do
        limit=0
        read -r limit <"$D/deadline"
        if flock -n 8; then
            finished && return
            verdict
            if [ "$(current_state)" = prepared ] && [ "$word" != abort ] && [ "$(now)" -lt "$patience" ]; then
                flock -u 8
            else
                journal 'the guard is gone'
                stop_others guard # what it started may still run
                settle
                return
            fi
        elif [ "$(now)" -gt "$limit" ]; then
            journal 'the guard ran past its deadline'
            if stop_others guard; then
                settle
            else
                state rollback-failed 'the guard ran past its deadline and could not be stopped'
            fi
            return
        fi
        sleep 1
    done
}

recover() {
    if ! flock -n 8; then
        # It lives: its operator is gone (whoever recovers has the lease). Ask it to end before it is made to.
        journal 'a later deploy asks for the end'
        put verdict "abort $nonce taken over by a later deploy"
        while ! finished; do
            limit=0
            read -r limit <"$D/deadline"
            [ "$(now)" -gt "$((limit + 5))" ] && break
            flock -n 8 && break
            sleep 0.5
        done
        if finished; then
            flock -w 10 8 && settle # it ends now; a roll-back that failed is tried again
            return
        fi
        if ! flock -n 8 && ! stop_others guard watchdog; then
            state rollback-failed 'the guard could not be stopped'
            return
        fi
    fi
    settle
}

settle() { # finish or undo what a guard that is gone left; with the lock held
    s=$(current_state)
    read -r boot </proc/sys/kernel/random/boot_id
    if [ "$boot" != "$boot_id" ]; then
        journal "found after a restart of the host in state $s"
    fi
    case $s in
    committed | rolled-back | refused) return ;;
    rollback-failed) settle_failed ;;
    none | prepared)
        state refused 'it never began'
        unroot
        ;;
    committing)
        deadline "$((activation_seconds * 3 + 90))"
        # Between setting the profile and the loader: finish it where the new generation runs, undo it where not.
        if [ "$(running)" = "$new" ] && [ "$(profile_now)" = "$new" ]; then
            activate "$new" boot boot.log
            code=$?
            if [ "$(boot_default)" = "$new" ] || { [ "$loader" = unknown ] && [ $code = 0 ]; }; then
                committed
            else
                roll_back 'the boot loader did not take the new generation' profile
            fi
        elif [ "$(running)" = "$new" ] || [ "$(running)" = "$old" ]; then
            roll_back 'interrupted while it was committed' profile
        elif undo_profile; then
            state rolled-back "interrupted while it was committed; the host runs $(running)"
            unroot
        else
            state rollback-failed 'interrupted while it was committed'
        fi
        ;;
    *)
        # An interrupted roll-back may have been one of a commit: only what is ours is undone.
        undo=none
        if [ "$new" != "$profile" ] && [ "$(profile_now)" = "$new" ]; then
            undo=profile
        elif [ "$loader" != unknown ] && [ "$new" != "$loader" ] && [ "$(boot_default)" = "$new" ]; then
            undo=profile
        fi
        if [ "$boot" = "$boot_id" ]; then
            roll_back "the guard was stopped in state $s" $undo
        elif [ "$(running)" = "$new" ]; then
            roll_back "the host restarted while in state $s" profile
        elif [ $undo = profile ] && ! undo_profile; then
            state rollback-failed "the host restarted while in state $s; its boot default could not be put back"
        elif [ "$(running)" = "$old" ]; then
            # It runs what its loader said.
            state rolled-back "the host restarted while in state $s"
            unroot
        else
            state rolled-back "the host restarted while in state $s and runs $(running), as its boot loader says"
            unroot
        fi
        ;;
    esac
}

settle_failed() { # a roll-back that failed earlier: somebody mended it by hand, or it is tried again
    is=$(running)
    if [ "$is" = "$new" ] && [ "$(profile_now)" = "$new" ] && [ "$new" != "$profile" ] &&
        { [ "$loader" = unknown ] || [ "$(boot_default)" = "$new" ]; }; then
        journal 'the new generation was settled on by hand'
        committed
    elif foreign && { [ "$(profile_now)" != "$new" ] || [ "$new" = "$profile" ]; }; then
        state rolled-back "settled by hand: the host runs $was"
        unroot
    elif [ "$(profile_now)" = "$new" ]; then
        roll_back 'tried again after a roll-back that failed' profile
    else
        roll_back 'tried again after a roll-back that failed' none
    fi
}

facts() { # what the boot loader starts next, if it is a generation of the profile: a loader that is no longer in use
    # leaves its configuration behind, and that never moves
    default=$(boot_default)
    for link in "$SYSTEM"-*-link; do
        [ "$(readlink -f "$link")" = "$default" ] && echo "$default" && return
    done
    echo unknown
}

[ "$mode" = facts ] || exec 8>>"$D/lock"
case $mode in
run | watch | recover | facts) "$mode" || true ;; # what came of it is in `state`
esac
