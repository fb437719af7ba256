"""Initial weights of the benchmarks' models, drawn on the device: a billion normal numbers take a CPU 20 s, a GPU a few
milliseconds. They depend on (seed, name) only for each kind of device, so all contestants start from the same weights.
"""

import math
import zlib

import torch
from torch import Tensor

from gcrm_fast.checkpoints.weights import Weights
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel, initial_value, load


def value(name: str, shape: torch.Size, config: ModelConfig, seed: int, device: torch.device) -> Tensor:
    """On a CPU the trainer's own initial value; on a GPU one from the same distribution."""
    if device.type == "cpu":
        return initial_value(name, shape, config, seed)
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("norm.weight")), device=device)
    generator = torch.Generator(device).manual_seed((seed << 32) + zlib.crc32(name.encode()))
    normal = torch.randn(shape, generator=generator, device=device)
    if name == "model.embed_tokens.weight":
        return normal
    return normal.div_(shape[1] + 1 if name == "score.weight" else math.sqrt(shape[1]))


def weights(config: ModelConfig, seed: int, device: torch.device) -> Weights:
    """For ``parallel.materialize``."""
    return Weights(lambda name, shape, rows: value(name, shape, config, seed, device)[rows])


def network(config: ModelConfig, seed: int, device: torch.device, dtype: torch.dtype) -> LlamaRewardModel:
    """A separate model, trunk in ``dtype``, reward head in float32."""
    with torch.device("meta"):
        model = LlamaRewardModel(config).cast(dtype)
    load(model, device, weights(config, seed, device).rows)
    return model
