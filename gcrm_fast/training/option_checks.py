"""Which options of ``gcrm train`` contradict each other, or need what is not installed."""

import contextlib
import importlib.util
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import check_fields, flag, shown

if TYPE_CHECKING:
    from gcrm_fast.training.config import TrainConfig

ARITHMETIC = "arithmetic"
MOST_GENERATED = 10**7  # pairs: about 10 GiB
BEST_BY = {  # metrics of --keep-best by --loss
    "ranking": ("eval/auroc", "eval/auroc_q", "eval/accuracy"),
    "bce": ("eval/auroc", "eval/accuracy"),
    "mse": ("eval/spearman",),
}
OF_PAIRS = ("pairs_per_prompt", "label_smoothing", "center_rewards", "sft_weight")  # options that need both sides
OF_BOTTLENECK = ("bottleneck_size", "bottleneck_weight")  # options that need --head bottleneck
OF_VIEWS = ("views_weight", "views_ramp")  # options that need --on-policy


def check_options(config: "TrainConfig") -> None:
    """Raises UserError, naming the option."""
    check = _Check(config)
    _check_data(config, check)
    _check_on_policy(config, check)
    _check_folders(config, check)
    _check_contrastive(config, check)
    _check_loss(config, check)
    _check_model(config, check)
    _check_evaluations(config, check)
    _check_packages(config, check)


@dataclass(frozen=True)
class _Check:
    config: "TrainConfig"

    def need(self, ok: bool, name: str, what: str) -> None:
        """Raises UserError unless ``ok``: the option ``name`` must be ``what``."""
        if not ok:
            given = f"{flag(name)} {shown(getattr(self.config, name))}".rstrip()  # an empty list shows nothing
            raise UserError(f"{given}: must be {what}")

    def only(self, ok: bool, names: Collection[str], what: str) -> None:
        """Raises UserError unless ``ok`` or the options have their defaults, which stand for {} in ``what``."""
        for name in names:
            default = getattr(type(self.config), name)
            self.need(ok or getattr(self.config, name) == default, name, what.format(default))


def _generated(config: "TrainConfig") -> bool:
    return config.data == (ARITHMETIC,)


def _check_data(config: "TrainConfig", check: _Check) -> None:
    generated, need = _generated(config), check.need
    need(bool(config.data) and all(config.data), "data", "at least one source")
    one_each = len(config.data_weights) in (0, len(config.data))
    need(one_each, "data_weights", f"one number per source of --data: {len(config.data)}")
    need(all(config.eval_data), "eval_data", "names of sources")
    held_out = bool(config.eval_data) or generated
    need(not config.eval_split or not held_out, "eval_split", "omitted with --eval-data or generated data")
    if generated:
        need(config.train_pairs <= MOST_GENERATED, "train_pairs", f"at most {MOST_GENERATED} generated pairs")
    if not generated and ARITHMETIC in config.data:
        raise UserError("--data arithmetic: generated data cannot be combined with other sources")
    if not generated and config.preset == ARITHMETIC:
        raise UserError(f"--preset arithmetic is for generated data, not for --data {' '.join(config.data)}")
    if ARITHMETIC in config.eval_data:
        raise UserError("--eval-data arithmetic: generated data includes its own held-out problems: omit it")
    if config.columns:
        from gcrm_fast.data.records import FORMATS, JUDGED_FORMATS, parse_columns  # here: it imports transformers

        parse_columns(config.columns, FORMATS if config.loss == "ranking" else JUDGED_FORMATS)


def _check_on_policy(config: "TrainConfig", check: _Check) -> None:
    need = check.need
    need(all(config.on_policy), "on_policy", "names of sources")
    if config.on_policy:
        need(config.loss == "ranking", "loss", "ranking with --on-policy")
        need(config.global_batch_pairs > 1, "global_batch_pairs", "2 or more with --on-policy")
        need(not config.cache_states, "cache_states", "omitted with --on-policy, which draws new pairs in each epoch")
    check.only(bool(config.on_policy), OF_VIEWS, "omitted without --on-policy")


def _check_folders(config: "TrainConfig", check: _Check) -> None:
    need = check.need
    need(not config.push_to_hub or _is_repository(config.push_to_hub), "push_to_hub", "OWNER/NAME")
    need(bool(config.cache), "cache", "a folder, auto or none")
    need(not config.template_date or _is_date(config.template_date), "template_date", "a date as in 2026-01-31")
    need(bool(config.resume), "resume", "auto, never or the folder of a checkpoint")


