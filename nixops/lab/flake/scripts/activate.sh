#!/bin/sh
# activate: makes the host what this generation says, but for the units that are to be started and stopped.
# Run at boot by `init` and at a switch by `switch-to-configuration`.
set -u
@settings@
PATH=/opt/lab/tools
LC_ALL=C.UTF-8
export PATH LC_ALL
status=0

replace() { # replace TARGET LINK: in one step, so that the link is never missing
    ln -sfn "$1" "$2.nixos-new" && mv -fT "$2.nixos-new" "$2"
}

mkdir -p /run /etc /var/lib/nixos /var/empty
[ -e /etc/NIXOS ] || : >/etc/NIXOS

# Every file of ours in /etc is a link through this one, so /etc changes in one step. While it does not exist, early
# in a boot, systemd finds none of our units, whatever generation was active before the power went.
replace "$toplevel" /run/current-system || status=1

while IFS= read -r file; do
    link=/run/current-system/etc/$file
    [ "$(readlink "/etc/$file")" = "$link" ] && continue
    case $file in */*) mkdir -p "/etc/${file%/*}" ;; esac
    # What the host's own distribution put there comes back when the configuration no longer has the file.
    if [ -e "/etc/$file" ] && [ ! -L "/etc/$file" ] && [ ! -e "/etc/$file.before-nixos" ]; then
        mv "/etc/$file" "/etc/$file.before-nixos"
    fi
    replace "$link" "/etc/$file" || status=1
done <"$toplevel/etc-files"

find /etc -lname '/run/current-system/etc/*' ! -name '*.nixos-new' -print | while IFS= read -r link; do
    file=${link#/etc/}
    if [ ! -e "$toplevel/etc/$file" ] && [ ! -L "$toplevel/etc/$file" ]; then
        rm -f "$link"
        [ -e "$link.before-nixos" ] && mv "$link.before-nixos" "$link"
    fi
done

# Read before any generation is active, so it is no link.
[ "$(cat /etc/hostname)" = "$host_name" ] || echo "$host_name" >/etc/hostname || status=1

[ -s "$sysusers" ] && { systemd-sysusers "$sysusers" || status=1; }
systemd-tmpfiles --create "$toplevel/etc/tmpfiles.d/00-nixos.conf" || status=1

@fragments@

# The network that an earlier generation of the lab's took away.
down=/var/lib/nixos/lab-links-down
if [ "$drops_network" = no ] && [ -e "$down" ]; then
    while read -r kind rest; do
        # shellcheck disable=SC2086 # a route is several words
        case $kind in
        link) ip link set "$rest" up || status=1 ;;
        route) ip route replace $rest || status=1 ;;
        esac
    done <"$down"
    rm -f "$down"
fi
exit $status
