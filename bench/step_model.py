"""What a training step must compute and move, and the speed that a GPU would then allow: a model, not a measurement.

    python bench/step_model.py [--model 1b 8b] [--tokens-per-batch 16384] [--gather step|block] [--tflops 800]
                               [--bandwidth 3.0]

Runs the trainer's model forward and backward on packs of equal pairs, on tensors without content, in bfloat16 and as on
a GPU: each of our kernels is one operator. Every operator counts the bytes of the tensors that it reads and writes,
views none; matrix products count 2 m k n, attention the products inside its mask (accounting.py). Each operator takes
the longer of computing at --tflops and moving at --bandwidth, one after the other; the defaults are what one H100
measured (bench/results): a product of 8192 x 8192 matrices and a copy. Per --global-batch pairs the optimizer moves 28
bytes per parameter (float32 AdamW: weight, gradient and moments read, all but the gradient written); FSDP's copies are
those of one process. Not counted: the losses, gradient clipping, communication, launches.
"""

import argparse
import collections
from collections import defaultdict
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import measure
import records
from gcrm_fast.common.torch_compat import FakeTensorMode, TorchDispatchMode, tree_leaves
from gcrm_fast.data.batches import Budget, plan_packs
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.model.inputs import Pack, mapped
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.training import accounting
from our_step import MODELS

SHAPES = ((100, 225), (250, 80))  # tokens of prompt and of each completion
TOKENS = 16384  # of a pack
TFLOPS, TBPS = 800.0, 3.0  # of one H100 SXM: bfloat16 product of 8192 x 8192 matrices, copy
MATMUL, ATTENTION, KERNELS, REST, OPTIMIZER = "matrix products", "attention", "our kernels", "RoPE and others", "AdamW"
FSDP = "FSDP's copies"
# Bytes per parameter that FSDP2 moves on one process: bfloat16 weights and gradients, float32 shards and reduction.
GATHER = 6 + 4  # the shard cast to bfloat16, and copied to the whole weight: alone it has no all-gather to copy in for
CAST = 2 + 4  # the first pack's gradient, to which the others are added
ADD = 2 + 4 + 4  # a later pack's gradient: read, and the sum read and written
REDUCE = 4 + 4 + 8  # the sum copied into the buffer of the reduction, and from there to the shard
REDUCE_ONE = 2 + 4 + 8  # likewise the only pack's gradient, in bfloat16
COLUMNS = ("model", "prompt/completion", "part", "TFLOP/pair", "GB/pair", "ms/pair", "% of step")


class Counter(TorchDispatchMode):
    """Counts operations, bytes and seconds of the operators inside its block, by part."""

    def __init__(self, flops: float, bandwidth: float, attention: float) -> None:
        """``attention``: operations of one layer's attention forward."""
        super().__init__()
        self.peak, self.bandwidth, self.attention = flops, bandwidth, attention
        self.totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves(args) if isinstance(x, Tensor)]  # ``out=`` is only written
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if not func.is_view and func.namespace != "prim":
            part, work = self._part(func, inputs)
            self.add(part, work, sum(x.nbytes for x in inputs + outputs))
        return result

    def _part(self, func: Any, inputs: list[Tensor]) -> tuple[str, float]:
        name = func.name()
        if name in ("aten::mm", "aten::addmm", "aten::addmm.out"):
            a, b = inputs[-2:]
            return MATMUL, 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
        if name.startswith("gcrm::segment_attention"):
            return ATTENTION, self.attention * (2 if name.endswith("backward") else 1)
        return KERNELS if name.startswith("gcrm::") else REST, 0.0

    def add(self, part: str, work: float, moved: float) -> None:
        seconds = max(work / self.peak, moved / self.bandwidth)
        self.totals[part] = [a + b for a, b in zip(self.totals[part], (work, moved, seconds), strict=True)]

    @property
    def seconds(self) -> float:
        return sum(total[2] for total in self.totals.values())


def packs_of(config: ModelConfig, prompt: int, completion: int, pairs: int, tokens: int) -> list[Pack]:
    """The trainer's packs of this many pairs, each with its own prompt."""
    batch = [[records.random_pair(i, i, prompt, completion, completion)] for i in range(pairs)]
    return [build_pack(groups, Sampling(), 0) for groups in plan_packs(batch, Budget(tokens, config.hidden_size), 1)]


