#!/usr/bin/env bash
# Test on GPUS processes of this machine, or of several (see launch.sh):
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [test.py arguments]
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: $0 CONFIG CHECKPOINT GPUS [test.py arguments]" >&2
  exit 2
fi
. "$(dirname "$0")/launch.sh"
launch "$3" test.py "$1" "$2" --launcher pytorch "${@:4}"
