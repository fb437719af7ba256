"""A trunk with a cache: hidden states of the tokens that continue any number of sequences."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
