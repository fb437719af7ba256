"""The whole training step against what people run, in one process: how fast is it, and why?

    python bench/train_step.py [--model tiny|135m|1b|8b] [--dtype float32|bfloat16] [--quick] [--scaling] [--profile]

naive    transformers' LlamaForSequenceClassification on padded batches, two sequences per pair, ranking loss and a
         naive contrastive loss; 8 pairs per micro-batch with gradient checkpointing off and on, and sorted by length
         within the global batch at its best micro-batch
TRL      its RewardTrainer (ranking loss only), 8 pairs per micro-batch, as shipped and without checkpointing
ours     what gcrm_fast.train runs: packs, shared prefixes, read rows, fused contrastive loss, on a GPU Triton
         kernels; then with each of them removed, one at a time, with --recompute mlp and block, and with more
         pairs of one prompt in a step

Records, weights, global batches, AdamW and dtype are the same for all; TRL and naive share one model, ours is another.
bfloat16 means compute in bfloat16 over float32 weights (autocast there, FSDP's mixed precision here). First, loss and
gradients of naive and of every form of ours are compared, in float32 and in the timed dtype; if they differ in float32,
nothing is timed, and if they differ in 16 bits every row says so. Contestants take turns, so that other load on the
machine affects all of them. pairs/s: all pairs over the sum of each step's median time; p10 and p90 are of single
steps. "sequence tokens/s" counts both sequences of a pair without padding, the same for all; "computed/pair" is the
tokens that went through the layers, including padding. FLOPs are the model's for those tokens, with half
of causal attention and without recomputation. "% matmul" is relative to a large matrix product measured in the same
run. Peak memory is that of a step beyond weights and optimizer: gradients, activations, temporaries. All contestants
run with freed memory kept by glibc, as the trainer sets it, which helps the padded ones too.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

import measure
import padded
import records
from contestants import (
    NAIVE,
    OURS,
    PAIRS,
    TOLERANCE,
    TRL,
    TRL_SHIPPED,
    Contestant,
    attempt,
    check,
    our_contestants,
    padded_contestants,
    references,
    refuse,
)
from gcrm_fast import train
from gcrm_fast.data.batches import epoch_batches
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.training import accounting, memory, parallel, prepare
from gcrm_fast.training.config import TrainConfig
from our_step import MODELS, Groups, Ours, flat, sampling_of
from step_costs import SCALING_COLUMNS, missing_kernels, plot_scaling, profiled, scaling

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CHECKED_PAIRS = 4
COLUMNS = (
    "data",
    "method",
    "pairs/s",
    "p10",
    "p90",
    "x naive",
    "x TRL",
    "x TRL shipped",
    "sequence tokens/s",
    "computed/pair",
    "GFLOP/s",
    "% matmul",
    "MFU %",
    "peak MB",
)


# -------------------------------------------------------------------------------------------------------- the rounds


def race(contestants: list[Contestant], rounds: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for each contestant. They take turns; the machine's rate of matrix products is measured in every round."""
    rows: dict[str, dict[str, Any]] = {}
    for c in contestants:
        first = [[flat(c.batches[0])[:1]]]
        attempt(partial(c.run, first), device)  # creates optimizer state, loads kernels
        rows[c.name] = {"method": c.name, **c.notes, "peak": attempt(partial(c.peak, c.batches[0]), device)}
    running = [c for c in contestants if rows[c.name]["peak"] != "out of memory"]
    seconds: dict[str, list[list[float]]] = {c.name: [] for c in running}
    rates = []
    for i in range(rounds):
        rates.append(accounting.matmul_rate(device, dtype))
        for c in list(running):
            taken = attempt(partial(c.run, c.batches), device)
            if isinstance(taken, str):
                rows[c.name]["peak"] = taken
                running.remove(c)
            else:
                seconds[c.name].append(taken)
        print(f"round {i + 1} of {rounds}", flush=True)
    rates.append(accounting.matmul_rate(device, dtype))
    for c in running:
        rows[c.name] |= summary(c, np.array(seconds[c.name]), float(np.median(rates)), device)
    return list(rows.values())


