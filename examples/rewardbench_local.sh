#!/usr/bin/env bash
# Accuracy of a saved model on a local file, with rewardbench (0.1.4, which needs a CUDA device):
#     examples/rewardbench_local.sh MODEL PAIRS
# PAIRS holds JSON lines with "chosen" and "rejected", each a whole conversation in messages. The model's tokenizer needs
# a chat template. Name MODEL by a relative path: scores go to results/MODEL_outputs.jsonl, the accuracy to
# results/MODEL.json.
set -euo pipefail
if [ $# -ne 2 ]; then
    echo "usage: examples/rewardbench_local.sh MODEL PAIRS" >&2
    exit 2
fi
rewardbench --model "$1" --dataset "$2" --load_json --not_quantized --torch_dtype float32 --output_dir results/
