# One layer of an image, the same bytes whoever builds it: a tar file with a text that names the image.
if [ "$seconds" -gt 0 ]; then
  echo "working for $seconds s" >&2
  sleep "$seconds"
fi
mkdir -p root/etc
echo "image $title for $system, salt $salt" >root/etc/motd
head -c 200000 /dev/zero >root/etc/zeros
if [ "$mib" -gt 0 ]; then
  head -c "${mib}M" /dev/zero >root/etc/large
fi
tar --sort=name --mtime=@1 --owner=0 --group=0 --numeric-owner --mode=u+rw,go+r --format=ustar -C root -cf "$out" etc
