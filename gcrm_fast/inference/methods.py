"""How the samples of one prompt compete: one class per method of decoding.py.

A method says when the Q-values are needed, and then drops, forks or resumes rows. It is made for one prompt.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gcrm_fast.inference.generation import Group, Row, Writer
from gcrm_fast.inference.judging import Judge

Kind = Literal["sample", "best-of-n", "filter", "reject", "beams"]
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
    step_q: Literal["last", "mean"] = "last"

    @property
    def rows(self) -> int:
        return self.beams * self.per_beam if self.kind == "beams" else self.samples

    def longest(self, max_new_tokens: int) -> int:
        """Maximum number of new tokens of a text."""
        return min(max_new_tokens, self.steps * self.step_tokens) if self.kind == "beams" else max_new_tokens


class Rivals:
    """The rows of one prompt. This method never interferes."""

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
        return bool(self.group.rows) and all(row.ending for row in self.group.rows)

    def due(self) -> bool:
        """Whether it is time for a look at the Q-values."""
        running = self.running
        return not running or bool(self.method.every and len(running[0].ids) % self.method.every == 0)

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


def fallen(rows_q: Sequence[Sequence[float] | np.ndarray], threshold: float) -> list[int]:
    """Which rows the filter drops, given the Q-values of their tokens: those with one below the threshold after the
    first UNJUDGED, except for the row whose lowest is greatest."""
    lowest = [min(q_n[UNJUDGED:], default=math.inf) for q_n in rows_q]
    best = lowest.index(max(lowest))
    return [i for i, low in enumerate(lowest) if low < threshold and i != best]


class Filter(Rivals):
    """Drops a row whose Q falls below the threshold, but never the last."""

    def decide(self) -> None:
        assert self.judge is not None
        kept = self.kept
        for i in fallen([self.judge.q_n(row) for row in kept], self.method.threshold):
            self.drop(kept[i])


class Halving(Rivals):
    """At each checkpoint, keeps the share of the rows that have the greatest Q at their last token."""

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
                self.writer.running = [one for one in self.writer.running if one is not row]
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
        self.writer.running += rows


RIVALS: dict[Kind, Callable[[Method, Group, Writer, Judge | None], Rivals]] = {
    "sample": Rivals,
    "best-of-n": Rivals,
    "filter": Filter,
    "reject": Halving,
    "beams": Beams,
}
