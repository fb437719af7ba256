"""Runs in words: what became of the records, what --dry-run shows, the held-out results."""

import math
from collections.abc import Mapping, Sequence

import torch

from gcrm_fast.common.errors import printable
from gcrm_fast.common.statistics import highest_by_chance
from gcrm_fast.common.tables import table
from gcrm_fast.data.encoding import CUT, Completion, TokenizedPair, TokenReport, token_texts
from gcrm_fast.training.accounting import work
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.training.memory import memory_limit, memory_plan, parameter_counts
from gcrm_fast.training.metrics_log import MetricsLog
from gcrm_fast.training.output_folder import finished
from gcrm_fast.training.prepare import Prepared, lora_of, steps_of, trained_layers

MANY_DROPPED = 0.1  # of the training pairs
FEW_STEPS, FEW_PAIRS = 20, 30
LEARNED = 0.98  # of the first evaluation's ranking loss
BLIND = "Q says nothing before the end token"
COLLAPSED = 0.95  # mean cosine between states of one completion
SHOWN = 200  # characters at both ends of a long text
HELD_OUT = {
    "AUROC": "auroc",
    "pair accuracy": "accuracy",
    "ranking loss": "loss/ranking",
    "contrastive loss": "loss/contrastive",
}
HELD_OUT_COMPLETIONS = {  # of --loss bce and mse
    "AUROC": "auroc",
    "accuracy": "accuracy",
    "binary cross-entropy": "loss/bce",
    "Pearson correlation": "pearson",
    "Spearman correlation": "spearman",
    "squared error": "loss/mse",
}


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def data_rows(prepared: Prepared, config: TrainConfig) -> list[tuple[str, str]]:
    """What became of the records: shown by --dry-run and at the start of a run."""

    def count(pairs: list[TokenizedPair], report: TokenReport) -> str:
        return (
            f"{len(pairs)} ({report.dropped} dropped: longer than --max-length {config.max_length} tokens; "
            f"{report.shortened} with a shortened prompt)"
        )

    report, held_out_report, shared = prepared.report, prepared.held_out_report, prepared.overlap
    rows = [
        (f"training {config.unit}", count(prepared.train, report)),
        (
            f"held-out {config.unit}",
            count(prepared.held_out, held_out_report)
            if held_out_report
            else "0: nothing is evaluated without --eval-data or --eval-split",
        ),
        (
            "held out and trained on",
            f"{_counted(shared.prompts, 'prompt')}, {_counted(shared.completions, 'completion')}",
        ),
        ("completion ends", report.ending_summary()),
    ]
    rows += mixture_rows(prepared, config) + on_policy_rows(prepared, config)
    if prepared.bad.skipped:
        rows.append(("bad records", f"{len(prepared.bad.skipped)} skipped; the first: {prepared.bad.skipped[0]}"))
    dropped = report.dropped / (report.dropped + len(prepared.train))
    if dropped > MANY_DROPPED:
        rows.append(("warning", f"{dropped:.0%} of the training {config.unit} are dropped: raise --max-length"))
    short = sum(len(pair.chosen_ids) - pair.chosen_start <= 2 for pair in prepared.train) / len(prepared.train)
    if config.objective == "gcrm" and short > 0.5:
        rows.append(
            (
                "warning",
                f"{short:.0%} of the chosen completions are one token and its end token: the contrastive loss compares "
                "little but the end token; --objective ranking omits it",
            )
        )
    if prepared.steps < FEW_STEPS:
        hint = "raise --steps" if config.steps else "raise --epochs or lower --global-batch-pairs"
        steps = _counted(prepared.steps, "optimizer step")
        rows.append(("warning", f"a run of {steps} hardly changes a model: {hint}"))
    if 0 < len(prepared.held_out) < FEW_PAIRS:
        more = "raise --eval-split" if config.eval_split else "give more --eval-data"
        few = f"{len(prepared.held_out)} held-out {config.unit}"
        rows.append(("warning", f"{few} cannot tell a good model from a bad one: {more}"))
    if prepared.bad.tied:
        rows.append(("records without a pair", f"{prepared.bad.tied}: all their completions tie"))
    longest = max(len(ids) for pair in prepared.train for ids in (pair.chosen_ids, pair.rejected_ids))
    positions = prepared.model_config.max_position_embeddings
    if longest > positions:
        rows.append(
            ("longer than the model knows", f"up to {longest} tokens: its max_position_embeddings is {positions}")
        )
    return rows


