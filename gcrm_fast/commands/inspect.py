"""``gcrm inspect``: a web page of a record (evaluation/page.py)."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from gcrm_fast.commands.options import InspectOptions
from gcrm_fast.commands.shared import PAIRED, open_model, records
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import output_file, written_aside
from gcrm_fast.data.records import Candidate
from gcrm_fast.evaluation.page import Column, first_difference, page, step_start
from gcrm_fast.inference.candidates import judge
from gcrm_fast.inference.scoring import RewardModel

ERROR_FIELDS = {"first_error_step": 0, "error_step": 1, "error_steps": 1}  # -> number of the first step
RIGHT_FIELD = "is_correct"


def read_row(options: InspectOptions, model: RewardModel) -> list[Candidate]:
    """The completions of record --row; reading stops there. Raises UserError."""
    count = 0
    for candidates in records(options.data, model, options):
        if count == options.row:
            return candidates
        count += 1
    raise UserError(f"--row {options.row}: {' '.join(options.data)} has {count} records, numbered from 0")


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


def columns_of(
    model: RewardModel, candidates: Sequence[Candidate], goal_D: Tensor, options: InspectOptions
) -> list[Column]:
    """Scores the completions; the first is compared with the second, all others with the first."""
    judged = judge(model, candidates, goal_D)
    columns = []
    for candidate, (tokens, reward_n, q_n) in zip(candidates, judged, strict=True):
        text_n = model.texts(tokens)
        marks: dict[int, list[str]] = {}
        other = judged[0] if tokens is not judged[0].tokens else judged[1] if len(judged) == 2 else None
        difference = first_difference(tokens, other.tokens) if other else None
        if difference is not None:
            marks[difference] = ["first difference"]
        step = error_step(candidate, options.error_field, options.count_from)
        start = step_start(text_n, step, options.step_end) if step is not None else None
        if step is not None and start is not None:
            marks.setdefault(start, []).append(f"error: step {step + 1}")
        columns.append(Column(title=title_of(candidate), text_n=text_n, q_n=q_n, reward_n=reward_n, marks=marks))
    return columns


def title_of(candidate: Candidate) -> str:
    label = candidate.fields.get(RIGHT_FIELD)
    known = {True: "right", False: "wrong"}.get(label, "") if isinstance(label, bool) else ""
    return ", ".join(part for part in (candidate.name, known, "cut" if candidate.cut else "") if part)


def run(options: InspectOptions) -> None:
    """Raises UserError."""
    output = output_file(options.output, options.data)
    model, goal_D = open_model(options)
    candidates = read_row(options, model)
    goal = f", goal {options.goal}" if options.goal else ""
    text = page(
        title=f"{Path(options.data[0]).name}, record {options.row}",
        about=f"{candidates[0].where}; model {options.model}{goal}; hover over a token for its values",
        prompt=candidates[0].prompt,
        columns=columns_of(model, candidates, goal_D, options),
    )
    with written_aside(output) as partial:
        partial.write_text(text, encoding="utf-8")
