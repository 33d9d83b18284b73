#!/usr/bin/env bash
# Train on GPUS processes of this machine, or of several (see launch.sh):
#   tools/dist_train.sh CONFIG GPUS [train.py arguments]
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 CONFIG GPUS [train.py arguments]" >&2
  exit 2
fi
. "$(dirname "$0")/launch.sh"
launch "$2" train.py "$1" --launcher pytorch "${@:3}"
