#!/bin/sh
# predict.sh [INPUTS [OUTPUTS [OPTION...]]]
#
# The challenge's harness calls this in /workspace without arguments: every scan of
# /workspace/inputs gets its labels in /workspace/outputs. Options go to `flare-clef predict`.
inputs=${1:-/workspace/inputs}
outputs=${2:-/workspace/outputs}
[ $# -lt 2 ] || shift
[ $# -lt 1 ] || shift

if command -v flare-clef >/dev/null 2>&1; then
  exec flare-clef predict "$@" -- "$inputs" "$outputs"
fi
# A bare checkout whose requirements are installed, but not the package itself.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec python3 -m flare_clef predict "$@" -- "$inputs" "$outputs"
