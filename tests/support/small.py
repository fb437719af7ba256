"""A model of three small layers, in memory."""

from typing import Any

import torch

from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel, initial_value
from gcrm_fast.training.memory import MemoryShape

VOCAB = 50
SPECIAL = 3  # bos, eos, pad: no random token is one of them


def small_config(**changes: object) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return ModelConfig(**{**values, **changes})


def small_model(
    config: ModelConfig, dtype: torch.dtype = torch.float64, *, lm_head: bool = False, views: bool = False
) -> LlamaRewardModel:
    """Weights of standard deviation of at least 0.1 everywhere: at 0.02 a wrong position hides in any tolerance."""
    model = LlamaRewardModel(config, lm_head=lm_head, views=views).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
            parameter.copy_(initial_value(name, parameter.shape, config, 0).double() + noise)
    return model


def memory_shape(config: ModelConfig, **changes: Any) -> MemoryShape:
    """Of one process on a CPU in float32, whose packs have one token."""
    values: dict[str, Any] = {
        "tokens": 1,
        "keys": 1,
        "read_rows": 1,
        "optimizer": "adamw",
        "width": 4,
        "kernels": False,
        "world_size": 1,
        "several_packs": False,
    }
    return MemoryShape(config=config, **{**values, **changes})
