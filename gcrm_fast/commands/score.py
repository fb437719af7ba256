"""``gcrm score``: rewards of completions, one output line per record, in the order of the input.

Records are read, scored and written one window at a time, so the data need not fit in memory. Completions of the same
prompt in a window share its computation. Windows depend only on the records, so neither the number of processes nor an
interruption changes the output, not even in the last digit.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from torch import Tensor

from gcrm_fast.checkpoints.goals import named_goal
from gcrm_fast.commands.options import ScoreOptions
from gcrm_fast.commands.output import Output, Progress, Stdout, say
from gcrm_fast.commands.shared import load, read
from gcrm_fast.common import processes
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import output_file
from gcrm_fast.common.json_lines import json_line, numbers
from gcrm_fast.common.progress import progress_bar
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.records import Candidate
from gcrm_fast.data.sources import STDIN, BadRecords
from gcrm_fast.inference.candidates import encoded, unfit
from gcrm_fast.inference.ensembles import Ensemble
from gcrm_fast.inference.scoring import Judged, RewardModel

T = TypeVar("T")
Window = list[list[Candidate]]  # the completions of each record
# How many records there are is known at the end only: a bar would never move. unit_scale shortens the rate.
COUNT: dict[str, Any] = {
    "bar_format": "{desc}: {n} records [{elapsed}, {rate_noinv_fmt}]",
    "unit": "",
    "unit_scale": True,
}
WINDOW_RECORDS, WINDOW_CHARACTERS = 1024, 2**21  # a window ends with the record that reaches either


# ---------------------------------------------------------------------------------------------------------- records


def windows(records: Iterator[list[Candidate]]) -> Iterator[Window]:
    window: Window = []
    characters = 0
    for record in records:
        window.append(record)
        characters += sum(len(candidate.prompt) + len(candidate.completion) for candidate in record)
        if len(window) == WINDOW_RECORDS or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def with_scores(record: Sequence[Candidate], scores: dict[str, list[Any]]) -> dict[str, Any]:
    """The record with the ``scores`` of its completions: under their names for one completion, as lists under the
    plural for a list, as NAME_chosen and NAME_rejected for a pair.

    Raises UserError if the record already has such a field.
    """
    added: dict[str, Any] = {}
    for name, values in scores.items():
        if record[0].position is not None:
            added[name if name.endswith("s") else name + "s"] = values
        elif len(record) == 1:
            added[name] = values[0]
        else:
            added |= {f"{name}_{candidate.name}": value for candidate, value in zip(record, values, strict=True)}
    raw = record[0].fields
    taken = sorted(raw.keys() & added.keys())
    if taken:
        raise UserError(f"{record[0].where}: field '{taken[0]}' already exists and would be overwritten: rename it")
    return raw | added


def tokens_of(model: RewardModel, completion: Completion, judged: Judged) -> dict[str, Any]:
    """The fields of --per-token: ids, texts, and the reward and Q-value at each token."""
    assert judged.rewards_n is not None
    values = {
        "ids": completion.ids[completion.start :].tolist(),
        "texts": model.texts(completion),
        "rewards": numbers(judged.rewards_n),
    }
    return values if judged.q_Gn is None else values | {"q_values": numbers(judged.q_Gn[0])}


def score_window(window: Window, model: RewardModel, goal: Tensor | None, per_token: bool, bad: BadRecords) -> bytes:
    """The output lines of a window; records that cannot be scored go to ``bad``."""
    tokens = iter(encoded([candidate for record in window for candidate in record], model))
    good: list[tuple[list[Candidate], list[Completion]]] = []
    for record in window:
        own_tokens = list(itertools.islice(tokens, len(record)))
        if wrong := unfit(record, own_tokens, model):
            bad.add(UserError(wrong))
        else:
            good.append((record, own_tokens))
    flat = [completion for _, own_tokens in good for completion in own_tokens]
    judged = model.judge(
        flat,
        goals_GD=goal[None] if goal is not None else None,
        per_token=per_token,
        names=[candidate.label for record, _ in good for candidate in record],
    )
    rest = iter(zip(flat, judged, strict=True))
    lines = []
    for record, _ in good:
        own = list(itertools.islice(rest, len(record)))
        scores: dict[str, list[Any]] = {"reward": numbers(np.array([j.reward for _, j in own]))}
        if per_token:
            scores["tokens"] = [tokens_of(model, completion, j) for completion, j in own]
        lines.append(json_line(with_scores(record, scores)))
    return b"".join(lines)


# ------------------------------------------------------------------------------------------------------ the program


def goal_of(options: ScoreOptions, model: RewardModel) -> Tensor | None:
    """The goal state of the Q-values [D]; None if none are asked for, or there is no goal."""
    if not options.per_token or not (options.goal or model.goals):
        return None
    return named_goal(options.goal, model.fingerprint, model.config.state_size) if options.goal else model.goal()


@contextlib.contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """(rank, number of processes), which are joined in a gloo group if there are several."""
    world_size = processes.world_size()
    if world_size == 1:
        yield 0, 1
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), world_size
    finally:
        dist.destroy_process_group()


def gathered(value: T, world_size: int) -> list[T]:
    """Every process's value, in the order of their ranks."""
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


