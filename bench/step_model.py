"""What a training step must compute and move, and what a GPU's data sheet would then allow: a model, not a measurement.

    python bench/step_model.py [--model 1b 8b] [--tokens-per-batch 16384] [--tflops 989] [--bandwidth 4.8]

The trainer's model runs forward and backward on a pack of equal pairs, on tensors without content, in bfloat16 and as
on a GPU: our kernels are one operator each. Every operator counts the bytes of the tensors that it reads and writes,
views none; matrix products count 2 m k n, attention the products that its mask leaves (accounting.py). Each operator
takes the longer of computing at --tflops and moving at --bandwidth (defaults: one H200), one after the other. The
optimizer moves its 28 bytes a parameter (float32 AdamW: weight, gradient and moments read, all but the gradient
written), once for --global-batch pairs. Left out: the losses, FSDP's copies and communication, launches.
"""

import argparse
from collections import defaultdict
from typing import Any
from unittest import mock

import measure
import records
import torch
from our_step import MODELS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.model.inputs import Pack, mapped
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.training import accounting

SHAPES = ((100, 225), (250, 80))  # tokens of prompt and of each completion
MATMUL, ATTENTION, KERNELS, REST, OPTIMIZER = "matrix products", "attention", "our kernels", "RoPE and others", "AdamW"
COLUMNS = ("model", "prompt/completion", "part", "TFLOP/pair", "GB/pair", "ms/pair", "% of step")


class Counter(TorchDispatchMode):
    """Operations, bytes and seconds of the operators that run under it, by part."""

    def __init__(self, flops: float, bandwidth: float, attention: float) -> None:
        """``attention``: operations of one layer's attention forward."""
        super().__init__()
        self.peak, self.bandwidth, self.attention = flops, bandwidth, attention
        self.totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves(args) if isinstance(x, Tensor)]  # what ``out=`` names is only written
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


def pack_of(prompt: int, completion: int, tokens: int) -> Pack:
    """As many pairs with prompts of their own as ``tokens`` hold."""
    count = max(tokens // (prompt + 2 * completion), 1)
    pairs = [records.random_pair(i, i, prompt, completion, completion) for i in range(count)]
    return build_pack([[pair] for pair in pairs], Sampling(), 0)


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
            reward_2N, z_RD = model(axis)
            torch.autograd.backward((reward_2N, z_RD), (torch.ones_like(reward_2N), torch.ones_like(z_RD)))
    return counter


def rows_of(name: str, prompt: int, completion: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    config, pack = MODELS[name], pack_of(prompt, completion, options.tokens_per_batch)
    counter = count(config, pack, 1e12 * options.tflops, 1e12 * options.bandwidth)
    counter.add(OPTIMIZER, 0.0, 28.0 * config.parameters() * pack.n_pairs / options.global_batch)
    seconds = sum(total[2] for total in counter.totals.values())
    about = {"model": name, "prompt/completion": f"{prompt}/{completion}"}
    parts = [{**about, "part": part, "TFLOP/pair": work / pack.n_pairs / 1e12, "GB/pair": moved / pack.n_pairs / 1e9,
              "ms/pair": 1000 * spent / pack.n_pairs, "% of step": 100 * spent / seconds}
             for part, (work, moved, spent) in counter.totals.items()]  # fmt: skip
    model_flops = accounting.work(pack, config, "none").model_flops
    mfu = 100 * model_flops / seconds / 1e12 / options.tflops
    print(f"{name}, {prompt}/{completion}: at most {pack.n_pairs / seconds:.0f} pairs/s, MFU {mfu:.0f}%; with matrix "
          f"products alone {1e12 * options.tflops * pack.n_pairs / model_flops:.0f} pairs/s")  # fmt: skip
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["1b", "8b"], help="default: 1b 8b")
    parser.add_argument("--tokens-per-batch", type=int, default=16384, help="of a pack, default: 16384")
    parser.add_argument("--global-batch", type=int, default=64, help="pairs an optimizer step, default: 64")
    parser.add_argument("--tflops", type=float, default=accounting.DATA_SHEET["H200"] / 1e12,
                        help="bfloat16 matrix products, default: H200's")  # fmt: skip
    parser.add_argument("--bandwidth", type=float, default=4.8, help="of memory in TB/s, default: H200's 4.8")
    options = parser.parse_args()
    rows = [row for name in options.model for shape in SHAPES for row in rows_of(name, *shape, options)]
    print(measure.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
