#!/usr/bin/env bash
# PPO with OpenRLHF (0.11) against a gcrm reward server:
#     examples/openrlhf_remote.sh MODEL POLICY PROMPTS [further options of OpenRLHF]
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: examples/openrlhf_remote.sh MODEL POLICY PROMPTS [further options of OpenRLHF]" >&2
    exit 2
fi
gcrm serve "$1" --port 5000 &
trap 'kill %1' EXIT
python -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path "$2" --data.prompt_dataset "$3" \
    --reward.remote_url http://127.0.0.1:5000/get_reward "${@:4}"
