#!/bin/sh
# The host's lease: one deploy at a time. Runs as the transient unit nixops-lease.service, whose name alone is
# taken only once; the flock says the same to anyone who asks without systemd.
#
#   lease.sh NONCE SECONDS TOOLS
#
# /run/nixops/lease   who holds it, JSON, for the next who asks (moved there from offer.NONCE once it is held)
# /run/nixops/alive   uptime of the holder's last sign of life; SECONDS without one end the lease, unless a guard
#                     is at work, which has deadlines of its own
set -u
umask 077
nonce=$1
seconds=$2
PATH=$3
export PATH
cd /run/nixops || exit 1
exec 9>lock
flock -n 9 || exit 75

# An auto-upgrade does not know the lease: this condition makes systemd skip it while the lease stands.
dropin=/run/systemd/system/nixos-upgrade.service.d
hold_upgrade() {
    [ "$(systemctl show -P LoadState nixos-upgrade.service)" = loaded ] || return 0
    mkdir -p "$dropin"
    printf '[Unit]\nConditionPathExists=!/run/nixops/lease\n' >"$dropin/50-nixops-lease.conf"
    chmod 755 "$dropin"
    chmod 644 "$dropin/50-nixops-lease.conf"
    systemctl daemon-reload
}

release() {
    trap - EXIT TERM INT
    rm -f lease alive "offer.$nonce"
    if [ -e "$dropin/50-nixops-lease.conf" ]; then
        rm -f "$dropin/50-nixops-lease.conf"
        rmdir "$dropin" 2>/dev/null
        systemctl daemon-reload
    fi
    exit 0
}
trap release EXIT TERM INT

read -r up _ </proc/uptime
echo "${up%%.*}" >alive
# First: who finds the lease taken may rely on it.
hold_upgrade
mv -f "offer.$nonce" lease || exit 1

while sleep 1; do
    read -r up _ </proc/uptime
    last=0
    [ -e alive ] && read -r last <alive
    if [ $((${up%%.*} - ${last:-0})) -gt "$seconds" ]; then
        # No answer is none: an activation may execute systemd again.
        busy=$(systemctl list-units --plain --no-legend --state=active,activating,deactivating \
            'nixops-guard-*' 'nixops-watchdog-*' 'nixops-recover-*' 2>/dev/null) || continue
        [ -n "$busy" ] || exit 0
    fi
done
