"""How well rewards and Q-values separate right completions from wrong ones, and how far shortcuts get.

Functions of arrays. Letters: N completions, P the eleven positions 0, 10, ..., 100 % of a completion, T tokens,
C questions, B bootstrap resamples, K scores. Completions of one question are dependent, so intervals resample
questions with all their completions.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.stats import pearsonr, spearmanr

from gcrm_fast.common.statistics import auroc, couples, ratio
from gcrm_fast.data.sampling import QUANTILES, quantile_positions

RESAMPLES = 1000
COVERAGE = 0.95
FEWEST = 10  # questions that an interval requires
PERCENT = tuple(range(0, 101, 100 // (QUANTILES - 1)))
CORRELATED = (20, 40, 60, 80)  # % of a completion at which reward and Q are correlated
CHUNK = 2**15  # weights held at once while resampling: they stay in a core's cache


class Measure(NamedTuple):
    """A number and its interval; NaN where it is undefined (a single class, constant values)."""

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Labeled:
    """N scored completions known to be right or wrong, in the order of their records.

    In a file of pairs each chosen completion (right) is followed by its rejected one (wrong).
    """

    right_N: np.ndarray  # bool
    question_N: np.ndarray  # int64, equal for completions of one question
    half_N: np.ndarray  # bool, see halves()
    lengths_N: np.ndarray  # int64, tokens
    reward_NP: np.ndarray  # float, running reward; [:, -1] is the reward
    q_N: list[np.ndarray]  # for each completion [its tokens] float32
    pairs: bool

    @property
    def q_NP(self) -> np.ndarray:
        return np.array([q[quantile_positions(len(q))] for q in self.q_N])

    def subset(self, mask_N: np.ndarray) -> "Labeled":
        arrays = {name: value[mask_N] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, q_N=[self.q_N[i] for i in np.flatnonzero(mask_N)], **arrays)


def halves(questions: Sequence[str]) -> np.ndarray:
    """Which half of the data each question belongs to, [N] bool: a function of its text alone.

    A bit from the middle of the hash: held-out generated problems (see arithmetic.is_held_out) share its last one.
    """
    return np.array([zlib.crc32(question.encode()) >> 16 & 1 for question in questions], dtype=bool)


def within_questions(right_N: np.ndarray, score_N: np.ndarray, question_N: np.ndarray) -> np.ndarray:
    """``couples`` of each of the C questions, [2, C]. The ratio of the sums is the AUROC within questions."""
    order = np.argsort(question_N, kind="stable")
    starts = np.flatnonzero(np.diff(question_N[order], prepend=-1))
    return np.array([couples(right_N[own], score_N[own]) for own in np.split(order, starts[1:])]).T


# -------------------------------------------------------------------------------------------------------- intervals


def interval(questions: int, width: int, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """Percentile bootstrap: the middle COVERAGE of ``statistic`` over RESAMPLES draws of questions with replacement.

    Args:
        questions: with fewer than FEWEST the interval is NaN, since draws of two or three questions agree too often.
        width: number of values that the statistic computes per draw.
        statistic: from how often each question was drawn, [B, C] float64, to [B]. NaN values are ignored.
    """
    if questions < FEWEST:
        return math.nan, math.nan
    generator = np.random.default_rng(0)
    rows = max(1, CHUNK // max(width, 1))
    parts: list[np.ndarray] = []
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        drawn_BC = generator.multinomial(questions, np.full(questions, 1 / questions), size).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append(statistic(drawn_BC))
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def auroc_interval(right_N: np.ndarray, score_N: np.ndarray, question_N: np.ndarray) -> tuple[float, float]:
    """Interval of ``auroc``. The scores are sorted once; each draw only changes the completions' weights."""
    if right_N.all() or not right_N.any():
        return math.nan, math.nan
    _, number_N = np.unique(question_N, return_inverse=True)
    order = np.argsort(score_N[~right_N])
    good, bad, wrong = number_N[right_N], number_N[~right_N][order], score_N[~right_N][order]
    # Each right one scores higher than the first `above` wrong ones, and ties with those up to `level`.
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


