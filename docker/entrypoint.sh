#!/bin/sh
# Process 1 of the image: runs one command as its child, hands signals on to it, and says why
# when the kernel kills it for want of memory, which the command itself cannot.
#
#   docker run clef                        predict.sh
#   docker run clef info                   any command or option of flare-clef
#   docker run clef /bin/bash -c "…"       any program of the image
case ${1:-} in
  # First, as the base image may have programs of these names (vim's view).
  -* | predict | info | view | evaluate | phantom | stress | profile | train)
    set -- flare-clef "$@" ;;
  *) command -v "${1:-}" >/dev/null || set -- flare-clef "$@" ;;
esac

child='' again=''
hand_on() {
  again=1
  [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null
}
trap 'hand_on TERM' TERM
trap 'hand_on INT' INT
trap 'hand_on HUP' HUP

# A child in the background would get /dev/null for its standard input.
exec 3<&0
"$@" <&3 3<&- &
child=$!
exec 3<&-
# A signal ends `wait` early: the child's own status is what the next one tells.
while :; do
  again=''
  wait "$child"
  status=$?
  [ -n "$again" ] || break
done

if [ "$status" -eq 137 ]; then
  limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null ||
    cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null)
  # Without a limit: "max", or on cgroup 1 a number of 19 digits.
  case $limit in
    '' | *[!0-9]* | ???????????????????) limit='no limit is set' ;;
    *) limit="limit: $((limit / 1048576)) MiB" ;;
  esac
  echo "flare-clef: killed, most likely for want of memory ($limit); finished cases are kept:" \
    "give it more (docker run --memory 4g) and run it again with" \
    "/workspace/predict.sh --skip-existing" >&2
fi
exit "$status"
