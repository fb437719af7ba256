"""Keys and values of earlier tokens, in numbered slots: what a forward of new tokens reads instead of computing them.

Letters: S slots, T new tokens of a forward, G key/value heads, D head size.

Slots are given out as extents of consecutive ones. A sequence of tokens is a list of runs, each the start of an extent:
several sequences may hold one run, so a prompt is stored once for all its samples, and a sequence is dropped, copied or
reordered without moving a key or a value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcrm_fast.common.errors import UserError
from gcrm_fast.model.inputs import CachedAxis, Run
from gcrm_fast.model.llama import ModelConfig

SMALLEST = 1024  # slots of a new cache


class CacheFull(UserError):
    """No slot is free."""


@dataclass(eq=False)
class Extent:
    """Consecutive slots. The first ``filled`` hold tokens; ``holders`` sequences begin or continue with them."""

    start: int
    size: int
    filled: int = 0
    holders: int = 1


class KVCache:
    """Slots for the keys and values of all layers. It grows as slots are taken, up to ``limit`` of them, each of
    ``bytes_per_slot``; while it grows it needs one layer twice.

    ``layers``: keys and values [S, G, D] of each layer.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, limit: int) -> None:
        self.config, self.limit, self.size, self.taken = config, limit, 0, 0
        shape = 0, config.num_key_value_heads, config.head_dim
        empty = torch.empty(shape, device=device, dtype=dtype)
        self.layers = [(empty, empty) for _ in range(config.num_hidden_layers)]
        self._free: list[tuple[int, int]] = []  # (start, size), ascending, none adjacent
        self._extents: set[Extent] = set()  # those that are taken

    @property
    def bytes_per_slot(self) -> int:
        keys, _ = self.layers[0]
        return 2 * len(self.layers) * keys.shape[1] * keys.shape[2] * keys.element_size()

    def take(self, size: int) -> Extent:
        """An extent of ``size`` free slots, of fewer where no more lie together within the limit. Raises UserError if
        no slot is free."""
        if all(free < size for _, free in self._free):
            self._grow(size)
        if not self._free:
            self._trim()
        if not self._free:
            raise CacheFull(
                f"the cache of keys and values is full: the maximum is {self.limit} tokens "
                f"({self.bytes_per_slot} bytes each): raise it, or use fewer or shorter samples"
            )
        fitting = (i for i, (_, free) in enumerate(self._free) if free >= size)
        place = next(fitting, max(range(len(self._free)), key=lambda i: self._free[i][1]))
        start, free = self._free.pop(place)
        size = min(size, free)
        if free > size:
            self._free.insert(place, (start + size, free - size))
        self.taken += size
        extent = Extent(start, size)
        self._extents.add(extent)
        return extent

    def drop(self, extent: Extent) -> None:
        """One holder less; without any its slots are free."""
        extent.holders -= 1
        if extent.holders:
            return
        self._extents.remove(extent)
        self._give_back(extent.start, extent.size)

    def _trim(self) -> None:
        """Takes back the slots that hold no token: a reservation never keeps others from theirs."""
        for extent in self._extents:
            self._give_back(extent.start + extent.filled, extent.size - extent.filled)
            extent.size = extent.filled

    def _give_back(self, start: int, size: int) -> None:
        if not size:
            return
        self.taken -= size
        merged: list[tuple[int, int]] = []
        for place, free in sorted([*self._free, (start, size)]):
            if merged and sum(merged[-1]) == place:
                place, free = merged[-1][0], merged.pop()[1] + free
            merged.append((place, free))
        self._free = merged

    def _grow(self, size: int) -> None:
        """Adds slots so that ``size`` consecutive ones are free at the end, as far as the limit allows."""
        last = self._free[-1] if self._free else (0, 0)
        at_end = last[1] if sum(last) == self.size else 0
        slots = min(self.limit, max(self.size - at_end + size, 2 * self.size, SMALLEST))
        if slots == self.size:
            return
        if at_end:
            self._free.pop()
        self._free.append((self.size - at_end, slots - self.size + at_end))
        for i, layer in enumerate(self.layers):
            self.layers[i] = grown(layer[0], slots), grown(layer[1], slots)
        self.size = slots


def grown(x_SGD: Tensor, slots: int) -> Tensor:
    """The same with more slots. New ones are 0: attention may multiply them by 0, which NaN would survive."""
    larger = x_SGD.new_zeros(slots, *x_SGD.shape[1:])
    larger[: len(x_SGD)] = x_SGD
    return larger


