#!/bin/sh
# predict.sh [INPUTS [OUTPUTS]] [OPTION...]
#
# The challenge's harness calls this in /workspace without arguments: every scan of
# /workspace/inputs gets its labels in /workspace/outputs. Options go to `flare-clef predict`.
# In the image, where what is not mounted is lost with the container, labels go to the folder
# "outputs" beside the scans when no OUTPUTS is named and /workspace/outputs is not a mount.
inputs=/workspace/inputs outputs=/workspace/outputs named=''
case ${1:--} in
  -*) ;;
  *)
    inputs=$1
    shift
    case ${1:--} in
      -*) ;;
      *) outputs=$1 named=1 && shift ;;
    esac
    ;;
esac

# Does the path lie on something mounted into the container?
mounted() {
  while read -r _ _ _ _ point _; do
    case $1/ in "${point%/}"/*) [ "$point" = / ] || return 0 ;; esac
  done </proc/self/mountinfo
  return 1
}

# By trying: the mode of a folder does not tell of a read-only or full file system. "why" is what
# the system says, with owner and mode where those are the reason.
writable() {
  if why=$(mkdir -p "$1" 2>&1) && why=$( (: >"$1/.flare-clef.$$") 2>&1); then
    rm -f "$1/.flare-clef.$$"
    return
  fi
  why=${why##*: }
  case $why in Permission*)
    at=$1
    [ -d "$at" ] || at=${1%/*}
    owner=$(stat -c %u:%g "$at")
    why="$why: owner $owner, mode $(stat -c %a "$at")"
    [ "${owner%:*}" != "${me%:*}" ] || owner=''
    ;;
  esac
  return 1
}

fail() {
  echo "flare-clef: $*" >&2
  exit 1
}

if [ -z "$named" ] && [ -e /opt/flare-clef/entrypoint.sh ]; then
  me=$(id -u):$(id -g) owner=''
  if mounted "$outputs"; then
    writable "$outputs" || fail "$outputs: user $me cannot write there ($why);" \
      "${owner:+add --user $owner, or chown $me FOLDER, or }mount another folder there"
  elif mounted "$inputs"; then
    writable "${inputs%/}/outputs" ||
      fail "$outputs is not mounted and user $me cannot write to $inputs ($why):" \
        "nowhere to put the labels; add -v FOLDER:$outputs${owner:+, or --user $owner}"
    echo "flare-clef: $outputs is not mounted: labels go beside the scans," \
      "to ${inputs%/}/outputs (folder \"outputs\" of what you mounted)" >&2
    outputs=${inputs%/}/outputs
  else
    writable "$outputs" || fail "nothing is mounted; add -v FOLDER:$inputs -v FOLDER:$outputs"
    echo "flare-clef: $outputs is not mounted: labels stay in the container (docker cp)" >&2
  fi
fi

if command -v flare-clef >/dev/null 2>&1; then
  exec flare-clef predict "$@" -- "$inputs" "$outputs"
fi
# A bare checkout whose requirements are installed, but not the package itself.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec python3 -m flare_clef predict "$@" -- "$inputs" "$outputs"
