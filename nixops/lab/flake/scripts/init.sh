#!/bin/sh
# init: what the boot loader's entry names. Activates this generation and starts its units, as part of the boot.
set -u
@settings@
PATH=/opt/lab/tools
LC_ALL=C.UTF-8
export PATH LC_ALL

"$toplevel/activate"
status=$?
ln -sfn "$toplevel" /run/booted-system
mkdir -p /nix/var/nix/gcroots
ln -sfn /run/booted-system /nix/var/nix/gcroots/booted-system
ln -sfn /run/current-system /nix/var/nix/gcroots/current-system

systemctl daemon-reload || status=1
set --
for link in "$toplevel"/etc/systemd/system/*.target.wants/* "$toplevel"/etc/systemd/system/*.target.requires/*; do
    [ -L "$link" ] && set -- "$@" "${link##*/}"
done
# Not waited for: this script is itself a job of the boot, and what it starts may be ordered after it.
[ $# = 0 ] || systemctl --no-block start -- "$@" || status=1
exit $status
