"""What the commands share that run a model over records: the model, the completions of files, fields of records."""

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from torch import Tensor

from gcrm_fast.checkpoints.goals import named_goal
from gcrm_fast.commands.options import EnsembleOptions, JudgingOptions, ModelOptions, ServeOptions
from gcrm_fast.common.errors import UserError, printable
from gcrm_fast.data.records import COMPLETION_FORMATS, Candidate, completions_of_records, parse_columns
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.inference.candidates import fit
from gcrm_fast.inference.ensembles import load_ensemble
from gcrm_fast.inference.scoring import RewardModel

Records = Iterator[list[Candidate]]
PAIRED = {"chosen": True, "correct": True, "rejected": False, "incorrect": False}  # a pair's fields: is it right?


def load(options: ModelOptions | ServeOptions) -> RewardModel:
    """The model that MODEL names, with those of --ensemble. Raises UserError."""
    others, combine = (options.ensemble, options.combine) if isinstance(options, EnsembleOptions) else ((), "mean")
    return load_ensemble(
        [options.model, *others],
        combine,
        dtype=options.dtype,
        tokens_per_batch=options.tokens_per_batch,
        end=options.end,
        special_tokens=options.special_tokens,
    )


def open_model(options: JudgingOptions) -> tuple[RewardModel, Tensor]:
    """The model, and the goal state [D] of its Q-values. Raises UserError."""
    model = load(options)
    if not options.goal:
        return model, model.goal()
    return model, named_goal(options.goal, model.fingerprint, model.config.state_size)


def read(
    sources: Sequence[str], model: RewardModel, options: ModelOptions, bad: BadRecords
) -> Iterator[list[Candidate]]:
    """The completions of one record after another, with all fields of the record."""
    columns = parse_columns(options.columns, COMPLETION_FORMATS)
    return completions_of_records(sources, fields=("*",), columns=columns, tokenizer=model.tokenizer, bad=bad)


def records(
    sources: Sequence[str],
    model: RewardModel,
    options: ModelOptions,
    check: Callable[[Candidate], object] = lambda candidate: None,
) -> Records:
    """The completions of one record after another. Records that do not fit the model count as bad, and so do those with
    a completion for which ``check`` raises UserError."""
    bad = BadRecords(skip=options.on_bad_record == "skip")
    for record in fit(read(sources, model, options, bad), model, bad):
        try:
            for candidate in record:
                check(candidate)
        except UserError as error:
            bad.add(error)
        else:
            yield record
    say_skipped(bad)


def say_skipped(bad: BadRecords) -> None:
    """Says on stderr how many records were skipped, and why the first one."""
    if bad.skipped:
        print(f"bad records skipped: {len(bad.skipped)}; the first: {printable(bad.skipped[0])}", file=sys.stderr)


def check_left(left: int, bad: BadRecords, sources: Sequence[str]) -> None:
    """``say_skipped``. Raises UserError where no record of ``sources`` is left."""
    if not left:
        raise UserError(f"{' '.join(sources)}: every record is bad; the first: {bad.skipped[0]}")
    say_skipped(bad)


def limited(candidates: list[Candidate], keys: Sequence[Hashable], limit: int) -> list[Candidate]:
    """The completions of ``limit`` keys, drawn at random, the same each time, in their order; all if it is 0."""
    distinct = list(dict.fromkeys(keys))
    if not limit or limit >= len(distinct):
        return candidates
    drawn = {distinct[i] for i in np.random.default_rng(0).permutation(len(distinct))[:limit]}
    return [candidate for candidate, key in zip(candidates, keys, strict=True) if key in drawn]


def text_of(candidate: Candidate, name: str, option: str) -> str:
    """A field that holds a string, number or boolean, as text without surrounding white space."""
    value = candidate.field(name, f"named by {option}")
    if not isinstance(value, (str, int, float)):
        kind = f"is {type(value).__name__}, not a string, number or boolean"
        raise UserError(f"{candidate.where}: field '{name}', named by {option}, {kind}")
    return str(value).strip()


def truth_of(candidate: Candidate, name: str, asked: str) -> bool:
    """A field that holds true or false, or 1 or 0; ``asked`` says who needs it."""
    value = candidate.field(name, asked)
    if value not in (True, False):
        raise UserError(f"{candidate.where}: field '{name}' is {str(value)[:20]!r}, not true or false")
    return bool(value)


def questions_of(candidates: Sequence[Candidate], field: str) -> list[str]:
    """The question of each completion: a field, or the prompt."""
    return [text_of(c, field, "--question") if field else c.prompt for c in candidates]


def groups_of(candidates: Sequence[Candidate], by: Sequence[str]) -> dict[str, np.ndarray]:
    """For each field of --by its value for every completion, [N] of str."""
    return {name: np.array([text_of(c, name, "--by") for c in candidates]) for name in by}


def members_of(groups: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The completions of each group FIELD=VALUE, after ``all`` of them, [N] of bool. A field with one value has no
    group, and a line says so: it would be the same as all."""
    members = {"all": np.ones(count, dtype=bool)}
    for name, value_N in groups.items():
        values = np.unique(value_N)
        if len(values) == 1:
            print(printable(f"--by {name}: every completion has {name}={values[0]}, the same as all"), file=sys.stderr)
        else:
            members |= {f"{name}={value}": value_N == value for value in values}
    return members
