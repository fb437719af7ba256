"""How well rewards and Q-values tell right completions from wrong ones, and how far shortcuts get.

Functions of arrays alone. Letters: N completions, P the eleven positions 0, 10, ..., 100 % of a completion, T tokens,
C questions, B bootstrap resamples, K scores. Completions of one question stand or fall together, so intervals draw
questions, with all their completions, and not completions.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import pearsonr, spearmanr

from gcrm_fast.common.statistics import auroc, couples, ratio
from gcrm_fast.data.sampling import QUANTILES, quantile_positions

RESAMPLES = 1000
COVERAGE = 0.95
FEWEST = 10  # questions of which draws say anything about others
PERCENT = tuple(range(0, 101, 100 // (QUANTILES - 1)))
CORRELATED = (20, 40, 60, 80)  # % of a completion at which reward and Q are correlated
CHUNK = 2**15  # weights held at once while resampling: they stay in a core's cache


class Measure(NamedTuple):
    """One number and its interval; NaN where it is not defined (one class alone, nothing that varies)."""

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Labelled:
    """N scored completions that are known to be right or wrong, in the order of their records.

    Of a file of pairs each chosen completion (right) is followed by its rejected one (wrong).
    """

    right_N: np.ndarray  # bool
    question_N: np.ndarray  # int64, the same for completions of one question
    half_N: np.ndarray  # bool, see halves()
    lengths_N: np.ndarray  # int64, tokens
    reward_NP: np.ndarray  # float32, running reward; [:, -1] is the reward
    q_N: list[np.ndarray]  # of each completion [its tokens] float32
    pairs: bool

    @property
    def q_NP(self) -> np.ndarray:
        return np.array([q[quantile_positions(len(q))] for q in self.q_N])

    def subset(self, mask_N: np.ndarray) -> "Labelled":
        return Labelled(
            self.right_N[mask_N],
            self.question_N[mask_N],
            self.half_N[mask_N],
            self.lengths_N[mask_N],
            self.reward_NP[mask_N],
            [self.q_N[i] for i in np.flatnonzero(mask_N)],
            self.pairs,
        )


def halves(questions: Sequence[str]) -> np.ndarray:
    """Which half of the data a question belongs to, [N] bool: a property of its text alone.

    A bit from the middle of the hash: held-out generated problems (see arithmetic.is_held_out) share its last one.
    """
    return np.array([zlib.crc32(question.encode()) >> 16 & 1 for question in questions], dtype=bool)


# ------------------------------------------------------------------------------------------------------------ AUROC


def within_questions(right_N: np.ndarray, score_N: np.ndarray, question_N: np.ndarray) -> np.ndarray:
    """``couples`` of each of the C questions, [2, C]. The ratio of the sums is the AUROC within questions."""
    order = np.argsort(question_N, kind="stable")
    starts = np.flatnonzero(np.diff(question_N[order], prepend=-1))
    return np.array([couples(right_N[own], score_N[own]) for own in np.split(order, starts[1:])]).T


# -------------------------------------------------------------------------------------------------------- intervals


def interval(questions: int, width: int, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """Percentile bootstrap: the middle COVERAGE of ``statistic`` over RESAMPLES draws of questions with replacement.

    ``statistic`` takes how often each question was drawn, [B, C] float64, and gives [B]; NaN where a draw leaves it
    undefined, which is not counted. ``width`` is the number of values that it computes with a draw. NaN for fewer
    than FEWEST questions: draws of two or three of them agree, and would make any result look sure.
    """
    if questions < FEWEST:
        return math.nan, math.nan
    generator = np.random.default_rng(0)
    rows = max(1, CHUNK // max(width, 1))
    found: list[np.ndarray] = []
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        drawn_BC = generator.multinomial(questions, np.full(questions, 1 / questions), size).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(statistic(drawn_BC))
    values = np.concatenate(found)
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def auroc_interval(right_N: np.ndarray, score_N: np.ndarray, question_N: np.ndarray) -> tuple[float, float]:
    """Interval of ``auroc``. The scores are sorted once; each draw only weighs the completions anew."""
    if right_N.all() or not right_N.any():
        return math.nan, math.nan
    _, number_N = np.unique(question_N, return_inverse=True)
    good, bad = number_N[right_N], number_N[~right_N][np.argsort(score_N[~right_N])]
    # Of the sorted wrong ones each right one is above the first `above`, and ties with those up to `level`.
    wrong = np.sort(score_N[~right_N])
    above, level = (np.searchsorted(wrong, score_N[right_N], side) for side in ("left", "right"))

    def statistic(drawn_BC: np.ndarray) -> np.ndarray:
        below = np.cumsum(drawn_BC[:, bad], axis=1)
        total = below[:, -1:]
        below = np.concatenate([np.zeros_like(total), below], axis=1)
        beaten = (below[:, above] + below[:, level]) / 2
        weight = drawn_BC[:, good]
        return np.einsum("bn,bn->b", weight, beaten) / (weight.sum(1) * total[:, 0])

    return interval(int(number_N.max()) + 1, len(number_N), statistic)


def ratio_interval(numerator_C: np.ndarray, denominator_C: np.ndarray) -> tuple[float, float]:
    """Interval of sum(numerator) / sum(denominator) over questions."""
    return interval(len(numerator_C), len(numerator_C), lambda drawn: drawn @ numerator_C / (drawn @ denominator_C))


# -------------------------------------------------------------------------------------------------------- shortcuts


def cross_fitted(labelled: Labelled, scores: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """AUROC of K scores that are fitted: learned on one half of the questions and judged on the other, both ways, and
    averaged by couples of right and wrong. Nothing that is judged has seen its own label, or left it out.

    ``scores`` takes which completions it may learn from, [N] bool, and gives scores of all, [N, K].
    """
    weights, values = [], []
    for half in (False, True):
        own_N = labelled.half_N == half
        right = labelled.right_N[own_N]
        if right.any() and not right.all() and not own_N.all():
            weights.append(float(right.sum() * (~right).sum()))
            values.append([auroc(right, score_N) for score_N in scores(~own_N)[own_N].T])
    if not values:
        return [math.nan] * scores(np.ones_like(labelled.half_N)).shape[1]
    return list(np.average(values, axis=0, weights=weights))


def group_scores(group_N: np.ndarray, right_N: np.ndarray, fitted_N: np.ndarray) -> np.ndarray:
    """For each completion the share of right ones in its group (numbers from 0) among those fitted; of a group that
    is not there, the share of all, [N, 1]."""
    size = int(group_N.max()) + 1
    count = np.bincount(group_N[fitted_N], minlength=size)
    share = np.full(size, right_N[fitted_N].mean())
    seen = count > 0
    share[seen] = np.bincount(group_N[fitted_N], right_N[fitted_N], minlength=size)[seen] / count[seen]
    return share[group_N][:, None]


def position_scores(q_N: Sequence[np.ndarray], position_NK: np.ndarray, fitted_N: np.ndarray) -> np.ndarray:
    """What Q is worth by position alone: the mean Q of the completions fitted at given token numbers, [N, K]. Past the
    longest of them its last position counts."""
    fitted = [q for q, taken in zip(q_N, fitted_N, strict=True) if taken]
    position_T = np.concatenate([np.arange(len(q)) for q in fitted])
    mean = np.bincount(position_T, np.concatenate(fitted)) / np.bincount(position_T)  # every position up to the last
    return mean[np.minimum(position_NK, len(mean) - 1)]


# ------------------------------------------------------------------------------------------------------ all measures


def correlations(reward_N: np.ndarray, q_N: np.ndarray) -> tuple[float, float]:
    """(Pearson, Spearman); NaN where one of the two does not vary."""
    if len(reward_N) < 2 or np.ptp(reward_N) == 0 or np.ptp(q_N) == 0:
        return math.nan, math.nan
    return float(pearsonr(reward_N, q_N).statistic), float(spearmanr(reward_N, q_N).statistic)


def measures(labelled: Labelled) -> list[Measure]:
    """Everything that is measured of one set of completions.

    ``auroc_longer`` is the AUROC of "longer is better"; ``baseline_length`` the better of that and its opposite.
    ``..._position_q@p`` replaces Q at p % by the mean Q at that token number (see cross_fitted).
    ``..._q_running_reward@p`` correlates Q with the reward at the same token, ``..._q_reward@p`` with the final one.
    """
    right, question, reward, q_NP = labelled.right_N, labelled.question_N, labelled.reward_NP[:, -1], labelled.q_NP
    found = []
    for name, score in (("reward", reward), ("q", q_NP[:, -1])):
        found.append(Measure(f"auroc_{name}", auroc(right, score), *auroc_interval(right, score, question)))
    couples = within_questions(right, reward, question)
    found.append(Measure("auroc_reward_within_questions", ratio(*couples.sum(1)), *ratio_interval(*couples)))
    if labelled.pairs:
        found.append(pair_accuracy(labelled))
    longer = auroc(right, labelled.lengths_N)
    found += [Measure("auroc_longer", longer), Measure("baseline_length", max(longer, 1 - longer))]
    position_NP = np.array([quantile_positions(n) for n in labelled.lengths_N])
    by_position = cross_fitted(labelled, lambda fitted: position_scores(labelled.q_N, position_NP, fitted))
    for p, percent in enumerate(PERCENT):
        found.append(Measure(f"auroc_reward@{percent}", auroc(right, labelled.reward_NP[:, p])))
        found.append(Measure(f"auroc_q@{percent}", auroc(right, q_NP[:, p])))
        found.append(Measure(f"baseline_position_q@{percent}", by_position[p]))
    for percent in CORRELATED:
        p = PERCENT.index(percent)
        for name, other in (("q_running_reward", labelled.reward_NP[:, p]), ("q_reward", reward)):
            pearson, spearman = correlations(other, q_NP[:, p])
            found += [Measure(f"pearson_{name}@{percent}", pearson), Measure(f"spearman_{name}@{percent}", spearman)]
    return found


def pair_accuracy(labelled: Labelled) -> Measure:
    """Share of pairs whose chosen completion scores higher, ties counting one half."""
    reward = labelled.reward_NP[:, -1]
    won = (np.sign(reward[labelled.right_N] - reward[~labelled.right_N]) + 1) / 2
    _, number = np.unique(labelled.question_N[labelled.right_N], return_inverse=True)
    counts = np.bincount(number)
    return Measure("pair_accuracy", float(won.mean()), *ratio_interval(np.bincount(number, won), counts))
