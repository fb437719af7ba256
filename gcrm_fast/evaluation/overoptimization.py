"""Over-optimization by best-of-n: how a gold score follows a proxy reward that picks the best of n samples.

Functions of numbers. The yardstick of Gao et al. (arXiv 2210.10760): gold against KL = ln n - (n - 1) / n, n samples
being picked from. Letters: M samples of a question, C questions, K sizes n.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from gcrm_fast.evaluation.measures import ratio_interval

ROUNDING = 1e-9  # a fall by less is none: gold that stays the same is the sum of its weights times it, about 1e-15 off


class Point(NamedTuple):
    """Best of ``n``: its KL from plain sampling in nats; mean gold and proxy over questions, each less that of n = 1;
    bounds of the gold gain."""

    n: int
    kl: float
    gold: float
    low: float
    high: float
    proxy: float


class Fall(NamedTuple):
    """What is lost from the best size to the largest: mean gold there less gold at the peak, and its interval."""

    peak: int
    largest: int
    change: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether the interval lies below 0, by more than rounding."""
        return self.high < -ROUNDING


def kl(n: int) -> float:
    """KL divergence of the best of n from a sample, in nats: ln n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n


def sizes(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def best_of_n(proxy_M: np.ndarray, gold_M: np.ndarray, n: int) -> float:
    """Expected gold of the sample with the greatest proxy among n of the M, over all choices of n; samples with equal
    proxies are equally likely to be picked. Unbiased (Nakano et al., arXiv 2112.09332, appendix I)."""
    m = len(proxy_M)
    order = np.argsort(proxy_M, kind="stable")
    ranked, gold = proxy_M[order], gold_M[order].astype(np.float64)
    _, group, count = np.unique(ranked, return_inverse=True, return_counts=True)
    gold = (np.bincount(group, gold) / count)[group]
    i = np.arange(n, m + 1)  # the i-th lowest is the best of n where the others are among the i - 1 below it
    choose = gammaln(i) - gammaln(n) - gammaln(i - n + 1)
    weights = np.exp(choose - (gammaln(m + 1) - gammaln(n + 1) - gammaln(m - n + 1)))
    return float(weights @ gold[n - 1 :])


def gains(proxy: Sequence[np.ndarray], gold: Sequence[np.ndarray], n_K: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Gold and proxy of the best of each n less those of a plain sample, [C, K] each."""
    both = np.array([[(best_of_n(p, g, n), best_of_n(p, p, n)) for n in n_K] for p, g in zip(proxy, gold, strict=True)])
    both -= np.array([(g.mean(), p.mean()) for p, g in zip(proxy, gold, strict=True)])[:, None]
    return both[..., 0], both[..., 1]


def curve(gold_CK: np.ndarray, proxy_CK: np.ndarray, n_K: Sequence[int]) -> list[Point]:
    """The means over questions, with intervals over questions."""
    questions = len(gold_CK)
    points = []
    for n, gold_C, proxy_C in zip(n_K, gold_CK.T, proxy_CK.T, strict=True):
        low, high = ratio_interval(gold_C, np.ones(questions))
        points.append(Point(n, kl(n), float(gold_C.mean()), low, high, float(proxy_C.mean())))
    return points


def fall(gold_CK: np.ndarray, n_K: Sequence[int], half_C: np.ndarray) -> Fall:
    """Whether gold turns down. The peak is found on one half of the questions and the change from it measured on the
    other, both ways: the highest of several noisy means would seem to be followed by a fall in any case."""
    change_C = np.zeros(len(gold_CK))
    for measured in (half_C, ~half_C):
        peak = int(gold_CK[~measured].mean(0).argmax()) if (~measured).any() else 0
        change_C[measured] = gold_CK[measured, -1] - gold_CK[measured, peak]
    low, high = ratio_interval(change_C, np.ones(len(change_C)))
    return Fall(n_K[int(gold_CK.mean(0).argmax())], n_K[-1], float(change_C.mean()), low, high)


def fit(points: Sequence[Point]) -> tuple[float, float]:
    """(alpha, beta) of gold = d (alpha - beta d), d = sqrt(KL), by least squares (Gao et al., section 3.1); NaN for
    fewer than two sizes above 1."""
    above = [point for point in points if point.n > 1]
    if len(above) < 2:
        return math.nan, math.nan
    d = np.sqrt([point.kl for point in above])
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -(d**2)], axis=1), [point.gold for point in above], rcond=None)
    return float(alpha), float(beta)
