"""The contrastive loss against other implementations, in one process on the same inputs.

    python bench/contrastive_loss.py [--quick]

naive     PyTorch as people write it: index, cosine_similarity on the broadcast [N, S, S, H], sigmoid, mean, log
compiled  the same under torch.compile
bmm       gather, normalize, batched matrix product
ours      gcrm_kernels.goal_contrastive_loss
fused     on a GPU, with a projection, forward only: bench/fused_projection.py

Each runs from all tokens [T, H] (512 per pair) and from the compact rows that are read. The form is the released one
(grid, mean_then_log), the most expensive. Losses and gradients are compared first; if they differ, nothing is timed.
Extra memory is the peak of a call minus its inputs and the gradients that it returns. Compulsory bytes: each distinct
row read in the forward and in the backward, each gradient row written once. Then the dense loss, and the share of a
training step.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

import drawn
import measure
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.training.objectives import ranking_loss
from gcrm_kernels import RowTiles, dense_contrastive_loss, goal_contrastive_loss
from gcrm_kernels.launch import use_triton
from gcrm_kernels.reference import unit_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOKENS_PER_PAIR = 512
TARGET_CASE = (8, 16, 4096, 0)  # N, S, H, D of the summary line on a CPU; on a GPU N is 512
COLUMNS = (
    "input",
    "N",
    "S",
    "H",
    "D",
    "method",
    "forward ms",
    "forward+backward ms",
    "p10",
    "p90",
    "graph ms",
    "x naive",
    "extra MB",
    "compulsory MB",
    "GB/s",
    "% of copy",
    "launches",
)

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (states [R, H], rows [4, N, S], projection) -> loss [N]


@dataclass(frozen=True)
class Case:
    """Inputs of one comparison."""

    source: str
    hidden: Tensor
    rows: Tensor
    tiles: RowTiles
    projection: Tensor | None

    @property
    def key(self) -> tuple[int, int, int, int]:
        """N, S, H, D"""
        _, n, s = self.rows.shape
        return n, s, self.hidden.shape[1], 0 if self.projection is None else len(self.projection)

    def compulsory_bytes(self) -> int:
        distinct, (rows, width) = len(self.rows.unique()), self.hidden.shape
        return (2 * distinct + rows) * width * self.hidden.itemsize


# ------------------------------------------------------------------------------------------------------ the contestants


def project(x: Tensor, w: Tensor | None) -> Tensor:
    return x if w is None else torch.nn.functional.linear(x, w)


def naive(hidden: Tensor, rows: Tensor, w: Tensor | None) -> Tensor:
    a, b, m, n = (project(hidden[index], w) for index in rows)
    positive = torch.cosine_similarity(a.unsqueeze(2), b.unsqueeze(1), dim=-1)
    negative = torch.cosine_similarity(m.unsqueeze(2), n.unsqueeze(1), dim=-1)
    return -torch.log(torch.sigmoid(positive).mean((1, 2))) - torch.log(1 - torch.sigmoid(negative).mean((1, 2)))


def bmm(hidden: Tensor, rows: Tensor, w: Tensor | None) -> Tensor:
    a, b, m, n = unit_rows(project(hidden[rows.flatten()], w)).unflatten(0, rows.shape)
    positive, negative = torch.sigmoid(a @ b.mT).mean((1, 2)), torch.sigmoid(m @ n.mT).mean((1, 2))
    return -torch.log(positive) - torch.log(1 - negative)


def ours(case: Case) -> Loss:
    has_positive = torch.ones(case.rows.shape[1], dtype=torch.bool, device=case.hidden.device)

    def loss(hidden: Tensor, rows: Tensor, w: Tensor | None) -> Tensor:
        a, b, m, n = rows
        return goal_contrastive_loss(
            hidden,
            *(a, b, m, n),
            w,
            has_positive_N=has_positive,
            pairing="grid",
            reduce="mean_then_log",
            tiles=case.tiles,
        )[0]

    return loss


# ------------------------------------------------------------------------------------------------------------ one case


def cases(n: int, s: int, h: int, d: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The same samples from all tokens and from compact rows; a pair's first half is chosen, the second rejected."""
    generator = torch.Generator().manual_seed(0)
    half = TOKENS_PER_PAIR // 2
    offset = torch.tensor([0, 0, 0, half])[:, None, None] + TOKENS_PER_PAIR * torch.arange(n)[:, None]
    rows = torch.randint(half, (4, n, s), generator=generator) + offset
    on_device = torch.Generator(device).manual_seed(0)  # a CPU would take 10 s for the largest case
    projection = None if d == 0 else (torch.randn(d, h, generator=on_device, device=device) / h**0.5).to(dtype)
    hidden = torch.randn(n * TOKENS_PER_PAIR, h, generator=on_device, device=device).to(dtype)
    distinct, compact = rows.unique(return_inverse=True)
    for source, states, index in (("tokens", hidden, rows), ("rows", hidden[distinct.to(device)], compact)):
        tiles = RowTiles(*(t.to(device) for t in RowTiles.of(index.numpy(), len(states))))
        yield Case(source, states, index.to(device), tiles, projection)


