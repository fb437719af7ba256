"""``gcrm score``: rewards of completions, one output line a record, in input order.

Records are read, scored and written a window at a time, so that the data need not fit in memory. The completions of a
prompt that lie in one window share its computation. Windows, and so the numbers in the last digit, depend on the
records alone: neither the number of processes nor where a run was interrupted changes the output.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from gcrm_fast.checkpoints.goals import named_goal
from gcrm_fast.commands.options import ScoreOptions
from gcrm_fast.common import processes
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import output_file, written_aside
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.records import COMPLETION_FORMATS, Candidate, completions_of_records, parse_columns
from gcrm_fast.data.sources import STDIN, BadRecords
from gcrm_fast.inference.candidates import encoded, unfit
from gcrm_fast.inference.scoring import Judged, RewardModel

T = TypeVar("T")
Window = list[list[Candidate]]  # the completions of each record
WINDOW_RECORDS, WINDOW_CHARACTERS = 1024, 2**21  # a window ends with the record that reaches one of them


class Progress(NamedTuple):
    """How far a partial output is: windows, bytes written, and a hash of the records behind them."""

    made_by: dict[str, Any]
    windows: int = 0
    bytes: int = 0
    records: str = ""


class Output:
    """A file of JSON lines that grows by whole windows beside its final name: ``NAME.partial``, and how far it is in
    ``NAME.partial.json``, which is replaced after each window."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.state = path.with_name(path.name + ".partial.json")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other runs away from the partial output."""
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            with FileLock(lock, timeout=0):
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
        except Timeout:
            raise UserError(f"{self.path}: another run is writing it: wait for it or name another file") from None

    def progress(self, made_by: dict[str, Any]) -> Progress:
        """Of a partial output that the same program would continue; else none, with a line that says why."""
        try:
            found = Progress(**json.loads(self.state.read_text()))
            if self.partial.stat().st_size < found.bytes:
                raise ValueError
        except FileNotFoundError:
            return Progress(made_by)
        except (OSError, ValueError, TypeError):
            say(f"{self.partial}: cannot be continued: starting anew")
            return Progress(made_by)
        other = [name for name in made_by if found.made_by.get(name) != made_by[name]]
        if other:
            say(f"{self.partial}: was made with another {', '.join(other)}: starting anew")
            return Progress(made_by)
        return found

    def append(self, lines: bytes, done: Progress) -> Progress:
        """Writes the lines of one window after what ``done`` counts; returns what is done with them."""
        if self.path.suffix == ".gz":
            lines = gzip.compress(lines, mtime=0)  # members of a gzip file follow one another
        try:
            with self.partial.open("r+b" if done.bytes else "wb") as file:
                file.seek(done.bytes)
                file.truncate()  # what a killed run wrote after its last whole window
                file.write(lines)
            done = done._replace(bytes=done.bytes + len(lines))
            with written_aside(self.state) as aside:
                aside.write_text(json.dumps(done._asdict()))
        except OSError as error:
            raise UserError(f"{self.partial}: cannot be written ({error.strerror})") from None
        return done

    def finish(self) -> None:
        os.replace(self.partial, self.path)
        self.state.unlink()


