#!/bin/sh
# switch-to-configuration {switch|boot|test|dry-activate}: makes a running host into this generation.
#
#   1   nothing was done (usage, not root, another one is running, the boot loader failed)
#   2   activated, but a part of the activation failed
#   4   activated, but units failed
set -u
@settings@
PATH=/opt/lab/tools
LC_ALL=C.UTF-8
export PATH LC_ALL

action=${1-}
case $action in
switch | boot | test | dry-activate) ;;
*)
    echo "Usage: ${0##*/} [switch|boot|test|dry-activate]" >&2
    exit 1
    ;;
esac
[ -e /etc/NIXOS ] || { echo 'This is not a NixOS installation!' >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo 'You must be root.' >&2; exit 1; }

mkdir -p /run/nixos
if [ "$action" != dry-activate ]; then
    exec 9>/run/nixos/switch-to-configuration.lock
    flock -n 9 || { echo 'Could not acquire lock' >&2; exit 1; }
fi
case $action in
switch | boot) "$toplevel/install-loader" || exit 1 ;;
esac
[ "$action" = boot ] && exit 0

work=$(mktemp -d /run/nixos/switch.XXXXXX) || exit 1
trap 'rm -rf "$work"' EXIT
old=$(readlink -f /run/current-system)
before=$old/etc/systemd/system
after=$toplevel/etc/systemd/system
status=0
for list in stop restart reload start skip changed; do : >"$work/$list"; done

add() { printf '%s\n' "$2" >>"$work/$1"; }
has() { grep -qsx "$2" "$1"; }
active() {
    case $(systemctl show -P ActiveState -- "$1") in
    active | activating | reloading) return 0 ;;
    esac
    return 1
}
listed() { # the names of a list in one line
    sort -u "$work/$1" | sed -e ':a' -e 'N' -e '$!ba' -e 's/\n/, /g'
}
say() { # say LIST TEXT
    [ -s "$work/$1" ] && echo "$2 the following units: $(listed "$1")" >&2
    return 0
}
control() { # control VERB LIST: waits for the jobs, as NixOS does
    [ -s "$work/$2" ] || return 0
    verb=$1
    sort -u "$work/$2" | {
        set --
        while IFS= read -r unit; do set -- "$@" "$unit"; done
        systemctl --no-ask-password "$verb" -- "$@"
    }
}

# -- what is to be done, by comparing the units of the running system with ours
for file in "$before"/*; do
    unit=${file##*/}
    case $unit in '*' | *.wants | *.requires | *.d) continue ;; esac
    if [ ! -e "$after/$unit" ] || [ "$(readlink "$after/$unit")" = /dev/null ]; then
        if has "$file" 'X-StopOnRemoval=false'; then add skip "$unit"; elif active "$unit"; then add stop "$unit"; fi
    elif ! cmp -s "$file" "$after/$unit" && active "$unit"; then
        if has "$after/$unit" 'X-ReloadIfChanged=true'; then
            add reload "$unit"
        elif has "$after/$unit" 'X-RestartIfChanged=false'; then
            add skip "$unit"
        elif has "$after/$unit" 'X-StopIfChanged=false'; then
            add restart "$unit"
        else
            add changed "$unit"
        fi
    fi
done

wanted() { # what an active target wants and is not there: new units, and those that a stop took along
    for link in "$after"/*.target.wants/* "$after"/*.target.requires/*; do
        [ -L "$link" ] || continue
        target=${link%/*}
        target=${target##*/}
        if active "${target%.*}" && ! active "${link##*/}"; then add start "${link##*/}"; fi
    done
}

if [ "$action" = dry-activate ]; then
    wanted
    say stop 'would stop'
    say skip 'would NOT stop'
    say changed 'would stop and start'
    say reload 'would reload'
    say restart 'would restart'
    say start 'would start'
    exit 0
fi

# -- stop, activate, start. What is to be started again is written down first, in /run, so that a switch that comes
#    after one that was killed starts it.
cat "$work/changed" >>/run/nixos/start-list
cat "$work/restart" >>/run/nixos/restart-list
cat "$work/reload" >>/run/nixos/reload-list
cat "$work/changed" >>"$work/stop"
say stop 'stopping'
control stop stop || true
say skip 'NOT restarting'

echo 'activating the configuration...' >&2
"$toplevel/activate" || status=2

if [ "$drops_network" = yes ] && [ ! -e /var/lib/nixos/lab-links-down ]; then
    # Not from /sys, which in a container may show the links of the machine outside.
    ip -o link show up | while read -r _ link _; do
        link=${link%:}
        [ "$link" = lo ] || printf 'link %s\n' "${link%@*}"
    done >"$work/links"
    ip -4 route show default | sed 's/^/route /' >"$work/routes"
    cat "$work/links" "$work/routes" >/var/lib/nixos/lab-links-down
    while read -r _ link; do ip link set "$link" down; done <"$work/links"
fi
while [ "$hangs" = yes ]; do sleep 3600 9>&-; done
code=$fails_with
[ -e /run/nixos/lab-activation-exit ] && read -r code </run/nixos/lab-activation-exit
if [ "$code" != 0 ]; then
    echo "the activation fails on purpose" >&2
    exit "$code"
fi

systemctl reset-failed
systemctl daemon-reload || status=4
if ! cmp -s "$old/etc/nix/nix.conf" "$toplevel/etc/nix/nix.conf"; then
    [ -e "$old/etc/nix/nix.conf" ] || [ -e "$toplevel/etc/nix/nix.conf" ] && systemctl try-restart nix-daemon.service
fi

present() { # present FILE: of the units a file lists, those this generation has
    sort -u "$1" | while IFS= read -r unit; do [ -e "$after/$unit" ] && printf '%s\n' "$unit"; done
}
present /run/nixos/reload-list >"$work/reload"
present /run/nixos/restart-list >"$work/restart"
present /run/nixos/start-list >>"$work/start"
say reload reloading
control reload reload || status=4
rm -f /run/nixos/reload-list
say restart restarting
control restart restart || status=4
rm -f /run/nixos/restart-list
wanted
say start starting
control start start || status=4
rm -f /run/nixos/start-list

# -- who failed
systemctl list-units --state=failed --plain --no-legend --full | while read -r unit _; do
    printf '%s\n' "$unit"
done >"$work/failed"
for file in "$after"/*.service; do
    unit=${file##*/}
    case $unit in '*'*) continue ;; esac
    state=$(systemctl show -P SubState -- "$unit")
    main=$(systemctl show -P ExecMainStatus -- "$unit")
    case $state in auto-restart*) [ "$main" = 0 ] || add failed "$unit" ;; esac
done
if [ -s "$work/failed" ]; then
    echo "warning: the following units failed: $(listed failed)" >&2
    sort -u "$work/failed" | while IFS= read -r unit; do systemctl status --no-pager --full -- "$unit" >&2; done
    status=4
fi
[ $status = 0 ] && echo "finished switching to system configuration $toplevel" >&2
exit $status
