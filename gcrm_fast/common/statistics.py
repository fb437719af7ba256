"""How well scores separate right from wrong.

Letters: N completions.
"""

import math

import numpy as np
from scipy.stats import rankdata


def couples(right_N: np.ndarray, score_N: np.ndarray) -> tuple[float, int]:
    """Couples of a right and a wrong completion: in how many the right one scores higher (a tie counts one half), and
    how many there are. This is Mann and Whitney's count, for few completions much faster than scikit-learn."""
    right = int(right_N.sum())
    won = float(rankdata(score_N)[right_N].sum()) - right * (right + 1) / 2
    return won, right * (len(right_N) - right)


def auroc(right_N: np.ndarray, score_N: np.ndarray) -> float:
    """The chance that a right completion scores above a wrong one (a tie counts one half); NaN for a single class."""
    return ratio(*couples(right_N, score_N))


def highest_by_chance(completions: int) -> float:
    """An AUROC that scores without information hardly ever exceed: 0.5 and three standard errors, for ``completions``
    right ones and as many wrong ones; 1 at the greatest."""
    return min(0.5 + 3 * math.sqrt((2 * completions + 1) / 12) / completions, 1.0)


def ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else math.nan