def summary(c: Contestant, seconds: np.ndarray, matmul: float, device: torch.device) -> dict[str, Any]:
    """The speeds of a contestant, from seconds [rounds, steps]."""
    pairs = np.array([len(flat(batch)) for batch in c.batches])
    total = float(np.median(seconds, axis=0).sum())
    rates = np.percentile(pairs / seconds, [10, 90])
    work = [c.work(batch) for batch in c.batches]
    flops = sum(w.flops for w in work) / total
    sequence_tokens = sum(len(p.chosen_ids) + len(p.rejected_ids) for batch in c.batches for p in flat(batch))
    return {
        "pairs/s": float(pairs.sum()) / total,
        "p10": float(rates[0]),
        "p90": float(rates[1]),
        "sequence tokens/s": sequence_tokens / total,
        "computed/pair": sum(w.tokens for w in work) / float(pairs.sum()),
        "GFLOP/s": flops / 1e9,
        "matmul GFLOP/s": matmul / 1e9,
        "% matmul": 100 * flops / matmul,
        "MFU %": 100 * flops / accounting.peak_flops(device, torch.bfloat16)[0] if device.type == "cuda" else None,
        "seconds": seconds.tolist(),
    }


def compare(
    names: Sequence[str],
    config: ModelConfig,
    options: TrainConfig,
    steps: int,
    rounds: int,
    dtype: torch.dtype,
    mesh: DeviceMesh,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Rows for all contestants on the records of each name. Exits with 1 before any timing if they disagree."""
    batches: dict[str, dict[int, list[Groups]]] = {}
    for name in names:
        pairs = records.records(name, steps * options.global_batch_pairs)
        batches[name] = {size: global_batches(pairs, options, size) for size in group_sizes(pairs)}
    checked = [[pair] for pair in flat(batches[names[0]][1][0])[:CHECKED_PAIRS]]
    if dtype != torch.float32:  # where rounding cannot hide an error
        equal_to_padded(config, options, checked, torch.float32, mesh, device)
        release(device)
    ours, alike = equal_to_padded(config, options, checked, dtype, mesh, device)
    rows: dict[str, list[dict[str, Any]]] = {}
    if fits_together(ours.model, device):
        model = padded_model(config, options, dtype, device)
        for name, of in batches.items():
            people = list(padded_contestants(model, config, of[1]))
            rows[name] = race([*people, *our_contestants(ours, of)], rounds, device, dtype)
    else:
        print("two models do not fit in memory: ours and the padded ones run one after the other", flush=True)
        for name, of in batches.items():
            rows[name] = race(list(our_contestants(ours, of)), rounds, device, dtype)
        del ours
        release(device)
        model = padded_model(config, options, dtype, device)
        for name, of in batches.items():
            rows[name] = race(list(padded_contestants(model, config, of[1])), rounds, device, dtype) + rows[name]
    return [finished(row, mine, name) | {"gradients alike": alike} for name, mine in rows.items() for row in mine]


def padded_model(config: ModelConfig, options: TrainConfig, dtype: torch.dtype, device: torch.device) -> padded.Padded:
    return padded.Padded(config, options, prepare.objective_of(options), sampling_of(options), dtype, device)


def equal_to_padded(
    config: ModelConfig, options: TrainConfig, batch: Groups, dtype: torch.dtype, mesh: DeviceMesh, device: torch.device
) -> tuple[Ours, bool]:
    """Ours, and whether its loss and gradients equal the padded reference's; one of the two is in memory at a time.

    In float32 a difference ends the program; in 16 bits it marks every row.
    """
    expected = references(padded_model(config, options, dtype, device), flat(batch))
    release(device)
    # Checked with float32 weights: bfloat16 weights start from other values.
    ours = Ours(config, replace(options, optimizer="adamw"), dtype, mesh, device)
    alike = check(ours, expected, batch, TOLERANCE[dtype])
    if not alike and dtype == torch.float32:
        refuse()
    if options.optimizer == "adamw":
        return ours, alike
    del ours
    release(device)
    return Ours(config, options, dtype, mesh, device), alike


def global_batches(pairs: list[TokenizedPair], options: TrainConfig, group_prompts: int) -> list[Groups]:
    keys = np.array([pair.prompt_key for pair in pairs])
    batches = epoch_batches(keys, options.global_batch_pairs, group_prompts, options.seed, 0)
    return [[[pairs[i] for i in group] for group in batch] for batch in batches]


def group_sizes(pairs: list[TokenizedPair]) -> list[int]:
    """1, and also 4 and 16 if prompts have more than one pair."""
    repeated = len({pair.prompt_key for pair in pairs}) < len(pairs)
    return [1, 4, 16] if repeated else [1]


def fits_together(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether two models with gradients and moments leave half of the memory for activations."""
    parameters = sum(p.numel() for p in model.parameters())
    return device.type == "cpu" or 2 * 16 * parameters < torch.cuda.get_device_properties(device).total_memory / 2


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def finished(row: dict[str, Any], rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The row with its ratios to the others."""
    rate = {r["method"]: r.get("pairs/s") for r in rows}
    mine = row.get("pairs/s")
    ratios = {
        f"x {label}": mine / rate[method] if mine and rate.get(method) else None
        for label, method in (("naive", NAIVE), ("TRL", TRL), ("TRL shipped", TRL_SHIPPED))
    }
    peak = row.pop("peak")
    memory = {"note": peak} if isinstance(peak, str) else {"peak MB": peak / 1e6}
    return {"data": name, **row, **ratios, **memory}


# ------------------------------------------------------------------------------------------------------------ output


def verdict(rows: list[dict[str, Any]]) -> str:
    """One line: ours against TRL in both settings and against naive, on each data set."""
    parts = []
    for row in rows:
        if row["method"] == OURS and row.get("pairs/s"):
            ratios = [
                f"{row[f'x {label}']:.1f} times {text}"
                for label, text in (
                    ("TRL", "TRL without checkpointing"),
                    ("TRL shipped", "TRL as shipped"),
                    ("naive", "naive"),
                )
                if row[f"x {label}"]
            ]
            parts.append(
                f"{row['data']}: {row['pairs/s']:.1f} pairs/s, {', '.join(ratios) or 'nothing to compare'}, "
                f"{row['% matmul']:.0f}% of the measured matmul rate"
            )
    return "; ".join(parts) or "no verdict: ours did not run"


def plot(rows: list[dict[str, Any]], path: str, title: str) -> None:
    """Bars of pairs/s and of peak memory, one color per data set."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.45 * len(methods) + 1.5), layout="constrained", sharey=True)
    for axis, column in zip(axes, ("pairs/s", "peak MB"), strict=True):
        for i, name in enumerate(names):
            values = {row["method"]: row.get(column) or 0.0 for row in rows if row["data"] == name}
            places = [k + (i - (len(names) - 1) / 2) * 0.8 / len(names) for k in range(len(methods))]
            axis.barh(places, [values.get(method, 0.0) for method in methods], 0.8 / len(names), label=name)
        axis.set(xlabel=column, yticks=range(len(methods)), yticklabels=methods)
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="default: 1b on CUDA, else tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--data", nargs="+", choices=records.DATA, default=records.DATA, help="default: both")
    parser.add_argument(
        "--global-batch", type=int, help=f"pairs per step, a multiple of {PAIRS}; default: 32, 64 on CUDA"
    )
    parser.add_argument(
        "--tokens-per-batch",
        type=int,
        default=TrainConfig().tokens_per_batch,
        help="maximum tokens per pack; default: the trainer's",
    )
    parser.add_argument("--steps", type=int, help="number of global batches; default: 3, 8 on CUDA")
    parser.add_argument("--rounds", type=int, default=3, help="number of times each contestant runs them; default: 3")
    parser.add_argument("--optimizer", choices=memory.OPTIMIZER_BYTES, default="adamw", help="of ours")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of ours")
    parser.add_argument(
        "--quick", action="store_true", help=f"one round; on a CPU one global batch of {PAIRS} pairs of each data set"
    )
    parser.add_argument(
        "--scaling", action="store_true", help="only measure how ours scales with packs and shared prompts"
    )
    parser.add_argument(
        "--profile", action="store_true", help="only list the most expensive operators or kernels of a step"
    )
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    options.model = options.model or ("1b" if cuda else "tiny")
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    options.global_batch = options.global_batch or (64 if cuda else PAIRS if options.quick else 32)
    options.steps = options.steps or ((3 if options.quick else 8) if cuda else (1 if options.quick else 3))
    options.rounds = 1 if options.quick else options.rounds
    if options.global_batch % PAIRS:
        parser.error(f"--global-batch {options.global_batch}: must be a multiple of {PAIRS}")
    return options


def main() -> None:
    options = arguments()
    train.keep_freed_memory()
    config, dtype = MODELS[options.model], getattr(torch, options.dtype)
    settings = TrainConfig(
        lr=1e-5,
        global_batch_pairs=options.global_batch,
        tokens_per_batch=options.tokens_per_batch,
        optimizer=options.optimizer,
        compile=options.compile,
    )
    with parallel.process_group() as (mesh, device):
        where = measure.environment(device)
        print(", ".join(f"{k} {v}" for k, v in where.items()))
        rates = {d: accounting.matmul_rate(device, getattr(torch, d)) for d in ("float32", "bfloat16")}
        print("measured matmul rate:", ", ".join(f"{d} {r / 1e9:.0f} GFLOP/s" for d, r in rates.items()))
        about = {
            "model": options.model,
            "dtype": options.dtype,
            "optimizer of ours": options.optimizer,
            "compiled": options.compile,
            "records": records.source(),
            "global batch": options.global_batch,
            "tokens per pack": options.tokens_per_batch,
            **{f"matmul {d} GFLOP/s": r / 1e9 for d, r in rates.items()},
        }
        print(", ".join(f"{k} {v}" for k, v in about.items() if not k.startswith("matmul")), flush=True)
        name = f"train_step-{options.model}-{options.dtype}"
        title = f"{options.model}, {options.dtype}, {where['device']}, {where['date']}"
        if options.scaling:
            ours = Ours(config, settings, dtype, mesh, device)
            rows = scaling(ours, 0.5 if options.quick else 2.0, 8 if options.quick else 32)
            print(measure.table(rows, SCALING_COLUMNS))
            stem = measure.record(f"{name}-scaling", [{**row, **about} for row in rows], where)
            plot_scaling(rows, f"{stem}.png", title)
        elif options.profile:
            ours = Ours(config, settings, dtype, mesh, device)
            batch = global_batches(records.records(options.data[0], options.global_batch), settings, 1)[0]
            rows = profiled(ours, batch)
            print(measure.table(rows[:30], ("kernel", "ms", "%", "calls")))
            stem = measure.record(f"{name}-profile", [{**row, **about} for row in rows[:30]], where)
            if device.type == "cuda" and (missing := missing_kernels(rows)):
                print(f"not in the profile: {', '.join(missing)}: the fused loss did not run", file=sys.stderr)
                sys.exit(1)
        else:
            if padded.trl_missing():
                print(f"TRL is skipped: {padded.trl_missing()}")
            rows = compare(options.data, config, settings, options.steps, options.rounds, dtype, mesh, device)
            print(measure.table(rows, COLUMNS))
            for row in rows:
                if "note" in row:
                    print(f"{row['data']}, {row['method']}: {row['note']}")
            stem = measure.record(name, [{**row, **about} for row in rows], where)
            plot(rows, f"{stem}.png", title)
            print(verdict(rows))
        print(f"written: {stem}.*")


if __name__ == "__main__":
    main()
