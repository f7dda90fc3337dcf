# A program that fails as skopeo does when the registry lets nobody in.
mkdir -p "$out/bin"
printf '#!/bin/sh\necho "unauthorized: authentication required" >&2\nexit 1\n' >"$out/bin/copy-to"
chmod 755 "$out/bin/copy-to"
