"""What is checked and known before training: data, tokenizer, weights, budgets, memory; and its description."""

import functools
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gcrm_fast.checkpoints.config_json import read_config
from gcrm_fast.checkpoints.locating import MODEL_FILES, TOKENIZER_FILES, locate
from gcrm_fast.checkpoints.weights import Weights, fresh_weights, open_weights
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.tables import table
from gcrm_fast.data import arithmetic
from gcrm_fast.data.batches import Budget, batches_per_epoch, split_to_budget
from gcrm_fast.data.chat import end_tokens
from gcrm_fast.data.encoding import TokenizedPair, TokenReport, tokenize_pairs
from gcrm_fast.data.overlap import Overlap, overlap
from gcrm_fast.data.records import Pair, parse_columns, read_pairs
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.data.token_cache import TokenCache, cache_folder
from gcrm_fast.data.tokenization import choose_pad, load_tokenizer, train_tokenizer
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.training.accounting import MemoryShape, choose_plan, memory_limit, predicted_memory, work
from gcrm_fast.training.config import ARITHMETIC, PRESETS, TrainConfig
from gcrm_fast.training.loader import Steps
from gcrm_fast.training.objectives import Objective
from gcrm_kernels.launch import HAS_TRITON


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
    bad: BadRecords
    weights: Weights
    budget: Budget
    sampling: Sampling
    steps: int
    output: Path

    @functools.cached_property
    def data_key(self) -> str:
        """Of all that the training data is: tokens and margins."""
        margins = np.array([pair.margin for pair in self.train], dtype=np.float64)
        return hashlib.sha256(self.report.key.encode() + margins.tobytes()).hexdigest()


def load_pairs(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None, bad: BadRecords
) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs, read or generated."""
    if config.data == (ARITHMETIC,):
        usual = PRESETS[ARITHMETIC]
        n_train, n_eval = config.train_pairs or usual["train_pairs"], config.eval_pairs or usual["eval_pairs"]
        return arithmetic.generate(n_train, n_eval, config.seed, config.arithmetic_steps)
    train, held_out = (
        read_pairs(
            sources,
            fields=fields,
            columns=parse_columns(config.columns),
            tokenizer=tokenizer,
            pairs_per_prompt=config.pairs_per_prompt,
            bad=bad,
        )
        for sources, fields in ((config.data, ()), (config.eval_data, config.eval_by))
    )
    if config.eval_pairs and len(held_out) > config.eval_pairs:
        chosen = np.random.default_rng(config.seed).permutation(len(held_out))[: config.eval_pairs]
        held_out = [held_out[i] for i in sorted(chosen)]
    return train[: config.train_pairs or None], held_out


def open_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of --tokenizer, or else of --model; None without either."""
    flag, name = ("--tokenizer", config.tokenizer) if config.tokenizer else ("--model", config.model)
    return load_tokenizer(locate(name, flag, TOKENIZER_FILES)) if name else None


def open_model(config: TrainConfig) -> tuple[ModelConfig, Weights]:
    """Shape and weights of --model.

    Raises:
        UserError: a model that is not supported, or whose sliding window is shorter than --max-length.
    """
    folder = locate(config.model, "--model", MODEL_FILES)
    model_config = read_config(folder, head=config.head, projection_size=config.projection_size)
    window = model_config.sliding_window
    if window and config.max_length > window:
        raise UserError(
            f"--max-length {config.max_length}: more than the sliding window of {config.model}, {window} tokens: pass "
            f"--max-length {window} or less"
        )
    return model_config, open_weights(folder, model_config, config.seed)


def new_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[ModelConfig, Weights]:
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
    return model_config, fresh_weights(model_config, config.seed)


def check_unfinished(output: Path, config: TrainConfig) -> None:
    """Raises UserError where a finished run would be replaced unasked."""
    if (output / "model").exists() and not config.overwrite:
        raise UserError(f"{output}: holds a finished model: choose another --output or pass --overwrite")


def prepare(config: TrainConfig) -> Prepared:
    """Reads and checks all inputs; writes nothing."""
    output = Path(config.output or default_output(config))
    check_unfinished(output, config)
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
    choose_pad(tokenizer, model_config.vocab_size, source, model_config.family)
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
    per_epoch = batches_per_epoch(len(tokenized), config.global_batch_pairs)
    steps = config.steps or max(1, math.ceil(config.epochs * per_epoch))
    return Prepared(
        tokenizer,
        model_config,
        tokenized,
        tokenized_held_out,
        report,
        held_out_report,
        shared,
        bad,
        weights,
        budget,
        sampling,
        steps,
        output,
    )


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
        prepared.train,
        prepared.budget,
        prepared.sampling,
        global_batch_pairs=config.global_batch_pairs,
        group_prompts=config.group_prompts,
        rank=rank,
        world_size=world_size,
    )


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    return getattr(torch, config.dtype if config.dtype != "auto" else fastest_dtype(device))


