"""Positions of a pair's completions: those compared, drawn or all; and the quantiles at which metrics are read.

Pure functions of (seed, epoch, pair); for ``rs`` also of the pairs of its step. Letters: S samples per pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gcrm_fast.data.encoding import M, TokenizedPair

QUANTILES = 11  # Q-values are read at 0, 10, ..., 100 % of a completion


@dataclass(frozen=True)
class Sampling:
    """Which source and goal positions are compared: drawn (``paper`` or ``repo``), or all of them (``dense``).

    ``positions`` are the arms of the paper's ablations (GCRM, appendix): ``random``; ``late_goal``, goals in the last
    tenth of a completion; ``late_both``, sources too; ``avg``, drawn like ``random``, the goal being their mean state;
    ``rs``, negative goals from the rejected completion of another prompt. Ours: ``end``, the goal is the end of chosen,
    as at inference, the negative source a token of rejected where it differs; ``end_mix``, half of each.
    """

    samples: int = 16  # 0 where no states are compared
    variant: str = "paper"
    negatives: str = "anywhere"  # or "after-divergence": negative goals only from the first differing token on
    seed: int = 0
    positions: str = "random"
    noise: int = 0  # numbers that the reward head draws per completion
    predict: bool = False  # whether an lm_head predicts the tokens of chosen completions
    views: int = 0  # numbers that the multi-view loss draws per view; 0 without it


def shared_start(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading tokens that two sequences share."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def divergence(pair: TokenizedPair) -> int:
    """Number of leading tokens that chosen and rejected sequences share."""
    return shared_start(pair.chosen_ids, pair.rejected_ids)


def differs_from(pair: TokenizedPair) -> int:
    """Position in the rejected completion of the first token that is not also chosen's, or its last one."""
    return min(max(divergence(pair) - pair.rejected_start, 0), len(pair.rejected_ids) - pair.rejected_start - 1)


def first_negative(pair: TokenizedPair, sampling: Sampling) -> int:
    """First position of the rejected completion that may be a negative goal."""
    return differs_from(pair) if sampling.negatives == "after-divergence" else 0


def other_pair(pair: M, block: Sequence[M]) -> M | None:
    """The next pair of the block, in a circle, that has another prompt: ``rs`` takes negative goals from it, and a pair
    of views its negative view."""
    at = next(i for i, member in enumerate(block) if member is pair)
    return next((p for p in (*block[at:], *block[:at]) if p.prompt_key != pair.prompt_key), None)


def negative_blocks(groups: Sequence[list[M]]) -> list[list[M]]:
    """The groups of a step, joined two by two: a group and the next one that has another prompt."""
    blocks: list[list[M]] = []
    waiting: list[list[M]] = []
    for group in groups:
        if waiting and waiting[0][0].prompt_key != group[0].prompt_key:  # those that wait all have one prompt
            blocks.append(waiting.pop(0) + group)
        else:
            waiting.append(group)
    return blocks + waiting


def draw_samples(
    pair: TokenizedPair, sampling: Sampling, epoch: int, negative_of: TokenizedPair | None = None
) -> np.ndarray:
    """Positions [4, S] in the completions (0 = first completion token): sources, goals, negative sources (of chosen),
    negative goals (of rejected; of that of ``negative_of`` for ``rs``). Counter-based: depends on (seed, epoch, pair
    id) alone.

    GCRM section 3 (``paper``) and its released code (``repo``). Where chosen has one token, positives are all 0. For
    ``end`` the negative source is the end of chosen and the negative goal a token of rejected: similarity is symmetric.
    """
    rng = np.random.Generator(np.random.Philox(key=[sampling.seed, epoch], counter=[0, 0, 0, pair.pair_id]))
    n_chosen = len(pair.chosen_ids) - pair.chosen_start
    other = negative_of or pair
    n_rejected = len(other.rejected_ids) - other.rejected_start
    first = first_negative(pair, sampling)
    s = sampling.samples
    if sampling.positions in ("late_goal", "late_both"):
        return _late(rng, n_chosen, n_rejected, s, both=sampling.positions == "late_both")
    if sampling.positions in ("end", "end_mix"):
        at_end = s if sampling.positions == "end" else (s + 1) // 2
        ends_4S = _to_the_end(rng, n_chosen, n_rejected, differs_from(pair), at_end)
        return np.concatenate([ends_4S, _anywhere(rng, n_chosen, n_rejected, first, s - at_end)], axis=1)
    if sampling.variant == "repo":
        # Fractions counted from the end: position -floor(f * na + 1) with na text tokens, -1 the end token.
        u_2S = np.sort(rng.random((2, s)), axis=0)
        sources, goals = (_from_end(u, n_chosen) for u in u_2S)
        return np.stack(
            [sources, goals, _from_end(rng.random(s), n_chosen), first + _from_end(rng.random(s), n_rejected - first)]
        )
    return _anywhere(rng, n_chosen, n_rejected, first, s)


