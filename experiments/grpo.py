"""GRPO of a small arithmetic policy with TRL on a CPU, and what is measured on the way."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from gcrm_fast.data.records import Pair
from gcrm_fast.inference.generation import Policy
from gcrm_fast.rlhf.trl import RewardFunction
from policies import chances


def grpo(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardFunction,
    records: Sequence[dict[str, Any]],
    *,
    steps: int,
    length: int,
    lr: float,
    kl_weight: float,
    seed: int,
    scratch: Path,
    callbacks: Sequence[TrainerCallback],
    shuffle: bool = True,
) -> list[dict[str, float]]:
    """Trains ``policy`` in place on the prompts of ``records``, 8 samples each of 8 prompts per step; TRL's log, a row
    per step.

    Args:
        length: maximum tokens of a sample.
        lr: learning rate at the start; it decreases linearly to 0.
        kl_weight: weight of the KL divergence from the policy at the start; 0 for none.
        scratch: folder that TRL may write to.
    """
    arguments = GRPOConfig(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=length,
        learning_rate=lr,
        beta=kl_weight,
        shuffle_dataset=shuffle,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=seed,
    )
    trained_function: Any = reward
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=trained_function,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(list(records)),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train()
    return list(trainer.state.log_history)


@torch.no_grad()
def kl_from(
    start: LlamaForCausalLM, policy: LlamaForCausalLM, prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]]
) -> float:
    """KL divergence of ``policy`` from ``start`` in nats per solution, estimated from samples of the policy: the sum of
    the divergences of the next token's distribution at each of their tokens. ``prompts`` and ``new``: their tokens."""
    width = max(len(p) + len(n) for p, n in zip(prompts, new, strict=True))
    ids = torch.zeros(len(new), width, dtype=torch.long)
    counted = torch.zeros(len(new), width - 1, dtype=torch.bool)
    for i, (p, n) in enumerate(zip(prompts, new, strict=True)):
        ids[i, : len(p) + len(n)] = torch.tensor([*p, *n])
        counted[i, len(p) - 1 : len(p) + len(n) - 1] = True
    log_p, log_q = (model(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for model in (policy, start))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).where(counted, 0.0).sum() / len(new))


@dataclass(kw_only=True)
class Meter(TrainerCallback):
    """Measures the policy before the first step and after every ``every`` steps: ``gold`` by problem, a sample of each
    problem and its reward."""

    folder: Path
    start: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    held_out: Sequence[Pair]
    reward: RewardFunction
    length: int
    every: int
    steps: list[int] = field(default_factory=list)
    gold: list[np.ndarray] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    def measure(self, policy: LlamaForCausalLM, step: int) -> None:
        policy.eval()
        policy.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        writer = Policy.from_pretrained(self.folder, device="cpu")
        prompts = [pair.prompt for pair in self.held_out]
        asked = writer.encode(prompts)
        new = writer.generate_ids(asked, max_new_tokens=self.length, temperature=1.0, seed=step, rows=256)
        texts = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in new]
        self.steps.append(step)
        self.gold.append(chances(policy, self.tokenizer, self.held_out))
        self.texts.append(texts)
        self.rewards.append(float(np.mean(self.reward(prompts, texts, completion_ids=new))))
        self.kl.append(kl_from(self.start, policy, asked, new))
        self.tokens.append(float(np.mean([len(ids) for ids in new])))
        policy.train()

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step % self.every == 0:
            self.measure(objects["model"], state.global_step)
