# Usage: launch LOG GROUP... -- PROGRAM ARGUMENT...
# Run PROGRAM away from whoever starts it, each boot in a control group of its own below each GROUP (no white space in
# their names; GROUP/launcher is there already). systemd-nspawn ends with 133 when its container wants a reboot.
exec </dev/null >>"$1" 2>&1
shift
groups=
while [ "$1" != -- ]; do
  echo $$ >"$1/launcher/cgroup.procs" || exit 1
  groups="$groups $1"
  shift
done
shift
boot=0
while :; do
  boot=$((boot + 1))
  for group in $groups; do
    mkdir "$group/boot-$boot" || exit 1
  done
  sh -c '
    for group in $1; do
      echo $$ >"$group/boot-$2/cgroup.procs" || exit 1
    done
    shift 2
    exec "$@"' boot "$groups" "$boot" "$@"
  if [ $? -ne 133 ]; then exit; fi
done
