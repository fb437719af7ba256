"""GRPO with TRL's own trainer: a small policy learns to add from the rewards and Q-values of the default model.

    make train                       # or: gcrm train
    python examples/grpo_with_trl.py runs/arithmetic-gcrm-paper-seed0/model

The policy first imitates solutions of which half are wrong, so that it knows the form but not the answers. Its gain is
judged by doing the sums, which it never sees. With a weak reward model (a held-out AUROC of 0.61 was tried) the reward
rises while the sums get worse. Needs pip install 'gcrm-fast[trl,datasets]'; two minutes on a CPU.
"""

import random
import sys
import tempfile
import warnings
from typing import Any, NamedTuple

if __name__ == "__main__" and len(sys.argv) != 2:  # before the imports that take seconds
    print("usage: python examples/grpo_with_trl.py MODEL", file=sys.stderr)
    sys.exit(2)

from gcrm_fast.common.torch_compat import quiet_torchao

quiet_torchao()
# TRL sets gradient checkpointing by its old name, which it shares with transformers 4.
warnings.filterwarnings("ignore", r".*gradient_checkpointing", FutureWarning)

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from gcrm_fast import RewardModel
from gcrm_fast.common.command_line import exit_code
from gcrm_fast.data.arithmetic import generate, is_correct
from gcrm_fast.data.records import Pair
from gcrm_fast.rlhf.trl import RewardFunction


class Gain(NamedTuple):
    """The share of right samples before and after, and the mean reward at the first and the last log."""

    right_before: float
    right_after: float
    first_reward: float
    last_reward: float


def small_policy(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def imitate(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], steps: int) -> None:
    """Supervised steps on solutions of which half are wrong."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for _ in range(steps):
        drawn = rng.sample(pairs, 32)
        texts = [p.prompt + rng.choice((p.chosen, p.rejected)) + str(tokenizer.eos_token) for p in drawn]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : min(len(tokenizer(p.prompt)["input_ids"]) for p in drawn)] = -100
        policy(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def share_right(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> float:
    """Share of sampled solutions that are right, of 16 per prompt."""
    asked = prompts * 16
    batch = tokenizer(asked, return_tensors="pt", padding=True, padding_side="left")
    generate_from: Any = policy.eval()  # transformers' types do not admit that a model generates
    sampled = generate_from.generate(**batch, do_sample=True, top_k=0, max_new_tokens=8)
    texts = tokenizer.batch_decode(sampled[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(is_correct(prompt, text) for prompt, text in zip(asked, texts, strict=True)) / len(asked)


def run(folder: str, steps: int = 30) -> Gain:
    """Trains a policy for ``steps`` optimizer steps on the rewards of the model in ``folder``."""
    model = RewardModel.from_pretrained(folder)
    tokenizer = model.tokenizer
    reward: Any = RewardFunction(model, q_weight=1.0, ends=[tokenizer.eos_token_id])
    pairs = [pair for pair in generate(8000, 0, seed=1, max_steps=2)[0] if pair.fields["steps"] == 1]
    prompts = sorted({pair.prompt for pair in pairs})[3::60]
    policy = small_policy(tokenizer)
    imitate(policy, tokenizer, [pair for pair in pairs if pair.prompt in prompts], 180)
    before = share_right(policy, tokenizer, prompts)
    with tempfile.TemporaryDirectory() as output:
        options = GRPOConfig(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=8,
            temperature=0.8,
            learning_rate=1e-3,
            beta=0.0,
            mask_truncated_completions=True,
            logging_steps=5,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            seed=0,
        )
        trainer = GRPOTrainer(
            model=policy,
            reward_funcs=reward,
            args=options,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
        )
        trainer.train()
    rewards = [row["rewards/gcrm/mean"] for row in trainer.state.log_history if "rewards/gcrm/mean" in row]
    return Gain(before, share_right(policy, tokenizer, prompts), rewards[0], rewards[-1])


def main() -> None:
    gain = run(sys.argv[1])
    print(f"right samples: {gain.right_before:.2f} before, {gain.right_after:.2f} after")
    print(f"mean reward: {gain.first_reward:.2f} at first, {gain.last_reward:.2f} at last")


if __name__ == "__main__":
    sys.exit(exit_code("grpo_with_trl.py", main))
