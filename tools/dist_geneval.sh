#!/usr/bin/env bash
# GenEval on GPUS processes of this machine:
#   tools/dist_geneval.sh GPUS run CONFIG [geneval.py arguments]
#   tools/dist_geneval.sh GPUS score FOLDER [geneval.py arguments]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR (and PORT) on each.
set -euo pipefail
# the repository's own environment, where the quickstart made one
if [ -z "${PYTHON:-}" ] && [ -x "$(dirname "$0")/../.venv/bin/python" ]; then
  PYTHON="$(dirname "$0")/../.venv/bin/python"
fi
if [ $# -lt 3 ]; then
  echo "usage: $0 GPUS run CONFIG | score FOLDER [geneval.py arguments]" >&2
  exit 2
fi
GPUS=$1
PYTHONPATH="$(dirname "$0")/..:${PYTHONPATH:-}" exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="${PORT:-29500}" --nproc_per_node="$GPUS" \
  "$(dirname "$0")/geneval.py" "${@:2}" --launcher pytorch
