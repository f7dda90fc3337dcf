# An output that is no image.
mkdir "$out"
echo "no image" >"$out/README"
