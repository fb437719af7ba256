"""LoRA: a frozen weight W [out, in] computes ``W x + scale * B A dropout(x)``; A [rank, in] and B [out, rank] are
trained (Hu et al. 2021, section 4.1). The library peft puts the adapters into the model.

The reward head and the projection are trained whole. A run saves its model twice: with the adapters merged into the
weights, and as an adapter that peft loads (checkpoints/adapters.py).
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from gcrm_fast.checkpoints.locating import PEFT_PREFIX
from gcrm_fast.model import heads
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel, RowReader

if TYPE_CHECKING:
    from peft import LoraConfig

A, B, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."  # of parameters' names in peft


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of the linear layers that ``targets`` names, in the blocks ``layers``."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    dropout: float
    layers: range

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def configuration(self, model: ModelConfig, base: str | None = None) -> "LoraConfig":
        """peft's; with ``base`` as saved, for transformers' sequence classifier of the model of that name."""
        from peft import LoraConfig, TaskType

        some = len(self.layers) < model.num_hidden_layers
        with_head = base is not None and heads.KINDS[model.head].in_transformers
        return LoraConfig(
            task_type=TaskType.SEQ_CLS,
            base_model_name_or_path=base,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=sorted(self.targets),
            layers_to_transform=list(self.layers) if some else None,
            modules_to_save=["score"] if with_head else None,
            inference_mode=base is not None,
        )

    def inject(self, model: LlamaRewardModel) -> None:
        """Freezes the trunk and adds the adapters, on the meta device."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(self.configuration(model.config), model, low_cpu_mem_usage=True)
        for part in (model.score, model.projection, model.views):
            if part is not None:
                part.requires_grad_(True)

    def rows(self, base: RowReader, seed: int) -> RowReader:
        """Initial values, by the names of the model with adapters: B is 0, A uniform with variance 1 / (3 * in), as in
        peft; a function of (seed, name) alone."""

        def read(name: str, shape: torch.Size, rows: slice) -> Tensor:
            if name.endswith(B):
                return torch.zeros(shape)[rows]
            if name.endswith(A):
                generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
                bound = 1 / math.sqrt(shape[1])
                return torch.empty(shape).uniform_(-bound, bound, generator=generator)[rows]
            return base(name.replace(BASE, "."), shape, rows)

        return read

    def merged(self, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Whole tensors in ``dtype`` under the names of the model without adapters, which are added to its weights."""
        weights = {}
        for name, tensor in state.items():
            if name.endswith((A, B)):
                continue
            layer, base, _ = name.rpartition(f"{BASE}weight")
            if base:
                tensor = tensor + self.scale * (state[layer + B] @ state[layer + A])
            weights[name.replace(BASE, ".")] = tensor.to(dtype)
        return weights

    def adapters(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A and B under the names of peft's files."""
        named = {name: tensor for name, tensor in state.items() if name.endswith((A, B))}
        return {PEFT_PREFIX + name.replace(".default.", "."): tensor for name, tensor in named.items()}

    def parameters(self, model: ModelConfig) -> int:
        """Number of trained ones in A and B."""
        return len(self.layers) * self.rank * sum(map(sum, self._sizes(model)))

    def flops(self, model: ModelConfig, tokens: int, read_rows: int) -> int:
        """Of the forward of A and B; the last block's output projection and MLP run at the read rows."""
        whole = sum(map(sum, self._sizes(model, ("q_proj", "k_proj", "v_proj"))))
        tail = sum(map(sum, self._sizes(model))) - whole
        blocks = len(self.layers)
        return 2 * self.rank * (blocks * tokens * whole + ((blocks - 1) * tokens + read_rows) * tail)

    def kept_for_backward(self, model: ModelConfig, tokens: int, width: int) -> int:
        """Bytes of activations that all adapters keep, ``width`` bytes per element: A's output and, with dropout, its
        input and mask."""
        sizes = self._sizes(model)
        dropped = sum(size for size, _ in sizes) * (width + 1) if self.dropout else 0
        return len(self.layers) * tokens * (len(sizes) * self.rank * width + dropped)

    def _sizes(self, model: ModelConfig, among: tuple[str, ...] | None = None) -> list[tuple[int, int]]:
        """(in, out) of the targets, or of those ``among`` them."""
        h, f = model.hidden_size, model.intermediate_size
        q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        of_all = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        of_all |= {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}
        return [of_all[name] for name in self.targets if among is None or name in among]


def seed_dropout(seed: int, step: int) -> None:
    """Makes the random numbers of a step's forward passes depend on (seed, step, process) alone."""
    torch.manual_seed(hash((seed, step, dist.get_rank(), 1)) % 2**63)
