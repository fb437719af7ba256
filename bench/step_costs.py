"""Where the time of our training step goes: as packs grow and prompts are shared, and operator by operator."""

from typing import Any

import matplotlib
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import measure
import records
from gcrm_fast.data import packing
from gcrm_fast.data.packing import build_pack
from gcrm_fast.model.inputs import Pack
from our_step import Groups, Ours, flat, packed_work

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RANGES = ("FSDP::", "Optimizer.step")  # spans that cover kernels listed separately
SCALING_COLUMNS = ("what", "n", "tokens", "ms", "us/token", "pairs/s", "GFLOP/s", "peak MB")


def scaling(ours: Ours, seconds: float, largest: int) -> list[dict[str, Any]]:
    """Forward + backward of one pack as it grows, and as more pairs share a prompt."""
    config = ours.model.config
    cases: list[tuple[str, int, Groups]] = []
    pool = records.records("gsm8k_pairs", 256)
    sizes = [packing.group_size([pair]).tokens for pair in pool]
    for thousands in (1, 2, 4, 8, 16, 32):
        if thousands <= largest:
            count = int(np.searchsorted(np.cumsum(sizes), 1000 * thousands))
            cases.append(("tokens per pack (thousands)", thousands, [[pair] for pair in pool[:count]]))
    for prompt, completion in ((100, 225), (250, 80)):
        for n in (1, 2, 4, 8, 16):
            pairs = [records.random_pair(i, i // n, prompt, completion, completion) for i in range(16)]
            what = f"pairs sharing a prompt of {prompt}, completions of {completion}"
            cases.append((what, n, [pairs[i : i + n] for i in range(0, 16, n)]))
    rows = []
    for what, n, groups in cases:
        pack = build_pack(groups, ours.sampling, 0)

        def step(pack: Pack = pack) -> None:
            ours.accumulate([pack], pack.n_pairs)
            ours.model.zero_grad()

        spent = measure.times({"step": step}, ours.device, seconds)["step"][0] / 1000
        work = packed_work(config, [pack])
        rows.append(
            {
                "what": what,
                "n": n,
                "tokens": work.tokens,
                "ms": 1000 * spent,
                "us/token": 1e6 * spent / work.tokens,
                "pairs/s": pack.n_pairs / spent,
                "GFLOP/s": work.flops / spent / 1e9,
                "peak MB": measure.peak_memory(step, ours.device) / 1e6,
            }
        )
        print(measure.table(rows[-1:], SCALING_COLUMNS), flush=True)
    return rows


# ----------------------------------------------------------------------------------------------------------- profile


def profiled(ours: Ours, batch: Groups) -> list[dict[str, Any]]:
    """The operators (CPU) or kernels (CUDA) of one step of ours, sorted by self time."""
    cuda = ours.device.type == "cuda"
    ours.step(ours.packs(batch), len(flat(batch)))
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as recorded:
        ours.step(ours.packs(batch), len(flat(batch)))
        measure.now(ours.device)
    spent: dict[str, list[float]] = {}
    for event in recorded.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        if on_gpu == cuda and time > 0 and not event.key.startswith(RANGES):
            spent.setdefault(event.key, [0.0, 0.0])
            spent[event.key][0] += time
            spent[event.key][1] += event.count
    total = sum(time for time, _ in spent.values())
    rows = [
        {"kernel": name[:90], "ms": time / 1000, "%": 100 * time / total, "calls": int(calls)}
        for name, (time, calls) in spent.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


FUSED_KERNELS = (
    "_add_rows_kernel",
    *(f"_{op}_{way}_kernel" for op in ("contrastive", "rms_norm", "swiglu") for way in ("forward", "backward")),
)


def missing_kernels(rows: list[dict[str, Any]]) -> list[str]:
    """Our kernels that are missing from a GPU profile."""
    names = {row["kernel"] for row in rows}
    return [kernel for kernel in FUSED_KERNELS if kernel not in names]


def plot_scaling(rows: list[dict[str, Any]], path: str, title: str) -> None:
    """Time per token by tokens per pack, pairs/s by pairs per prompt."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        by_size = what.startswith("tokens")
        axis, column = (axes[0], "us/token") if by_size else (axes[1], "pairs/s")
        axis.plot([row["n"] for row in mine], [row[column] for row in mine], "o-", label=what)
        axis.set(xscale="log", xlabel=what if by_size else "pairs sharing a prompt", ylabel=column)
    for axis in axes:
        axis.set_ylim(bottom=0)  # last: it also fixes the upper limit
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
