"""Policies for arithmetic, trained from scratch with TRL's SFTTrainer: what other experiments sample from.

    python experiments/policies.py                     # runs/policies/right-15 and right-50: a few minutes on one core
    python experiments/policies.py --right 30 --seed 1 --runs runs/policies-1

A tiny Llama with the tokenizer and the problems of the arithmetic preset. Every few steps it measures how often a
solution sampled at temperature 1 is right on held-out problems, and each time a wanted percentage is reached, the
policy is written, with its numbers in policy.json. Needs pip install 'gcrm-fast[trl,datasets]'.
"""

import json
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from gcrm_fast.common.command_line import run_script
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.options import AtLeastOne, Range, ZeroOrMore
from gcrm_fast.common.options import Options as CommandOptions
from gcrm_fast.data.arithmetic import generate
from gcrm_fast.data.records import Pair
from gcrm_fast.data.tokenization import train_tokenizer
from gcrm_fast.training.config import PRESETS
from summary import machine, to_json

PRESET = PRESETS["arithmetic"]
BATCH = 512  # held-out solutions per forward


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Trains policies for arithmetic; see the top of the script."""

    right: tuple[str, ...] = ("15", "50")
    """Percentages of right samples at which to write a policy, between 0 and 100."""
    runs: Path = Path("runs/policies")
    """Folder of the policies, each in right-PERCENTAGE."""
    seed: ZeroOrMore = 0
    """Seed of the initial weights and of the order of the problems."""
    hidden_size: AtLeastOne = 64
    """Width of the policy; the MLP is twice as wide."""
    layers: AtLeastOne = 2
    """Number of layers."""
    arithmetic_steps: Annotated[int, Range(least=1, greatest=25)] = 3
    """Maximum number of steps of a problem, as in gcrm train."""
    problems: AtLeastOne = 20_000
    """Number of solutions to train on, each of another problem while there are enough."""
    held_out: AtLeastOne = 500
    """Number of held-out problems that measure the percentage."""
    lr: Annotated[float, Range(above=0)] = 1e-3
    """Learning rate, constant after 50 steps."""
    batch: AtLeastOne = 64
    """Solutions per step."""
    steps: AtLeastOne = 6000
    """Maximum number of steps."""
    every: AtLeastOne = 5
    """Steps between two measurements."""

    def check(self) -> None:
        """Raises UserError for what is no percentage."""
        for text in self.right:
            if not text.isdigit() or not 0 < int(text) < 100:
                raise UserError(f"--right {text}: must be a whole number between 1 and 99")


@torch.no_grad()
def chances(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> np.ndarray:
    """The exact probability of each pair's chosen text at temperature 1, end token included, float64. It is the chance
    that a sample is right where only one text of its problem is."""
    found = []
    for first in range(0, len(pairs), BATCH):
        some = pairs[first : first + BATCH]
        prompts = [len(tokenizer(pair.prompt)["input_ids"]) for pair in some]
        texts = [f"{pair.prompt}{pair.chosen}{tokenizer.eos_token}" for pair in some]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        log_p = policy(input_ids=ids, attention_mask=mask).logits[:, :-1].double().log_softmax(-1)
        own = log_p.gather(2, ids[:, 1:, None])[..., 0]
        places = torch.arange(1, ids.shape[1])
        counted = mask[:, 1:].bool() & (places >= torch.tensor(prompts)[:, None])
        found.append(own.where(counted, 0.0).sum(1).exp().numpy())
    return np.concatenate(found)


def share_right(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> float:
    """The exact share of right solutions among samples at temperature 1; ``pairs`` have every text that solves their
    problems."""
    return float(chances(policy, tokenizer, pairs).sum()) / len({pair.prompt for pair in pairs})


class Milestones(TrainerCallback):
    """Writes the policy at each percentage that it reaches, lowest first, and stops training after the last."""

    def __init__(self, options: Options, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> None:
        self.options, self.tokenizer, self.pairs = options, tokenizer, pairs
        self.wanted = sorted({int(text) for text in options.right})
        self.written: list[dict[str, Any]] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        if state.global_step % self.options.every:
            return
        policy = objects["model"]
        right = share_right(policy.eval(), self.tokenizer, self.pairs)
        policy.train()
        while self.wanted and right >= self.wanted[0] / 100:
            self._write(policy, f"right-{self.wanted.pop(0)}", right, state.global_step)
        control.should_training_stop = not self.wanted

    def _write(self, policy: LlamaForCausalLM, name: str, right: float, steps: int) -> None:
        options = {k: v for k, v in asdict(self.options).items() if k not in ("runs", "right")}
        numbers = {
            "name": name,
            "right": round(right, 4),
            "trained_steps": steps,
            "parameters": policy.num_parameters(),
            **options,
            "command": shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "machine": machine(),
        }
        with written_aside(self.options.runs / name) as partial:
            policy.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            (partial / "policy.json").write_text(to_json(numbers), encoding="utf-8")
        self.written.append(numbers)
        print(json.dumps(numbers), flush=True)


def new_policy(options: Options, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=PRESET["vocab_size"],
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16 * (options.arithmetic_steps + 2),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def problems(options: Options) -> tuple[list[Pair], list[Pair]]:
    """(to train on, held out); a training problem comes once."""
    pairs, held_out = generate(
        2 * options.arithmetic_steps * options.problems, options.held_out, options.seed, options.arithmetic_steps
    )
    return list({pair.prompt: pair for pair in pairs}.values())[: options.problems], held_out


def texts(pairs: Iterable[Pair]) -> list[dict[str, str]]:
    return [{"prompt": pair.prompt, "completion": pair.chosen} for pair in pairs]


def fine_tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[dict[str, str]],
    *,
    steps: int,
    seed: int,
    batch: int = 64,
    lr: float = 1e-3,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Trains the model on the ``completion`` of each text, after its ``prompt``."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=50,
            weight_decay=0.1,
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(list(texts)),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        trainer.train()


def train(options: Options) -> list[dict[str, Any]]:
    """``train_on`` for the problems of ``options``."""
    return train_on(options, *problems(options))


def train_on(options: Options, pairs: Sequence[Pair], held_out: Sequence[Pair]) -> list[dict[str, Any]]:
    """Trains policies on the chosen texts of ``pairs`` and writes them; ``held_out`` has every right text of its
    problems. Returns their numbers, as in policy.json. Raises UserError where a percentage is not reached."""
    options.check()
    tokenizer = train_tokenizer((pair.prompt + pair.chosen for pair in pairs), PRESET["vocab_size"])
    milestones = Milestones(options, tokenizer, held_out)
    options.runs.mkdir(parents=True, exist_ok=True)
    fine_tune(
        new_policy(options, tokenizer),
        tokenizer,
        texts(pairs),
        steps=options.steps,
        seed=options.seed,
        batch=options.batch,
        lr=options.lr,
        callbacks=[milestones],
    )
    if milestones.wanted:
        raise UserError(
            f"--steps {options.steps}: too few to reach {milestones.wanted[0]}% of right samples: raise it or --lr"
        )
    return milestones.written


def run(options: Options) -> None:
    datasets.disable_progress_bars()
    train(options)


def main(argv: list[str] | None = None) -> int:
    return run_script("policies.py", Options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
