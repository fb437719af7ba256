"""TRL: reward models that its RewardTrainer saves, whole or as LoRA adapters; our rewards inside its GRPOTrainer."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

from gcrm_fast.rlhf.trl import RewardFunction

SETTINGS: dict[str, Any] = {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "seed": 0}


def trained(base: dict[str, Any], work: Path, kind: str, *, plain: bool = False) -> dict[str, Any]:
    """Two steps on preferences, saved by the trainer; the rewards that it gives its own chosen completions."""
    cases, folder = base["cases"], work / f"trl-{kind}"
    if plain:
        rows = {"prompt": [c["messages"][0]["content"] for c in cases]}
        rows["chosen"] = [" " + c["messages"][1]["content"] for c in cases]
        texts: list[Any] = [list(pair) for pair in zip(rows["prompt"], rows["chosen"], strict=True)]
    else:
        rows = {"chosen": [c["messages"] for c in cases]}
        texts = [[c["messages"][:1], c["messages"][1:]] for c in cases]
    rows["rejected"] = [*rows["chosen"][1:], rows["chosen"][0]] if plain else [c["messages"] for c in cases[::-1]]
    lora = None if kind in ("whole", "plain") else LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
    names = AutoTokenizer.from_pretrained(base["folder"])
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(base["folder"], dtype=torch.float32),
        args=RewardConfig(output_dir=str(work / "trl"), max_steps=2, learning_rate=1e-2, **SETTINGS),
        train_dataset=Dataset.from_dict(rows),
        processing_class=names,
        peft_config=lora,
    )
    trainer.train()
    model: Any = trainer.model
    model.eval()
    with torch.no_grad():
        dataset: Any = trainer.train_dataset
        ids = [torch.tensor([row["chosen_ids"]]) for row in dataset]
        found = [model(input_ids=one, attention_mask=torch.ones_like(one)).logits.item() for one in ids]
    if kind == "merged":
        model.merge_and_unload().save_pretrained(folder)
        names.save_pretrained(folder)
    else:
        trainer.save_model(str(folder))
    kinds = {"whole": "messages", "plain": "texts", "merged": "a LoRA adapter, merged", "adapter": "a LoRA adapter"}
    what = f"model saved by RewardTrainer ({kinds[kind]}), scored by gcrm"
    return {"what": what, "model": "base", "folder": str(folder), "found": found, "texts": texts}


def rewarded(model: dict[str, Any], name: str, work: Path) -> dict[str, Any]:
    """The rewards that GRPOTrainer was given for what its policy wrote."""
    tokenizer = AutoTokenizer.from_pretrained(model["folder"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    function = RewardFunction(model["folder"])
    texts: list[list[Any]] = []
    found: list[float] = []

    def gcrm(prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        rewards = function(prompts, completions, **columns)
        texts.extend([prompt, completion] for prompt, completion in zip(prompts, completions, strict=True))
        found.extend(rewards)
        return rewards

    options: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 1,
    }
    trainer = GRPOTrainer(
        model=LlamaForCausalLM(config),
        reward_funcs=gcrm,
        args=GRPOConfig(output_dir=str(work / "grpo"), **options, **SETTINGS),
        train_dataset=Dataset.from_dict({"prompt": [c.get("messages", [])[:1] or c["prompt"] for c in model["cases"]]}),
        processing_class=tokenizer,
    )
    trainer.train()
    return {"what": "RewardFunction in GRPOTrainer", "model": name, "found": found, "texts": texts}


def main(work: Path, answers: Path) -> None:
    models = json.loads((work / "models.json").read_text())
    made = [trained(models["base"], work, kind, plain=kind == "plain") for kind in ("whole", "plain", "merged")]
    made.append(trained(models["base"], work, "adapter"))
    made += [rewarded(models[name], name, work) for name in ("text", "chatml")]
    answers.write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
