"""What the commands share that run a model over records: options, completions read from files, their fields."""

import sys
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from torch import Tensor

from gcrm_fast.checkpoints.goals import named_goal
from gcrm_fast.commands.options import JudgingOptions
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.records import COMPLETION_FORMATS, Candidate, completions_of_records, parse_columns
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.inference.candidates import fit
from gcrm_fast.inference.scoring import RewardModel

PAIRED = {"chosen": True, "correct": True, "rejected": False, "incorrect": False}  # a pair's fields: is it right?


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
