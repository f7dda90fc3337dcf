# An OCI image layout with one manifest over one layer (image-layout.md and manifest.md of the OCI image format).
if [ -n "${fail:-}" ]; then
  echo "first line of a build that fails"
  echo "No space left on this shelf, says a program that is asked for the impossible" >&2
  exit 3
fi

blob() { # blob FILE: put it among the blobs; its digest in $digest, its size in $size
  digest=$(sha256sum "$1")
  digest=${digest%% *}
  size=$(stat -c %s "$1")
  cp "$1" "$out/blobs/sha256/$digest"
}

mkdir -p "$out/blobs/sha256"
printf '{"imageLayoutVersion":"1.0.0"}' >"$out/oci-layout"
blob "$layer"
layer_digest=$digest layer_size=$size

printf '{"architecture":"%s","os":"linux","created":"1970-01-01T00:00:01Z","config":{"Cmd":["/bin/app"]},' \
  "$architecture" >config
printf '"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' "$layer_digest" >>config
blob config
config_digest=$digest config_size=$size

printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",' >manifest
printf '"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:%s","size":%s},' \
  "$config_digest" "$config_size" >>manifest
printf '"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:%s","size":%s}]}' \
  "$layer_digest" "$layer_size" >>manifest
blob manifest
printf '{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json",' >"$out/index.json"
printf '"digest":"sha256:%s","size":%s}]}' "$digest" "$size" >>"$out/index.json"