def step(loss: Loss, case: Case, grad: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients, forward and backward."""
    leaves = [x.detach().requires_grad_() for x in (case.hidden, case.projection) if x is not None]
    value = loss(leaves[0], case.rows, leaves[1] if len(leaves) > 1 else None)
    return (value, *torch.autograd.grad(value, leaves, grad.to(value.dtype)))


def agrees(name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Within 1e-4 of the largest element (2e-2 for 16 bits: the naive forms round every intermediate)."""
    tolerance = 1e-4 if expected[-1].dtype == torch.float32 else 2e-2
    errors = [
        ((f.float() - e.float()).abs().max() / e.float().abs().max()).item()
        for f, e in zip(found, expected, strict=True)
    ]
    if max(errors) <= tolerance:
        return True
    print(f"{name}: relative errors of loss and gradients {errors} exceed {tolerance}: not timed", file=sys.stderr)
    return False


def compare(case: Case, bandwidth: float, seconds: float) -> list[dict[str, Any]]:
    """Rows of the table for one case. A method that cannot run is listed with its reason."""
    n, s, h, d = case.key
    device = case.hidden.device
    torch.compiler.reset()
    methods: dict[str, Loss] = {"naive": naive, "compiled": torch.compile(naive), "bmm": bmm, "ours": ours(case)}
    # Without the loss scaling of float16 training its gradients are subnormal.
    grad = (torch.rand(n, device=device) + 0.5) * (2**12 if case.hidden.dtype == torch.float16 else 1)
    notes = unable(methods, case, grad)
    calls = {name: partial(step, f, case, grad) for name, f in methods.items() if name not in notes}
    both = measure.times(calls, device, seconds)
    forward = measure.times({name: partial(forward_only, methods[name], case) for name in calls}, device, seconds)
    head = {"input": case.source, "N": n, "S": s, "H": h, "D": d, "dtype": str(case.hidden.dtype)[6:]}
    rows = [{**head, "method": name, "note": note} for name, note in notes.items()]
    returned = case.hidden.nbytes + (0 if case.projection is None else case.projection.nbytes)
    for name, call in calls.items():
        rate = case.compulsory_bytes() / (both[name][0] / 1000)
        rows.append(
            {
                **head,
                "method": name,
                "forward ms": forward[name][0],
                "forward+backward ms": both[name][0],
                "p10": both[name][1],
                "p90": both[name][2],
                "graph ms": measure.graph_time(call) if device.type == "cuda" else None,
                "x naive": both["naive"][0] / both[name][0] if "naive" in both else None,
                "extra MB": (measure.peak_memory(call, device) - returned) / 1e6,
                "compulsory MB": case.compulsory_bytes() / 1e6,
                "GB/s": rate / 1e9,
                "% of copy": 100 * rate / bandwidth,
                "launches": measure.launches(call) if device.type == "cuda" else None,
            }
        )
    if case.projection is not None and use_triton(case.hidden):
        rows.append({**head, "method": "fused", "forward ms": fused_time(case, seconds)})
    return rows


def unable(methods: dict[str, Loss], case: Case, grad: Tensor) -> dict[str, str]:
    """Why each method that cannot run here cannot, by name. Exits if a method gives a different loss or gradients."""
    n, s, h, d = case.key
    needed = 10 * n * s * s * (d or h) * case.hidden.itemsize  # broadcast operands, products and their gradients
    notes = {}
    if needed > free_memory(case.hidden.device):
        notes = dict.fromkeys(("naive", "compiled"), f"needs about {needed / 2**30:.0f} GiB")
    projection = None if case.projection is None else case.projection.float()
    exact = step(bmm, replace(case, hidden=case.hidden.float(), projection=projection), grad)
    for name in [name for name in methods if name not in notes]:
        try:
            found = step(methods[name], case, grad)
        except torch.OutOfMemoryError:
            notes[name] = "out of memory"
            continue
        except Exception as error:  # torch.compile needs a C++ compiler on a CPU
            if name != "compiled":
                raise
            notes[name] = f"failed: {str(error).splitlines()[0][:80]}"
            continue
        if not agrees(name, found, tuple(e.to(f.dtype) for e, f in zip(exact, found, strict=True))):
            sys.exit(1)
    return notes


def fused_time(case: Case, seconds: float) -> float:
    """Milliseconds of the forward with a fused projection, after it agrees with the separate one."""
    from fused_projection import fused_forward  # needs triton

    assert case.projection is not None
    hidden, rows, w = case.hidden, case.rows, case.projection
    if not agrees("fused", (fused_forward(hidden, rows, w),), (ours(case)(hidden, rows, w),)):
        sys.exit(1)
    timed = {"fused": lambda: fused_forward(hidden, rows, w)}
    return measure.times(timed, hidden.device, seconds)["fused"][0]


@torch.no_grad()
def forward_only(loss: Loss, case: Case) -> Tensor:
    return loss(case.hidden, case.rows, case.projection)


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------------------------------- dense loss


def naive_dense(states: Tensor, lengths: list[int]) -> Tensor:
    """The loss over all positions as people write it: broadcast cosines of every pair of positions."""
    losses = []
    chosen_rejected = states.split(lengths)
    for chosen, rejected in zip(chosen_rejected[::2], chosen_rejected[1::2], strict=True):
        i, j = torch.triu_indices(len(chosen), len(chosen), offset=1, device=states.device)
        positive = torch.cosine_similarity(chosen[:, None], chosen[None], dim=-1)[i, j]
        negative = torch.cosine_similarity(chosen[:, None], rejected[None], dim=-1)
        log_sigmoid = torch.nn.functional.logsigmoid
        losses.append(-log_sigmoid(positive).mean() - log_sigmoid(-negative).mean())
    return torch.stack(losses)


def matmul_dense(states: Tensor, lengths: list[int]) -> Tensor:
    """The same with unit vectors and matrix products: only the cosines are materialized."""
    losses = []
    chosen_rejected = unit_rows(states).split(lengths)
    for chosen, rejected in zip(chosen_rejected[::2], chosen_rejected[1::2], strict=True):
        i, j = torch.triu_indices(len(chosen), len(chosen), offset=1, device=states.device)
        log_sigmoid = torch.nn.functional.logsigmoid
        losses.append(-log_sigmoid((chosen @ chosen.mT)[i, j]).mean() - log_sigmoid(-(chosen @ rejected.mT)).mean())
    return torch.stack(losses)


def compare_dense(n: int, length: int, h: int, device: torch.device, dtype: torch.dtype, seconds: float) -> list[dict]:
    """n pairs of two completions of ``length`` tokens each."""
    lengths = [length] * (2 * n)
    cu_seqlens = torch.arange(2 * n + 1, dtype=torch.int32, device=device) * length
    hidden = torch.randn(2 * n * length, h, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    methods: dict[str, Callable[[Tensor], Tensor]] = {
        "naive": lambda x: naive_dense(x, lengths),
        "bmm": lambda x: matmul_dense(x, lengths),
        "ours": lambda x: dense_contrastive_loss(x, cu_seqlens, 2 * length)[0],
    }

    def run(method: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x = hidden.detach().requires_grad_()
        value = method(x)
        return value, torch.autograd.grad(value.sum(), x)[0]

    expected = run(methods["bmm"])
    if not all(agrees(f"dense {name}", run(f), expected) for name, f in methods.items()):
        sys.exit(1)
    both = measure.times({name: partial(run, f) for name, f in methods.items()}, device, seconds)
    return [
        {
            "input": f"dense {length}+{length}",
            "N": n,
            "H": h,
            "D": 0,
            "method": name,
            "dtype": str(dtype)[6:],
            "forward+backward ms": both[name][0],
            "p10": both[name][1],
            "p90": both[name][2],
            "x naive": both["naive"][0] / both[name][0],
            "extra MB": (measure.peak_memory(partial(run, f), device) - hidden.nbytes) / 1e6,
        }
        for name, f in methods.items()
    ]


# ------------------------------------------------------------------------------------------- share of a training step


def step_model(device: torch.device) -> ModelConfig:
    """Llama 3.2 1B's shape on a GPU, a small model elsewhere."""
    if device.type == "cuda":
        return ModelConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
        )
    return ModelConfig(
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    )


def share_of_step(device: torch.device, dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    """Time of the contrastive loss, forward and backward, as a share of a step without it plus that time."""
    config = step_model(device)
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(32 if device.type == "cuda" else 8):
        prompt, chosen, rejected = (rng.integers(3, 32000, size=k).astype(np.int32) for k in (100, 200, 180))
        pairs.append(
            TokenizedPair(
                pair_id=i,
                chosen_ids=np.r_[prompt, chosen],
                rejected_ids=np.r_[prompt, rejected],
                chosen_start=100,
                rejected_start=100,
                prompt_key=i,
            )
        )
    pack = build_pack([[pair] for pair in pairs], Sampling(variant="repo"), 0).to(device)
    model = drawn.network(config, 0, device, dtype)
    z_RD = model(pack).z_RD.detach()
    case = Case("step", z_RD, pack.pairs.samples_4NS, pack.pairs.samples_tiles, None)
    grad = torch.ones(len(pairs), device=device)

    def without_loss() -> None:
        output = model(pack)
        (ranking_loss(output.reward_2N, pack.pairs.margin_N).sum() + 0.0 * output.z_RD.float().sum()).backward()

    methods: dict[str, Loss] = {"naive": naive, "ours": ours(case)}
    calls: dict[str, Callable[[], object]] = {name: partial(step, f, case, grad) for name, f in methods.items()}
    spent = measure.times({"step": without_loss, **calls}, device, seconds)
    return [
        {
            "input": "share of step",
            "N": len(pairs),
            "S": case.rows.shape[2],
            "H": config.hidden_size,
            "method": name,
            "forward+backward ms": spent[name][0],
            "step without it ms": spent["step"][0],
            "share %": 100 * spent[name][0] / (spent["step"][0] + spent[name][0]),
        }
        for name in methods
    ]


# ------------------------------------------------------------------------------------------------------------- output


def plot(rows: list[dict[str, Any]], path: str, title: str) -> None:
    """Time and extra memory against compulsory bytes without projection, one line per method and input form."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for source, style in (("tokens", "--"), ("rows", "-")):
        for method, color in zip(("naive", "compiled", "bmm", "ours"), ("C3", "C1", "C0", "C2"), strict=True):
            mine = [r for r in rows if (r["input"], r["method"], r.get("D")) == (source, method, 0) and r.get("GB/s")]
            mine.sort(key=lambda r: r["compulsory MB"])
            label = f"{method}, from {'all tokens' if source == 'tokens' else 'read rows'}"
            for axis, column in zip(axes, ("forward+backward ms", "extra MB"), strict=True):
                axis.plot(
                    [r["compulsory MB"] for r in mine],
                    [r[column] for r in mine],
                    style,
                    color=color,
                    marker=".",
                    label=label,
                )
    for axis, label in zip(axes, ("forward + backward, ms", "extra memory, MB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="compulsory bytes, MB", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def verdict(rows: list[dict[str, Any]], key: tuple[int, int, int, int]) -> str:
    """One line about the case ``key``: how many times faster and leaner than naive."""
    parts = []
    for source, name in (("tokens", "all tokens"), ("rows", "read rows")):
        found = {
            r["method"]: r
            for r in rows
            if r["input"] == source and (r["N"], r["S"], r["H"], r["D"]) == key and r.get("GB/s")
        }
        if "ours" in found and "naive" in found:
            mine = found["ours"]
            parts.append(
                f"{mine['x naive']:.1f} times as fast as naive from {name}, with "
                f"1/{found['naive']['extra MB'] / mine['extra MB']:.0f} of the extra memory"
            )
    n, s, h, d = key
    case = f"N={n} S={s} H={h} D={d or 'none'}"
    return f"{case}: ours is {'; '.join(parts)}" if parts else f"{case}: no verdict, naive did not run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small cases, for a CPU (several minutes)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="dtype of the states; default: bfloat16 on CUDA, else float32",
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    where = measure.environment(device)
    bandwidth = measure.copy_bandwidth(device)
    print(", ".join(f"{k} {v}" for k, v in where.items()), f"{dtype}, copy {bandwidth / 1e9:.1f} GB/s", sep=", ")
    seconds = 1.0 if options.quick else 2.0
    sizes = [(1, 8, 2048, 0), (8, 16, 2048, 0), (8, 16, 2048, 256), (8, 32, 4096, 0), TARGET_CASE]
    if not options.quick:
        sizes = list(product((1, 8, 32, 128, 512), (8, 16, 32), (2048, 4096), (0, 256)))
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for case in cases(*size, device, dtype):
            rows += compare(case, bandwidth, seconds)
    for n, length, h in [(4, 128, 2048)] if options.quick else [(4, 128, 2048), (32, 200, 4096)]:
        rows += compare_dense(n, length, h, device, dtype, seconds)
    shares = share_of_step(device, dtype, 5 * seconds)
    print(measure.table(rows, COLUMNS))
    for row in rows:
        if "note" in row:
            print(f"{row['input']} N={row['N']} S={row['S']} H={row['H']} D={row['D']} {row['method']}: {row['note']}")
    for row in shares:
        print(f"share of a training step (H {row['H']}, {row['N']} pairs): {row['method']} {row['share %']:.1f} %")
    stem = measure.record("contrastive_loss", rows + shares, where)
    plot(rows, f"{stem}.png", f"contrastive loss, {dtype}, {where['device']}, {where['date']}")
    print(f"written: {stem}.json, .csv, .png")
    print(verdict(rows, TARGET_CASE if device.type == "cpu" or options.quick else (512, *TARGET_CASE[1:])))


if __name__ == "__main__":
    main()