def fastest_dtype(device: torch.device) -> str:
    """bfloat16 where there are matrix units for it: on a GPU, and on a CPU with AMX (950 against 150 GFLOP/s of float32
    on two cores of one)."""
    if device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16"):
        return "bfloat16"
    return "float32"


class MemoryPlan(NamedTuple):
    """What is recomputed, when weights are gathered, and the predicted memory of one process in bytes, for the largest
    pack that the budget allows."""

    recompute: str
    gather: str
    predicted: int

    def __str__(self) -> str:
        return f"{self.predicted / 2**30:.2f} GiB per process, --recompute {self.recompute}, --gather {self.gather}"


def memory_plan(
    prepared: Prepared, config: TrainConfig, world_size: int, device: torch.device, limit: int
) -> MemoryPlan:
    """The fastest plan that ``limit`` bytes allow, with what the configuration fixes. Every process must hand over the
    same limit: all gather weights together."""
    tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in prepared.train) / len(prepared.train)
    pairs = prepared.budget.tokens / tokens  # in the largest pack
    read_rows = prepared.budget.tokens if config.objective_variant == "dense" else int(pairs * (4 * config.samples + 2))
    shape = MemoryShape(
        config=prepared.model_config,
        tokens=prepared.budget.tokens,
        keys=prepared.budget.keys,
        read_rows=min(read_rows, prepared.budget.tokens),
        optimizer=config.optimizer,
        width=compute_dtype(config, device).itemsize,
        kernels=HAS_TRITON and device.type == "cuda",
        world_size=world_size,
        several_packs=tokens * config.global_batch_pairs > prepared.budget.tokens * world_size,
    )
    recompute, gather = choose_plan(limit, shape, config.recompute, config.gather)
    return MemoryPlan(recompute, gather, predicted_memory(shape, recompute, gather))


def data_rows(prepared: Prepared, config: TrainConfig) -> list[tuple[str, str]]:
    """What became of the records: shown by --dry-run and at the start of a run."""

    def count(pairs: list[TokenizedPair], report: TokenReport) -> str:
        return (
            f"{len(pairs)} ({report.dropped} dropped: longer than --max-length {config.max_length} tokens; "
            f"{report.shortened} with a shortened prompt)"
        )

    report, held_out_report, shared = prepared.report, prepared.held_out_report, prepared.overlap
    rows = [
        ("training pairs", count(prepared.train, report)),
        ("held-out pairs", count(prepared.held_out, held_out_report) if held_out_report else "0"),
        ("held out and trained on", f"{shared.prompts} prompts, {shared.completions} completions"),
        ("completion ends", report.ending_summary()),
    ]
    if prepared.bad.skipped:
        rows.append(("bad records", f"{len(prepared.bad.skipped)} skipped; the first: {prepared.bad.skipped[0]}"))
    if prepared.bad.tied:
        rows.append(("records without a pair", f"{prepared.bad.tied}: all their completions tie"))
    longest = max(len(ids) for pair in prepared.train for ids in (pair.chosen_ids, pair.rejected_ids))
    if longest > prepared.model_config.max_position_embeddings:
        rows.append(
            (
                "longer than the model knows",
                f"up to {longest} tokens, its max_position_embeddings is "
                f"{prepared.model_config.max_position_embeddings}",
            )
        )
    return rows


def describe(prepared: Prepared, config: TrainConfig, world_size: int) -> str:
    """What --dry-run prints: lengths, drops, packs, steps, predicted memory."""
    steps, sampled_steps = steps_of(prepared, config, 0, 1), min(8, prepared.steps)
    packs = [pack for i in range(sampled_steps) for pack in steps[i].packs]
    done = [work(pack, prepared.model_config, "none") for pack in packs]
    tokens = [int(w.tokens) for w in done]
    m = prepared.model_config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = memory_plan(prepared, config, world_size, device, memory_limit(device))
    return table(
        [
            *data_rows(prepared, config),
            ("prompt tokens", prepared.report.prompt_summary()),
            ("completion tokens", prepared.report.completion_summary()),
            ("steps", f"{prepared.steps} of {config.global_batch_pairs} pairs"),
            ("packs a step", f"{len(packs) / sampled_steps:.1f} over all processes (first {sampled_steps} steps)"),
            ("pack fill", f"{100 * sum(tokens) / len(tokens) / config.tokens_per_batch:.0f}% of --tokens-per-batch"),
            (
                "padded / packed",
                f"{sum(w.padded_tokens for w in done) / sum(tokens):.2f} times the tokens, were the packs padded",
            ),
            ("parameters", f"{m.parameters() / 1e6:.2f} M"),
            ("predicted memory", str(plan)),
        ]
    )
