"""veRL's own reward managers, under its own configuration: our functions, and its own reward model on ``/classify``."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.reward_loop import RewardLoopWorker

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "verl_reward.py"


def worker(policy: str, *overrides: str, address: str | None = None) -> RewardLoopWorker:
    """As its trainer builds one; a name that its configuration lacks is an error."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[f"actor_rollout_ref.model.path={policy}", *overrides])
    return RewardLoopWorker(config, address)


def sampled(model: dict[str, Any], cuts: list[bool]) -> DataProto:
    """A batch as its rollout leaves it: tokens of prompts padded at the left, of responses at the right."""
    tokenizer = AutoTokenizer.from_pretrained(model["folder"])
    prompts, responses = [], []
    for case, cut in zip(model["cases"], cuts, strict=True):
        prompts.append(tokenizer(case["prompt"], add_special_tokens=False)["input_ids"])
        end = case["text"].removeprefix(case["prompt"])
        responses.append(tokenizer(end, add_special_tokens=False)["input_ids"][: -1 if cut else None])

    def padded(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        blank = [[0] * (width - len(row)) for row in rows]
        ids = [b + row if left else row + b for row, b in zip(rows, blank, strict=True)]
        ones = [[1] * len(row) for row in rows]
        mask = [b + one if left else one + b for one, b in zip(ones, blank, strict=True)]
        return torch.tensor(ids), torch.tensor(mask)

    (prompt_ids, prompt_mask), (response_ids, response_mask) = padded(prompts, True), padded(responses, False)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    tensors = {"prompts": prompt_ids, "responses": response_ids, "attention_mask": mask}
    others: dict[str, list[Any]] = {
        "data_source": ["ours"] * len(cuts),
        "reward_model": [{"ground_truth": None} for _ in cuts],
        "extra_info": [{"prompt": case.get("messages", [])[:1] or case["prompt"]} for case in model["cases"]],
        "raw_prompt": [case.get("messages", [])[:1] for case in model["cases"]],
    }
    columns = {name: np.array([*values, None], dtype=object)[:-1] for name, values in others.items()}
    return DataProto.from_dict(tensors=tensors, non_tensors=columns)


def rewards(loop: RewardLoopWorker, data: DataProto) -> list[float]:
    scores = asyncio.get_event_loop().run_until_complete(loop.compute_score_batch(data))
    return [score["reward_score"] for score in scores]


def main(work: Path, answers: Path) -> None:
    models = json.loads((work / "models.json").read_text())
    made: list[dict[str, Any]] = []
    function = f"reward.custom_reward_function.path={EXAMPLE}"
    manager = ["source=importlib", "name=CutsIncluded", f"module.path={EXAMPLE}"]
    for name in ("text", "chatml"):
        model = models[name]
        os.environ["GCRM_URL"] = model["url"]
        none, cuts = [False] * len(model["cases"]), [i % 2 == 0 for i in range(len(model["cases"]))]
        loop = worker(model["folder"], function)
        what = "examples/verl_reward.py, reward.custom_reward_function.path"
        made.append({"what": what, "model": name, "found": rewards(loop, sampled(model, none))})
        loop = worker(model["folder"], function, *(f"reward.reward_manager.{option}" for option in manager))
        batch = sampled(model, cuts)
        if name == "chatml":  # the manager finds the prompt in raw_prompt
            batch.non_tensor_batch["extra_info"] = np.array([{} for _ in cuts], dtype=object)
        what = "the same, cut answers, reward.reward_manager.name=CutsIncluded"
        made.append({"what": what, "model": name, "found": rewards(loop, batch), "cuts": cuts})
    # veRL takes the policy's eos out of the answer before the reward model's template adds the end of the turn.
    model = models["base"]
    options = ["enable=True", f"model_path={model['folder']}", "rollout.name=vllm"]
    options = [f"reward.reward_model.{option}" for option in options]
    loop = worker(model["folder"], *options, address=model["url"].removeprefix("http://"))
    found = rewards(loop, sampled(model, [False] * len(model["cases"])))
    made.append({"what": "reward.reward_model.enable, its client on gcrm serve", "model": "base", "found": found})
    answers.write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
