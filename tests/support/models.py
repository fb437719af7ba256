"""Small reward models on the disk, and completions for them to score."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcrm_fast.checkpoints.reading import Q_VALUES
from gcrm_fast.checkpoints.saving import save_model
from gcrm_fast.data.tokenization import choose_pad
from gcrm_fast.model.reward_model import LlamaRewardModel
from support.folders import VOCAB, tokenizer
from support.small import small_config, small_model

WORDS = ("one", "two", "three", "four", "five", "six", "seven", ", ", "; ", " 1", "2")
VERDICT = "Q says nothing before the end token"


def save(folder: Path, *, verdict: str = "", **changes: Any) -> LlamaRewardModel:
    """A random model whose default goal is all ones, as training saves it. ``verdict``: what it found of Q-values."""
    config = small_config(vocab_size=VOCAB, num_hidden_layers=2, **changes)
    model = small_model(config, torch.float32)
    state: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}
    choose_pad(tokenizer(), config.vocab_size, "test")
    goal = torch.ones(config.state_size)
    save_model(folder, state, config, tokenizer(), goal, 3, {Q_VALUES: verdict} if verdict else {})
    return model


def texts(count: int, prompts: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Prompts in turn and completions of very different lengths, some of them the same or with a common start."""
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> str:
        return "".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator))

    heads = [words(2 + 3 * i) + "?" for i in range(prompts)]
    starts = ["", words(4)]
    tails = [starts[i % 2] + words(1 + (7 * i) % 23) for i in range(count)]
    tails[-1] = tails[0] if count > 1 and (count - 1) % prompts == 0 else tails[-1]
    return [heads[i % prompts] for i in range(count)], tails
