#!/usr/bin/env bash
# Train a model on your own images: check them, compute their features once, train LoRA on them, generate with it.
#
#   examples/own_folder.sh DATA PROMPT [any flag of spar train]
#
# DATA is a folder of images with metadata.jsonl (lines of {"file_name": "1.png", "text": "a caption"}), or any other set
# that spar.data.sources reads. MODEL, RECIPE and RUN may be set; by default the bundled model of the shapes world is used.
set -euo pipefail
data=$1 prompt=$2
shift 2
recipe=${RECIPE:-shapes} run=${RUN:-runs/own}
model=${MODEL:-$(python -c 'from spar.inference.pipeline import BUNDLED; print(BUNDLED)')}
set -- --data.source files --data.sets "$data" "$@"

spar data check "$data"
spar train "$recipe" --stage unified-3 --init-from "$model" "$@" --stages.unified-3.data.edit-share 0 --lora.rank 8 \
    --run "$run" --dry-run  # the plan; captions whose words the model does not know are refused here
spar cache "$recipe" --init-from "$model" "$@" -o "$run-features"
spar train "$recipe" --stage unified-3 --init-from "$model" "$@" --data.cache "$run-features" \
    --stages.unified-3.data.edit-share 0 --lora.rank 8 --run "$run"
# The captions have taught no layouts.
spar generate "$prompt" --no-layout --model "$model" --adapter "$run/adapter" -o "$run/drawn.png" --overwrite
