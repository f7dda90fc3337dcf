# Writes the program that nix2container writes: with a skopeo of its own, to which it gives its arguments as they come,
# unquoted, after it has printed them.
skopeo=$(command -v skopeo)
mkdir -p "$out/bin"
program=$out/bin/${program:-copy-to}
{
  echo '#!/bin/sh'
  if [ "$pause" -gt 0 ]; then
    echo "sleep $pause"
  fi
  echo "echo Running skopeo --insecure-policy copy oci:$image \$@"
  echo "exec_skopeo() { $skopeo --insecure-policy copy oci:$image \$@; }"
  echo 'exec_skopeo $@'
} >"$program"
chmod 755 "$program"
if [ -n "${second:-}" ]; then
  printf '#!/bin/sh\nexit 9\n' >"$out/bin/another"
  chmod 755 "$out/bin/another"
fi