def mixture_rows(prepared: Prepared, config: TrainConfig) -> list[tuple[str, str]]:
    """Pairs, or completions, per epoch of each source, with --data-weights."""
    if not prepared.mixture:
        return []
    drawn, available = prepared.mixture.counts(), prepared.mixture.available()
    return [
        (
            f"  source {i}",
            f"{name}: {n} per epoch ({n / sum(drawn):.1%}), each of its {own} {config.unit} {n / own:.2g} times",
        )
        for i, (name, n, own) in enumerate(zip(config.data, drawn, available, strict=True), start=1)
    ]


def on_policy_rows(prepared: Prepared, config: TrainConfig) -> list[tuple[str, str]]:
    """What became of the samples of --on-policy, and how often they are used."""
    samples = prepared.on_policy
    if not samples:
        return []
    kept, per_epoch = sum(map(len, samples.records)), samples.per_epoch
    passes = prepared.steps * config.global_batch_pairs / per_epoch
    dropped = f"{samples.report.dropped} dropped: longer than --max-length {config.max_length} tokens"
    few = f"; {samples.too_few} prompts with fewer than two left" if samples.too_few else ""
    return [
        ("on-policy samples", f"{kept} of {len(samples.records)} prompts ({dropped}{few})"),
        ("  pairs of samples", f"{per_epoch}, about {passes:.2g} times in this run"),
        ("  sample ends", samples.report.ending_summary()),
    ]


def unlearned_rows(ranking: Sequence[float], peak_lr: float) -> list[tuple[str, str]]:
    """A warning where no evaluation has a ranking loss much below that of the first."""
    if min(ranking) < LEARNED * ranking[0]:
        return []
    fall = f"the held-out ranking loss hardly fell ({ranking[0]:.3f} -> {ranking[-1]:.3f})"
    return [("warning", f"{fall}: raise --lr (here {peak_lr:g}) or --epochs")]


def q_verdict(evaluation: Mapping[str, float]) -> str:
    """Whether Q-values say more than the end token, and whether states collapsed, in words."""
    within = evaluation["eval/similarity/within"]
    if within > COLLAPSED:
        return (
            f"the states have collapsed: those of a completion are nearly all equal (mean cosine {within:.3f}), so Q "
            "is about the same at each token: lower --contrastive-weight or --lr"
        )
    before, chance = evaluation["eval/auroc_q_at/before_end"], highest_by_chance(int(evaluation["eval/pairs"]))
    if before > chance:
        return f"Q tells chosen from rejected before the end token too (AUROC {before:.3f} one token before it)"
    if evaluation["eval/pairs"] < FEW_PAIRS:
        return f"too few held-out pairs ({evaluation['eval/pairs']:.0f}) to tell whether Q-values can be trusted"
    return (
        f"{BLIND} (AUROC {before:.3f} one token before it, where chance gives up to {chance:.3f}): do not use Q-values "
        "inside completions"
    )


def blind_rows(verdict: str, config: TrainConfig) -> list[tuple[str, str]]:
    """A warning where ``q_verdict`` found Q blind before the end token and goals at the end may change that
    (docs/results.md)."""
    if not verdict.startswith(BLIND) or config.objective != "gcrm" or config.sampling != "random":
        return []
    return [("warning", "for Q-values inside completions try --sampling end_mix: pretrained models needed it")]


def beaten_rows(evaluation: Mapping[str, float], baselines: Mapping[str, float]) -> list[tuple[str, str]]:
    """A warning where a shortcut orders the held-out pairs at least as well as the model."""
    own = evaluation["eval/auroc"]
    names = {"baseline/auroc_length": "their length", "baseline/auroc_bag_of_tokens": "their bag of tokens"}
    better = [f"{name} ({baselines[key]:.3f})" for key, name in names.items() if baselines[key] >= own]
    text = f"{' or '.join(better)} alone orders the held-out completions as well as this model (AUROC {own:.3f})"
    return [("warning", text)] if better else []


