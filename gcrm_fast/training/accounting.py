"""What a step costs: floating-point operations, the machine's peak, the speed of training.

Letters: T tokens of a pack, R read rows, H hidden size, F width of the MLP, L layers, Q and G width of all query heads
and of all key/value heads.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from gcrm_fast.model import heads
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.views import Views
from gcrm_fast.training.lora import Lora

T = TypeVar("T")

# Dense bfloat16 operations per second, from the data sheets; the longest matching name counts.
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


class Work(NamedTuple):
    """Totals over packs. Operations count a multiplication and an addition as two."""

    pairs: float
    tokens: float
    padded_tokens: float  # of the sequences of the same pairs, each padded to the longest of their pack
    model_flops: float  # forward and backward of what the packs hold, however it is computed
    extra_flops: float  # of recomputation in the backward


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


def work(
    pack: Pack, config: ModelConfig, recompute: str, trained_layers: int | None = None, lora: Lora | None = None
) -> Work:
    """What training the top ``trained_layers`` blocks (None: all) on ``pack`` takes. A backward pass counts twice the
    forward (Kaplan et al. 2020, section 2.1), of attention too: what flash attention computes again belongs to neither
    number. Blocks below have a forward only, and not even that where the pack brings their states. Under adapters the
    gradients of the linear layers' weights are not computed."""
    t, r, h = len(pack.input_ids_T), len(pack.read_rows_R), config.hidden_size
    products, layers = query_key_products(pack), trained_layers or config.num_hidden_layers
    trained = forward_flops(replace(config, num_hidden_layers=layers), t, products, r)
    below = forward_flops(config, t, products, r) - trained if pack.states_TH is None else 0
    omitted = 0
    if lora:
        omitted = trained - forward_flops(replace(config, num_hidden_layers=layers), 0, products, 0)
        trained += lora.flops(config, t, r)
    # One of the MLP's three products; the last of a recomputed part is not needed again.
    product = 2 * h * config.intermediate_size * ((layers - 1) * t + r)
    again = {"none": 0, "product": 0, "mlp": 2 * product, "block": trained - product}[recompute]
    compared = config.bottleneck_size if config.compare == "latents" else config.projection_size
    read = 2 * h * compared * r + 2 * pack.n_pairs * heads.KINDS[config.head].flops(config)
    predictions = pack.pairs.predictions
    predicted = 2 * h * config.vocab_size * len(predictions.tokens_M) if predictions is not None else 0
    views = len(pack.views.other_V) if pack.views is not None else 0
    read += views * Views.flops(h)
    flops = below + 3 * (trained + read) - omitted + 2 * predicted  # the lm_head's weights have no gradient
    sequences = pack.n_pairs * (1 if torch.equal(*pack.pairs.end_2N) else 2) + 2 * views  # one completion, or a pair
    return Work(pack.n_pairs, t, sequences * pack.max_seqlen_k, flops, again)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Operations per second that MFU and HFU refer to, and their source: the data sheet for bfloat16 on a known GPU,
    else the measured rate of a large matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [key for key in DATA_SHEET if all(word in name for word in key.split())]
        if known:
            return DATA_SHEET[max(known, key=len)], f"data sheet of {max(known, key=len)}"
    return matmul_rate(device, dtype), f"measured, {str(dtype).removeprefix('torch.')} matrix product"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of six large square matrix products."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)  # a GPU is faster on equal numbers
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
    """Maximum bytes in use so far: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
    """Speed of training since the last reading, over all ranks."""

    def __init__(
        self,
        config: ModelConfig,
        recompute: str,
        trained_layers: int,
        lora: Lora | None,
        device: torch.device,
        peak: float,
    ) -> None:
        self.device, self.peak = device, peak
        self.settings = config, recompute, trained_layers, lora
        self.restart()

    def restart(self) -> None:
        self.started, self.waited = time.perf_counter(), 0.0
        self.done = Work(0, 0, 0, 0, 0)

    def fetch(self, steps: Iterator[T]) -> T:
        """The next of ``steps``; the time that this takes counts as waiting for data."""
        start = time.perf_counter()
        step = next(steps)
        self.waited += time.perf_counter() - start
        return step

    def add(self, packs: Sequence[Pack]) -> None:
        """Counts packs that were run."""
        for pack in packs:
            self.done = Work(*(a + b for a, b in zip(self.done, work(pack, *self.settings), strict=True)))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Skips time that is not training; work still queued on the device counts."""
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
