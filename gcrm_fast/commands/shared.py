"""What the commands share that run a model over records: options, completions read from files, their fields."""

import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from torch import Tensor
from tyro.conf import Positional

from gcrm_fast.checkpoints.goals import named_goal
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.records import COMPLETION_FORMATS, Candidate, completions_of_records, parse_columns
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.inference.candidates import fit
from gcrm_fast.inference.scoring import RewardModel

PAIRED = {"chosen": True, "correct": True, "rejected": False, "incorrect": False}  # a pair's fields: is it right?


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Of the commands that run a model over records."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Reward model: a folder or a hub name."""
    data: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE...")]
    """Records: files of JSON lines (plain or gzipped, - for stdin) or Parquet, folders that datasets saved, datasets of
    the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the trunk computes in; auto: bfloat16 on a GPU, else float32."""
    tokens_per_batch: int = 16384
    """Tokens that are computed at a time: memory grows with it."""
    columns: str = ""
    """Names that the records use for this project's fields: prompt=instruction,completion=answer. No other fields are
    read then."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A record that cannot be used ends the run, or is left out and counted."""

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("no records are named: MODEL FILE... are expected")
        if self.tokens_per_batch < 1:
            raise UserError(f"--tokens-per-batch {self.tokens_per_batch}: must be at least 1")


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