class CachedSequence:
    """Tokens whose keys and values are in a cache, in order. ``len()`` is their number."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._parts: list[tuple[Extent, int]] = []  # and how many of its slots belong to the sequence
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def runs(self) -> tuple[Run, ...]:
        """Where its tokens are. An extent without any, which the cache may have taken back, is no run."""
        runs, position = [], 0
        for extent, length in self._parts:
            if length:
                runs.append(Run(extent.start, length, position))
            position += length
        return tuple(runs)

    def room(self) -> int:
        """How many tokens fit without another extent. One that a copy has continued has no room here."""
        if not self._parts:
            return 0
        extent, length = self._parts[-1]
        return extent.size - length if length == extent.filled else 0

    def reserve(self, tokens: int) -> None:
        """Takes an extent where the next ``tokens`` would not fit in the last one. Raises UserError, see KVCache."""
        if tokens > self.room():
            self._parts.append((self.cache.take(tokens), 0))

    def append(self, tokens: int) -> list[range]:
        """Takes slots for new tokens; returns them."""
        slots = []
        while tokens:
            if not self.room():
                # Grown by half of what it does not share, so that a long sequence is in few runs.
                own = sum(length for extent, length in self._parts if extent.holders == 1)
                self.reserve(max(tokens, 64, own // 2))
            extent, length = self._parts[-1]
            taken = min(tokens, self.room())
            slots.append(range(extent.start + length, extent.start + length + taken))
            extent.filled += taken
            self._parts[-1] = extent, length + taken
            self._length += taken
            tokens -= taken
        return slots

    def truncate(self, length: int) -> None:
        """Forgets the tokens from ``length`` on."""
        while self._length > length:
            extent, own = self._parts.pop()
            kept = max(0, own - (self._length - length))
            self._length -= own - kept
            if extent.holders == 1:
                extent.filled = kept
            if kept:
                self._parts.append((extent, kept))
            else:
                self.cache.drop(extent)

    def copy(self) -> "CachedSequence":
        """The same tokens, and no slot more."""
        twin = CachedSequence(self.cache)
        twin._parts, twin._length = [part for part in self._parts if part[1]], self._length
        for extent, _ in twin._parts:
            extent.holders += 1
        return twin

    def free(self) -> None:
        """Gives its slots back; no tokens are left."""
        for extent, _ in self._parts:
            self.cache.drop(extent)
        self._parts, self._length = [], 0


def cached_axis(
    sequences: Sequence[CachedSequence], new_ids: Sequence[Sequence[int]], read: Sequence[bool], device: torch.device
) -> CachedAxis:
    """Appends new tokens, one or more per sequence, and builds the axis of their forward.

    ``read``: whether all new tokens of a sequence are read, or the last alone. Raises UserError, see KVCache.take.
    """
    starts = [len(sequence) for sequence in sequences]
    slots: list[int] = []
    for done, (sequence, ids) in enumerate(zip(sequences, new_ids, strict=True)):
        try:
            slots += [slot for part in sequence.append(len(ids)) for slot in part]
        except UserError:
            for taken, start in zip(sequences[: done + 1], starts, strict=False):
                taken.truncate(start)
            raise
    runs = tuple(sequence.runs for sequence in sequences)
    q_lens, k_lens = [len(ids) for ids in new_ids], [len(sequence) for sequence in sequences]
    q_ends = torch.tensor([0, *q_lens]).cumsum(0)
    kv_index = [torch.arange(run.start, run.start + run.length) for own in runs for run in own]
    rows = [
        range(end if every else end + n - 1, end + n)
        for end, n, every in zip(q_ends.tolist(), q_lens, read, strict=False)
    ]
    return CachedAxis(
        input_ids_T=torch.tensor([token for ids in new_ids for token in ids]),
        position_ids_T=torch.tensor([p for s, n in zip(starts, q_lens, strict=True) for p in range(s, s + n)]),
        cu_seqlens_q=q_ends.int(),
        cu_seqlens_k=torch.tensor([0, *k_lens]).cumsum(0).int(),
        max_seqlen_q=max(q_lens),
        max_seqlen_k=max(k_lens),
        kv_index_K=torch.cat(kv_index),
        kv_inverse=None,
        read_rows_R=torch.tensor([row for own in rows for row in own]),
        read_inverse=None,
        slots_T=torch.tensor(slots),
        runs=runs,
    ).to(device)
