"""A reward function for veRL (0.9), from a running reward server, and a manager that sees which answers were cut.

    gcrm serve MODEL --port 8000
    python -m verl.trainer.main_ppo reward.custom_reward_function.path=examples/verl_reward.py \\
        reward.reward_manager.source=importlib reward.reward_manager.name=CutsIncluded \\
        reward.reward_manager.module.path=examples/verl_reward.py ...

GCRM_URL names another server. The manager gives the function the messages of the prompt. veRL's own manager, without
the options of reward.reward_manager, does not: each row of the training data must then hold them, or the text of its
prompt for a model without a chat template, in ``extra_info["prompt"]``; and every answer counts as finished.
"""

import importlib.util
import json
import os
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

if TYPE_CHECKING or not importlib.util.find_spec("verl"):
    NaiveRewardManager: Any = object
else:
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any], **_: Any
) -> float:
    """The reward of one completion. veRL calls this by name; ``data_source`` and ``ground_truth`` are not used."""
    cut = bool(extra_info.get("cut", False))
    body = {"prompts": [extra_info["prompt"]], "completions": [solution_str], "cuts": [cut]}
    url = os.environ.get("GCRM_URL", "http://127.0.0.1:8000")
    request = Request(f"{url}/score", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return float(json.load(answer)["rewards"][0])


class CutsIncluded(NaiveRewardManager):
    """Adds to ``extra_info`` the prompt, and as ``cut`` whether the answer lacks an end token."""

    async def run_single(self, data: Any) -> dict[str, Any]:
        item = data[-1]
        ids, extra = item.batch["responses"], item.non_tensor_batch["extra_info"]
        length = int(item.batch["attention_mask"][-len(ids) :].sum())
        last = self.tokenizer.added_tokens_decoder.get(int(ids[length - 1])) if length else None
        extra["cut"] = last is None or not last.special
        extra.setdefault("prompt", list(item.non_tensor_batch["raw_prompt"]))
        rewarded: dict[str, Any] = await super().run_single(data)
        return rewarded
