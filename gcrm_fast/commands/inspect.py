"""``gcrm inspect``: a web page of records, token by token (evaluation/page.py), or of generated texts (tree.py)."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from gcrm_fast.commands.options import InspectOptions
from gcrm_fast.commands.shared import PAIRED, check_left, limited, open_model, records
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import output_file, written_aside
from gcrm_fast.data.prompts import read_prompts
from gcrm_fast.data.records import Candidate
from gcrm_fast.data.sources import STDIN, BadRecords, rows
from gcrm_fast.data.special_tokens import readable
from gcrm_fast.evaluation.page import Column, Page, Record, margin, marks_of, page, selected
from gcrm_fast.evaluation.tree import Tree, samples_of, tree_page
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
    """Records with the values of their tokens."""
    judged = iter(judge(model, [candidate for candidates in chosen for candidate in candidates], goal_D))
    result = []
    for candidates in chosen:
        of_record = [next(judged) for _ in candidates]
        completions = [one.tokens for one in of_record]
        texts = [model.texts(tokens) for tokens in completions]
        errors = [error_step(candidate, options.error_field, options.count_from) for candidate in candidates]
        marks = marks_of(completions, texts, errors, options.step_end)
        columns = [
            Column(
                title=candidate.name + (", cut" if candidate.cut else ""),
                text_n=texts[i],
                q_n=of_record[i].q_n,
                reward_n=of_record[i].reward_n,
                right=is_right(candidate),
                marks=marks[i],
                step_end=options.step_end,
            )
            for i, candidate in enumerate(candidates)
        ]
        title = f"Record {candidates[0].row} ({Path(candidates[0].where).name})"
        prompt = readable(model.tokenizer, candidates[0].prompt)
        result.append(Record(title=title, prompt=prompt, columns=columns))
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
    known = [value for value in margins if value is not None]
    about = f"{len(pool)} of {len(everything)} records scored"
    if known:
        won = sum(value > 0 for value in known)
        about += f"; the right completion has the higher reward in {won} of {len(known)}"
    groups = selected(margins, options.worst, options.random)
    return {heading: [pool[i] for i in rows] for heading, rows in groups.items()}, about


def is_generated(sources: Sequence[str]) -> bool:
    """Whether the first record is one of gcrm generate. Standard input, which is read once, is taken to be none."""
    first = next(rows(sources[0], BadRecords(skip=True)), None) if sources[0] != STDIN else None
    return first is not None and isinstance(first[1], dict) and first[1].keys() >= {"samples", "policy_tokens"}


def generated_page(options: InspectOptions) -> Page:
    """The page of a file of gcrm generate: the records of --row, or --random others. Raises UserError."""
    bad = BadRecords(skip=options.on_bad_record == "skip")
    records = list(read_prompts(options.data, bad=bad))
    check_left(len(records), bad, options.data)
    if options.row and max(options.row) >= len(records):
        raise UserError(f"--row {max(options.row)}: there are {len(records)} records, numbered from 0")
    chosen = list(options.row) or sorted(np.random.default_rng(0).permutation(len(records))[: options.random].tolist())
    if not chosen:
        raise UserError("--random 0: selects no record: raise it, or name a --row")
    trees = []
    for i in chosen:
        samples = samples_of(records[i].fields, records[i].where)
        prompt = records[i].prompt
        text = prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        trees.append((Tree.of(f"Record {i} ({Path(records[i].where).name})", text, samples), samples))
    return tree_page(title=title_of(options), about=[f"{len(chosen)} of {len(records)} records"], trees=trees)


def title_of(options: InspectOptions) -> str:
    return "Inspect " + ", ".join(Path(source).name for source in options.data)


def inspect(options: InspectOptions) -> None:
    """Raises UserError."""
    output = output_file(options.output, options.data)
    made = generated_page(options) if is_generated(options.data) else judged_page(options)
    with written_aside(output) as partial:
        made.save(partial)
    print(f"wrote {output}")


def judged_page(options: InspectOptions) -> Page:
    """The page of records that the model judges. Raises UserError."""
    model, goal_D = open_model(options)
    about = [f"Model {options.model}" + (f", goal {options.goal}" if options.goal else "")]
    about += model.q_notes
    if options.row:
        groups = {"": read_rows(options, model)}
    else:
        groups, scored = select(model, options)
        about.append(scored)
    if not groups:
        raise UserError(
            "--random 0: --worst selects no record, for none has both a right and a wrong completion: raise --random, "
            "or name a --row"
        )
    flat = shown(model, [candidates for of_group in groups.values() for candidates in of_group], goal_D, options)
    remaining = iter(flat)
    by_heading = {heading: [next(remaining) for _ in of_group] for heading, of_group in groups.items()}
    return page(title=title_of(options), about=about, groups=by_heading)
