"""``gcrm goals``: makes a goal state from preferred completions and adds it to a goal file."""

import json
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gcrm_fast.checkpoints.goals import check_goal_name, read_goals, write_goals
from gcrm_fast.commands.options import GoalOptions
from gcrm_fast.commands.shared import load, read
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import output_file, written_aside
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.records import Candidate
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.inference.candidates import fit
from gcrm_fast.inference.scoring import RewardModel

LABEL = "is_correct"
COMPARISONS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
CONDITION = re.compile(rf"\s*(.+?)\s*({'|'.join(COMPARISONS)})\s*(.+?)\s*")


class Condition(NamedTuple):
    """``field compare value`` on a record."""

    field: str
    compare: Callable[[Any, Any], bool]
    value: Any
    asked: str = "named by --where"

    @staticmethod
    def parse(text: str) -> "Condition":
        """From text like 'helpfulness>=4' or 'family==code'. Raises UserError."""
        match = CONDITION.fullmatch(text)
        if not match:
            raise UserError(f"--where {text}: must be FIELD, one of {' '.join(COMPARISONS)}, and a value")
        field, sign, value = match.groups()
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        if not isinstance(parsed, (bool, int, float, str)):
            parsed = value
        if sign not in ("==", "!=") and isinstance(parsed, (bool, str)):
            raise UserError(f"--where {text}: {sign} compares with a number")
        return Condition(field, COMPARISONS[sign], parsed)

    def holds(self, candidate: Candidate) -> bool:
        """Raises UserError where the record has no such field, or one of another type than the condition's."""
        value = candidate.field(self.field, self.asked)
        kinds = [bool if isinstance(v, bool) else str if isinstance(v, str) else float for v in (value, self.value)]
        if kinds[0] is not kinds[1] or not isinstance(value, (bool, int, float, str)):
            wanted = {bool: "true or false", str: "a string", float: "a number"}[kinds[1]]
            raise UserError(
                f"{candidate.where}: field '{self.field}' is {type(value).__name__}, not {wanted} ({candidate.name})"
            )
        return self.compare(value, self.value)


def is_preferred(candidate: Candidate, conditions: Sequence[Condition]) -> bool:
    """Whether a completion belongs to the goal: never the worse side of a pair; otherwise one that fulfills the
    conditions or, without any, the better side or one labeled correct."""
    if candidate.name in ("rejected", "incorrect"):
        return False
    if not conditions and candidate.name in ("chosen", "correct"):
        return True
    conditions = conditions or [Condition(LABEL, operator.eq, True, "read where --where is not given")]
    return all(condition.holds(candidate) for condition in conditions)


def preferred(options: GoalOptions, model: RewardModel, bad: BadRecords) -> tuple[list[Candidate], int]:
    """The completions of the goal, and how many were skipped because they are cut."""
    conditions = [Condition.parse(text) for text in options.where]
    whole, cut = list[Candidate](), 0
    for record in fit(read(options.data, model, options, bad), model, bad):
        try:
            wanted = [candidate for candidate in record if is_preferred(candidate, conditions)]
        except UserError as error:
            bad.add(error)
            continue
        cut += sum(candidate.cut for candidate in wanted)
        whole += [candidate for candidate in wanted if not candidate.cut]
        if options.limit and len(whole) >= options.limit:
            return whole[: options.limit], cut
    return whole, cut


def cut_at_random(encoded: Sequence[Completion], seed: int) -> list[Completion]:
    """The completions up to a token drawn from all of theirs: the state at that token is then the last one."""
    rng = np.random.default_rng(seed)
    return [
        completion._replace(ids=completion.ids[: rng.integers(completion.start, len(completion.ids)) + 1])
        for completion in encoded
    ]


def goals(options: GoalOptions) -> None:
    """Reads the records, computes the goal and writes the file. Raises UserError."""
    check_goal_name(options.name)
    path = output_file(options.output, options.data)
    model = load(options)
    states, counts = read_goals(path, model.fingerprint, model.config.state_size) if path.exists() else ({}, {})
    if options.name in states:
        raise UserError(f"{path}: already holds a goal {options.name!r}: choose another --name, or remove the file")
    bad = BadRecords(skip=options.on_bad_record == "skip")
    chosen, cut = preferred(options, model, bad)
    if not chosen:
        raise UserError(f"{' '.join(options.data)}: no completion to make a goal of ({cut} cut): see gcrm goals --help")
    encoded = model.encode([c.prompt for c in chosen], [c.completion for c in chosen])
    if options.token == "random":
        encoded = cut_at_random(encoded, options.seed)
    states[options.name] = model.goal_state(encoded, names=[c.label for c in chosen], progress=True)
    counts[options.name] = len(chosen)
    with written_aside(path) as partial:
        write_goals(partial, states, counts, model.fingerprint, model.end.kind)
    which = "end state" if options.token == "last" else "state at a random token"
    print(
        f"{path}: goal {options.name!r} is the mean {which} of {len(chosen)} completions; skipped {cut} cut "
        f"completions and {len(bad.skipped)} bad records"
    )