def _anywhere(rng: np.random.Generator, n_chosen: int, n_rejected: int, first: int, s: int) -> np.ndarray:
    """[4, S] of the paper: uniform over i < j of chosen, over chosen, and over rejected from ``first`` on."""
    negatives = np.stack([rng.integers(n_chosen, size=s), rng.integers(first, n_rejected, size=s)])
    if n_chosen == 1:
        return np.concatenate([np.zeros((2, s), dtype=np.int64), negatives])
    # Two distinct positions, uniform over unordered pairs: skip the first draw in the second, then sort.
    i = rng.integers(n_chosen, size=s)
    j = rng.integers(n_chosen - 1, size=s)
    positives = np.sort(np.stack([i, j + (j >= i)]), axis=0)
    return np.concatenate([positives, negatives])


def _late(rng: np.random.Generator, n_chosen: int, n_rejected: int, s: int, *, both: bool) -> np.ndarray:
    """[4, S] with goals in the last tenth, at least one position (``both``: sources too, at least two)."""

    def start(n: int) -> int:
        return max(n - max(2 if both else 1, -(-n // 10)), 0)

    negatives = np.stack(
        [
            rng.integers(start(n_chosen) if both else 0, n_chosen, size=s),
            rng.integers(start(n_rejected), n_rejected, size=s),
        ]
    )
    if n_chosen == 1:
        return np.concatenate([np.zeros((2, s), dtype=np.int64), negatives])
    if both:
        first = start(n_chosen)
        return np.concatenate([first + _anywhere(rng, n_chosen - first, 1, 0, s)[:2], negatives])
    goals = rng.integers(start(n_chosen), n_chosen, size=s)
    return np.concatenate([[rng.integers(goals), goals], negatives])


def _to_the_end(rng: np.random.Generator, n_chosen: int, n_rejected: int, first: int, s: int) -> np.ndarray:
    """[4, S]: any position before chosen's last with its last, and its last with rejected's from ``first`` on."""
    end = np.full(s, n_chosen - 1)
    sources = rng.integers(max(n_chosen - 1, 1), size=s)
    return np.stack([sources, end, end, rng.integers(first, n_rejected, size=s)])


def _from_end(u_S: np.ndarray, n: int) -> np.ndarray:
    """Positions of the released code among n tokens, u in [0, 1): n - floor((1 - u) * (n - 1) + 1)."""
    return n - np.floor((1 - u_S) * (n - 1) + 1).astype(np.int64)


def draw_noise(pair: TokenizedPair, sampling: Sampling, epoch: int) -> np.ndarray:
    """Standard normal values [2, D] float32 for the latents of chosen [0] and rejected [1]: a function of (seed, epoch,
    pair id) alone, as ``draw_samples`` is, in numbers of another stream."""
    rng = np.random.Generator(np.random.Philox(key=[sampling.seed, epoch], counter=[0, 0, 1, pair.pair_id]))
    return rng.standard_normal((2, sampling.noise), dtype=np.float32)


def quantile_positions(n: int) -> np.ndarray:
    """Positions at 0, 10, ..., 100 % of a completion of n tokens: max(n * i // 10 - 1, 0), [11]."""
    return np.maximum(n * np.arange(QUANTILES) // 10 - 1, 0)
