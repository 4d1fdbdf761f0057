#!/bin/sh
# tests/container/check.sh: builds the image and tests it on a real engine.
#
# Needs the test requirements, and DOCKER (the client's name) in the environment; how an engine
# without a registry is given stands in tests/container/engine.py.
# Exit: pytest's status; 77 where there is no engine.
cd "$(dirname "$0")/../.." || exit 1
: "${DOCKER:=docker}"
export DOCKER
if ! "$DOCKER" info >/dev/null 2>&1; then
  echo "SKIPPED: no Docker engine answers ($DOCKER info)" >&2
  exit 77
fi
exec python3 -m pytest tests/container -rA --durations=0 -p no:cacheprovider
