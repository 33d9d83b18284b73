#!/usr/bin/env bash
# Train on GPUS processes of this machine (one per GPU; gloo where there is none):
#   tools/dist_train.sh CONFIG GPUS [train.py arguments]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR (and PORT) on each.
set -euo pipefail
# the repository's own environment, where the quickstart made one
if [ -z "${PYTHON:-}" ] && [ -x "$(dirname "$0")/../.venv/bin/python" ]; then
  PYTHON="$(dirname "$0")/../.venv/bin/python"
fi
if [ $# -lt 2 ]; then
  echo "usage: $0 CONFIG GPUS [train.py arguments]" >&2
  exit 2
fi
CONFIG=$1
GPUS=$2
# exec, so that a SIGTERM for this script reaches the training
PYTHONPATH="$(dirname "$0")/..:${PYTHONPATH:-}" exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="${PORT:-29500}" --nproc_per_node="$GPUS" \
  "$(dirname "$0")/train.py" "$CONFIG" --launcher pytorch "${@:3}"
