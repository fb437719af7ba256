"""What a step costs: floating-point operations, the machine's peak, and the memory that training takes.

Letters: T tokens of a pack, K gathered key rows, R read rows, H hidden size, F width of the MLP, L layers, Q and G
width of all query heads and of all key/value heads.
"""

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from gcrm_fast.common import processes
from gcrm_fast.model import heads
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.llama import ModelConfig

T = TypeVar("T")

# Dense bfloat16 operations a second, from the makers' data sheets; the longest name that fits counts.
DATA_SHEET = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "MI300X": 1307e12,
}

# Bytes a parameter: weights, gradient, two moments.
OPTIMIZER_BYTES = {"adamw": 16.0, "adamw-bf16": 8.0, "adamw-8bit": 10.1}
GRADIENT_BYTES = {"adamw": 4.0, "adamw-bf16": 2.0, "adamw-8bit": 4.0}  # of these
# (recomputation, when weights are gathered), fastest first: on one H100 at the 1b shape the product is some 2% of a
# step, gathering for every pack 7%, the MLP 15%.
PLANS = (
    ("none", "step"),
    ("product", "step"),
    ("none", "block"),
    ("product", "block"),
    ("mlp", "step"),
    ("mlp", "block"),
    ("block", "step"),
    ("block", "block"),
)


class Work(NamedTuple):
    """Totals over packs. Operations count a multiplication and an addition as two."""

    pairs: float
    tokens: float
    padded_tokens: float  # of the same pairs, two sequences each, padded to the longest of their pack
    model_flops: float  # forward and backward of what the packs hold, however it is computed
    extra_flops: float  # what is computed again in the backward


def forward_flops(config: ModelConfig, tokens: int, products: int, read_rows: int) -> int:
    """Of the trunk: linear layers for ``tokens``, the last layer's output projection and MLP for ``read_rows``,
    attention for ``products`` query-key products that the causal mask leaves."""
    h, layers = config.hidden_size, config.num_hidden_layers
    q, g = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    projections, tail = 2 * h * (q + 2 * g), 2 * h * (q + 3 * config.intermediate_size)
    return layers * (projections * tokens + 4 * q * products) + tail * ((layers - 1) * tokens + read_rows)