class Stdout:
    """Takes the place of Output: nothing to continue, nothing to rename."""

    def held(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def progress(self, made_by: dict[str, Any]) -> Progress:
        return Progress(made_by)

    def append(self, lines: bytes, done: Progress) -> Progress:
        sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()
        return done

    def finish(self) -> None: ...


def say(message: str) -> None:
    """A line for people: never on stdout, which may be the output; once, whatever the number of processes."""
    if processes.rank() == 0:
        print(f"gcrm score: {message}", file=sys.stderr, flush=True)


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


def numbers(values: np.ndarray) -> list[float]:
    """float32 values in as few digits as tell them apart."""
    return [float(text) for text in values.astype(np.float32).astype("U")]


def with_scores(record: Sequence[Candidate], scores: dict[str, list[Any]]) -> dict[str, Any]:
    """The record and, for each of its completions, ``scores``: under their names for one completion, as a list under
    their plural for ``completions``, as NAME_chosen and NAME_rejected for a pair.

    Raises UserError where the record has such a field already.
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
        raise UserError(f"{record[0].where}: field '{taken[0]}' is there already, and would be lost: rename it")
    return raw | added


def tokens_of(model: RewardModel, completion: Completion, judged: Judged) -> dict[str, Any]:
    """What --per-token adds: ids, texts, and the rewards and Q-values at each token."""
    assert judged.rewards_n is not None
    values = {
        "ids": completion.ids[completion.start :].tolist(),
        "texts": model.texts(completion),
        "rewards": numbers(judged.rewards_n),
    }
    return values if judged.q_Gn is None else values | {"q_values": numbers(judged.q_Gn[0])}


def json_line(record: dict[str, Any]) -> bytes:
    """UTF-8 text where that can hold the record, else escapes. Dates and the like, of Parquet, as text."""
    try:
        return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, in a field that is not ours
        return (json.dumps(record, default=str) + "\n").encode()


def score_window(window: Window, model: RewardModel, goal: Tensor | None, per_token: bool, bad: BadRecords) -> bytes:
    """The output lines of a window; its records with a completion that cannot be scored go to ``bad``."""
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
    """The goal state of the Q-values [D]; None where none are asked for, or there is no goal."""
    if not options.per_token:
        return None
    if not options.goal:
        return model.goal() if model.goals else None
    return named_goal(options.goal, model.fingerprint)


@contextlib.contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """(rank, number of processes); more than one are joined, by a group that passes text around."""
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
    """Scores what ``done`` does not count yet. False, and nothing is written, if that was made of other records."""
    bad, unscored = (BadRecords(skip=options.on_bad_record == "skip") for _ in range(2))
    records = completions_of_records(
        options.data,
        fields=["*"],
        columns=parse_columns(options.columns, COMPLETION_FORMATS),
        tokenizer=model.tokenizer,
        bad=bad,
    )
    read = hashlib.sha256()

    def hashed(window: Window) -> Window:
        for record in window:
            read.update(json_line(record[0].fields))
        return window

    source = map(hashed, windows(records))
    with tqdm(desc="scoring", unit="record", disable=rank != 0) as bar:
        bar.update(sum(map(len, itertools.islice(source, done.windows))))
        if read.hexdigest() != (done.records or hashlib.sha256().hexdigest()):
            return False
        if done.windows:
            say(f"{options.output}: going on after {bar.n} records")
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
            done = done._replace(windows=done.windows + len(turn), records=read.hexdigest())
            if rank == 0:
                done = output.append(b"".join(parts), done)
            bar.update(sum(map(len, turn)))
    skipped = bad.skipped + [text for texts in gathered(unscored.skipped, world_size) for text in texts]
    if rank == 0:
        output.finish()
    if skipped:
        say(f"{len(skipped)} bad records skipped; the first: {skipped[0]}")
    return True


def score(options: ScoreOptions) -> None:
    """Checks the output, loads the model, scores. Raises UserError."""
    output = Stdout() if options.output == STDIN else Output(output_file(options.output, options.data))
    model = RewardModel.from_pretrained(options.model, dtype=options.dtype, tokens_per_batch=options.tokens_per_batch)
    goal = goal_of(options, model)
    made_by = {
        "model": model.fingerprint,
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
        if rank == 0 and STDIN not in options.data:  # which cannot be read twice
            done = output.progress(made_by)
        done = gathered(done, world_size)[0]
        if not score_files(options, model, goal, output, done, rank, world_size):
            say(f"{options.output}: the partial output was made of other records: starting anew")
            score_files(options, model, goal, output, Progress(made_by), rank, world_size)
