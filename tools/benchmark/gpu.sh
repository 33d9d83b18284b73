#!/usr/bin/env bash
# Rehearsals against one GPU, for docs/scale.md: Stable Diffusion 3 medium at 512 and 1024 pixels,
# compiled and not, recomputed and not, with adapters, and the largest batch.
#
#   bash tools/benchmark/gpu.sh predict H200-141GB predictions.json    # on any CPU, an hour
#   bash tools/benchmark/gpu.sh measure H200-141GB predictions.json    # on the GPU, minutes
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# = 3 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; }
only=()
[ "$1" = predict ] && only=(--only-predict)
python=${PYTHON:-python}

reality() {
    "$python" tools/benchmark/reality.py "$@" --gpu "$gpu" --predictions "$file" --iterations 4 "${only[@]}"
    echo
}

gpu=$2
file=$3
reality configs/fgm/sd3_512_1xb4.py --largest --variants default strategy.compile=True \
    model.network.checkpointing=False model.network.checkpointing=0.5 model.network.checkpointing=attention
reality configs/fgm/sd3_512_lora_1xb4.py --largest
reality configs/fgm/sd3_1024.py --variants default train_dataloader.batch_size=1
