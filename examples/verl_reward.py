"""A reward function for veRL, from a running reward server.

    gcrm serve MODEL --port 8000
    python -m verl.trainer.main_ppo reward.custom_reward_function.path=examples/verl_reward.py ...

Each row of the training data holds the text of its prompt in ``extra_info["prompt"]``, with the chat template applied
and as the policy sees it. GCRM_URL names another server.
"""

import json
import os
from typing import Any
from urllib.request import Request, urlopen

URL = os.environ.get("GCRM_URL", "http://127.0.0.1:8000")


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any], **_: Any
) -> float:
    """The reward of one completion. veRL calls this by name; ``data_source`` and ``ground_truth`` are not used."""
    body = {"prompts": [extra_info["prompt"]], "completions": [solution_str]}
    request = Request(f"{URL}/score", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return float(json.load(answer)["rewards"][0])
