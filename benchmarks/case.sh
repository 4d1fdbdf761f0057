#!/bin/sh
# benchmarks/case.sh SCAN: one whole command, from the shell to the file, three times, with
# the peak resident memory of each (GNU time). The lines of `predict` give the stages.
set -eu
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for _ in 1 2 3; do
  /usr/bin/time -f '%e s wall, %M KiB peak RSS' flare-clef predict "$1" "$out/labels.nii.gz"
done
