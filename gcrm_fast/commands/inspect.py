"""``gcrm inspect``: a web page of records, token by token (evaluation/page.py)."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from gcrm_fast.commands.options import InspectOptions
from gcrm_fast.commands.shared import PAIRED, limited, open_model, records
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import output_file, written_aside
from gcrm_fast.data.records import Candidate
from gcrm_fast.evaluation.page import Column, Record, first_difference, margin, page, step_starts
from gcrm_fast.inference.candidates import encoded, judge
from gcrm_fast.inference.scoring import RewardModel

ERROR_FIELDS = {"first_error_step": 0, "error_step": 1, "error_steps": 1}  # -> number of the first step
RIGHT_FIELD = "is_correct"


def read_rows(options: InspectOptions, model: RewardModel) -> list[list[Candidate]]:
    """The records of --row; reading stops after the last. Raises UserError."""
    last = max(options.row)
    start = list(itertools.islice(records(options.data, model, options), last + 1))
    if len(start) <= last:
        raise UserError(f"--row {last}: {' '.join(options.data)} has {len(start)} records, numbered from 0")
    return [start[row] for row in options.row]


def error_step(candidate: Candidate, field: str, count_from: str) -> int | None:
    """Number of a completion's first wrong step, counted from 0; None if there is none or no field names one.

    Raises:
        UserError: --error-field is missing, or the value is not the number of a step.
    """
    if PAIRED.get(candidate.name):
        return None
    name = field or next((known for known in ERROR_FIELDS if known in candidate.fields), "")
    if not name:
        return None
    value = candidate.field(name, "named by --error-field")
    steps = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(step, bool) or not isinstance(step, int) for step in steps):
        raise UserError(f"{candidate.where}: field '{name}' is {str(value)[:20]!r}, not the number of a step")
    first = int(count_from or ERROR_FIELDS.get(name, 1))
    return min((step - first for step in steps if step >= first), default=None)


def is_right(candidate: Candidate) -> bool | None:
    """Whether a completion is right, by its place in a pair or its label; None if unknown."""
    if candidate.name in PAIRED:
        return PAIRED[candidate.name]
    label = candidate.field(RIGHT_FIELD, "a label") if RIGHT_FIELD in candidate.fields else None
    return bool(label) if label in (True, False) else None


def shown(
    model: RewardModel, chosen: Sequence[list[Candidate]], goal_D: Tensor, options: InspectOptions
) -> list[Record]:
    """Records with the values of their tokens. The first completion is compared with the second, all others with the
    first."""
    judged = iter(judge(model, [candidate for candidates in chosen for candidate in candidates], goal_D))
    result = []
    for candidates in chosen:
        of_record = [next(judged) for _ in candidates]
        columns = []
        for i, (candidate, (tokens, reward_n, q_n)) in enumerate(zip(candidates, of_record, strict=True)):
            text_n = model.texts(tokens)
            marks: dict[int, list[str]] = {}
            other = of_record[0] if i else of_record[1] if len(of_record) == 2 else None
            difference = first_difference(tokens, other.tokens) if other else None
            if difference is not None:
                marks[difference] = ["first difference"]
            step = error_step(candidate, options.error_field, options.count_from)
            starts = step_starts(text_n, options.step_end)
            if step is not None and step < len(starts):
                marks.setdefault(starts[step], []).append(f"error: step {step + 1}")
            column = Column(
                title=candidate.name + (", cut" if candidate.cut else ""),
                text_n=text_n,
                q_n=q_n,
                reward_n=reward_n,
                right=is_right(candidate),
                marks=marks,
                step_end=options.step_end,
            )
            columns.append(column)
        title = f"Record {candidates[0].row} ({Path(candidates[0].where).name})"
        result.append(Record(title=title, prompt=candidates[0].prompt, columns=columns))
    return result


def select(model: RewardModel, options: InspectOptions) -> tuple[dict[str, list[list[Candidate]]], str]:
    """Records to show by heading, and a line about all that were scored. Raises UserError."""
    everything = list(records(options.data, model, options))
    if not everything:
        raise UserError(f"{' '.join(options.data)}: has no records")
    candidates = [candidate for of_record in everything for candidate in of_record]
    drawn = {candidate.row for candidate in limited(candidates, [c.row for c in candidates], options.limit)}
    pool = [of_record for of_record in everything if of_record[0].row in drawn]
    flat = [candidate for of_record in pool for candidate in of_record]
    scores = iter(model.judge(encoded(flat, model), names=[c.label for c in flat], progress=True))
    margins = [margin([(is_right(candidate), next(scores).reward) for candidate in of_record]) for of_record in pool]
    known = sorted((value, i) for i, value in enumerate(margins) if value is not None)
    worst = [i for _, i in known[: options.worst]]
    others = [i for i in range(len(pool)) if i not in set(worst)]
    random = [others[i] for i in np.random.default_rng(0).permutation(len(others))[: options.random]]
    random.sort(key=lambda i: (margins[i] is None, margins[i] or 0.0))
    about = f"{len(pool)} of {len(everything)} records scored"
    if known:
        won = sum(value > 0 for value, _ in known)
        about += f"; the right completion has the higher reward in {won} of {len(known)}"
    elif options.worst:
        print("no record has a right and a wrong completion: --worst shows none", file=sys.stderr)
    groups = {
        f"Lowest {len(worst)} margins": worst,
        f"{len(random)} {'others, ' if worst else ''}drawn at random": random,
    }
    return {heading: [pool[i] for i in rows] for heading, rows in groups.items() if rows}, about


def inspect(options: InspectOptions) -> None:
    """Raises UserError."""
    output = output_file(options.output, options.data)
    model, goal_D = open_model(options)
    about = [f"Model {options.model}" + (f", goal {options.goal}" if options.goal else "")]
    title = "Inspect " + ", ".join(Path(source).name for source in options.data)
    if options.row:
        groups = {"": read_rows(options, model)}
    else:
        groups, scored = select(model, options)
        about.append(scored)
    if not groups:
        raise UserError("--worst and --random select no record: raise --random, or name a --row")
    flat = shown(model, [candidates for of_group in groups.values() for candidates in of_group], goal_D, options)
    remaining = iter(flat)
    by_heading = {heading: [next(remaining) for _ in of_group] for heading, of_group in groups.items()}
    with written_aside(output) as partial:
        page(title=title, about=about, groups=by_heading).save(partial)