def cross_fitted(labeled: Labeled, scores: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """AUROC of K fitted scores: fitted on one half of the questions and evaluated on the other, both ways, and averaged
    by the number of couples of right and wrong.

    ``scores`` takes which completions it may learn from, [N] bool, and returns scores of all, [N, K].
    """
    weights, values = [], []
    for half in (False, True):
        own_N = labeled.half_N == half
        right = labeled.right_N[own_N]
        if right.any() and not right.all() and not own_N.all():
            weights.append(float(right.sum() * (~right).sum()))
            values.append([auroc(right, score_N) for score_N in scores(~own_N)[own_N].T])
    if not values:
        return [math.nan] * scores(np.ones_like(labeled.half_N)).shape[1]
    return list(np.average(values, axis=0, weights=weights))


def group_scores(group_N: np.ndarray, right_N: np.ndarray, fitted_N: np.ndarray) -> np.ndarray:
    """Share of right completions among the fitted ones of each completion's group, [N, 1]; for a group without fitted
    completions the share among all fitted ones. Groups are numbered from 0."""
    size = int(group_N.max()) + 1
    count = np.bincount(group_N[fitted_N], minlength=size)
    share = np.full(size, right_N[fitted_N].mean())
    np.divide(np.bincount(group_N[fitted_N], right_N[fitted_N], minlength=size), count, out=share, where=count > 0)
    return share[group_N][:, None]


def position_scores(q_N: Sequence[np.ndarray], position_NK: np.ndarray, fitted_N: np.ndarray) -> np.ndarray:
    """Mean Q-value of the fitted completions at given token indices, [N, K]: what position alone predicts. Past the
    longest fitted completion, the mean at its last token."""
    fitted = [q for q, taken in zip(q_N, fitted_N, strict=True) if taken]
    position_T = np.concatenate([np.arange(len(q)) for q in fitted])
    mean = np.bincount(position_T, np.concatenate(fitted)) / np.bincount(position_T)  # every position up to the last
    return mean[np.minimum(position_NK, len(mean) - 1)]


# ------------------------------------------------------------------------------------------------------ all measures


def correlations(reward_N: np.ndarray, q_N: np.ndarray) -> tuple[float, float]:
    """(Pearson, Spearman); NaN where one of the two is constant."""
    if len(reward_N) < 2 or np.ptp(reward_N) == 0 or np.ptp(q_N) == 0:
        return math.nan, math.nan
    return float(pearsonr(reward_N, q_N).statistic), float(spearmanr(reward_N, q_N).statistic)


def measures(labeled: Labeled) -> list[Measure]:
    """All measures of one set of completions.

    ``auroc_longer`` is the AUROC of "longer is better"; ``baseline_length`` the better of that and its opposite.
    ``..._position_q@p`` replaces Q at p % by the mean Q at that token index (see cross_fitted).
    ``..._q_running_reward@p`` correlates Q with the reward at the same token, ``..._q_reward@p`` with the final one.
    """
    right, question, reward, q_NP = labeled.right_N, labeled.question_N, labeled.reward_NP[:, -1], labeled.q_NP
    table = []
    for name, score in (("reward", reward), ("q", q_NP[:, -1])):
        table.append(Measure(f"auroc_{name}", auroc(right, score), *auroc_interval(right, score, question)))
    couples_2C = within_questions(right, reward, question)
    table.append(Measure("auroc_reward_within_questions", ratio(*couples_2C.sum(1)), *ratio_interval(*couples_2C)))
    if labeled.pairs:
        table.append(pair_accuracy(labeled))
    longer = auroc(right, labeled.lengths_N)
    table += [Measure("auroc_longer", longer), Measure("baseline_length", max(longer, 1 - longer))]
    position_NP = np.array([quantile_positions(n) for n in labeled.lengths_N])
    by_position = cross_fitted(labeled, lambda fitted: position_scores(labeled.q_N, position_NP, fitted))
    for p, percent in enumerate(PERCENT):
        table.append(Measure(f"auroc_reward@{percent}", auroc(right, labeled.reward_NP[:, p])))
        table.append(Measure(f"auroc_q@{percent}", auroc(right, q_NP[:, p])))
        table.append(Measure(f"baseline_position_q@{percent}", by_position[p]))
    for percent in CORRELATED:
        p = PERCENT.index(percent)
        for name, other in (("q_running_reward", labeled.reward_NP[:, p]), ("q_reward", reward)):
            pearson, spearman = correlations(other, q_NP[:, p])
            table += [Measure(f"pearson_{name}@{percent}", pearson), Measure(f"spearman_{name}@{percent}", spearman)]
    return table


def pair_accuracy(labeled: Labeled) -> Measure:
    """Share of pairs in which the chosen completion scores higher; a tie counts one half."""
    reward = labeled.reward_NP[:, -1]
    won = (np.sign(reward[labeled.right_N] - reward[~labeled.right_N]) + 1) / 2
    _, number = np.unique(labeled.question_N[labeled.right_N], return_inverse=True)
    return Measure("pair_accuracy", float(won.mean()), *ratio_interval(np.bincount(number, won), np.bincount(number)))