def count(config: ModelConfig, pack: Pack, flops: float, bandwidth: float) -> Counter:
    """Forward and backward of the trainer's model on the pack."""
    attention = accounting.forward_flops(config, 0, accounting.query_key_products(pack), 0)
    counter = Counter(flops, bandwidth, attention / config.num_hidden_layers)
    swiglu = mock.patch("gcrm_kernels.swiglu.use_triton", return_value=True)
    rotary = mock.patch("gcrm_kernels.rotary.use_triton", return_value=True)
    with FakeTensorMode() as mode, swiglu, rotary:
        model = LlamaRewardModel(config, "eager")
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        axis = mapped(pack, Tensor, mode.from_tensor)
        with counter:
            reward_2N, z_RD, *_ = model(axis)
            torch.autograd.backward((reward_2N, z_RD), (torch.ones_like(reward_2N), torch.ones_like(z_RD)))
    return counter


def fsdp_bytes(config: ModelConfig, packs: int, gather: str) -> float:
    """Bytes that FSDP moves in a step. Weights are gathered once, or with ``gather`` ``block`` for each pack: a
    block's for its forward and for its backward, the root's (here the embedding) for both together."""
    embedding = config.vocab_size * config.hidden_size
    blocks = config.parameters() - embedding
    gathered = embedding + blocks if gather == "step" else packs * (embedding + 2 * blocks)
    reduced = REDUCE_ONE if packs == 1 else CAST + (packs - 1) * ADD + REDUCE
    return GATHER * gathered + reduced * config.parameters()


def step(config: ModelConfig, packs: Sequence[Pack], flops: float, bandwidth: float, gather: str) -> Counter:
    """A whole optimizer step on packs of equal pairs."""
    whole = Counter(flops, bandwidth, 0.0)
    alike = {pack.n_pairs: pack for pack in packs}
    for n_pairs, times in collections.Counter(pack.n_pairs for pack in packs).items():
        for part, total in count(config, alike[n_pairs], flops, bandwidth).totals.items():
            whole.totals[part] = [a + times * b for a, b in zip(whole.totals[part], total, strict=True)]
    whole.add(FSDP, 0.0, fsdp_bytes(config, len(packs), gather))
    whole.add(OPTIMIZER, 0.0, 28.0 * config.parameters())
    return whole


def predicted_ms(
    config: ModelConfig, shape: tuple[int, int], pairs: int, tokens: int, tflops: float, tbps: float, gather: str
) -> float:
    """Milliseconds of a step on ``pairs`` of ``shape``, prompt and completion, in packs of at most ``tokens``."""
    packs = packs_of(config, *shape, pairs, tokens)
    return 1e3 * step(config, packs, 1e12 * tflops, 1e12 * tbps, gather).seconds


def rows_of(name: str, prompt: int, completion: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    config, pairs = MODELS[name], options.global_batch
    packs = packs_of(config, prompt, completion, pairs, options.tokens_per_batch)
    whole = step(config, packs, 1e12 * options.tflops, 1e12 * options.bandwidth, options.gather)
    about = {"model": name, "prompt/completion": f"{prompt}/{completion}"}
    parts = [
        {
            **about,
            "part": part,
            "TFLOP/pair": work / pairs / 1e12,
            "GB/pair": moved / pairs / 1e9,
            "ms/pair": 1000 * spent / pairs,
            "% of step": 100 * spent / whole.seconds,
        }
        for part, (work, moved, spent) in whole.totals.items()
    ]
    model_flops = sum(accounting.work(pack, config, "none").model_flops for pack in packs)
    mfu = 100 * model_flops / whole.seconds / 1e12 / options.tflops
    print(
        f"{name}, {prompt}/{completion}: {1e3 * whole.seconds:.0f} ms for {pairs} pairs in {len(packs)} packs, at most "
        f"{pairs / whole.seconds:.0f} pairs/s, {mfu:.0f}% of the matrix products' rate; with these alone "
        f"{1e12 * options.tflops * pairs / model_flops:.0f} pairs/s"
    )
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["1b", "8b"], help="default: 1b 8b")
    parser.add_argument("--tokens-per-batch", type=int, default=TOKENS, help=f"tokens per pack; default: {TOKENS}")
    parser.add_argument("--global-batch", type=int, default=64, help="pairs per optimizer step; default: 64")
    gather = "gather weights once per step, or for every pack; default: step"
    parser.add_argument("--gather", choices=("step", "block"), default="step", help=gather)
    parser.add_argument(
        "--tflops", type=float, default=TFLOPS, help=f"rate of matrix products; default: an H100's {TFLOPS:g}"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=TBPS, help=f"memory bandwidth in TB/s; default: an H100's {TBPS:g}"
    )
    options = parser.parse_args()
    rows = [row for name in options.model for shape in SHAPES for row in rows_of(name, *shape, options)]
    print(measure.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
