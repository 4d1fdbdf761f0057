#!/bin/sh
# benchmarks/container.sh SCAN [IMAGE]
#
# One scan by `docker run` and by the bare command, taking turns three times: wall time from the
# shell to the file, and peak memory. Inside the container the peak is what the kernel counted
# for it (memory.peak, page cache of files that were read included); outside it is the
# resident set of the process (GNU time). DOCKER names the client.
set -eu
image=${2:-clef:latest}
docker=${DOCKER:-docker}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/in" "$work/out"
cp "$1" "$work/in/case_0000.nii.gz"
chmod 755 "$work" "$work/in"
for _ in 1 2 3; do
  # `time` writes to a file, so that what the command logs does not hide it.
  /usr/bin/time -o "$work/time" -f '%e s, %M KiB peak RSS' \
    flare-clef predict "$work/in" "$work/out" --quiet --overwrite
  echo "bare        $(cat "$work/time")"
  /usr/bin/time -o "$work/time" -f '%e s' "$docker" run --rm --user "$(id -u):$(id -g)" \
    -v "$work/in:/workspace/inputs:ro" -v "$work/out:/workspace/outputs" "$image" \
    /bin/sh -c 'predict=/workspace/predict.sh; $predict >/dev/null 2>&1
      echo $(($(cat /sys/fs/cgroup/memory.peak 2>/dev/null ||
        cat /sys/fs/cgroup/memory/memory.max_usage_in_bytes) / 1024)) >/workspace/outputs/peak'
  echo "container   $(cat "$work/time"), $(cat "$work/out/peak") KiB peak of its control group"
done
/usr/bin/time -o "$work/time" -f '%e s' "$docker" run --rm "$image" --help >/dev/null
echo "container   $(cat "$work/time") for --help: the start alone"
