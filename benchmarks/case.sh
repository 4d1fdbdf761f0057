#!/bin/sh
# benchmarks/case.sh SCAN [OPTION…]: one whole command, from the shell to the file, three times, with
# the peak resident memory of each (GNU time). The lines of `predict` give the stages. Then
# three scans in one run: the next is read, and the last written, while one is computed.
set -eu
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
scan=$1
shift
for _ in 1 2 3; do
  /usr/bin/time -f '%e s wall, %M KiB peak RSS' flare-clef predict "$scan" "$out/labels.nii.gz" "$@"
done
mkdir "$out/in"
file=${scan##*/}
for name in a b c; do cp "$scan" "$out/in/$name.${file#*.}"; done
/usr/bin/time -f '%e s wall for three, %M KiB peak RSS' flare-clef predict "$out/in" "$out/three" "$@"
