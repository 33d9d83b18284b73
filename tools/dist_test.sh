#!/usr/bin/env bash
# Test on GPUS processes of this machine, or of several (see launch.sh):
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [test.py arguments]
#   tools/dist_test.sh WORK_DIR GPUS [test.py arguments]
set -euo pipefail
model=("${@:1:2}")
if [ $# -ge 2 ] && [ -d "$1" ] && [[ "$2" =~ ^[0-9]+$ ]]; then model=("$1"); fi
rest=("${@:${#model[@]}+1}")
if [ ${#rest[@]} -lt 1 ]; then
  echo "usage: $0 CONFIG CHECKPOINT GPUS [test.py arguments], or WORK_DIR GPUS [...]" >&2
  exit 2
fi
. "$(dirname "$0")/launch.sh"
launch "${rest[0]}" test.py "${model[@]}" --launcher pytorch "${rest[@]:1}"
