"""The ranking loss of gcrm train and of TRL's RewardTrainer, step by step: same weights, tokens, order and schedule."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from gcrm_fast.training.config import TrainConfig, parse
from gcrm_fast.training.prepare import Prepared, prepare, steps_of
from summary import trained, write_aside

PAIRS_PER_STEP = 2


class InOrder(RewardTrainer):
    """Takes the rows as they come, and keeps the unrounded loss of each step and the time when it was known."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.losses: list[float] = []
        self.times: list[float] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        assert isinstance(self.train_dataset, Dataset)
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *arguments: Any, **more: Any) -> Any:
        loss = super().compute_loss(*arguments, **more)
        self.losses.append(loss.item())
        self.times.append(time.perf_counter())
        return loss


def shortest(source: Path, count: int, path: Path) -> Path:
    """A file of the ``count`` shortest records of ``source``."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = sorted(file, key=len)[:count]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, "".join(lines))
    return path


def of_trl(config: TrainConfig, prepared: Prepared, work: Path) -> tuple[list[float], float]:
    """Its losses and pairs/s, on our tokens in the order of our steps."""
    steps = steps_of(prepared, config, 0, 1)
    pairs = [pair for i in range(prepared.steps) for group in steps.groups(i)[1] for pair in group]
    rows = [{"chosen_ids": p.chosen_ids.tolist(), "rejected_ids": p.rejected_ids.tolist()} for p in pairs]
    model = AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.copy_(prepared.weights.whole("score.weight", model.score.weight.shape))
    trainer = InOrder(
        model=model,
        args=RewardConfig(
            output_dir=str(work),
            max_steps=prepared.steps,
            per_device_train_batch_size=PAIRS_PER_STEP,
            learning_rate=config.lr,
            lr_scheduler_type="cosine",
            warmup_steps=0,
            adam_beta2=config.beta2,
            weight_decay=config.weight_decay,
            max_grad_norm=config.clip,
            disable_dropout=True,
            gradient_checkpointing=False,
            max_length=None,
            bf16=config.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=prepared.tokenizer,
    )
    trainer.train()
    return trainer.losses, PAIRS_PER_STEP / float(np.median(np.diff(trainer.times)))


def compare(model: str, source: Path, steps: int, lr: float, dtype: str, runs: Path) -> dict[str, Any]:
    """Losses of both at each of ``steps``, of the whole model, and the pairs/s of a median step."""
    data = shortest(source, steps * PAIRS_PER_STEP, runs / "shortest.jsonl")
    folder = runs / f"as-trl-{steps}-{dtype}"
    words = ["--model", model, "--data", str(data), "--objective", "ranking", "--dtype", dtype]
    words += ["--global-batch-pairs", str(PAIRS_PER_STEP), "--steps", str(steps), "--lr", str(lr), "--warmup", "0"]
    words += ["--log-every", "1", "--keep", "0", "--goal-pairs", "2", "--template-date", "2026-01-01"]
    config = parse(words)
    prepared = prepare(config)
    trained(folder, words)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in lines if "loss" in line]
    speeds = [line["pairs_per_s"] for line in lines if "pairs_per_s" in line]
    theirs, their_speed = of_trl(config, prepared, runs / "trl")
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in prepared.train)
    common = {"model": model, "pairs": len(prepared.train), "tokens": tokens, "lr": lr, "dtype": dtype}
    speed = {"our_pairs_per_s": float(np.median(speeds)), "trl_pairs_per_s": their_speed}
    return {**common, **speed, "ours": ours, "trl": theirs, "largest_difference": largest}
