#!/bin/sh
# predict.sh [INPUTS [OUTPUTS [OPTION...]]]
#
# The challenge's harness calls this in /workspace without arguments: every scan of
# /workspace/inputs gets its labels in /workspace/outputs. Options go to `flare-clef predict`.
# In the image, where what is not mounted is lost with the container, labels go to the folder
# "outputs" beside the scans when no OUTPUTS is named and /workspace/outputs is not a mount.
inputs=${1:-/workspace/inputs}
outputs=${2:-/workspace/outputs}

# Does the path lie on something mounted into the container?
mounted() {
  while read -r _ _ _ _ point _; do
    case $1/ in "${point%/}"/*) [ "$point" = / ] || return 0 ;; esac
  done </proc/self/mountinfo
  return 1
}

# By trying: the mode of a folder does not tell of a read-only or full file system.
writable() {
  mkdir -p "$1" 2>/dev/null && (: >"$1/.flare-clef.$$") 2>/dev/null && rm "$1/.flare-clef.$$"
}

fail() {
  echo "flare-clef: $*" >&2
  exit 1
}

if [ $# -lt 2 ] && [ -e /opt/flare-clef/entrypoint.sh ]; then
  me="user $(id -u):$(id -g)"
  # shellcheck disable=SC2016 # the remedy is for the user's own shell
  remedy='docker run --user "$(id -u):$(id -g)", or a folder that all may write'
  if mounted "$outputs"; then
    writable "$outputs" || fail "$outputs: $me cannot write there; $remedy"
  elif mounted "$inputs"; then
    writable "${inputs%/}/outputs" ||
      fail "$outputs is not mounted and $me cannot write to $inputs: nowhere to put the labels;" \
        "add -v FOLDER:$outputs (or $remedy)"
    echo "flare-clef: $outputs is not mounted: labels go beside the scans," \
      "to ${inputs%/}/outputs (folder \"outputs\" of what you mounted)" >&2
    outputs=${inputs%/}/outputs
  else
    writable "$outputs" || fail "nothing is mounted; add -v FOLDER:$inputs -v FOLDER:$outputs"
    echo "flare-clef: $outputs is not mounted: labels stay in the container (docker cp)" >&2
  fi
fi
[ $# -lt 2 ] || shift
[ $# -lt 1 ] || shift

if command -v flare-clef >/dev/null 2>&1; then
  exec flare-clef predict "$@" -- "$inputs" "$outputs"
fi
# A bare checkout whose requirements are installed, but not the package itself.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec python3 -m flare_clef predict "$@" -- "$inputs" "$outputs"
