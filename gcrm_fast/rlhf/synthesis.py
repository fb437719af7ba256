"""Preference pairs from samples of a policy without labels: synthetic preference generation of RLP (arXiv 2403.19279,
section 3.2).

The samples of a prompt are clustered by what they answer. Where the largest cluster has most of them, the policy is
confident: its sample with the greatest reward is chosen, and a random sample of another cluster is rejected.

Letters: n samples of a prompt.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gcrm_fast.data.chat import is_empty


class Outcome(NamedTuple):
    """What the samples of a record give: ``kind`` is pair, or why there is none. ``chosen`` and ``rejected`` number the
    samples of a pair, ``confidence`` is the share of the largest cluster, ``clusters`` their number."""

    kind: str
    confidence: float
    clusters: int
    chosen: int = -1
    rejected: int = -1


PAIR, AGREED, UNSURE, TIE, SAME = "pair", "one answer", "below the threshold", "tie", "same or no text"


def by_answer(answers: Sequence[str | None]) -> list[int]:
    """The cluster of each sample: that of its final answer. An answer that cannot be read is a cluster of its own."""
    numbers: dict[str | int, int] = {}
    return [numbers.setdefault(i if answer is None else answer, len(numbers)) for i, answer in enumerate(answers)]


def by_entailment(count: int, entails: Callable[[int, int], bool]) -> list[int]:
    """The cluster of each sample: the first whose first sample entails it and is entailed by it."""
    firsts: list[int] = []
    clusters = []
    for i in range(count):
        match = next((c for c, first in enumerate(firsts) if entails(first, i) and entails(i, first)), len(firsts))
        if match == len(firsts):
            firsts.append(i)
        clusters.append(match)
    return clusters


def synthesized(
    clusters: Sequence[int],
    rewards: Sequence[float],
    texts: Sequence[object],
    threshold: float,
    rng: np.random.Generator,
) -> Outcome:
    """The pair of a record, if it gives one. Each of its n samples counts in its cluster, also where texts are equal;
    one without text is neither chosen nor rejected, since no pair of training may be empty."""
    (largest, size), *others = Counter(clusters).most_common()
    confidence = size / len(clusters)
    if not others:
        return Outcome(AGREED, confidence, 1)
    if confidence < threshold:
        return Outcome(UNSURE, confidence, len(others) + 1)
    if others[0][1] == size:
        return Outcome(TIE, confidence, len(others) + 1)
    written = [i for i, text in enumerate(texts) if not is_empty(text)]
    chosen = max((i for i in written if clusters[i] == largest), key=lambda i: rewards[i], default=-1)
    worse = [i for i in written if chosen >= 0 and clusters[i] != largest and texts[i] != texts[chosen]]
    if not worse:
        return Outcome(SAME, confidence, len(others) + 1)
    return Outcome(PAIR, confidence, len(others) + 1, chosen, worse[rng.integers(len(worse))])


class Accuracy(NamedTuple):
    """Pairs in which the chosen sample has a better, an equal and a worse verdict."""

    right: int
    equal: int
    wrong: int

    @property
    def share(self) -> float:
        """Of right among right and wrong pairs; NaN where there are none."""
        decided = self.right + self.wrong
        return self.right / decided if decided else float("nan")


def accuracy(pairs: Sequence[tuple[float, float]]) -> Accuracy:
    """Of the verdicts of (chosen, rejected)."""
    signs = [np.sign(chosen - rejected) for chosen, rejected in pairs]
    return Accuracy(signs.count(1), signs.count(0), signs.count(-1))
