"""A trunk with a reward head and, where there is one, a projection for cosines; and what a new one starts from.

Letters: R read rows, H hidden size, D width of the projection. Parameters carry the names of transformers'
``LlamaForSequenceClassification`` and its like so that a checkpoint needs no renaming. There is no lm_head.
"""

import math
import zlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gcrm_fast.model import heads
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.llama import Llama, ModelConfig


class Output(NamedTuple):
    """reward [2, pairs] float32 at the end rows of chosen [0] and rejected [1]; z [R, D or H] what cosines compare."""

    reward_2N: Tensor
    z_RD: Tensor


def upcast(x: Tensor) -> Tensor:
    """x in float32; float64 stays (the tests' exact runs)."""
    return x if x.dtype == torch.float64 else x.float()


class LlamaRewardModel(nn.Module):
    """Trunk, reward head and optional projection.

    ``attention_backend``: see attention.py; ``auto`` by default. ``recompute``: see ``Block``.
    """

    def __init__(self, config: ModelConfig, attention_backend: str = "auto", recompute: str = "none") -> None:
        super().__init__()
        h = config.hidden_size
        self.config = config
        self.attention_backend = attention_backend
        self.gather = "block"  # see parallel.shard
        self.model = Llama(config, recompute)
        self.score = heads.KINDS[config.head](h)
        self.projection = nn.Linear(h, config.projection_size, bias=False) if config.projection_size else None

    def compile_blocks(self) -> None:
        """Compiles the forward of every block, and with it the backward; sizes of packs stay symbols."""
        # Whole and pruned blocks, with and without gradient, of one token or row: more kinds than the default of 8.
        torch._dynamo.config.recompile_limit = 32
        for layer in self.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def forward(self, pack: Pack) -> Output:
        hidden_RH = self.model(pack, self.attention_backend)
        reward = self.rewards(hidden_RH.index_select(0, pack.pairs.end_2N.flatten()))
        # A stack and not a view: FSDP's hooks must own the tensors that leave the module.
        return Output(torch.stack(reward.chunk(2)), self.compared(hidden_RH))

    def rewards(self, hidden_RH: Tensor) -> Tensor:
        """[R] float32. Rewards are differences of nearly equal numbers: the head runs in float32 whatever the trunk's
        dtype."""
        return self.score(upcast(hidden_RH)).squeeze(1)

    def compared(self, hidden_RH: Tensor) -> Tensor:
        """z [R, D or H], what cosines compare: projected states, or the states themselves."""
        return hidden_RH if self.projection is None else self.projection(hidden_RH)


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Initial value of one parameter, float32 on the CPU: a function of (seed, name) alone, so that any number of ranks
    starts from the same weights.

    Norm weights are 1 and biases 0; embeddings have variance 1, linear layers variance 1 / fan-in; the reward head says
    for itself.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    normal = torch.randn(shape, generator=generator)
    if name == "model.embed_tokens.weight":
        return normal
    if name.startswith("score."):
        return heads.KINDS[config.head].initial_weight(normal)
    return normal / math.sqrt(shape[1])
