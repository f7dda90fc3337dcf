# A docker archive, as `docker save` and dockerTools write it, made by skopeo from the layout.
export HOME="$PWD" TMPDIR="$PWD"
skopeo --insecure-policy --tmpdir "$PWD" copy "oci:$layout" "docker-archive:$PWD/image.tar:app:lab"
cp image.tar "$out"