def _check_contrastive(config: "TrainConfig", check: _Check) -> None:
    need = check.need
    if config.objective_variant == "dense":
        need(config.pairing in ("auto", "paired"), "pairing", "paired with --objective-variant dense")
        need(config.reduce in ("auto", "log_then_mean"), "reduce", "log_then_mean with --objective-variant dense")
        need(config.sampling == "random", "sampling", "random with --objective-variant dense, which draws nothing")
        need(config.distance == "cosine", "distance", "cosine with --objective-variant dense")
    if config.objective_variant == "repo":
        need(config.sampling in ("random", "avg"), "sampling", "random or avg with --objective-variant repo")
    if config.negatives == "after-divergence":
        drawn = config.sampling in ("random", "avg")
        need(drawn, "sampling", "random or avg with --negatives after-divergence")
    if config.sampling == "avg":
        need(config.pairing in ("auto", "paired"), "pairing", "paired with --sampling avg: there is one goal")


def _check_loss(config: "TrainConfig", check: _Check) -> None:
    need, loss = check.need, config.loss
    best = BEST_BY[loss]
    need(config.keep_best in ("", *best), "keep_best", f"{' or '.join(best)} with --loss {loss}")
    if loss != "ranking":
        need(not _generated(config), "loss", "ranking without --data, as the generated data are pairs")
        need(config.objective == "ranking", "objective", f"ranking with --loss {loss}: one completion has no goal")
        need(config.head != "bottleneck", "head", f"linear or mlp with --loss {loss}")
        need(not config.eval_by or loss == "bce", "eval_by", "omitted with --loss mse, which has no AUROC")
        check.only(False, OF_PAIRS, f"{{}} with --loss {loss}, which has no pairs")


def _check_model(config: "TrainConfig", check: _Check) -> None:
    need = check.need
    check.only(config.head == "bottleneck", OF_BOTTLENECK, "{} or omitted without --head bottleneck")
    if config.compare == "latents":
        need(config.head == "bottleneck", "compare", "states without --head bottleneck")
        need(not config.projection_size, "projection_size", "0 with --compare latents")
    if config.cache_states:
        need(config.train_layers > 0, "train_layers", "1 or more with --cache-states")
        need(config.cache != "none", "cache", "a folder or auto with --cache-states")
    need(bool(config.lora_targets), "lora_targets", "at least one layer")
    need(not config.lora_rank or bool(config.model), "lora_rank", "0 without --model, whose weights it adapts")
    need(not config.sft_weight or bool(config.model), "sft_weight", "0 without --model, whose lm_head it uses")
    if not config.model:
        if config.head_size:
            need(config.head_size % 2 == 0, "head_size", "even")
        else:
            need(config.hidden_size % (2 * config.heads) == 0, "hidden_size", "a multiple of 2 * --heads")
        need(config.heads % config.kv_heads == 0, "kv_heads", "a divisor of --heads")


def _check_evaluations(config: "TrainConfig", check: _Check) -> None:
    need = check.need
    check_fields("eval_by", config.eval_by)
    if config.keep_best:
        held_out = bool(config.eval_data) or config.eval_split > 0 or _generated(config)
        need(held_out, "keep_best", "omitted without --eval-data or --eval-split")
        need(config.keep > 0, "keep", "1 or more with --keep-best")
    watched = bool(config.keep_best) or not config.early_stopping
    need(watched, "early_stopping", "0 without --keep-best METRIC, as in --keep-best eval/auroc: it watches that")


def _check_packages(config: "TrainConfig", check: _Check) -> None:
    for name, wanted, module, extra in (
        ("lora_rank", config.lora_rank > 0, "peft", "lora"),
        ("optimizer", config.optimizer != "adamw", "torchao", "torchao"),
        ("attention", config.attention == "flash_attn", "flash_attn", "flash"),
        ("report_to", config.report_to == "wandb", "wandb", "wandb"),
    ):
        missing = wanted and importlib.util.find_spec(module) is None
        check.need(not missing, name, f"another value until pip install 'gcrm-fast[{extra}]'")


def _is_date(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return date.fromisoformat(text).isoformat() == text
    return False


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None
