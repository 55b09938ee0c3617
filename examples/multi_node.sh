#!/usr/bin/env bash
# Train one stage on several machines: run this on each of them, with its own NODE (0, 1, ...) and all else the same.
#
#   NODE=0 NODES=8 GPUS=8 HEAD=address-of-node-0:29500 RUN=/shared/run examples/multi_node.sh RECIPE STAGE [flags]
#
# RUN is on a shared disk. To resume a stopped run, add --resume auto to the flags, on any number of machines.
set -euo pipefail
recipe=$1 stage=$2
shift 2
torchrun --nnodes "${NODES:-1}" --node-rank "${NODE:-0}" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:29500}" --rdzv-id spar -m -- \
    spar train "$recipe" --stage "$stage" --device "${DEVICE:-cuda}" --parallelism.strategy "${STRATEGY:-fsdp}" --run "$RUN" "$@"
