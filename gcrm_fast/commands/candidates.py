"""What the judging commands share: options, completions read from files, their fields, their rewards and Q-values."""

import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from torch import Tensor

from gcrm_fast.checkpoints.goals import named_goal
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import ModelOptions
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.records import COMPLETION_FORMATS, Candidate, completions_of_records, parse_columns
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.inference.scoring import RewardModel

PAIRED = {"chosen": True, "correct": True, "rejected": False, "incorrect": False}  # a pair's fields: is it right?


@dataclass(frozen=True, kw_only=True)
class JudgingOptions(ModelOptions):
    """Options of every command that judges a file's completions."""

    goal: str = ""
    """Goal state of the Q-values: FILE[:NAME]. By default the model's own default goal."""


@dataclass(frozen=True, kw_only=True)
class TableOptions(JudgingOptions):
    """Options of every command that leaves a folder of results."""

    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Folder for the results: written aside, and there only when complete."""
    by: str = ""
    """Fields to break the numbers down by, as in family,model."""
    question: str = ""
    """Field that tells questions apart, whose completions belong together. Empty: the prompt does."""
    limit: int = 0
    """At most this many are taken, drawn at random but the same every time; 0 is all."""
    overwrite: bool = False
    """Replace the results in the output folder."""


class Judgement(NamedTuple):
    """A completion's tokens, and the rewards and Q-values [n] float32 at each of those after the prompt."""

    tokens: Completion
    reward_n: np.ndarray
    q_n: np.ndarray


def open_model(options: JudgingOptions) -> tuple[RewardModel, Tensor]:
    """The model, and the goal state [D] of its Q-values. Raises UserError."""
    model = RewardModel.from_pretrained(options.model, dtype=options.dtype, tokens_per_batch=options.tokens_per_batch)
    return model, named_goal(options.goal, model.fingerprint) if options.goal else model.goal()


def records(sources: Sequence[str], model: RewardModel, options: JudgingOptions) -> Iterator[list[Candidate]]:
    """The completions of one record after another, with all fields of their record."""
    columns = parse_columns(options.columns, COMPLETION_FORMATS)
    bad = BadRecords(skip=options.on_bad_record == "skip")
    found = completions_of_records(sources, columns=columns, tokenizer=model.tokenizer, fields=("*",), bad=bad)
    yield from fit(found, model, bad)
    if bad.skipped:
        print(f"{len(bad.skipped)} bad records are left out; the first: {bad.skipped[0]}", file=sys.stderr)


def fit(found: Iterator[list[Candidate]], model: RewardModel, bad: BadRecords) -> Iterator[list[Candidate]]:
    """The records; where bad ones are left out, those with a completion that the model cannot score go there too. Else
    scoring says so, before it starts."""
    for record in found:
        if bad.skip and (wrong := unfit(record, encoded(record, model), model)):
            bad.add(UserError(wrong))
        else:
            yield record


def encoded(found: Sequence[Candidate], model: RewardModel) -> list[Completion]:
    """Their tokens."""
    return model.encode([c.prompt for c in found], [c.completion for c in found], [c.cut for c in found])


def unfit(record: Sequence[Candidate], tokens: Sequence[Completion], model: RewardModel) -> str:
    """Why the first completion that cannot be scored cannot; "" where all can."""
    wrong = (f"{c.label} {why}" for c, t in zip(record, tokens, strict=True) if (why := model.unfit(t)))
    return next(wrong, "")


def limited(candidates: list[Candidate], keys: Sequence[Hashable], limit: int) -> list[Candidate]:
    """The completions of ``limit`` keys, drawn at random but the same every time, in their order; all where it is 0."""
    if limit < 0:
        raise UserError(f"--limit {limit}: must be 0 or more")
    distinct = list(dict.fromkeys(keys))
    if not limit or limit >= len(distinct):
        return candidates
    drawn = {distinct[i] for i in np.random.default_rng(0).permutation(len(distinct))[:limit]}
    return [candidate for candidate, key in zip(candidates, keys, strict=True) if key in drawn]


def text_of(candidate: Candidate, name: str, flag: str) -> str:
    """A field that names something, a string, number or boolean, as text without white space around it."""
    value = candidate.field(name, f"named by {flag}")
    if not isinstance(value, (str, int, float)):
        kind = f"is {type(value).__name__}, not a string, number or boolean"
        raise UserError(f"{candidate.where}: field '{name}', named by {flag}, {kind}")
    return str(value).strip()


def questions_of(candidates: Sequence[Candidate], field: str) -> list[str]:
    """What tells the question of each completion: a field, or the prompt."""
    return [text_of(c, field, "--question") if field else c.prompt for c in candidates]


def groups_of(candidates: Sequence[Candidate], by: str) -> dict[str, np.ndarray]:
    """For each field of --by the value of every completion, [N] of str."""
    names = [name for name in (part.strip() for part in by.split(",")) if name]
    return {name: np.array([text_of(c, name, "--by") for c in candidates]) for name in names}


def judge(model: RewardModel, candidates: Sequence[Candidate], goal_D: Tensor) -> list[Judgement]:
    """Rewards and Q-values at every token of every completion."""
    completions = encoded(candidates, model)
    names = [c.label for c in candidates]
    judged = model.judge(completions, goals_GD=goal_D[None], per_token=True, names=names, progress=True)
    return [
        Judgement(tokens, scores.rewards_n, scores.q_Gn[0])
        for tokens, scores in zip(completions, judged, strict=True)
        if scores.rewards_n is not None and scores.q_Gn is not None  # both were asked for
    ]
