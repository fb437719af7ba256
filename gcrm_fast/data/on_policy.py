"""Samples of a policy without labels: two of one prompt are two views of it (RLP, arXiv 2403.19279, section 3.1).

Which samples make a pair, and the order of the pairs, are functions of (seed, pass over the samples, data) alone.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.encoding import TokenizedPair, TokenReport, common_prefix
from gcrm_fast.data.records import Pair
from gcrm_fast.data.samples import read_samples, texts_of
from gcrm_fast.data.sampling import negative_blocks
from gcrm_fast.data.sources import BadRecords

LARGEST_BLOCK = 3  # pairs of views, see view_blocks


def read_on_policy(sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, bad: BadRecords) -> list[Pair]:
    """Each sample as a completion, those of a record one after the other; ``where`` names the record.

    Raises:
        UserError: see ``read_samples`` and ``texts_of``; ``bad`` may skip such records.
    """
    completions = []
    for samples in read_samples(sources, bad=bad):
        try:
            texts = texts_of(samples, samples.completions, tokenizer)
        except UserError as error:
            bad.add(error)
            continue
        completions += [
            Pair(prompt, text, text, where=samples.where, chosen_cut=cut, rejected_cut=cut, target=0.0)
            for (prompt, text), cut in zip(texts, samples.cuts, strict=True)
        ]
    if not completions:
        raise UserError(f"--on-policy {' '.join(sources)}: every record is bad; the first: {bad.skipped[-1]}")
    return completions


@dataclass(frozen=True, kw_only=True, eq=False)
class ViewPair:
    """Two samples of a record, the pair with that ``number`` among those of the record in a pass over the samples."""

    record: int
    number: int
    epoch: int  # the pass
    samples: tuple[TokenizedPair, TokenizedPair]

    @property
    def name(self) -> str:
        return f"a pair of samples of {self.where}"

    @property
    def where(self) -> str:
        return self.samples[0].where

    @property
    def prompt_key(self) -> int:
        return self.samples[0].prompt_key

    @property
    def sequences(self) -> tuple[np.ndarray, ...]:
        one, two = self.samples
        return one.chosen_ids, two.chosen_ids

    def noise(self, seed: int, width: int) -> np.ndarray:
        """Standard normal values [2, width] float32 for the latents of both views."""
        rng = np.random.Generator(np.random.Philox(key=[seed, self.epoch], counter=[0, self.number, 3, self.record]))
        return rng.standard_normal((2, width), dtype=np.float32)


class ViewSize(NamedTuple):
    """The maximum number of tokens computed, and of key rows gathered."""

    tokens: int
    keys: int


@dataclass(kw_only=True)
class OnPolicy:
    """The samples to learn from: of each record those that fit into --max-length, at least two. ``too_few`` records had
    fewer and are skipped."""

    records: list[list[TokenizedPair]]
    report: TokenReport
    too_few: int
    seed: int
    _epoch: int = field(default=-1, init=False)
    _drawn: list[ViewPair] = field(default_factory=list, init=False)

    @classmethod
    def of(cls, samples: Sequence[TokenizedPair], report: TokenReport, seed: int) -> "OnPolicy":
        """From the tokens of what ``read_on_policy`` gave. Raises UserError unless two prompts are left."""
        records = [list(group) for _, group in groupby(samples, key=lambda sample: sample.where)]
        enough = [record for record in records if len(record) > 1]
        if len({record[0].prompt_key for record in enough}) < 2:
            raise UserError(
                f"--on-policy: {len(enough)} of {len(records)} records have two samples that fit into --max-length, "
                "and they need two different prompts: sample more prompts, or raise --max-length"
            )
        return cls(records=enough, report=report, too_few=len(records) - len(enough), seed=seed)

    @property
    def key(self) -> bytes:
        """Fingerprint of the samples and of which record they belong to."""
        counts = np.array([len(record) for record in self.records], dtype=np.int64)
        return hashlib.sha256(self.report.key.encode() + counts.tobytes()).digest()

    @property
    def per_epoch(self) -> int:
        """Pairs of views in a pass over the samples: all samples once, except the last one of an odd number."""
        return sum(len(record) // 2 for record in self.records)

    def largest(self, count: int) -> list[ViewSize]:
        """Upper bounds of the sizes of ``count`` pairs that follow one another, the largest first."""
        bounds = []
        for record in self.records:
            one, two = sorted((len(sample.chosen_ids) for sample in record), reverse=True)[:2]
            shared = common_prefix([sample.chosen_ids for sample in record])
            bounds += [ViewSize(one + two - shared, one + two)] * (len(record) // 2)
        passes = -(-count // len(bounds)) + 1
        return sorted(bounds * passes, reverse=True)[:count]

    def views(self, first: int, count: int) -> list[ViewPair]:
        """Those at the positions ``first`` to ``first`` + ``count`` - 1 of all passes one after the other."""
        drawn, per_epoch = [], self.per_epoch
        for position in range(first, first + count):
            epoch, place = divmod(position, per_epoch)
            if epoch != self._epoch:
                self._epoch, self._drawn = epoch, self._pass(epoch)
            drawn.append(self._drawn[place])
        return drawn

    def _pass(self, epoch: int) -> list[ViewPair]:
        """All pairs of a pass, in the order in which they are used."""
        pairs = []
        for number, record in enumerate(self.records):
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=[0, 0, 2, number]))
            order = rng.permutation(len(record))
            pairs += [
                ViewPair(record=number, number=i, epoch=epoch, samples=(record[a], record[b]))
                for i, (a, b) in enumerate(zip(order[::2], order[1::2], strict=False))
            ]
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=[0, 0, 4, 0]))
        return [pairs[i] for i in rng.permutation(len(pairs))]


def view_blocks(views: Sequence[ViewPair]) -> list[list[ViewPair]]:
    """The views of a step in blocks that stay in one pack: two of different prompts, which give each other a negative
    view. One that is left joins such a block; where too many have the same prompt, the others are alone."""
    blocks = negative_blocks([[view] for view in views])
    joined, alone = [[block for block in blocks if len(block) == n] for n in (2, 1)]
    return [a + b for a, b in zip_longest(joined, alone, fillvalue=list[ViewPair]())]