def score_files(
    options: ScoreOptions,
    model: RewardModel,
    goal: Tensor | None,
    output: Output | Stdout,
    done: Progress,
    rank: int,
    world_size: int,
) -> bool:
    """Scores what ``done`` does not count. Returns False, and writes nothing, if that was made from other records."""
    bad, unscored = (BadRecords(skip=options.on_bad_record == "skip") for _ in range(2))
    digest = hashlib.sha256()

    def hashed(window: Window) -> Window:
        for record in window:
            digest.update(json_line(record[0].fields))
        return window

    source = map(hashed, windows(read(options.data, model, options, bad)))
    with progress_bar(desc="scoring", shown=rank == 0, **COUNT) as bar:
        bar.update(sum(map(len, itertools.islice(source, done.windows))))
        if digest.hexdigest() != (done.records or hashlib.sha256().hexdigest()):
            return False
        if done.windows:
            say(f"{options.output}: resuming after {bar.n} records")
        while turn := list(itertools.islice(source, world_size)):
            lines, complaint = b"", None
            try:
                if rank < len(turn):
                    lines = score_window(turn[rank], model, goal, options.per_token, unscored)
            except UserError as error:
                complaint = error
            parts, complaints = zip(*gathered((lines, complaint), world_size), strict=True)
            if any(complaints):
                raise next(filter(None, complaints))
            done = done._replace(windows=done.windows + len(turn), records=digest.hexdigest())
            if rank == 0:
                done = output.append(b"".join(parts), done)
            bar.update(sum(map(len, turn)))
    skipped = bad.skipped + [text for texts in gathered(unscored.skipped, world_size) for text in texts]
    if rank == 0:
        output.finish()
    if skipped:
        say(f"bad records skipped: {len(skipped)}; the first: {skipped[0]}")
    return True


def score(options: ScoreOptions) -> None:
    """Checks the output, loads the model and scores. Raises UserError."""
    output = Stdout() if options.output == STDIN else Output(output_file(options.output, options.data))
    model = load(options)
    goal = goal_of(options, model)
    made_by = {
        "model": model.fingerprint,
        "--ensemble": [other.fingerprint for other in model.others] if isinstance(model, Ensemble) else [],
        "--combine": options.combine,
        "--end": model.end.kind,
        "--special-tokens": model.tokenizer.split_special_tokens,
        "goal": hashlib.sha256(goal.numpy().tobytes()).hexdigest() if goal is not None else "",
        "device": model.device.type,
        "--per-token": options.per_token,
        "--dtype": options.dtype,
        "--tokens-per-batch": options.tokens_per_batch,
        "--columns": options.columns,
        "--on-bad-record": options.on_bad_record,
    }
    with joined() as (rank, world_size), output.held() if rank == 0 else contextlib.nullcontext():
        done = Progress(made_by)
        if rank == 0 and STDIN not in options.data:  # stdin cannot be read twice
            done = output.progress(made_by)
        done = gathered(done, world_size)[0]
        with output.kept():
            if not score_files(options, model, goal, output, done, rank, world_size):
                say(f"{options.output}: the partial output was made from other records: starting over")
                score_files(options, model, goal, output, Progress(made_by), rank, world_size)
