"""What is read and checked before training: data, tokenizer, weights, budgets."""

import functools
import hashlib
import math
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from gcrm_fast.checkpoints.adapters import MERGE, base_folder, tokenizer_folder
from gcrm_fast.checkpoints.config_json import read_config
from gcrm_fast.checkpoints.locating import MODEL_FILES, TOKENIZER_FILES, locate
from gcrm_fast.checkpoints.weights import Weights, fresh_weights, open_weights
from gcrm_fast.common.errors import UserError
from gcrm_fast.data import arithmetic
from gcrm_fast.data.batches import Budget, batches_per_epoch, split_to_budget
from gcrm_fast.data.chat import end_tokens, with_date
from gcrm_fast.data.encoding import TokenizedPair, TokenReport, preferred, tokenize_pairs
from gcrm_fast.data.mixture import Mixture
from gcrm_fast.data.on_policy import LARGEST_BLOCK, OnPolicy, read_on_policy
from gcrm_fast.data.overlap import Overlap, overlap, split_by_prompt
from gcrm_fast.data.packing import group_size
from gcrm_fast.data.records import FORMATS, JUDGED_FORMATS, Pair, parse_columns, read_judged, read_pairs
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.data.token_cache import TokenCache, cache_folder
from gcrm_fast.data.tokenization import choose_pad, load_tokenizer, train_tokenizer
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.views import WIDTH
from gcrm_fast.training.config import PRESETS, TrainConfig
from gcrm_fast.training.loader import Steps
from gcrm_fast.training.lora import Lora
from gcrm_fast.training.objectives import RIGHT, Objective
from gcrm_fast.training.option_checks import ARITHMETIC
from gcrm_fast.training.output_folder import check_output


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that is checked and known before training: the same on every rank."""

    tokenizer: PreTrainedTokenizerBase
    model_config: ModelConfig
    train: list[TokenizedPair]
    held_out: list[TokenizedPair]
    mixture: Mixture | None
    on_policy: OnPolicy | None
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
        """Fingerprint of the training data: tokens, margins, labels, the source of each pair where that matters, and
        the samples of --on-policy."""
        sources = self.mixture.source_N.tobytes() if self.mixture else b""
        return _fingerprint(self.train, self.report, sources + (self.on_policy.key if self.on_policy else b""))

    @property
    def held_out_key(self) -> str:
        """Fingerprint of the held-out data; empty without any."""
        return _fingerprint(self.held_out, self.held_out_report) if self.held_out_report else ""


def _fingerprint(pairs: list[TokenizedPair], report: TokenReport, more: bytes = b"") -> str:
    margins = np.array([pair.margin for pair in pairs], dtype=np.float64)
    targets = np.array([pair.target for pair in pairs if pair.target is not None], dtype=np.float64)
    return hashlib.sha256(report.key.encode() + margins.tobytes() + targets.tobytes() + more).hexdigest()


def load_pairs(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None, bad: BadRecords
) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs, read or generated; for --loss bce and mse completions with their label or score."""
    if config.data == (ARITHMETIC,):
        preset = PRESETS[ARITHMETIC]
        n_train, n_eval = config.train_pairs or preset["train_pairs"], config.eval_pairs or preset["eval_pairs"]
        return arithmetic.generate(n_train, n_eval, config.seed, config.arithmetic_steps)

    def read(sources: tuple[str, ...], fields: tuple[str, ...]) -> list[Pair]:
        more: dict[str, Any] = {"fields": fields, "tokenizer": tokenizer, "bad": bad}
        if config.loss == "ranking":
            columns = parse_columns(config.columns, FORMATS)
            return read_pairs(sources, columns=columns, pairs_per_prompt=config.pairs_per_prompt, **more)
        columns = parse_columns(config.columns, JUDGED_FORMATS)
        return read_judged(sources, columns=columns, probability=config.loss == "bce", **more)

    if config.eval_split:
        train, held_out = split_by_prompt(read(config.data, config.eval_by), config.eval_split, config.seed)
    else:
        train, held_out = read(config.data, ()), read(config.eval_data, config.eval_by)
    if config.eval_pairs and len(held_out) > config.eval_pairs:
        chosen = np.random.default_rng(config.seed).permutation(len(held_out))[: config.eval_pairs]
        held_out = [held_out[i] for i in sorted(chosen)]
    return train[: config.train_pairs or None], held_out