def query_key_products(pack: Pack) -> int:
    """Of one attention head: the pairs of a query and a key that the causal mask leaves."""
    q_B, k_B = pack.cu_seqlens_q.diff().long(), pack.cu_seqlens_k.diff().long()
    return int((q_B * k_B - q_B * (q_B - 1) // 2).sum())


def work(pack: Pack, config: ModelConfig, recompute: str) -> Work:
    """What training on ``pack`` takes. A backward pass counts twice the forward (Kaplan et al. 2020, section 2.1), of
    attention too: what flash attention computes again belongs to neither number."""
    t, r, h = len(pack.input_ids_T), len(pack.read_rows_R), config.hidden_size
    forward = forward_flops(config, t, query_key_products(pack), r)
    # One of the MLP's three products; the last of a recomputed part is not needed again.
    product = 2 * h * config.intermediate_size * ((config.num_hidden_layers - 1) * t + r)
    again = {"none": 0, "product": 0, "mlp": 2 * product, "block": forward - product}[recompute]
    read = 2 * h * config.projection_size * r + 2 * pack.n_pairs * heads.KINDS[config.head].flops(h)
    return Work(pack.n_pairs, t, 2 * pack.n_pairs * pack.max_seqlen_k, 3 * (forward + read), again)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Operations a second that MFU and HFU refer to, and where the number is from: the data sheet for bfloat16 on a
    known GPU, else what a large matrix product reaches here and now."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [key for key in DATA_SHEET if all(word in name for word in key.split())]
        if known:
            return DATA_SHEET[max(known, key=len)], f"data sheet of {max(known, key=len)}"
    return matmul_rate(device, dtype), f"measured, {str(dtype).removeprefix('torch.')} matrix product"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of six large square matrix products."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)  # a GPU is faster on numbers that are all alike
    best = float("inf")
    for _ in range(6):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use so far: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_limit(device: torch.device) -> int:
    """Bytes that this process may count on: free memory of the GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    local = processes.local_world_size()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local


class Meter:
    """Speed of training since the last reading, over all ranks."""

    def __init__(self, config: ModelConfig, recompute: str, device: torch.device, peak: float) -> None:
        self.config, self.recompute, self.device, self.peak = config, recompute, device, peak
        self.restart()

    def restart(self) -> None:
        self.started, self.waited = time.perf_counter(), 0.0
        self.done = Work(0, 0, 0, 0, 0)

    def fetch(self, steps: Iterator[T]) -> T:
        """The next of ``steps``; the time until it is there counts as waiting for data."""
        start = time.perf_counter()
        step = next(steps)
        self.waited += time.perf_counter() - start
        return step

    def add(self, packs: Sequence[Pack]) -> None:
        """Counts packs that were run."""
        for pack in packs:
            self.done = Work(*(a + b for a, b in zip(self.done, work(pack, self.config, self.recompute), strict=True)))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out time that is not training; what the device still has to do is."""
        _synchronize(self.device)
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """A row for the log, the same on every rank; starts the next reading. All ranks must call it."""
        seconds = time.perf_counter() - self.started
        totals = torch.tensor([*self.done, self.waited], dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        *done, waited = totals.tolist()
        total, ranks = Work(*done), dist.get_world_size()
        row = {
            "pairs_per_s": total.pairs / seconds,
            "tokens_per_s": total.tokens / seconds,
            "padded_equivalent_tokens_per_s": total.padded_tokens / seconds,
            "mfu": total.model_flops / (seconds * self.peak * ranks),
            "hfu": (total.model_flops + total.extra_flops) / (seconds * self.peak * ranks),
            "data_wait": waited / (seconds * ranks),
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        self.restart()
        return row


def kept_for_backward(
    config: ModelConfig, tokens: int, keys: int, read_rows: int, recompute: str, width: int, kernels: bool
) -> int:
    """Bytes of activations that L layers keep until their backward, ``width`` bytes per element; the last one's MLP
    runs at the read rows alone. ``kernels``: whether the Triton kernels run, without which SwiGLU keeps silu(gate)."""
    h, f = config.hidden_size, config.intermediate_size
    q, g = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # The block's input and its norm, queries, output; gathered keys and values.
    attention = tokens * (2 * h + 2 * q) + keys * 2 * g
    if config.family.qk_norm:  # queries and keys before it
        attention += tokens * (q + g)
    # Residual and its norm; gate, up and their product.
    mlp = {"none": 2 * h + (3 if kernels else 4) * f, "product": 2 * h + 2 * f, "mlp": 2 * h}
    layers = config.num_hidden_layers
    if recompute == "block":
        return layers * tokens * h * width
    return (layers * attention + ((layers - 1) * tokens + read_rows) * mlp[recompute]) * width


@dataclass(frozen=True)
class MemoryShape:
    """What the memory of one process depends on, beside what is recomputed."""

    config: ModelConfig
    tokens: int  # of the largest pack
    keys: int
    read_rows: int
    optimizer: str
    width: int  # bytes of an activation's element
    kernels: bool  # Triton's
    world_size: int
    several_packs: bool  # a step


def predicted_memory(shape: MemoryShape, recompute: str, gather: str) -> int:
    """Bytes of tensors of one process at its peak, in the backward of the largest pack.

    Sharded weights and moments; weights whole, of the largest parts or with ``gather`` ``step`` of all; and either what
    the layers keep and what the backward of one block holds at a time, a recomputed part included, or, later, the
    sharded gradients, whichever is more. (One H100 at the 1b shape, 3 packs and 1 pack per step: 5% and 7% above what
    was measured.)
    """
    config, tokens, keys, width = shape.config, shape.tokens, shape.keys, shape.width
    h, f = config.hidden_size, config.intermediate_size
    block, embedding = config.parameters_per_layer(), config.vocab_size * h
    # What FSDP holds whole: weights in the compute dtype, and gradients of the root and of two blocks; and, until the
    # last pack of a step, all gradients in float32.
    largest = embedding + 2 * block
    sharded = config.parameters() / shape.world_size
    whole = (largest + (config.parameters() if gather == "step" else largest)) * width
    whole += 4 * config.parameters() if shape.several_packs else 0
    working = kept_for_backward(
        replace(config, num_hidden_layers=1), tokens, keys, tokens, "none", width, shape.kernels
    )
    working += tokens * (2 * h + 3 * f) * width  # gradients on their way
    kept = kept_for_backward(config, tokens, keys, shape.read_rows, recompute, width, shape.kernels)
    held = int(sharded * (OPTIMIZER_BYTES[shape.optimizer] - GRADIENT_BYTES[shape.optimizer]))
    return held + whole + max(kept + working, int(sharded * GRADIENT_BYTES[shape.optimizer]))


def choose_plan(limit: int, shape: MemoryShape, recompute: str = "auto", gather: str = "auto") -> tuple[str, str]:
    """The fastest of PLANS, with what is given instead of ``auto``, whose predicted memory stays within nine tenths of
    ``limit``; else the one that takes the least."""
    allowed = [plan for plan in PLANS if recompute in ("auto", plan[0]) and gather in ("auto", plan[1])]
    fitting = [plan for plan in allowed if predicted_memory(shape, *plan) < 0.9 * limit]
    return fitting[0] if fitting else allowed[-1]
