"""``gcrm evaluate``: how well a model's rewards and Q-values tell right completions from wrong ones, and how far
shortcuts get on the same completions."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from gcrm_fast.command_line import exit_code, parse_options
from gcrm_fast.config import parse_columns
from gcrm_fast.errors import UserError
from gcrm_fast.judging import COVERAGE, RESAMPLES, Labelled, cross_fitted, group_scores, halves, measures
from gcrm_fast.packing import quantile_positions
from gcrm_fast.plots import plot_histograms, plot_partial, plot_roc
from gcrm_fast.records import Candidate, read_completions
from gcrm_fast.results import Row, check_folder, columns, new_folder, number, with_interval, write_rows
from gcrm_fast.scoring import RewardModel
from gcrm_fast.sources import BadRecords


@dataclass(frozen=True)
class Options:
    """AUROC of rewards and Q-values over completions known to be right or wrong, beside what shortcuts reach.

    Leaves results.json, results.csv, roc.png, partial.png and histograms.png in the output folder.
    """

    model: tyro.conf.Positional[str]
    """Folder of a trained model, or a hub repository."""
    files: tyro.conf.Positional[tuple[str, ...]]
    """Completions with a label, or preference pairs: any source that gcrm train reads; each is reported on its own."""
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Folder for the results: written aside, and there only when complete."""
    label: str = "is_correct"
    """Field that says whether a completion is right: true or false. Of pairs the chosen one is."""
    by: str = ""
    """Fields to break the numbers down by, as in family,model; each also gives the baseline of knowing it alone."""
    question: str = ""
    """Field that tells questions apart, whose completions belong together. Empty: the prompt does."""
    goal: str = ""
    """Name of the goal state in the model's folder; its first by default."""
    limit: int = 0
    """Records of each file that are taken, drawn at random but the same every time; 0 is all."""
    columns: str = ""
    """The records' names of fields, as in prompt=instruction,completion=answer."""
    tokens_per_batch: int = 16384
    """Tokens computed at a time: memory grows with it."""
    dtype: str = "auto"
    """Of the computation: auto is bfloat16 on a GPU, else float32."""
    attention: str = "auto"
    """As in gcrm train."""
    overwrite: bool = False
    """Replace the results in the output folder."""


# ------------------------------------------------------------------------------------------------------------ input


def field_of(candidate: Candidate, name: str, flag: str) -> Any:
    """A field of the completion's record; of a list over 'completions' the completion's own entry.

    Raises:
        UserError: no such field, or no such entry.
    """
    where = candidate.where
    if name not in candidate.fields:
        raise UserError(f"{where}: field '{name}', named by {flag}, is missing")
    value = candidate.fields[name]
    if isinstance(value, list) and candidate.name.startswith("completions["):
        index = int(candidate.name[len("completions[") : -1])
        if index >= len(value):
            raise UserError(f"{where}: field '{name}' has {len(value)} entries, but there is a {candidate.name}")
        return value[index]
    return value


def text_of(candidate: Candidate, name: str, flag: str) -> str:
    """The same for a field that names something: a string, number or boolean, as text."""
    value = field_of(candidate, name, flag)
    if not isinstance(value, (str, int, float)):
        raise UserError(
            f"{candidate.where}: field '{name}', named by {flag}, is {type(value).__name__}, not a string, number or "
            "boolean"
        )
    return str(value)


def questions_of(candidates: Sequence[Candidate], field: str) -> list[str]:
    return [text_of(c, field, "--question") if field else c.prompt for c in candidates]


def is_right(candidate: Candidate, label: str) -> bool:
    """Whether a completion is right: the chosen one of a pair, or as its label says."""
    if candidate.name in ("chosen", "rejected", "correct", "incorrect"):
        return candidate.name in ("chosen", "correct")
    value = field_of(candidate, label, "--label")
    if value not in (True, False):  # 1 and 0 too
        raise UserError(f"{candidate.where}: field '{label}' is {str(value)[:20]!r}, not true or false")
    return bool(value)


def read_limited(source: str, model: RewardModel, columns_: str, limit: int) -> list[Candidate]:
    """The completions of one source; ``limit`` draws that many records, the same every time, and keeps their order."""
    candidates = read_completions(
        [source], columns=parse_columns(columns_), tokenizer=model.tokenizer, fields=("*",), bad=BadRecords()
    )
    last = candidates[-1].row
    if 0 < limit <= last:
        drawn = set(np.random.default_rng(0).permutation(last + 1)[:limit].tolist())
        candidates = [candidate for candidate in candidates if candidate.row in drawn]
    return candidates


@dataclass(frozen=True)
class Labels:
    """What is known of a source's completions before they are scored."""

    candidates: list[Candidate]
    questions: list[str]
    right_N: np.ndarray
    groups: dict[str, np.ndarray]  # by field of --by: the value of each completion, [N] of str


def read_labels(source: str, model: RewardModel, options: Options) -> Labels:
    """Raises UserError for a record without label, question or group, and where all completions are of one class."""
    candidates = read_limited(source, model, options.columns, options.limit)
    right_N = np.array([is_right(candidate, options.label) for candidate in candidates], dtype=bool)
    if right_N.all() or not right_N.any():
        kind = "right" if right_N.all() else "wrong"
        raise UserError(f"{source}: all {len(right_N)} completions are {kind}: there is nothing to tell apart")
    names = [name for name in (part.strip() for part in options.by.split(",")) if name]
    groups = {name: np.array([text_of(c, name, "--by") for c in candidates]) for name in names}
    return Labels(candidates, questions_of(candidates, options.question), right_N, groups)