def open_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of --tokenizer, or else of --model; None without either."""
    flag, name = ("--tokenizer", config.tokenizer) if config.tokenizer else ("--model", config.model)
    if not name:
        return None
    tokenizer = load_tokenizer(tokenizer_folder(locate(name, flag, TOKENIZER_FILES)))
    tokenizer.split_special_tokens = config.special_tokens == "text"
    if config.template_date:
        with_date(tokenizer, date.fromisoformat(config.template_date))
    return tokenizer


def open_model(config: TrainConfig) -> tuple[ModelConfig, Weights]:
    """Shape and weights of --model.

    Raises:
        UserError: a model that is not supported, or whose sliding window is shorter than --max-length.
    """
    folder = locate(config.model, "--model", MODEL_FILES)
    base = base_folder(folder)
    if config.lora_rank and base != folder:
        raise UserError(f"--model {config.model}: is already an adapter, and --lora-rank cannot add another: {MERGE}")
    model_config = read_config(base, **head_of(config))
    window = model_config.sliding_window
    if window and config.max_length > window:
        raise UserError(
            f"--max-length {config.max_length}: more than the sliding window of {config.model}, {window} tokens: pass "
            f"--max-length {window} or less"
        )
    return model_config, open_weights(folder, model_config, config.seed, lm_head=config.sft_weight > 0)


def head_of(config: TrainConfig) -> dict[str, Any]:
    """Fields of the ModelConfig that say what is read from the hidden states."""
    return {
        "head": config.head,
        "bottleneck_size": config.bottleneck_size if config.head == "bottleneck" else 0,
        "projection_size": config.projection_size,
        "compare": config.compare,
    }


def new_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[ModelConfig, Weights]:
    """Shape and weights of a model from scratch."""
    model_config = ModelConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size or config.hidden_size // config.heads,
        max_position_embeddings=config.max_length,
        **head_of(config),
    )
    return model_config, fresh_weights(model_config, config.seed)


def check_overlap(train: list[Pair], held_out: list[Pair], allowed: bool) -> Overlap:
    """What training and held-out pairs share. Raises UserError for shared prompts unless they are ``allowed``."""
    shared = overlap(train, held_out)
    if shared.prompts and not allowed:
        raise UserError(
            f"{shared.example}: field 'prompt' is also in the training data, as in {shared.prompts} of {len(held_out)} "
            "held-out pairs: use other held-out pairs, or pass --allow-overlap"
        )
    return shared


def prepare(config: TrainConfig) -> Prepared:
    """Reads and checks all inputs; writes nothing."""
    output = check_output(config)
    model = open_model(config) if config.model else None
    tokenizer = open_tokenizer(config)  # before the records: its chat template renders those that are messages
    bad = BadRecords(skip=config.on_bad_record == "skip")
    train, held_out = load_pairs(config, tokenizer, bad)
    shared = check_overlap(train, held_out, config.allow_overlap)
    if tokenizer is None:
        texts = (p.prompt + side for p in train for side in p.completions)
        tokenizer = train_tokenizer(texts, config.vocab_size)
        tokenizer.split_special_tokens = config.special_tokens == "text"
    model_config, weights = model or new_model(config, tokenizer)
    if config.train_layers > model_config.num_hidden_layers:
        layers = model_config.num_hidden_layers
        raise UserError(f"--train-layers {config.train_layers}: the model has {layers} layers: name {layers} or fewer")
    source = config.tokenizer or config.model or "the trained tokenizer"
    choose_pad(tokenizer, model_config.vocab_size, source, model_config.family)
    if tokenizer.pad_token_id in end_tokens(tokenizer):
        raise UserError(f"{source}: pad token {tokenizer.pad_token!r} also ends a turn: set another pad token")
    budget = Budget(config.tokens_per_batch, model_config.hidden_size)
    samples = read_on_policy(config.on_policy, tokenizer, bad) if config.on_policy else []
    check_overlap(samples, held_out, config.allow_overlap)
    with TokenCache(cache_folder(config.cache)) as cache:

        def tokenize(pairs: list[Pair]) -> tuple[list[TokenizedPair], TokenReport]:
            return tokenize_pairs(tokenizer, pairs, config.max_length, overlong=config.overlong, bad=bad, cache=cache)

        tokenized, report = tokenize(train)
        tokenized_held_out, held_out_report = tokenize(held_out) if held_out else ([], None)
        on_policy = OnPolicy.of(*tokenize(samples), config.seed) if samples else None
        if not preferred(tokenized):
            which = "chosen " if config.loss == "ranking" else ""
            raise UserError(f"--data {' '.join(config.data)}: every {which}completion is cut: none has an end state")
        if config.keep_best and config.loss != "ranking":
            check_labels_differ(tokenized_held_out, config)
        for pair in tokenized + tokenized_held_out:
            split_to_budget([pair], budget)  # raises where a pair does not fit
        if config.sampling == "rs" and config.loss == "ranking":
            _check_blocks(tokenized + tokenized_held_out, config, budget)
        if on_policy:
            _check_views(on_policy, budget)
    per_epoch = batches_per_epoch(len(tokenized), config.global_batch_pairs)
    return Prepared(
        tokenizer=tokenizer,
        model_config=model_config,
        train=tokenized,
        held_out=tokenized_held_out,
        mixture=mixture_of(config, tokenized),
        on_policy=on_policy,
        report=report,
        held_out_report=held_out_report,
        overlap=shared,
        bad=bad,
        weights=weights,
        budget=budget,
        sampling=Sampling(
            config.samples,
            config.objective_variant,
            config.negatives,
            config.seed,
            config.sampling,
            noise=model_config.bottleneck_size,
            predict=config.sft_weight > 0,
            views=WIDTH if on_policy else 0,
        )
        if config.loss == "ranking"
        else Sampling(samples=0),
        steps=config.steps or max(1, math.ceil(config.epochs * per_epoch)),
        output=output,
    )


def check_labels_differ(held_out: list[TokenizedPair], config: TrainConfig) -> None:
    """Raises UserError where the metric of --keep-best is undefined."""
    targets = {pair.target for pair in held_out}
    if config.loss == "bce":
        targets = {float(target is not None and target > RIGHT) for target in targets}
    if len(targets) < 2:
        raise UserError(
            f"--keep-best {config.keep_best}: all {len(held_out)} held-out completions have the same label or score: "
            "hold out others, or omit --keep-best"
        )


def mixture_of(config: TrainConfig, pairs: list[TokenizedPair]) -> Mixture | None:
    """The shares of the sources by --data-weights. Raises UserError where a source has no pair left."""
    if not config.data_weights:
        return None
    mixture = Mixture(source_N=np.array([pair.source for pair in pairs]), weights=config.data_weights)
    for name, available in zip(config.data, mixture.available(), strict=True):
        if not available:
            raise UserError(
                f"--data-weights: {name} has no {config.unit} left: all are longer than --max-length, held out by "
                "--eval-split, or after the first --train-pairs"
            )
    return mixture


def _check_blocks(pairs: list[TokenizedPair], config: TrainConfig, budget: Budget) -> None:
    """Raises UserError where the pairs that meet for ``--sampling rs`` might not fit in a pack."""
    most = 2 * config.group_prompts * max(group_size([pair]).tokens for pair in pairs)
    if most > budget.tokens:
        raise UserError(
            f"--sampling rs compares pairs of two prompts, up to {most} tokens together, more than --tokens-per-batch "
            f"{config.tokens_per_batch}: raise --tokens-per-batch, or lower --group-prompts or --max-length"
        )


def _check_views(on_policy: OnPolicy, budget: Budget) -> None:
    """Raises UserError where the samples that meet might not fit in a pack."""
    largest = LARGEST_BLOCK * on_policy.largest(1)[0].tokens
    if largest > budget.tokens:
        raise UserError(
            f"--on-policy needs up to three pairs of samples in one pack, up to {largest} tokens together, more than "
            f"--tokens-per-batch {budget.tokens}: raise --tokens-per-batch, or lower --max-length"
        )


def objective_of(config: TrainConfig) -> Objective:
    released = config.objective_variant == "repo"
    average = config.sampling == "avg"
    return Objective(
        contrastive_weight=config.contrastive_weight if config.objective == "gcrm" else 0.0,
        dense=config.objective_variant == "dense",
        pairing=("grid" if released and not average else "paired") if config.pairing == "auto" else config.pairing,
        reduce=("mean_then_log" if released else "log_then_mean") if config.reduce == "auto" else config.reduce,
        temperature=config.temperature,
        average=average,
        distance=config.distance,
        label_smoothing=config.label_smoothing,
        centering=config.center_rewards,
        term_weights=term_weights(config),
        loss=config.loss,
        views_weight=config.views_weight,
    )


def term_weights(config: TrainConfig) -> dict[str, float]:
    """Of what the model adds to the loss."""
    of_head = {"kl": config.bottleneck_weight} if config.head == "bottleneck" else {}
    return of_head | ({"sft": config.sft_weight} if config.sft_weight else {})


def trained_layers(config: TrainConfig, model: ModelConfig) -> int:
    """Number of top blocks that are trained; all of them include the embeddings."""
    return config.train_layers or model.num_hidden_layers


def lora_of(config: TrainConfig, model: ModelConfig) -> Lora | None:
    """The adapters to train, if any."""
    if not config.lora_rank:
        return None
    return Lora(
        rank=config.lora_rank,
        alpha=config.lora_alpha or 2 * config.lora_rank,
        targets=config.lora_targets,
        dropout=config.lora_dropout,
        layers=range(model.num_hidden_layers - trained_layers(config, model), model.num_hidden_layers),
    )


def steps_of(prepared: Prepared, config: TrainConfig, rank: int, world_size: int) -> Steps:
    return Steps(
        pairs=prepared.train,
        budget=prepared.budget,
        sampling=prepared.sampling,
        global_batch_pairs=config.global_batch_pairs,
        group_prompts=config.group_prompts,
        rank=rank,
        world_size=world_size,
        mixture=prepared.mixture,
        on_policy=prepared.on_policy,
    )
