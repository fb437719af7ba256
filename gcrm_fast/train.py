"""Trains a goal-conditioned reward model: ``torchrun gcrm_fast/train.py`` or ``gcrm train``.

Read ``train`` at the bottom first: it is the whole program in the order in which it happens.
"""

import contextlib
import ctypes
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from gcrm_fast import checkpoint, parallel
from gcrm_fast.accounting import Meter, peak_flops, peak_memory
from gcrm_fast.command_line import exit_code
from gcrm_fast.config import TrainConfig, parse, to_toml
from gcrm_fast.errors import UserError
from gcrm_fast.evaluation import breakdown, goal_state, metrics, score_pairs, shortcuts
from gcrm_fast.loader import load
from gcrm_fast.model import LlamaRewardModel
from gcrm_fast.model_card import model_card
from gcrm_fast.objectives import STATISTICS, Objective, losses
from gcrm_fast.packing import Pack
from gcrm_fast.prepare import Prepared, compute_dtype, data_rows, describe, memory_plan, objective_of, prepare, steps_of
from gcrm_fast.report import MetricsLog, plot_curves, table

EVALUATION_GOAL_PAIRS = 512  # training pairs behind the goal state of the evaluations during a run


# ------------------------------------------------------------------------------------------------- pieces of the loop


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of returning it to the kernel: without it page faults made
    the training steps of a small model on the CPU about twice as long."""
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # <malloc.h>
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 2**30)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def optimizer_and_schedule(
    model: torch.nn.Module, config: TrainConfig, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW (0.9, beta2); linear warm-up, then a cosine to 0."""
    values: dict[str, Any] = {
        "lr": config.lr or (9e-6 if config.model else 1e-3),
        "betas": (0.9, config.beta2),
        "weight_decay": config.weight_decay,
    }
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), **values, fused=True)
    else:
        from torchao.optim import AdamW8bit, _AdamW

        kind = AdamW8bit if config.optimizer == "adamw-8bit" else _AdamW
        optimizer = kind(model.parameters(), **values, bf16_stochastic_round=True)  # of those that are bfloat16
    warmup = math.ceil(config.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def cast_weights(model: LlamaRewardModel, optimizer: str) -> None:
    """Stores the trunk's weights as the optimizer keeps them; the reward head stays float32."""
    if optimizer == "adamw-bf16":
        for parameter in model.model.parameters():  # not buffers: RoPE's frequencies stay float32
            parameter.data = parameter.data.bfloat16()


def accumulate(
    model: torch.nn.Module, packs: list[Pack], n_pairs: int, objective: Objective, device: torch.device
) -> Tensor:
    """Gradients of the mean loss over the GLOBAL batch, from this rank's packs; returns the sums of STATISTICS.

    FSDP averages gradients over ranks, hence the factor world size; they are reduced once, at the last pack.
    """
    sums = torch.zeros(len(STATISTICS), device=device)
    assert isinstance(model, FSDPModule)
    for i, pack in enumerate(packs):
        model.set_requires_gradient_sync(i == len(packs) - 1)
        on_device = pack.to(device)
        total, statistics = losses(model(on_device), on_device.pairs, objective)
        (total * (dist.get_world_size() / n_pairs)).backward()
        sums += statistics
    return sums


def clip_gradients(model: torch.nn.Module, largest: float) -> Tensor:
    """Scales gradients to a global norm of at most ``largest``; returns the norm before, without a host sync."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Holds the output folder for this run."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{output}: another run is using this folder: wait for it or choose another --output") from None


def list_skipped(prepared: Prepared) -> None:
    """Bad records, a line each, to skipped_records.txt; no such file where there are none."""
    path = prepared.output / "skipped_records.txt"
    path.unlink(missing_ok=True)
    if prepared.bad.skipped:
        lines = "".join(line + "\n" for line in prepared.bad.skipped)
        path.write_text(lines, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8


# ------------------------------------------------------------------------------------------------------- the program


def train(config: TrainConfig, prepared: Prepared, mesh: torch.distributed.DeviceMesh, device: torch.device) -> None:
    """The whole run: build, loop, evaluate, save. Every rank runs it; rank 0 writes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtype, objective = compute_dtype(config, device), objective_of(config)
    budget, sampling = prepared.budget, prepared.sampling
    recompute, predicted = memory_plan(prepared, config, world_size, device)

    with torch.device("meta"):
        model = LlamaRewardModel(prepared.model_config, config.attention, recompute)
    cast_weights(model, config.optimizer)
    if config.compile:
        model.compile_blocks()
    parallel.shard(model, mesh, dtype)
    parallel.materialize(model, mesh, device, prepared.weights.rows)
    optimizer, schedule = optimizer_and_schedule(model, config, prepared.steps)

    log = None
    if rank == 0:
        log = MetricsLog(prepared.output)
        list_skipped(prepared)
        print(table(data_rows(prepared, config)), flush=True)
    eval_every = config.eval_every or -(-prepared.steps // 8)
    goal_pairs = [pair for pair in prepared.train if not pair.chosen_cut][: config.goal_pairs or None]

    def evaluate(step: int, goal: Tensor) -> dict[str, float]:
        scores = score_pairs(model, prepared.held_out, goal, objective, budget, sampling, device)
        row = metrics(scores)
        if step == prepared.steps:
            row |= {f"eval/auroc/{k}": v for k, (v, _) in breakdown(scores, config.eval_by).items()}
        if log:
            log.write(step, row)
        return row

    peak, source = peak_flops(device, dtype)
    if log:
        print(f"MFU and HFU refer to {peak / 1e12:.4g} TFLOP/s a process ({source}); predicted memory "
              f"{predicted / 2**30:.2f} GiB a process, --recompute {recompute}", flush=True)  # fmt: skip
    first = last = {}
    if prepared.held_out:
        first = last = evaluate(0, goal_state(model, goal_pairs[:EVALUATION_GOAL_PAIRS], budget, sampling, device))
    workers = config.workers if config.workers >= 0 else 2 if device.type == "cuda" else 0
    steps = load(steps_of(prepared, config, rank, world_size), 0, prepared.steps, workers, device)
    sums = torch.zeros(len(STATISTICS), device=device)  # since the last log row, like what the meter counts
    pairs_since = 0
    meter = Meter(prepared.model_config, recompute, device, peak)
    bar = tqdm(range(1, prepared.steps + 1), disable=rank != 0, unit="step", dynamic_ncols=True)
    for step in bar:
        n_pairs, packs = meter.fetch(steps)
        sums += accumulate(model, packs, n_pairs, objective, device)
        meter.add(packs)
        norm = clip_gradients(model, config.clip)
        learning_rate = float(schedule.get_last_lr()[0])  # torchao keeps it in a tensor, on the CPU
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        pairs_since += n_pairs

        if step % config.log_every == 0 or step == prepared.steps:
            dist.all_reduce(sums)
            row = {name: value / pairs_since for name, value in zip(STATISTICS, sums.tolist(), strict=True)}
            row |= {"grad_norm": norm.item(), "lr": learning_rate} | meter.read()
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                raise UserError(f"loss or gradient is not finite at step {step}: lower --lr, or mend --model's weights")
            if log:
                log.write(step, row)
                bar.set_postfix(loss=f"{row['loss']:.3f}", auroc=f"{last.get('eval/auroc', math.nan):.3f}")
            sums.zero_()
            pairs_since = 0
        if prepared.held_out and step % eval_every == 0 and step != prepared.steps:
            with meter.paused():
                last = evaluate(step, goal_state(model, goal_pairs[:EVALUATION_GOAL_PAIRS], budget, sampling, device))

    goal = goal_state(model, goal_pairs, budget, sampling, device)
    if prepared.held_out:
        last = evaluate(prepared.steps, goal)
    state = parallel.full_state(model, dtype)
    if log:
        finish(config, prepared, log, state, goal.cpu(), len(goal_pairs), first, last, device)
    dist.barrier()


def finish(
    config: TrainConfig, prepared: Prepared, log: MetricsLog, state: dict[str, Tensor], goal: Tensor, goal_count: int,
    first: dict[str, float], last: dict[str, float], device: torch.device,
) -> None:  # fmt: skip
    """Writes curves and the model (aside, then renamed: `model` is complete or absent) and prints the summary."""
    output = prepared.output
    rows = [("optimizer steps", f"{prepared.steps} of {config.global_batch_pairs} pairs")]
    if last:
        baselines = shortcuts(prepared.train, prepared.held_out, prepared.model_config.vocab_size)
        log.write(prepared.steps, baselines)
        rows += [(f"held-out {name}", f"{first[f'eval/{key}']:.3f} -> {last[f'eval/{key}']:.3f}")
                 for name, key in (("AUROC", "auroc"), ("pair accuracy", "accuracy"), ("ranking loss", "loss/ranking"),
                                   ("contrastive loss", "loss/contrastive"))]  # fmt: skip
        rows += [(f"  AUROC {key.removeprefix('eval/auroc/')}", f"{value:.3f}")
                 for key, value in last.items() if key.startswith("eval/auroc/")]  # fmt: skip
        rows += [("shortcut: length only", f"{baselines['baseline/auroc_length']:.3f}"),
                 ("shortcut: bag of tokens", f"{baselines['baseline/auroc_bag_of_tokens']:.3f}")]  # fmt: skip
    plot_curves(log.rows, output / "curves.png")
    (output / "config.toml").write_text(to_toml(config))
    partial = output / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.save_model(partial, state, prepared.model_config, prepared.tokenizer, goal, goal_count)
    card = model_card(config, data_rows(prepared, config), rows, last, dist.get_world_size())
    (partial / "README.md").write_text(card, encoding="utf-8")
    if (output / "model").exists():
        shutil.rmtree(output / "model")
    partial.rename(output / "model")
    log.close()
    rows += [("peak memory", f"{peak_memory(device) / 2**30:.2f} GiB a process"), ("saved", str(output / "model"))]
    print(f"\n{table(rows)}", flush=True)


def run(config: TrainConfig) -> None:
    """Checks all inputs on every rank before any process group work, then trains. Raises UserError."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    is_first = os.environ.get("RANK", "0") == "0"
    prepared = prepare(config)
    if is_first and prepared.weights.notes:
        print(*prepared.weights.notes, sep="\n", flush=True)
    if config.dry_run:
        if is_first:
            print(describe(prepared, config, world_size))
        return
    keep_freed_memory()
    with locked(prepared.output) if is_first else contextlib.nullcontext(), parallel.process_group() as (mesh, device):
        train(config, prepared, mesh, device)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr for an error that the user can mend."""
    return exit_code("gcrm train", lambda: run(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
