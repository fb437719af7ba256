#!/usr/bin/env bash
# PPO with OpenRLHF (0.11) against a gcrm reward server:
#     examples/openrlhf_remote.sh MODEL POLICY PROMPTS [further options of OpenRLHF]
set -euo pipefail
gcrm serve "$1" --port 5000 &
trap 'kill %1' EXIT
python -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path "$2" --data.prompt_dataset "$3" \
    --reward.remote_url http://127.0.0.1:5000/get_reward "${@:4}"
