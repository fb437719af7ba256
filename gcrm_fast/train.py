"""Trains a goal-conditioned reward model: ``torchrun gcrm_fast/train.py`` or ``gcrm train``.

Read ``train`` at the bottom first: it is the whole program in the order in which it happens.
"""

import contextlib
import ctypes
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gcrm_fast import arithmetic, checkpoint, parallel
from gcrm_fast.accounting import Meter, choose_recompute, memory_limit, peak_flops, predicted_memory, work
from gcrm_fast.config import ARITHMETIC, TrainConfig, parse, parse_columns, to_toml
from gcrm_fast.data import TokenizedPair, TokenReport, end_tokens, tokenize_pairs, train_tokenizer
from gcrm_fast.errors import UserError
from gcrm_fast.evaluation import breakdown, goal_state, metrics, score_pairs, shortcuts
from gcrm_fast.llama_config import read_config
from gcrm_fast.loader import Steps, load
from gcrm_fast.model import ModelConfig, RewardModel
from gcrm_fast.objectives import STATISTICS, Objective, losses
from gcrm_fast.packing import Budget, Pack, Sampling, split_to_budget
from gcrm_fast.records import Overlap, Pair, overlap, read_pairs
from gcrm_fast.report import MetricsLog, plot_curves, table
from gcrm_fast.sources import BadRecords
from gcrm_fast.token_cache import TokenCache, cache_folder
from gcrm_fast.tokenization import choose_pad, load_tokenizer

EVALUATION_GOAL_PAIRS = 512  # training pairs behind the goal state of the evaluations during a run


# ------------------------------------------------------------------------------------- before any process group work


@dataclass(frozen=True)
class Prepared:
    """Everything that is checked and known before training: the same on every rank."""

    tokenizer: PreTrainedTokenizerBase
    model_config: ModelConfig
    train: list[TokenizedPair]
    held_out: list[TokenizedPair]
    report: TokenReport
    held_out_report: TokenReport | None
    overlap: Overlap
    skipped: list[str]  # what was wrong with each bad record
    weights: checkpoint.Weights
    budget: Budget
    sampling: Sampling
    steps: int
    output: Path


def load_pairs(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None, bad: BadRecords
) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs, read or generated."""
    if config.data == (ARITHMETIC,):
        n_train, n_eval = config.train_pairs or 60_000, config.eval_pairs or 1000
        return arithmetic.generate(n_train, n_eval, config.seed, config.arithmetic_steps)
    train, held_out = (
        read_pairs(sources, fields=config.eval_by, columns=parse_columns(config.columns), tokenizer=tokenizer,
                   pairs_per_prompt=config.pairs_per_prompt, bad=bad)
        for sources in (config.data, config.eval_data)
    )  # fmt: skip
    if config.eval_pairs and len(held_out) > config.eval_pairs:
        chosen = np.random.default_rng(config.seed).permutation(len(held_out))[: config.eval_pairs]
        held_out = [held_out[i] for i in sorted(chosen)]
    return train[: config.train_pairs or None], held_out


def open_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of --tokenizer, or else of --model; None without either."""
    flag, name = ("--tokenizer", config.tokenizer) if config.tokenizer else ("--model", config.model)
    return load_tokenizer(checkpoint.locate(name, flag, checkpoint.TOKENIZER_FILES)) if name else None


def open_model(config: TrainConfig) -> tuple[ModelConfig, checkpoint.Weights]:
    """Shape and weights of --model."""
    folder = checkpoint.locate(config.model, "--model", checkpoint.MODEL_FILES)
    model_config = read_config(folder, head=config.head, projection_size=config.projection_size)
    return model_config, checkpoint.open_weights(folder, model_config, config.seed)


def new_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[ModelConfig, checkpoint.Weights]:
    """Shape and weights of a model from scratch."""
    model_config = ModelConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.hidden_size // config.heads,
        max_position_embeddings=config.max_length,
        head=config.head,
        projection_size=config.projection_size,
    )
    return model_config, checkpoint.fresh_weights(model_config, config.seed)


