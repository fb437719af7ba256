"""``gcrm evaluate``: how well rewards and Q-values tell right completions from wrong ones, compared with shortcuts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gcrm_fast.commands.options import EvaluateOptions
from gcrm_fast.commands.shared import (
    PAIRED,
    groups_of,
    limited,
    members_of,
    open_model,
    questions_of,
    records,
    truth_of,
)
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.progress import progress_bar
from gcrm_fast.common.tables import columns, number
from gcrm_fast.data.records import Candidate
from gcrm_fast.data.sampling import quantile_positions
from gcrm_fast.evaluation.measures import COVERAGE, RESAMPLES, Labeled, cross_fitted, group_scores, halves, measures
from gcrm_fast.evaluation.plots import plot_histograms, plot_partial, plot_roc
from gcrm_fast.evaluation.results import Row, check_folder, with_interval, write_rows
from gcrm_fast.inference.candidates import judge
from gcrm_fast.inference.scoring import RewardModel


@dataclass(frozen=True, kw_only=True)
class Source:
    """The completions of a source before they are scored."""

    candidates: list[Candidate]
    questions: list[str]
    right_N: np.ndarray
    groups: dict[str, np.ndarray]


def is_right(candidate: Candidate, label: str) -> bool:
    """Whether a completion is right, by its place in a pair or its label."""
    if candidate.name in PAIRED:
        return PAIRED[candidate.name]
    return truth_of(candidate, label, "which labels completions (--label)")


def read_source(source: str, model: RewardModel, options: EvaluateOptions) -> Source:
    """Raises UserError for a record without label, question or group, and if all completions are right, or wrong."""

    def check(candidate: Candidate) -> None:
        is_right(candidate, options.label)
        questions_of([candidate], options.question)
        groups_of([candidate], options.by)

    candidates = [candidate for of_record in records([source], model, options, check) for candidate in of_record]
    candidates = limited(candidates, [candidate.row for candidate in candidates], options.limit)
    right_N = np.array([is_right(candidate, options.label) for candidate in candidates], dtype=bool)
    if right_N.all() or not right_N.any():
        kind = "right" if right_N.all() else "wrong"
        raise UserError(f"{source}: all {len(right_N)} completions are {kind}: AUROC needs both kinds")
    return Source(
        candidates=candidates,
        questions=questions_of(candidates, options.question),
        right_N=right_N,
        groups=groups_of(candidates, options.by),
    )


def score(model: RewardModel, source: Source, goal_D: Tensor) -> Labeled:
    """The label, rewards and Q-values of every completion."""
    judged = judge(model, source.candidates, goal_D)
    return Labeled(
        right_N=source.right_N,
        question_N=np.unique(source.questions, return_inverse=True)[1],
        half_N=halves(source.questions),
        lengths_N=np.array([len(one.q_n) for one in judged]),
        reward_NP=np.array([one.reward_n[quantile_positions(len(one.reward_n))] for one in judged], dtype=np.float64),
        q_N=[one.q_n for one in judged],
        pairs=all(candidate.name in PAIRED for candidate in source.candidates),
    )


def identity_auroc(labeled: Labeled, group_N: np.ndarray) -> float:
    """AUROC of a score that knows only the group of a completion."""
    number_N = np.unique(group_N, return_inverse=True)[1]
    [value] = cross_fitted(labeled, lambda fitted_N: group_scores(number_N, labeled.right_N, fitted_N))
    return value


def rows_of(source: str, labeled: Labeled, groups: dict[str, np.ndarray]) -> list[Row]:
    """Every measure of a source as a whole and of each group."""
    parts = members_of(groups, len(labeled.right_N))
    rows = []
    for group, mask_N in progress_bar(parts.items(), desc="resampling", unit="group", brief=True):
        part = labeled.subset(mask_N)
        rows += [
            Row(source, group, "completions", len(part.right_N)),
            Row(source, group, "right", int(part.right_N.sum())),
        ]
        rows += [Row(source, group, *measure) for measure in measures(part)]
    for name, value_N in groups.items():
        rows.append(Row(source, "all", f"baseline_identity:{name}", identity_auroc(labeled, value_N)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The printed summary: a line per source, and per group of it."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.source, row.group), {})[row.measure] = row
    identities = sorted({row.measure for row in rows if row.measure.startswith("baseline_identity")})
    pairs = any(row.measure == "pair_accuracy" for row in rows)
    head = [
        "",
        "completions",
        "right",
        "reward AUROC",
        "Q AUROC",
        "reward AUROC within questions",
        *(["pair accuracy"] if pairs else []),
        "length AUROC",
        "Q position AUROC",
        *(name.removeprefix("baseline_") for name in identities),
    ]
    cells = []
    for (source, group), measured in lines.items():
        n, right = measured["completions"].value, measured["right"].value
        longer = measured["auroc_longer"].value
        sign = "" if longer != longer else " longer" if longer >= 0.5 else " shorter"
        cells.append(
            [
                source if group == "all" else f"  {group}",
                f"{n:.0f}",
                f"{100 * right / n:.0f}%",
                with_interval(measured["auroc_reward"]) if 0 < right < n else "one class",
                number(measured["auroc_q"].value),
                number(measured["auroc_reward_within_questions"].value),
                *([with_interval(measured["pair_accuracy"]) if "pair_accuracy" in measured else "-"] if pairs else []),
                number(measured["baseline_length"].value) + sign,
                number(measured["baseline_position_q@100"].value),
                *(number(measured[name].value) if name in measured else "" for name in identities),
            ]
        )
    return columns(head, cells)


def evaluate(options: EvaluateOptions) -> None:
    """Reads and checks all files, then scores them. Raises UserError."""
    check_folder(options.output, options.overwrite)
    model, goal_D = open_model(options)
    sources = {name: read_source(name, model, options) for name in options.data}
    rows: list[Row] = []
    with written_aside(options.output) as folder:
        folder.mkdir(parents=True)
        scored = {name: score(model, source, goal_D) for name, source in sources.items()}
        for name, labeled in scored.items():
            rows += rows_of(name, labeled, sources[name].groups)
        unit = f"field {options.question}" if options.question else "prompt"
        about = {
            "model": options.model,
            "fingerprint": model.fingerprint,
            "goal": options.goal or "the model's own",
            "limit": options.limit,
            "intervals": f"{100 * COVERAGE:.0f} %, bootstrap of {RESAMPLES} draws of questions (identified by {unit})",
        }
        write_rows(folder, rows, about)
        plot_roc(scored, rows, folder / "roc.png")
        plot_partial(scored, rows, folder / "partial.png")
        plot_histograms(scored, folder / "histograms.png")
    print(f"{table(rows)}\n\nwrote {options.output}")
