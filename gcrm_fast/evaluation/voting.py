"""Answers to a question from many samples: majority, filtered by Q, weighted by reward, best of n, the top K.

Functions of numbers and texts. A sample without an answer does not vote. Letters: n samples of a question,
Q questions.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import softmax
from scipy.stats import binomtest

UNJUDGED = 5  # first tokens of a completion; their Q-values are ignored
THRESHOLDS = 51  # quantiles of the lowest Q-values that are tried as thresholds


@dataclass(frozen=True, kw_only=True)
class Question:
    """The samples of one question."""

    expected: str
    answers: list[str]  # one per sample, "" for none
    rewards_n: np.ndarray  # float64
    q_n: list[np.ndarray]  # for each sample [its tokens]
    correct: Sequence[bool] = ()  # the data's own label of each sample; by default whether its answer is the expected

    def lowest_q(self) -> np.ndarray:
        """Lowest Q-value of each sample after its first UNJUDGED tokens, [n]; infinity for shorter samples."""
        return np.array([q[UNJUDGED:].min(initial=math.inf) for q in self.q_n])


class Filtered(NamedTuple):
    """What a threshold does to the samples of a question."""

    kept_n: np.ndarray  # bool; all where none would be left
    saved: int  # tokens that would not have been generated
    none_left: bool


def filtered(question: Question, threshold: float) -> Filtered:
    """Keeps samples with no Q-value below ``threshold`` after the first UNJUDGED tokens.

    A dropped sample saves the tokens after the first one below the threshold, which itself had to be generated. If no
    sample with an answer would remain, all are kept and nothing is saved.
    """
    kept_n = question.lowest_q() >= threshold
    if not any(answer for answer, kept in zip(question.answers, kept_n, strict=True) if kept):
        return Filtered(np.ones_like(kept_n), 0, True)
    dropped = [question.q_n[i] for i in np.flatnonzero(~kept_n)]
    saved = sum(len(q) - UNJUDGED - 1 - int(np.argmax(q[UNJUDGED:] < threshold)) for q in dropped)
    return Filtered(kept_n, saved, False)


# ---------------------------------------------------------------------------------------------------------- methods


def vote(answers: Sequence[str], weights: Sequence[float], rewards: Sequence[float]) -> str:
    """The answer with the greatest summed weight; ties go to the greatest summed reward, then to the first sample. ""
    if no sample has an answer."""
    totals: dict[str, tuple[float, float]] = {}
    for answer, weight, reward in zip(answers, weights, rewards, strict=True):
        if answer:
            weight_before, reward_before = totals.get(answer, (0.0, 0.0))
            totals[answer] = weight_before + weight, reward_before + reward
    return max(totals, key=lambda answer: totals[answer], default="")


def majority(question: Question, kept_n: np.ndarray | None = None) -> str:
    """The most frequent answer of the kept samples (by default all); ties go to the greatest summed reward."""
    kept = range(len(question.answers)) if kept_n is None else np.flatnonzero(kept_n).tolist()
    return vote([question.answers[i] for i in kept], [1.0] * len(kept), question.rewards_n[kept].tolist())


def weighted(question: Question) -> str:
    """Each sample's vote has the weight of its reward's softmax over the question. Training on pairs determines rewards
    only up to a constant per question, which does not change the softmax."""
    return vote(question.answers, softmax(question.rewards_n).tolist(), question.rewards_n.tolist())


def top(question: Question, k: int) -> str:
    """Majority among the ``k`` samples with an answer and the greatest rewards; best of n where k is 1."""
    order = [i for i in np.argsort(-question.rewards_n, kind="stable").tolist() if question.answers[i]]
    kept_n = np.zeros(len(question.answers), dtype=bool)
    kept_n[order[:k]] = True
    return majority(question, kept_n)


def kept_as_released(question: Question, threshold: float) -> np.ndarray:
    """The published code's filter, [n] of bool: all samples are kept only if none would remain, with an answer or
    without."""
    kept_n = question.lowest_q() >= threshold
    return kept_n if kept_n.any() else np.ones_like(kept_n)


def released(question: Question, kept_n: np.ndarray) -> bool:
    """The published code's metric: whether the samples labeled correct are at least as many as those of every wrong
    answer. No answer is a wrong answer too. It needs the labels to break a tie, so no vote can be run like this."""
    correct = question.correct or [answer == question.expected for answer in question.answers]
    kept = np.flatnonzero(kept_n).tolist()
    wrong = Counter(question.answers[i] for i in kept if not correct[i])
    return sum(correct[i] for i in kept) >= max(wrong.values(), default=0)


def saved_as_released(questions: Sequence[Question], threshold: float) -> float:
    """The share of tokens saved as the published code counts it: with the first token below the threshold, of all
    tokens after the first UNJUDGED of each completion."""
    saved = judged = 0
    for question in questions:
        judged += sum(max(len(q) - UNJUDGED, 0) for q in question.q_n)
        dropped = [question.q_n[i] for i in np.flatnonzero(~kept_as_released(question, threshold))]
        saved += sum(len(q) - UNJUDGED - int(np.argmax(q[UNJUDGED:] < threshold)) for q in dropped)
    return saved / judged if judged else 0.0


# ------------------------------------------------------------------------------------------------------- comparison


class Result(NamedTuple):
    """Accuracy of a voting method, compared with another on the same questions."""

    name: str
    right: int
    questions: int
    low: float  # Wilson interval of the accuracy, 95 %
    high: float
    won: int  # questions that only this method gets right
    lost: int  # questions that only the other gets right
    p: float  # exact McNemar test, two-sided; 1 where they agree on all questions

    @property
    def accuracy(self) -> float:
        return self.right / self.questions


def compared(name: str, right_Q: np.ndarray, other_Q: np.ndarray) -> Result:
    """Accuracy of ``right_Q`` (bool), tested against ``other_Q`` on the same questions."""
    won, lost = int((right_Q & ~other_Q).sum()), int((~right_Q & other_Q).sum())
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    interval = binomtest(int(right_Q.sum()), len(right_Q)).proportion_ci(method="wilson")
    return Result(name, int(right_Q.sum()), len(right_Q), float(interval.low), float(interval.high), won, lost, p)


class Saving(NamedTuple):
    """Filtering at a threshold: accuracy, share of completions dropped, share of tokens saved (also as the published
    code counts it), and share of questions without a remaining sample (all of their samples vote)."""

    threshold: float
    accuracy: float
    dropped: float
    saved: float
    saved_as_released: float
    none_left: float


def saving(questions: Sequence[Question], threshold: float) -> Saving:
    """Accuracy of the filtered majority, and the shares of all completions and tokens that it saves."""
    results = [filtered(question, threshold) for question in questions]
    right = [majority(q, f.kept_n) == q.expected for q, f in zip(questions, results, strict=True)]
    return Saving(
        threshold=threshold,
        accuracy=float(np.mean(right)),
        dropped=sum(int((~f.kept_n).sum()) for f in results) / sum(len(q.answers) for q in questions),
        saved=sum(f.saved for f in results) / sum(len(tokens) for q in questions for tokens in q.q_n),
        saved_as_released=saved_as_released(questions, threshold),
        none_left=float(np.mean([f.none_left for f in results])),
    )


def thresholds(questions: Sequence[Question]) -> list[float]:
    """Thresholds to try: quantiles of the samples' lowest Q-values. The first one drops no sample."""
    lowest = np.concatenate([question.lowest_q() for question in questions])
    lowest = lowest[np.isfinite(lowest)]
    if not len(lowest):
        return [0.0]
    return sorted({float(value) for value in np.quantile(lowest, np.linspace(0, 1, THRESHOLDS))})


