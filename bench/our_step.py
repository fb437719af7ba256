"""The training step as gcrm_fast.train runs it, and without each of its levers.

Shape suffixes: T tokens of a pack, R read rows, N pairs, S samples, H hidden size, D state size.
"""

import contextlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import drawn
import padded
from gcrm_fast import train
from gcrm_fast.data import packing
from gcrm_fast.data.batches import Budget, plan_packs
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.model import llama
from gcrm_fast.model.inputs import Pack, PairRows
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.training import accounting, objectives, parallel, prepare
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.training.optimizer import Updater, cast_weights
from gcrm_kernels import ContrastiveStatistics, InverseIndex, RowTiles, reference

MODELS = {
    "tiny": ModelConfig(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    ),
    "135m": ModelConfig(  # SmolLM2-135M
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rope_theta=100_000.0,
    ),
    "1b": ModelConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rope_theta=500_000.0,
    ),
    "8b": ModelConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=500_000.0,
    ),
}
LEVERS: tuple[str, ...] = ("packing", "sharing", "read rows", "fused loss")
LEVERS += ("fused RoPE", "Triton") if torch.cuda.is_available() else ()
RECOMPUTING = {f"recomputing {part}": part for part in ("product", "mlp", "block")}  # --recompute: each saves memory

Groups = list[list[TokenizedPair]]  # one global batch: groups of pairs with the same prompt


@dataclass(frozen=True)
class Work:
    """Tokens through the layers, and model FLOPs forward + backward."""

    tokens: int
    flops: float


def packed_work(config: ModelConfig, packs: Sequence[Pack]) -> Work:
    done = [accounting.work(pack, config, "none") for pack in packs]
    return Work(int(sum(w.tokens for w in done)), sum(w.model_flops for w in done))


def flat(groups: Groups) -> list[TokenizedPair]:
    return [pair for group in groups for pair in group]


def naive_loss(z_RD: Tensor, pairs: PairRows, objective: objectives.Objective) -> tuple:
    """Replaces objectives.contrastive_loss: the naive loss on the same states, without statistics."""
    unmeasured = z_RD.new_zeros(len(pairs.has_positive_N))
    loss_N = padded.naive_contrastive(z_RD, pairs.samples_4NS, pairs.has_positive_N)
    return loss_N, ContrastiveStatistics(unmeasured, unmeasured)


def never(x: Tensor) -> bool:
    return False


def plain_rms_norm(
    x_TH: Tensor, weight_H: Tensor, eps: float, residual_TH: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    s_TH = x_TH if residual_TH is None else x_TH + residual_TH
    y_TH = torch.nn.functional.rms_norm(s_TH, weight_H.shape, weight_H, eps)
    return y_TH if residual_TH is None else (y_TH, s_TH)


def reading_all_rows(pack: Pack) -> Pack:
    """The pack with every token as a read row: a full last layer and final norm, losses on the same states."""
    rows, tokens = pack.read_rows_R, len(pack.input_ids_T)
    every = np.arange(tokens)
    samples_4NS = rows[pack.pairs.samples_4NS]
    pairs = replace(
        pack.pairs,
        end_2N=rows[pack.pairs.end_2N],
        samples_4NS=samples_4NS,
        samples_tiles=RowTiles.of(samples_4NS.numpy(), tokens),
    )
    return replace(pack, read_rows_R=torch.from_numpy(every), read_inverse=InverseIndex.of(every, tokens), pairs=pairs)


class Ours:
    """The model as the trainer builds it, on a process group of one, and its optimizer step."""

    def __init__(
        self, config: ModelConfig, options: TrainConfig, dtype: torch.dtype, mesh: DeviceMesh, device: torch.device
    ) -> None:
        with torch.device("meta"):
            self.model = LlamaRewardModel(config, options.attention)
        cast_weights(self.model, options.optimizer)
        if options.compile:
            self.model.compile_blocks()
        parallel.shard(self.model, mesh, dtype, gather="step" if options.gather == "auto" else options.gather)
        parallel.materialize(self.model, mesh, device, drawn.weights(config, options.seed, device).rows)
        self.updater = Updater(self.model, options, padded.SCHEDULE_STEPS, device)
        self.objective, self.sampling = prepare.objective_of(options), sampling_of(options)
        self.budget = Budget(options.tokens_per_batch, config.hidden_size)
        self.device = device

    def packs(self, batch: Groups, without: str = "") -> list[Pack]:
        """The trainer's packs of a global batch, or its packs without one of LEVERS."""
        unshared = mock.patch.object(packing, "common_prefix", return_value=0)
        with unshared if without == "sharing" else contextlib.nullcontext():
            plan = [[group] for group in batch] if without == "packing" else plan_packs(batch, self.budget, 1)
            packs = [build_pack(groups, self.sampling, 0) for groups in plan]
        return [reading_all_rows(pack) for pack in packs] if without == "read rows" else packs

    def accumulate(self, packs: list[Pack], n_pairs: int, without: str = "") -> objectives.Statistics:
        for layer in self.model.model.layers:
            assert isinstance(layer, llama.Block)
            layer.recompute = RECOMPUTING.get(without, "none")
        with contextlib.ExitStack() as removed:
            if without == "fused loss":
                removed.enter_context(mock.patch.object(objectives, "contrastive_loss", naive_loss))
            plain = {"fused RoPE": ("rotary",), "Triton": ("contrastive", "gather", "rotary")}
            for operator in plain.get(without, ()):
                module = importlib.import_module(f"gcrm_kernels.{operator}")
                removed.enter_context(mock.patch.object(module, "use_triton", new=never))
            if without == "Triton":
                # Plain PyTorch, which torch.compile can fuse; our operators it cannot.
                removed.enter_context(mock.patch.object(llama, "rms_norm", new=plain_rms_norm))
                removed.enter_context(mock.patch.object(llama, "swiglu", new=reference.swiglu))
            return train.accumulate(self.model, packs, n_pairs, self.objective, self.device)

    def step(self, packs: list[Pack], n_pairs: int, without: str = "") -> None:
        self.updater.update(0, self.accumulate(packs, n_pairs, without)["loss"])


def sampling_of(options: TrainConfig) -> Sampling:
    return Sampling(options.samples, options.objective_variant, options.negatives, options.seed, options.sampling)
