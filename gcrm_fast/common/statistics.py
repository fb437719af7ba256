"""How well numbers tell right from wrong.

Letters: N completions.
"""

import math

import numpy as np
from scipy.stats import rankdata


def couples(right_N: np.ndarray, score_N: np.ndarray) -> tuple[float, int]:
    """Of all couples of a right and a wrong completion: in how many the right one scores higher (ties one half), and
    how many there are. Mann and Whitney's count; sklearn's AUROC is the ratio, at a hundred times the time where there
    are few completions."""
    right = int(right_N.sum())
    won = float(rankdata(score_N)[right_N].sum()) - right * (right + 1) / 2
    return won, right * (len(right_N) - right)


def auroc(right_N: np.ndarray, score_N: np.ndarray) -> float:
    """The chance that a right completion scores above a wrong one, ties counting one half; NaN for one class alone."""
    return ratio(*couples(right_N, score_N))


def ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else math.nan