def prepare(config: TrainConfig) -> Prepared:
    """Reads and checks all inputs; writes nothing."""
    output = Path(config.output or default_output(config))
    if (output / "model").exists() and not config.overwrite:
        raise UserError(f"{output}: holds a finished model: choose another --output or pass --overwrite")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is not a folder")
    model = open_model(config) if config.model else None
    tokenizer = open_tokenizer(config)  # before the records, some of which its chat template writes out
    bad = BadRecords(skip=config.on_bad_record == "skip")
    train, held_out = load_pairs(config, tokenizer, bad)
    shared = overlap(train, held_out)
    if shared.prompts and not config.allow_overlap:
        raise UserError(
            f"{shared.example}: field 'prompt' is also in the training data, as in {shared.prompts} of {len(held_out)} "
            "held-out pairs: take others, or pass --allow-overlap"
        )
    if tokenizer is None:
        texts = (p.prompt + side for p in train for side in (p.chosen, p.rejected))
        tokenizer = train_tokenizer(texts, config.vocab_size)
    model_config, weights = model or new_model(config, tokenizer)
    source = config.tokenizer or config.model or "the trained tokenizer"
    choose_pad(tokenizer, model_config.vocab_size, source)
    if tokenizer.pad_token_id in end_tokens(tokenizer):
        raise UserError(f"{source}: pad token {tokenizer.pad_token!r} also ends a turn: set another pad token")
    budget = Budget(config.tokens_per_batch, model_config.hidden_size)
    with TokenCache(cache_folder(config.cache)) as cache:

        def tokenize(pairs: list[Pair]) -> tuple[list[TokenizedPair], TokenReport]:
            return tokenize_pairs(tokenizer, pairs, config.max_length, overlong=config.overlong, bad=bad, cache=cache)

        tokenized, report = tokenize(train)
        tokenized_held_out, held_out_report = tokenize(held_out) if held_out else ([], None)
        if all(pair.chosen_cut for pair in tokenized):
            raise UserError(f"--data {' '.join(config.data)}: every chosen completion is cut: none has an end state")
        for pair in tokenized + tokenized_held_out:
            split_to_budget([pair], budget)  # raises where a pair does not fit
    sampling = Sampling(config.samples, config.objective_variant, config.negatives, config.seed)
    per_epoch = -(-len(tokenized) // config.global_batch_pairs)
    steps = config.steps or max(1, math.ceil(config.epochs * per_epoch))
    return Prepared(
        tokenizer, model_config, tokenized, tokenized_held_out, report, held_out_report, shared, bad.skipped, weights,
        budget, sampling, steps, output,
    )  # fmt: skip


def default_output(config: TrainConfig) -> str:
    """runs/<data>-<objective>[-<variant>]-seed<n>, e.g. runs/arithmetic-gcrm-paper-seed0."""
    name = re.split(r"[.:]", Path(config.data[0]).name)[0]
    objective = config.objective if config.objective == "ranking" else f"gcrm-{config.objective_variant}"
    return f"runs/{name}-{objective}-seed{config.seed}"


def objective_of(config: TrainConfig) -> Objective:
    released = config.objective_variant == "repo"
    return Objective(
        contrastive_weight=config.contrastive_weight if config.objective == "gcrm" else 0.0,
        dense=config.objective_variant == "dense",
        pairing=("grid" if released else "paired") if config.pairing == "auto" else config.pairing,
        reduce=("mean_then_log" if released else "log_then_mean") if config.reduce == "auto" else config.reduce,
        temperature=config.temperature,
    )


def steps_of(prepared: Prepared, config: TrainConfig, rank: int, world_size: int) -> Steps:
    return Steps(
        prepared.train, prepared.budget, prepared.sampling, global_batch_pairs=config.global_batch_pairs,
        group_prompts=config.group_prompts, rank=rank, world_size=world_size,
    )  # fmt: skip


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


def cast_weights(model: RewardModel, optimizer: str) -> None:
    """Stores the trunk's weights as the optimizer keeps them; the reward head stays float32."""
    if optimizer == "adamw-bf16":
        model.model.to(torch.bfloat16)


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


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    name = config.dtype if config.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def memory_plan(prepared: Prepared, config: TrainConfig, world_size: int, device: torch.device) -> tuple[str, int]:
    """What is recomputed, and the predicted memory of one process for the largest pack that the budget allows."""
    shape: dict[str, Any] = {
        "config": prepared.model_config, "tokens": prepared.budget.tokens, "keys": prepared.budget.keys,
        "optimizer": config.optimizer, "width": compute_dtype(config, device).itemsize, "world_size": world_size,
    }  # fmt: skip
    chosen = config.recompute
    recompute = choose_recompute(memory_limit(device), **shape) if chosen == "auto" else chosen
    return recompute, predicted_memory(recompute=recompute, **shape)


def list_skipped(prepared: Prepared) -> None:
    """Bad records, a line each, to skipped_records.txt; no such file where there are none."""
    path = prepared.output / "skipped_records.txt"
    path.unlink(missing_ok=True)
    if prepared.skipped:
        path.write_text("".join(line + "\n" for line in prepared.skipped), encoding="utf-8")


def data_rows(prepared: Prepared, config: TrainConfig) -> list[tuple[str, str]]:
    """What became of the records: shown by --dry-run and at the start of a run."""

    def count(pairs: list[TokenizedPair], report: TokenReport) -> str:
        return (f"{len(pairs)} ({report.dropped} dropped: longer than --max-length {config.max_length} tokens; "
                f"{report.shortened} with a shortened prompt)")  # fmt: skip

    report, held_out_report, shared = prepared.report, prepared.held_out_report, prepared.overlap
    rows = [
        ("training pairs", count(prepared.train, report)),
        ("held-out pairs", count(prepared.held_out, held_out_report) if held_out_report else "0"),
        ("held out and trained on", f"{shared.prompts} prompts, {shared.completions} completions"),
        ("completion ends", f"{report.own_end} of their own, {report.added_end} with eos added, {report.cut} cut"),
    ]
    if prepared.skipped:
        rows.append(("bad records", f"{len(prepared.skipped)} skipped; the first: {prepared.skipped[0]}"))
    return rows


def describe(prepared: Prepared, config: TrainConfig, world_size: int) -> str:
    """What --dry-run prints: lengths, drops, packs, steps, predicted memory."""
    steps, sampled_steps = steps_of(prepared, config, 0, 1), min(8, prepared.steps)
    packs = [pack for i in range(sampled_steps) for pack in steps[i].packs]
    done = [work(pack, prepared.model_config, "none") for pack in packs]
    tokens = [int(w.tokens) for w in done]
    m = prepared.model_config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recompute, predicted = memory_plan(prepared, config, world_size, device)
    return table(
        [
            *data_rows(prepared, config),
            ("prompt tokens", prepared.report.prompt_summary()),
            ("completion tokens", prepared.report.completion_summary()),
            ("steps", f"{prepared.steps} of {config.global_batch_pairs} pairs"),
            ("packs a step", f"{len(packs) / sampled_steps:.1f} over all processes (first {sampled_steps} steps)"),
            ("pack fill", f"{100 * sum(tokens) / len(tokens) / config.tokens_per_batch:.0f}% of --tokens-per-batch"),
            ("padded / packed", f"{sum(w.padded_tokens for w in done) / sum(tokens):.2f} times the tokens, were the "
                                "packs padded"),
            ("parameters", f"{m.parameters() / 1e6:.2f} M"),
            ("predicted memory", f"{predicted / 2**30:.2f} GiB a process, --recompute {recompute}"),
        ]
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the program


def train(config: TrainConfig, prepared: Prepared, mesh: torch.distributed.DeviceMesh, device: torch.device) -> None:
    """The whole run: build, loop, evaluate, save. Every rank runs it; rank 0 writes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtype, objective = compute_dtype(config, device), objective_of(config)
    budget, sampling = prepared.budget, prepared.sampling
    recompute, predicted = memory_plan(prepared, config, world_size, device)

    with torch.device("meta"):
        model = RewardModel(prepared.model_config, config.attention, recompute)
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
        learning_rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        pairs_since += n_pairs

        if step % config.log_every == 0 or step == prepared.steps:
            dist.all_reduce(sums)
            row = {name: value / pairs_since for name, value in zip(STATISTICS, sums.tolist(), strict=True)}
            row |= {"grad_norm": norm.item(), "lr": learning_rate} | meter.read()
            if log:
                log.write(step, row)
                bar.set_postfix(loss=f"{row['loss']:.3f}", auroc=f"{last.get('eval/auroc', math.nan):.3f}")
            sums.zero_()
            pairs_since = 0
        if prepared.held_out and step % eval_every == 0 and step != prepared.steps:
            paused = time.perf_counter()
            last = evaluate(step, goal_state(model, goal_pairs[:EVALUATION_GOAL_PAIRS], budget, sampling, device))
            meter.pause(time.perf_counter() - paused)

    goal = goal_state(model, goal_pairs, budget, sampling, device)
    if prepared.held_out:
        last = evaluate(prepared.steps, goal)
    state = parallel.full_state(model, dtype)
    if log:
        finish(config, prepared, log, state, goal.cpu(), len(goal_pairs), first, last)
    dist.barrier()


def finish(
    config: TrainConfig, prepared: Prepared, log: MetricsLog, state: dict[str, Tensor], goal: Tensor, goal_count: int,
    first: dict[str, float], last: dict[str, float],
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
    if (output / "model").exists():
        shutil.rmtree(output / "model")
    partial.rename(output / "model")
    log.close()
    rows.append(("saved", str(output / "model")))
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
    try:
        run(parse(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"gcrm train: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
