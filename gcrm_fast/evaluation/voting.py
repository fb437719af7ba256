"""Answers to a question from many samples of it: majority, filtered by Q, weighed by reward, best of n, the top K.

Functions of plain numbers and texts. A sample without an answer takes part in no vote. Letters: n samples of a
question, Q questions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import softmax
from scipy.stats import binomtest

UNJUDGED = 5  # first tokens of a completion, whose Q-values decide nothing
THRESHOLDS = 51  # quantiles of the lowest Q-values that are tried as thresholds


@dataclass(frozen=True)
class Question:
    """The samples of one question."""

    expected: str
    answers: list[str]  # of each sample; "" for none
    rewards_n: np.ndarray  # float64
    q_n: list[np.ndarray]  # of each sample [its tokens]

    def lowest_q(self) -> np.ndarray:
        """The lowest Q-value of each sample after the first tokens; infinity for samples that have no others, [n]."""
        return np.array([q[UNJUDGED:].min(initial=math.inf) for q in self.q_n])


class Filtered(NamedTuple):
    """What a threshold does to the samples of a question."""

    kept_n: np.ndarray  # bool; all where none would be left
    saved: int  # tokens that need not have been generated
    none_left: bool


def filtered(question: Question, threshold: float) -> Filtered:
    """Keeps samples whose Q-values never fall below ``threshold`` after the first UNJUDGED tokens.

    Of a dropped sample the tokens after the first one below are saved: that one had to be generated to be seen. Where
    none with an answer would be left, all vote and nothing is saved.
    """
    kept_n = question.lowest_q() >= threshold
    if not any(answer for answer, kept in zip(question.answers, kept_n, strict=True) if kept):
        return Filtered(np.ones_like(kept_n), 0, True)
    dropped = [question.q_n[i] for i in np.flatnonzero(~kept_n)]
    saved = sum(len(q) - UNJUDGED - 1 - int(np.argmax(q[UNJUDGED:] < threshold)) for q in dropped)
    return Filtered(kept_n, saved, False)


# ------------------------------------------------------------------------------------------------------------ votes


def vote(answers: Sequence[str], weights: Sequence[float], rewards: Sequence[float]) -> str:
    """The answer of the greatest summed weight, then of the greatest summed reward, then of the first sample; "" where
    no sample has an answer."""
    totals: dict[str, tuple[float, float]] = {}
    for answer, weight, reward in zip(answers, weights, rewards, strict=True):
        if answer:
            weight_before, reward_before = totals.get(answer, (0.0, 0.0))
            totals[answer] = weight_before + weight, reward_before + reward
    return max(totals, key=lambda answer: totals[answer], default="")


def majority(question: Question, kept_n: np.ndarray | None = None) -> str:
    """The most frequent answer of the samples kept; ties go to the greatest summed reward."""
    kept = range(len(question.answers)) if kept_n is None else np.flatnonzero(kept_n).tolist()
    return vote([question.answers[i] for i in kept], [1.0] * len(kept), question.rewards_n[kept].tolist())


def weighted(question: Question) -> str:
    """Every sample votes with the softmax of the rewards of its question: rewards trained on pairs are known only up to
    a constant a question, which this does not depend on."""
    return vote(question.answers, softmax(question.rewards_n).tolist(), question.rewards_n.tolist())


def top(question: Question, k: int) -> str:
    """Majority among the ``k`` samples of greatest reward that have an answer; best of n where k is 1."""
    order = [i for i in np.argsort(-question.rewards_n, kind="stable").tolist() if question.answers[i]]
    kept_n = np.zeros(len(question.answers), dtype=bool)
    kept_n[order[:k]] = True
    return majority(question, kept_n)


def released(question: Question, kept_n: np.ndarray | None = None) -> bool:
    """The metric of the released code: right if no wrong answer occurs more often than the right one. It needs the
    expected answer even to break a tie, so nobody can run such a vote; it is here to compare."""
    kept = range(len(question.answers)) if kept_n is None else np.flatnonzero(kept_n)
    answers = [question.answers[i] for i in kept if question.answers[i]]
    wrong = [answer for answer in answers if answer != question.expected]
    return len(answers) > len(wrong) and len(answers) - len(wrong) >= max(map(wrong.count, wrong), default=0)


# -------------------------------------------------------------------------------------------------------- all votes


class Result(NamedTuple):
    """Accuracy of one way to vote over questions, against another on the same questions."""

    name: str
    right: int
    questions: int
    low: float  # Wilson interval of the accuracy, 95 %
    high: float
    won: int  # questions that it gets right and the other wrong
    lost: int
    p: float  # exact McNemar test, two-sided; 1 where no question tells them apart

    @property
    def accuracy(self) -> float:
        return self.right / self.questions


def compared(name: str, right_Q: np.ndarray, other_Q: np.ndarray) -> Result:
    """Accuracy of ``right_Q`` (bool), tested against ``other_Q`` question by question."""
    won, lost = int((right_Q & ~other_Q).sum()), int((~right_Q & other_Q).sum())
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    interval = binomtest(int(right_Q.sum()), len(right_Q)).proportion_ci(method="wilson")
    return Result(name, int(right_Q.sum()), len(right_Q), float(interval.low), float(interval.high), won, lost, p)


class Saving(NamedTuple):
    """What filtering at a threshold gives over all questions: shares of completions dropped, of tokens saved, and of
    questions whose samples would all be dropped, so that all of them vote."""

    threshold: float
    accuracy: float
    dropped: float
    saved: float
    none_left: float


def saving(questions: Sequence[Question], threshold: float) -> Saving:
    """Accuracy of the filtered majority, and what it saves of all completions and tokens."""
    results = [filtered(question, threshold) for question in questions]
    right = [majority(q, f.kept_n) == q.expected for q, f in zip(questions, results, strict=True)]
    return Saving(
        threshold=threshold,
        accuracy=float(np.mean(right)),
        dropped=sum(int((~f.kept_n).sum()) for f in results) / sum(len(q.answers) for q in questions),
        saved=sum(f.saved for f in results) / sum(len(tokens) for q in questions for tokens in q.q_n),
        none_left=float(np.mean([f.none_left for f in results])),
    )


def thresholds(questions: Sequence[Question]) -> list[float]:
    """Thresholds worth trying: quantiles of the samples' lowest Q-values, from one that drops none."""
    lowest = np.concatenate([question.lowest_q() for question in questions])
    lowest = lowest[np.isfinite(lowest)]
    if not len(lowest):
        return [0.0]
    return sorted({float(value) for value in np.quantile(lowest, np.linspace(0, 1, THRESHOLDS))})


