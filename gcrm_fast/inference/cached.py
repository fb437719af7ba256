"""A trunk with a cache: hidden states of the tokens that continue any number of sequences.

Letters: R read rows, n tokens of a completion, H hidden size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gcrm_fast.data.batches import Budget
from gcrm_fast.data.packing import Item
from gcrm_fast.model.attention import resolve_backend
from gcrm_fast.model.cache import CachedSequence, KVCache, cached_axis
from gcrm_fast.model.llama import Llama

CACHE_TOKENS = 65536  # default maximum of tokens whose keys and values are kept


class Continuation(NamedTuple):
    """New tokens of a sequence, and whether all their states are wanted or the last one alone."""

    sequence: CachedSequence
    ids: Sequence[int]
    every: bool = True


class CachedTrunk:
    """Continues sequences, up to ``tokens`` new tokens per forward and ``limit`` in the cache.

    ``computed`` counts the tokens that went through the network.
    """

    def __init__(self, trunk: Llama, backend: str, *, tokens: int, limit: int = CACHE_TOKENS) -> None:
        weight = trunk.embed_tokens.weight
        self.trunk, self.device, self.tokens, self.computed = trunk, weight.device, tokens, 0
        self.backend = resolve_backend(backend, weight.device, weight.dtype)
        self.cache = KVCache(trunk.config, weight.device, weight.dtype, limit)

    def open(self) -> CachedSequence:
        """A sequence without tokens."""
        return CachedSequence(self.cache)

    @torch.inference_mode()
    def extend(self, work: Sequence[Continuation]) -> list[Tensor]:
        """The wanted states after the final norm, [n, H] or [1, H], or [0, H] without new tokens, for each sequence.

        If this raises, interrupts included, the sequences are as before.

        Raises:
            UserError: the cache is full.
        """
        before = [(one.sequence, len(one.sequence)) for one in work]
        states: list[list[Tensor]] = [[] for _ in work]
        try:
            for parts in self._forwards(work):
                axis = cached_axis(
                    [work[i].sequence for i, _, _ in parts],
                    [work[i].ids[a:b] for i, a, b in parts],
                    [work[i].every for i, _, _ in parts],
                    self.device,
                )
                hidden_RH = self.trunk(axis, self.backend, self.cache.layers)
                self.computed += len(axis.slots_T)
                counts = [b - a if work[i].every else 1 for i, a, b in parts]
                for (i, _, end), own in zip(parts, hidden_RH.split(counts), strict=True):
                    if work[i].every or end == len(work[i].ids):
                        states[i].append(own)
        except BaseException:
            for sequence, length in before:
                sequence.truncate(length)
            raise
        empty = self.trunk.norm.weight.new_empty(0, self.trunk.config.hidden_size)
        return [own[0] if len(own) == 1 else torch.cat([empty, *own]) for own in states]

    def _forwards(self, work: Sequence[Continuation]) -> list[list[tuple[int, int, int]]]:
        """(index in ``work``, first and last + 1 of its new tokens) of the parts of each forward."""
        forwards: list[list[tuple[int, int, int]]] = []
        room = 0
        for i, (_, ids, _) in enumerate(work):
            done = 0
            while done < len(ids):
                if not room:
                    forwards.append([])
                    room = self.tokens
                end = min(len(ids), done + room)
                forwards[-1].append((i, done, end))
                room -= end - done
                done = end
        return forwards


class ReadRows(NamedTuple):
    """Completions whose states are read, by their ``index``, and of each the rows that are its own."""

    indices: Sequence[int]
    rows_of: Sequence[np.ndarray]


def forwards_after_prompt(items: Sequence[Item], budget: Budget) -> Iterator[list[Item]]:
    """Completions of one prompt whose new tokens, and keys with the prompt's, fit in a forward: one at least."""
    taken: list[Item] = []
    tokens = keys = 0
    for item in items:
        new, length = len(item.ids) - item.start, len(item.ids)
        if taken and (tokens + new > budget.tokens or keys + length > budget.keys):
            yield taken
            taken, tokens, keys = [], 0, 0
        taken.append(item)
        tokens, keys = tokens + new, keys + length
    yield taken


def states_after_prompt(
    trunk: Llama, backend: str, budget: Budget, items: Sequence[Item], *, per_token: bool
) -> Iterator[tuple[ReadRows, Tensor]]:
    """Of completions of one prompt, of any number, the states [R, H] of all tokens or of the last one.

    The prompt and each distinct completion are computed once.
    """
    start = items[0].start
    same: dict[bytes, list[Item]] = {}
    for item in items:
        same.setdefault(item.ids.tobytes(), []).append(item)
    forwards = list(forwards_after_prompt([twins[0] for twins in same.values()], budget))
    most = max(sum(len(item.ids) - start for item in part) for part in forwards)
    cached = CachedTrunk(trunk, backend, tokens=budget.tokens, limit=start + most)
    prompt = cached.open()
    prompt.reserve(start)
    cached.extend([Continuation(prompt, items[0].ids[:start].tolist(), every=False)])
    for part in forwards:
        sequences = [prompt.copy() for _ in part]
        for sequence, item in zip(sequences, part, strict=True):
            sequence.reserve(len(item.ids) - start)
        new = [item.ids[start:].tolist() for item in part]
        states = cached.extend([Continuation(*one, every=per_token) for one in zip(sequences, new, strict=True)])
        for sequence in sequences:
            sequence.free()
        ends = np.cumsum([0, *map(len, states)])
        read = [
            (twin.index, np.arange(a, b))
            for item, a, b in zip(part, ends[:-1], ends[1:], strict=True)
            for twin in same[item.ids.tobytes()]
        ]
        yield ReadRows(*zip(*read, strict=True)), torch.cat(states)
