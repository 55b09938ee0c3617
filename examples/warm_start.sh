#!/usr/bin/env bash
# From UniLIP's public checkpoint to full SPAR without training a tokenizer or a generator from scratch: the converted
# model computes the same as UniLIP, then the unified stages train router and DiT.
#
#   examples/warm_start.sh CHECKPOINT DATA [any flag of spar train]
#
# CHECKPOINT is a folder or Hub id (kanashi6/UniLIP-1B), DATA a set of images with captions. RUN may be set, and CONVERT
# to further flags of spar convert (the published parts, if the checkpoint does not name them).
set -euo pipefail
checkpoint=$1 data=$2
shift 2
run=${RUN:-runs/warm}

read -ra convert <<< "${CONVERT:-}"
spar convert unilip "$checkpoint" -o "$run-start" "${convert[@]}"
spar train spar-1b --stage unified-2 --stage unified-3 --init-from "$run-start" \
    --data.source files --data.sets "$data" --stages.unified-2.data.edit-share 0 --stages.unified-3.data.edit-share 0 \
    --run "$run" "$@"
