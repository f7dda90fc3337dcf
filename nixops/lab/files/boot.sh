#!/bin/sh
# What systemd-boot and NixOS's stages 1 and 2 do between them, as far as a container has it: find the default
# generation in /boot, make it the booted system, run its init. Where there is no init, nothing more is booted; an init
# that fails is told by this unit's state, and the boot goes on.
set -u
tools=/opt/lab/tools
loader=/boot/loader

default=
while read -r key value; do
  if [ "$key" = default ]; then default=$value; fi
done <"$loader/loader.conf"

# An entry that is not there is passed over, and the newest one booted, as systemd-boot does.
if [ ! -f "$loader/entries/$default" ]; then
  newest=-1
  for file in "$loader"/entries/nixos-generation-*.conf; do
    number=${file##*-generation-}
    number=${number%.conf}
    if [ "$number" -gt "$newest" ] 2>/dev/null; then newest=$number; fi
  done
  echo "boot: no entry '$default', taking generation $newest"
  default=nixos-generation-$newest.conf
fi

init=
while read -r key value; do
  if [ "$key" = options ]; then
    for option in $value; do
      case $option in init=*) init=${option#init=} ;; esac
    done
  fi
done <"$loader/entries/$default"
echo "boot: $default: $init"

# Programs with set-user-ID live here alone, on a file system of their own: /run itself is mounted nosuid.
$tools/mkdir -p /run/wrappers
$tools/mount -t tmpfs -o mode=0755,nodev wrappers /run/wrappers
$tools/mkdir /run/wrappers/bin
for program in sudo su; do
  $tools/cp "$tools/$program" "/run/wrappers/bin/$program"
  $tools/chown 0:0 "/run/wrappers/bin/$program"
  $tools/chmod 4511 "/run/wrappers/bin/$program"
done

if [ ! -x "$init" ]; then
  echo "boot: '$init' cannot be run" >&2
  exit 1
fi
system=${init%/*}
$tools/ln -sfn "$system" /run/booted-system
$tools/ln -sfn "$system" /run/current-system
"$init"