def first_pair_rows(prepared: Prepared) -> list[tuple[str, str]]:
    """The first training pair, or completion, as the model reads it: texts, where each completion starts, where its
    reward is read."""
    pair = prepared.train[0]
    what, names = ("pair", ["chosen", "rejected"]) if pair.target is None else ("completion", ["completion"])
    prompt = "".join(token_texts(prepared.tokenizer, Completion(pair.chosen_ids[: pair.chosen_start], 0, CUT)))
    rows = [(f"first {what}", pair.where or pair.name), ("  prompt", _quoted(prompt))]
    starts = pair.chosen_start, pair.rejected_start
    for name, ids, start in zip(names, pair.sequences, starts, strict=False):
        *_, last = texts = token_texts(prepared.tokenizer, Completion(ids, start, CUT))
        place = f"tokens {start + 1} to {len(ids)}; the reward is read at the last, {_quoted(last)}"
        rows.append((f"  {name}", f"{_quoted(''.join(texts))}, {place}"))
    if pair.target is not None:
        rows.append(("  label or score", f"{pair.target:g}"))
    return rows


def _quoted(text: str) -> str:
    """On one line, without its middle where it is long."""
    text = text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} ... {text[-SHOWN:]}"
    return f'"{printable(text)}"'


def describe(prepared: Prepared, config: TrainConfig, world_size: int) -> str:
    """What --dry-run prints: drops, the first pair, lengths, packs, steps, predicted memory."""
    steps, sampled_steps = steps_of(prepared, config, 0, 1), min(8, prepared.steps)
    packs = [pack for i in range(sampled_steps) for pack in steps[i].packs]
    layers, lora = trained_layers(config, prepared.model_config), lora_of(config, prepared.model_config)
    done = [work(pack, prepared.model_config, "none", layers, lora) for pack in packs]
    tokens = sum(w.tokens for w in done)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained, whole = parameter_counts(
        prepared.model_config,
        layers,
        lora,
        cached_states=False,
        lm_head=config.sft_weight > 0,
        views=prepared.on_policy is not None,
    )
    refused = finished(prepared.output, config)
    parameters = f"{whole / 1e6:.2f} M" + (f", of which {trained / 1e6:.2f} M are trained" if trained < whole else "")
    return table(
        [
            *data_rows(prepared, config),
            *first_pair_rows(prepared),
            ("prompt tokens", prepared.report.prompt_summary()),
            ("completion tokens", prepared.report.completion_summary()),
            ("steps", f"{prepared.steps} of {config.global_batch_pairs} {config.unit}"),
            ("packs per step", f"{len(packs) / sampled_steps:.1f} over all processes (first {sampled_steps} steps)"),
            ("pack fill", f"{100 * tokens / len(packs) / config.tokens_per_batch:.0f}% of --tokens-per-batch"),
            ("padded / packed", f"{sum(w.padded_tokens for w in done) / tokens:.2f} times the tokens if padded"),
            ("parameters", parameters),
            ("predicted memory", str(memory_plan(prepared, config, world_size, device, memory_limit(device)))),
            *([("warning", refused)] if refused else []),
        ]
    )


def held_out_rows(log: MetricsLog, evaluation: Mapping[str, float]) -> list[tuple[str, str]]:
    """Lines of a table: the first evaluation and this one; none without held-out data."""
    if not evaluation:
        return []

    def last(key: str) -> str:
        bounds = [evaluation.get(f"eval/{key}_{end}", math.nan) for end in ("low", "high")]
        shown = "" if math.isnan(bounds[0]) else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
        return f"{evaluation.get(f'eval/{key}', math.nan):.3f}{shown}"

    pairs = "eval/pairs" in evaluation
    names = HELD_OUT if pairs else {n: k for n, k in HELD_OUT_COMPLETIONS.items() if log.series(f"eval/{k}")}
    rows = [(f"held-out {name}", f"{log.series(f'eval/{key}')[0]:.3f} -> {last(key)}") for name, key in names.items()]
    places = {"_at/50": "at 50% of the completion", "_at/90": "at 90%", "_at/before_end": "one token before the end"}
    of_q = [
        f"{evaluation.get(f'eval/auroc_q{at}', math.nan):.3f} {place}" for at, place in (places | {"": "at it"}).items()
    ]
    if pairs:
        rows.append(("held-out AUROC of Q", ", ".join(of_q)))
    prefix = "eval/auroc/"
    groups = {key.removeprefix(prefix): value for key, value in evaluation.items() if key.startswith(prefix)}
    return rows + [(f"  AUROC {name}", f"{value:.3f}") for name, value in groups.items()]