def chosen_threshold(questions: Sequence[Question]) -> float:
    """The threshold with the best accuracy on these questions; among equals the one that saves most tokens."""
    return max((saving(questions, t) for t in thresholds(questions)), key=lambda s: (s.accuracy, s.saved)).threshold


def results(questions: Sequence[Question], threshold: float, k: int) -> list[Result]:
    """All voting methods compared with the plain majority; the released metric with itself without the filter."""

    def kept(question: Question) -> np.ndarray:
        return filtered(question, threshold).kept_n

    methods: dict[str, Callable[[Question], str]] = {
        "majority": majority,
        "reward-weighted": weighted,
        "best of n": lambda q: top(q, 1),
        f"majority of the top {k}": lambda q: top(q, k),
        "Q-filtered majority": lambda q: majority(q, kept(q)),
    }
    right = {name: np.array([method(q) == q.expected for q in questions]) for name, method in methods.items()}
    plain_Q = np.array([released(q, np.ones(len(q.answers), dtype=bool)) for q in questions])
    filtered_Q = np.array([released(q, kept_as_released(q, threshold)) for q in questions])
    return [
        *(compared(name, right_Q, right["majority"]) for name, right_Q in right.items()),
        compared("released metric, majority", plain_Q, plain_Q),
        compared("released metric, Q-filtered", filtered_Q, plain_Q),
    ]
