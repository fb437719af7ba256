"""Several sources of training data in given shares: the pairs of each epoch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Shares of the sources in each epoch, which has as many pairs as all sources together, N.

    ``source_N``: number of the source of each pair, from 0; ``weights``: of each source, positive, of any sum. Every
    source has a pair.
    """

    source_N: np.ndarray
    weights: Sequence[float]

    def counts(self) -> list[int]:
        """Pairs per epoch of each source, N together: the shares of N rounded down, and one more for those with the
        largest remainders."""
        exact = len(self.source_N) * np.array(self.weights) / sum(self.weights)
        counts = exact.astype(int)
        counts[np.argsort(counts - exact, kind="stable")[: len(self.source_N) - counts.sum()]] += 1
        return [int(count) for count in counts]

    def available(self) -> list[int]:
        """Pairs of each source."""
        return [int(n) for n in np.bincount(self.source_N, minlength=len(self.weights))]

    def drawn(self, seed: int, epoch: int) -> np.ndarray:
        """Positions in the data of the pairs of an epoch, [N]; later passes over a source have N, 2 N ... added.

        A source is read pass after pass, each in an order of its own, and an epoch starts where the one before ended:
        all its pairs are drawn equally often, up to one time. A pure function of (seed, epoch, data).
        """
        parts: list[np.ndarray] = []
        for source, count in enumerate(self.counts()):
            own = np.flatnonzero(self.source_N == source)
            start = epoch * count
            first, end = start // len(own), -(-(start + count) // len(own))
            passes = [
                np.random.default_rng([seed, number, source]).permutation(own) + (number - first) * len(self.source_N)
                for number in range(first, end)
            ]
            parts.append(np.concatenate([own[:0], *passes])[start - first * len(own) :][:count])
        return np.concatenate(parts)