def chosen_threshold(questions: Sequence[Question]) -> float:
    """The threshold of the best accuracy on these questions; of equals the one that saves most."""
    return max((saving(questions, t) for t in thresholds(questions)), key=lambda s: (s.accuracy, s.saved)).threshold


def results(questions: Sequence[Question], threshold: float, k: int) -> list[Result]:
    """Every way to vote, against the plain majority; the released metric against itself without the filter."""
    kept = [filtered(question, threshold).kept_n for question in questions]
    ways: list[tuple[str, Callable[[Question], str]]] = [
        ("majority", majority),
        ("reward-weighted", weighted),
        ("best of n", lambda question: top(question, 1)),
        (f"majority of the top {k}", lambda question: top(question, k)),
    ]
    right = {name: np.array([way(q) == q.expected for q in questions], dtype=bool) for name, way in ways}
    right["Q-filtered majority"] = np.array(
        [majority(q, kept_n) == q.expected for q, kept_n in zip(questions, kept, strict=True)], dtype=bool
    )
    plain = np.array([released(q) for q in questions], dtype=bool)
    filtered_ = np.array([released(q, kept_n) for q, kept_n in zip(questions, kept, strict=True)], dtype=bool)
    found = [compared(name, right_Q, right["majority"]) for name, right_Q in right.items()]
    return [
        *found,
        compared("released metric, majority", plain, plain),
        compared("released metric, Q-filtered", filtered_, plain),
    ]