def score(model: RewardModel, labels: Labels, goal: str) -> Labelled:
    """Rewards and Q-values of every completion, beside its label."""
    candidates = labels.candidates
    encoded = model.encode(
        [c.prompt for c in candidates], [c.completion for c in candidates], [c.cut for c in candidates]
    )
    names = [f"{c.where}: {c.name}" for c in candidates]
    state = model.goal(goal or None)
    judged = model.judge(encoded, goals_GD=state[None], per_token=True, names=names, progress=True)
    reward_NP, q_N = [], []
    for one in judged:
        assert one.rewards_n is not None
        assert one.q_Gn is not None
        reward_NP.append(one.rewards_n[quantile_positions(len(one.rewards_n))])
        q_N.append(one.q_Gn[0])
    return Labelled(
        right_N=labels.right_N,
        question_N=np.unique(labels.questions, return_inverse=True)[1],
        half_N=halves(labels.questions),
        lengths_N=np.array([len(q) for q in q_N]),
        reward_NP=np.array(reward_NP, dtype=np.float64),
        q_N=q_N,
        pairs=all(c.name in ("chosen", "rejected", "correct", "incorrect") for c in candidates),
    )


# ----------------------------------------------------------------------------------------------------------- output


def rows_of(source: str, labelled: Labelled, groups: dict[str, np.ndarray]) -> list[Row]:
    """Every measure of a source as a whole and of each group."""
    parts = {"all": np.ones_like(labelled.right_N)}
    parts |= {f"{name}={value}": value_N == value for name, value_N in groups.items() for value in np.unique(value_N)}
    rows = []
    for group, mask_N in tqdm(parts.items(), desc="resampling", unit="group", leave=False, delay=1):
        part = labelled.subset(mask_N)
        rows += [Row(source, group, "completions", len(part.right_N)), Row(source, group, "right", part.right_N.sum())]
        rows += [Row(source, group, *measure) for measure in measures(part)]
    for name, value_N in groups.items():
        number_N = np.unique(value_N, return_inverse=True)[1]
        [value] = cross_fitted(labelled, lambda fitted, n=number_N: group_scores(n, labelled.right_N, fitted))
        rows.append(Row(source, "all", f"baseline_identity:{name}", value))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The printed summary: a line for each source and each of its groups."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.source, row.group), {})[row.measure] = row
    identities = sorted({row.measure for row in rows if row.measure.startswith("baseline_identity")})
    pairs = any(row.measure == "pair_accuracy" for row in rows)
    head = ["", "n", "right", "AUROC of reward", "of Q", "within questions", *(["pair accuracy"] if pairs else []),
            "length", "position Q", *(name.removeprefix("baseline_") for name in identities)]  # fmt: skip
    cells = []
    for (source, group), found in lines.items():
        n, right = found["completions"].value, found["right"].value
        longer = found["auroc_longer"].value
        sign = "" if longer != longer else " longer" if longer >= 0.5 else " shorter"
        cells.append(
            [
                source if group == "all" else f"  {group}",
                f"{n:.0f}",
                f"{100 * right / n:.0f}%",
                with_interval(found["auroc_reward"]) if 0 < right < n else "one class",
                number(found["auroc_q"].value),
                number(found["auroc_reward_within_questions"].value),
                *([with_interval(found["pair_accuracy"]) if "pair_accuracy" in found else "-"] if pairs else []),
                number(found["baseline_length"].value) + sign,
                number(found["baseline_position_q@100"].value),
                *(number(found[name].value) if name in found else "" for name in identities),
            ]
        )
    return columns(head, cells)


def run(options: Options) -> None:
    """Reads and checks all files, then scores them. Raises UserError."""
    check_folder(options.output, options.overwrite)
    if not options.files:
        raise UserError("no FILE is given: name files of completions with labels, or of pairs")
    if options.limit < 0:
        raise UserError(f"--limit {options.limit}: must be 0 or more")
    model = RewardModel.from_pretrained(
        options.model, dtype=options.dtype, tokens_per_batch=options.tokens_per_batch, attention=options.attention
    )
    sources = {source: read_labels(source, model, options) for source in options.files}
    rows: list[Row] = []
    with new_folder(options.output) as folder:
        scored = {source: score(model, labels, options.goal) for source, labels in sources.items()}
        for source, labelled in scored.items():
            rows += rows_of(source, labelled, sources[source].groups)
        plot_roc(scored, folder / "roc.png")
        plot_partial(rows, folder / "partial.png")
        plot_histograms(scored, folder / "histograms.png")
        about = {
            "model": options.model,
            "fingerprint": model.fingerprint,
            "goal": options.goal or next(iter(model.goals)),
            "limit": options.limit,
            "intervals": f"{100 * COVERAGE:.0f} %, bootstrap of {RESAMPLES} draws of questions "
            f"({'field ' + options.question if options.question else 'one a prompt'})",
        }
        write_rows(folder, rows, about)
    print(table(rows))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr for an error that the user can mend."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code("gcrm evaluate", lambda: run(parse_options(Options, arguments, "gcrm evaluate")))
