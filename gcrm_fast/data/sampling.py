"""Positions of a pair's completions: those compared, drawn or all; and the quantiles at which metrics are read.

Pure functions of (seed, epoch, pair). Letters: S samples per pair.
"""

from dataclasses import dataclass

import numpy as np

from gcrm_fast.data.encoding import TokenizedPair

QUANTILES = 11  # Q-values are read at 0, 10, ..., 100 % of a completion


@dataclass(frozen=True)
class Sampling:
    """Which source and goal positions are compared: drawn (``paper`` or ``repo``), or all of them (``dense``)."""

    samples: int = 16
    variant: str = "paper"
    negatives: str = "anywhere"  # or "after-divergence": negative goals only from the first differing token on
    seed: int = 0


def shared_start(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading tokens that two sequences share."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def divergence(pair: TokenizedPair) -> int:
    """Number of leading tokens that chosen and rejected sequences share."""
    return shared_start(pair.chosen_ids, pair.rejected_ids)


def first_negative(pair: TokenizedPair, sampling: Sampling) -> int:
    """First position of the rejected completion that may be a negative goal."""
    if sampling.negatives != "after-divergence":
        return 0
    return min(max(divergence(pair) - pair.rejected_start, 0), len(pair.rejected_ids) - pair.rejected_start - 1)


def draw_samples(pair: TokenizedPair, sampling: Sampling, epoch: int) -> np.ndarray:
    """Positions [4, S] in the completions (0 = first completion token): sources, goals, negative sources (of chosen),
    negative goals (of rejected). Counter-based: depends on (seed, epoch, pair id) alone.

    GCRM section 3 (``paper``) and its released code (``repo``). Where chosen has one token, positives are all 0.
    """
    rng = np.random.Generator(np.random.Philox(key=[sampling.seed, epoch], counter=[0, 0, 0, pair.pair_id]))
    n_chosen = len(pair.chosen_ids) - pair.chosen_start
    n_rejected = len(pair.rejected_ids) - pair.rejected_start
    first = first_negative(pair, sampling)
    s = sampling.samples
    if sampling.variant == "repo":
        # Fractions counted from the end: position -floor(f * na + 1) with na text tokens, -1 the end token.
        u_2S = np.sort(rng.random((2, s)), axis=0)
        sources, goals = (_from_end(u, n_chosen) for u in u_2S)
        return np.stack(
            [sources, goals, _from_end(rng.random(s), n_chosen), first + _from_end(rng.random(s), n_rejected - first)]
        )
    negatives = np.stack([rng.integers(n_chosen, size=s), rng.integers(first, n_rejected, size=s)])
    if n_chosen == 1:
        return np.concatenate([np.zeros((2, s), dtype=np.int64), negatives])
    # Two distinct positions, uniform over unordered pairs: skip the first draw in the second, then sort.
    i = rng.integers(n_chosen, size=s)
    j = rng.integers(n_chosen - 1, size=s)
    positives = np.sort(np.stack([i, j + (j >= i)]), axis=0)
    return np.concatenate([positives, negatives])


def _from_end(u_S: np.ndarray, n: int) -> np.ndarray:
    """Positions of the released code among n tokens, u in [0, 1): n - floor((1 - u) * (n - 1) + 1)."""
    return n - np.floor((1 - u_S) * (n - 1) + 1).astype(np.int64)


def quantile_positions(n: int) -> np.ndarray:
    """Positions at 0, 10, ..., 100 % of a completion of n tokens: max(n * i // 10 - 1, 0), [11]."""
    return np.maximum(n * np.arange(QUANTILES) // 10 - 1, 0)
