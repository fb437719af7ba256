"""How the samples of one prompt compete: one class per method of decoding.py.

A method says when the Q-values are needed, and then drops, forks or resumes rows. It is made for one prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from gcrm_fast.common.errors import UserError
from gcrm_fast.inference.generation import Group, Row, Writer
from gcrm_fast.inference.judging import Judge

Kind = Literal["sample", "best-of-n", "filter", "reject", "beams"]
StepQ = Literal["last", "mean"]
BY_Q: tuple[Kind, ...] = ("filter", "reject", "beams")  # act on Q-values
UNJUDGED = 5  # tokens at the start that the filter does not judge


@dataclass(frozen=True, kw_only=True)
class Method:
    """How the text of a prompt is chosen.

    samples: rows of a prompt (beams have ``beams * per_beam``). threshold: of the filter. every: tokens between two
    looks at the Q-values; 0 looks only where the method must. keep: share that each checkpoint of reject keeps.
    checkpoints: their tokens. beams, per_beam: beams that continue, and samples of each. step_tokens: maximum tokens of
    a step, which ends at a line feed. steps: their maximum number. alpha: weight of Q. step_q: Q of a step, that of its
    last token or the mean.
    """

    kind: Kind = "best-of-n"
    samples: int = 16
    threshold: float = 0.0
    every: int = 16
    keep: float = 0.5
    checkpoints: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    beams: int = 5
    per_beam: int = 2
    step_tokens: int = 52
    steps: int = 16
    alpha: float = 1.0
    step_q: StepQ = "last"

    def __post_init__(self) -> None:
        for name, fits, range_ in (
            ("kind", self.kind in get_args(Kind), f"one of {', '.join(get_args(Kind))}"),
            ("samples", self.samples >= 1, "at least 1"),
            ("every", self.every >= 0, "0 or more"),
            ("keep", 0 < self.keep <= 1, "more than 0 and at most 1"),
            ("checkpoints", all(tokens >= 1 for tokens in self.checkpoints), "numbers of tokens, each at least 1"),
            ("beams", self.beams >= 1, "at least 1"),
            ("per_beam", self.per_beam >= 1, "at least 1"),
            ("step_tokens", self.step_tokens >= 1, "at least 1"),
            ("steps", self.steps >= 1, "at least 1"),
            ("step_q", self.step_q in get_args(StepQ), f"one of {', '.join(get_args(StepQ))}"),
        ):
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)!r}: must be {range_}")

    @property
    def rows(self) -> int:
        return self.beams * self.per_beam if self.kind == "beams" else self.samples

    def longest(self, max_new_tokens: int) -> int:
        """Maximum number of new tokens of a text."""
        return min(max_new_tokens, self.steps * self.step_tokens) if self.kind == "beams" else max_new_tokens


class Rivals:
    """The rows of one prompt. This method never interferes.

    ``in_step``: the method compares rows at the same number of tokens, so that they have to start together. Else
    ``at_once`` of them must have places in the cache at the same time.
    """

    in_step = False
    at_once = 1

    def __init__(self, method: Method, group: Group, writer: Writer, judge: Judge | None) -> None:
        self.method, self.group, self.writer, self.judge = method, group, writer, judge
        self.parents: dict[int, tuple[int, int]] = {}  # number of a fork -> its parent's, and tokens at the fork

    @property
    def kept(self) -> list[Row]:
        """Rows that are not dropped, finished or not."""
        return [row for row in self.group.rows if row.ending != "dropped"]

    @property
    def running(self) -> list[Row]:
        return [row for row in self.writer.running if row.group is self.group]

    @property
    def finished(self) -> bool:
        return not self.group.numbers and all(row.ending for row in self.group.rows)

    def due(self) -> bool:
        """Whether it is time for a look at the Q-values."""
        running, every = self.running, self.method.every
        if not running and (not self.group.numbers or not self.writer.running):
            return True
        clock = len(running[0].ids) if self.writer.together else self.writer.steps
        return bool(every) and clock % every == 0

    @property
    def certain(self) -> list[Row]:
        """Finished rows that will not be dropped."""
        return [row for row in self.kept if row.ending]

    def decide(self) -> None:
        """Acts on the Q-values, which are up to date."""

    def drop(self, row: Row) -> None:
        if row.ending:
            row.ending = "dropped"
        else:
            self.writer.end(row, "dropped")
        if self.judge is not None:
            self.judge.drop([row])

    def choose(self, rewards: dict[int, float]) -> Row:
        """The best of the kept rows: by reward among those that ended by themselves, else by Q at the last token."""
        if self.judge is None or self.method.kind == "sample":
            return self.kept[0]
        whole = [row for row in self.kept if row.ending == "stop"]
        return max(whole, key=lambda row: rewards[row.number]) if whole else max(self.kept, key=self.last_q)

    def last_q(self, row: Row) -> float:
        """Q at the last token that is no end token; -inf without one."""
        assert self.judge is not None
        q_n = self.judge.content(row)
        return float(q_n[-1]) if len(q_n) else -math.inf


def lowest(q_n: Sequence[float] | np.ndarray) -> float:
    """What the filter compares to its threshold: the lowest Q-value after the first UNJUDGED; inf without one."""
    return float(min(q_n[UNJUDGED:], default=math.inf))


class Filter(Rivals):
    """Drops a row whose Q falls below the threshold. The best of these, by its lowest Q, waits instead of being
    dropped: it continues if no other row reaches its end. So texts do not depend on how many rows run at the same time.
    """

    at_once = 2  # one may wait

    def __init__(self, method: Method, group: Group, writer: Writer, judge: Judge | None) -> None:
        super().__init__(method, group, writer, judge)
        self.last: Row | None = None

    @property
    def certain(self) -> list[Row]:
        return [row for row in super().certain if row is not self.last]

    def decide(self) -> None:
        for row in self.kept:
            if row is not self.last and self._lowest(row) < self.method.threshold:
                self._fall(row)
        others = [row for row in self.kept if row is not self.last]
        if self.last is None:
            return
        if any(row.ending for row in others):
            self.drop(self.last)
            self.last = None
        elif not others and not self.group.numbers and not self.last.ending and self.last not in self.running:
            self.writer.resume([self.last])

    def _lowest(self, row: Row) -> float:
        assert self.judge is not None
        return lowest(self.judge.q_n(row))

    def _fall(self, row: Row) -> None:
        self.writer.pause(row)
        if self.last is None:
            self.last = row
            return
        better, worse = sorted((self.last, row), key=lambda one: (-self._lowest(one), one.number))
        self.last = better
        self.drop(worse)


class Halving(Rivals):
    """At each checkpoint, keeps the share of the rows that have the greatest Q at their last token."""

    in_step = True

    def due(self) -> bool:
        return super().due() or self._checkpoint()

    def _checkpoint(self) -> bool:
        running = self.running
        return bool(running) and len(running[0].ids) in self.method.checkpoints

    def decide(self) -> None:
        if self._checkpoint():
            ranked = sorted(self.kept, key=self.last_q, reverse=True)
            for row in ranked[math.ceil(self.method.keep * len(ranked)) :]:
                self.drop(row)


class Beams(Rivals):
    """After each step, the best beams continue in several samples each; finished ones compete as they are."""

    in_step = True

    def __init__(self, method: Method, group: Group, writer: Writer, judge: Judge | None) -> None:
        super().__init__(method, group, writer, judge)
        self.step, self.next_number = 0, method.rows
        self.starts: dict[int, tuple[int, int, int]] = {}  # tokens, characters, Q-values of a row when its step began
        self.scores: dict[int, float] = {}  # by number; those of finished rows stay

    def due(self) -> bool:
        """Once all rows have reached the end of their step, where they wait."""
        for row in self.running:
            tokens, characters, _ = self.starts.get(row.number, (0, 0, 0))
            line_feed = "\n" in row.text[characters:].lstrip("\n")
            if line_feed or len(row.ids) - tokens >= self.method.step_tokens:
                self.writer.pause(row)
        return not self.running

    def decide(self) -> None:
        self.step += 1
        for row in self.kept:
            if row.number not in self.scores:
                self.scores[row.number] = self._score(row)
        ranked = sorted(self.kept, key=self._rank, reverse=True)
        best = list({(row.text, row.ending): row for row in reversed(ranked)}.values())  # of the same text the best
        best = sorted(best, key=self._rank, reverse=True)[: self.method.beams]
        for row in ranked:
            if row not in best:
                self.drop(row)
        for row in best:
            if not row.ending and self.step == self.method.steps:
                self.writer.end(row, "length")
            elif not row.ending:
                self._continue(row)

    def choose(self, rewards: dict[int, float]) -> Row:
        return max(self.kept, key=self._rank)

    def _rank(self, row: Row) -> float:
        return self.scores[row.number]

    def _score(self, row: Row) -> float:
        assert self.judge is not None
        _, _, before = self.starts.get(row.number, (0, 0, 0))
        q_n = self.judge.content(row)
        own = q_n[before:] if len(q_n) > before else q_n[-1:]
        q = 0.0 if not len(own) else own[-1] if self.method.step_q == "last" else own.mean()
        return row.log_p / len(row.ids) + self.method.alpha * float(q)

    def _continue(self, row: Row) -> None:
        """Resumes a row and its forks."""
        assert self.judge is not None
        del self.scores[row.number]
        rows = [row]
        for _ in range(self.method.per_beam - 1):
            twin = self.writer.fork(row, self.next_number)
            self.judge.fork(row, twin)
            self.parents[twin.number] = row.number, len(row.ids)
            self.next_number += 1
            rows.append(twin)
        for one in rows:
            self.starts[one.number] = len(one.ids), len(one.text), len(self.judge.q_n(one))
        self.writer.resume(rows)


RIVALS: dict[Kind, type[Rivals]] = {
    "sample": Rivals,
    "best-of-n": Rivals,
    "filter": Filter,
    "reject": Halving,
    "beams": Beams,
}
