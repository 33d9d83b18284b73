# Sourced by tools/dist_*.sh: `launch GPUS TOOL.py [arguments]` becomes that tool on GPUS processes of this machine (one per
# GPU; gloo where there is none). Several machines: set NNODES, NODE_RANK, MASTER_ADDR (and PORT) on each.
launch() {
  local tools
  tools="$(dirname "${BASH_SOURCE[0]}")"
  # the repository's own environment, where the quickstart made one
  if [ -z "${PYTHON:-}" ] && [ -x "$tools/../.venv/bin/python" ]; then
    PYTHON="$tools/../.venv/bin/python"
  fi
  # exec, so that a SIGTERM for the script reaches the tool
  PYTHONPATH="$tools/..:${PYTHONPATH:-}" exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" --nproc_per_node="$1" "$tools/$2" "${@:3}"
}
