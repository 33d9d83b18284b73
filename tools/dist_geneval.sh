#!/usr/bin/env bash
# GenEval on GPUS processes of this machine, or of several (see launch.sh):
#   tools/dist_geneval.sh GPUS run CONFIG [geneval.py arguments]
#   tools/dist_geneval.sh GPUS score FOLDER [geneval.py arguments]
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: $0 GPUS run CONFIG | score FOLDER [geneval.py arguments]" >&2
  exit 2
fi
. "$(dirname "$0")/launch.sh"
launch "$1" geneval.py "${@:2}" --launcher pytorch
