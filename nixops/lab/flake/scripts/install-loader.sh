#!/bin/sh
# install-loader: an entry for every generation of the system profile, as NixOS writes them for systemd-boot, and
# this system as the default. Each file is the old one or the new one, never half.
set -u
@settings@
PATH=/opt/lab/tools
LC_ALL=C.UTF-8
export PATH LC_ALL
profile=/nix/var/nix/profiles/system
loader=/boot/loader

[ "$silent_loader" = yes ] && exit 0

put() { # put FILE: stdin becomes its content
    cat >"$1.tmp" && sync "$1.tmp" && mv -f "$1.tmp" "$1" && return
    rm -f "$1.tmp"
    echo "error: $1 could not be written" >&2
    exit 1
}

mkdir -p "$loader/entries" || exit 1
default=
current=$(readlink "$profile")
for link in "$profile"-*-link; do
    [ -e "$link" ] || continue
    n=${link#"$profile"-}
    n=${n%-link}
    system=$(readlink -f "$link")
    put "$loader/entries/nixos-generation-$n.conf" <<-ENTRY
	title NixOS
	sort-key nixos
	version Generation $n NixOS $(cat "$system/nixos-version")
	options init=$system/init
	ENTRY
    # Of several generations with this system the current one is meant, else the last.
    if [ "$system" = "$toplevel" ] && [ "$default" != "${current##*/}" ]; then default=${link##*/}; fi
done

for entry in "$loader/entries"/nixos-generation-*.conf; do
    n=${entry##*/nixos-generation-}
    [ -L "$profile-${n%.conf}-link" ] || rm -f "$entry"
done

if [ -z "$default" ]; then
    echo "warning: $toplevel is no generation of the system profile; the boot default stays" >&2
    exit 0
fi
n=${default#system-}
put "$loader/loader.conf" <<-CONF
	timeout 5
	default nixos-generation-${n%-link}.conf
	console-mode keep
	CONF
sync "$loader"
