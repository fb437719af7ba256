"""The cache of keys and values: attention on its slots, who holds which, and what it costs."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gcrm_fast.common.errors import UserError
from gcrm_fast.model.cache import CachedSequence, CacheFull, KVCache, cached_axis
from gcrm_fast.model.cached_attention import blocks_of, cached_attention
from gcrm_fast.model.segment_attention import segment_attention
from support.small import small_config

CPU = torch.device("cpu")
KEY_HEADS, REPEATS, HEAD_SIZE = 2, 2, 8


def cache(limit: int = 10**5) -> KVCache:
    return KVCache(small_config(), CPU, torch.float64, limit)


lengths = st.sampled_from([1, 2, 3, 20, 64, 100, 150])


@settings(max_examples=80, deadline=None)
@given(
    prompt=st.integers(0, 200),
    before=st.lists(lengths, min_size=1, max_size=5),
    more=st.lists(st.lists(lengths, max_size=2), min_size=5, max_size=5),
    new=st.lists(lengths, min_size=5, max_size=5),
    order=st.randoms(use_true_random=False),
    alike=st.booleans(),
)
def test_attention_on_slots_equals_attention_to_gathered_keys(
    prompt: int, before: list[int], more: list[list[int]], new: list[int], order: Random, alike: bool
) -> None:
    """Shared prompts, forks of forks, runs of all lengths, several runs per sequence, in any order; ``alike``: one
    token each, as in generation."""
    kv = cache()
    root = CachedSequence(kv)
    root.append(prompt)
    sequences = []
    for own, tails in zip(before, more, strict=False):
        for parent in (root, *sequences[:1]):
            sequence = parent.copy()
            sequence.append(own)
            for tail in tails:
                sequence.append(tail)
            sequences.append(sequence)
    order.shuffle(sequences)
    new_ids = [[0] * (1 if alike else n) for n, _ in zip(new * 2, sequences, strict=False)]
    axis = cached_axis(sequences, new_ids, [True] * len(sequences), CPU)
    k, v = (torch.randn(kv.size, KEY_HEADS, HEAD_SIZE, dtype=torch.float64) for _ in range(2))
    q = torch.randn(len(axis.slots_T), KEY_HEADS * REPEATS, HEAD_SIZE, dtype=torch.float64)
    expected = segment_attention(q, k[axis.kv_index_K], v[axis.kv_index_K], axis.cu_seqlens_q, axis.cu_seqlens_k)
    ours = cached_attention(q, k, v, blocks_of(axis, kv.size, REPEATS, torch.float64))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_samples_of_a_prompt_take_two_products() -> None:
    kv = cache()
    root = CachedSequence(kv)
    root.append(300)
    rows = [root.copy() for _ in range(16)]
    for row in rows:
        row.reserve(50)
    for step in range(3):
        kept = rows[: 16 - 5 * step]
        axis = cached_axis(kept, [[0]] * len(kept), [True] * len(kept), CPU)
        blocks = blocks_of(axis, kv.size, REPEATS, torch.float64)
        assert [(block.b, block.length) for block in blocks] == [(1, 300), (len(kept), step + 1)]


class Holders(RuleBasedStateMachine):
    """Sequences that grow, are copied, shortened and dropped in any order, next to lists of what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = cache(limit=5000)
        self.contents: dict[int, int] = {}  # slot -> the token last written to it
        self.held: list[tuple[CachedSequence, list[int]]] = [(CachedSequence(self.cache), [])]
        self.token = 0

    def pick(self, which: int) -> tuple[CachedSequence, list[int]]:
        return self.held[which % len(self.held)]

    @rule(which=st.integers(0, 99), tokens=st.integers(1, 150))
    def append(self, which: int, tokens: int) -> None:
        sequence, expected = self.pick(which)
        for slots in sequence.append(tokens):
            for slot in slots:
                self.token += 1
                self.contents[slot] = self.token
                expected.append(self.token)

    @rule(which=st.integers(0, 99))
    def copy(self, which: int) -> None:
        sequence, expected = self.pick(which)
        self.held.append((sequence.copy(), list(expected)))

    @rule(which=st.integers(0, 99), tokens=st.integers(0, 60))
    def reserve(self, which: int, tokens: int) -> None:
        self.pick(which)[0].reserve(tokens)

    @rule(which=st.integers(0, 99), share=st.floats(0, 1))
    def truncate(self, which: int, share: float) -> None:
        sequence, expected = self.pick(which)
        length = int(share * len(expected))
        sequence.truncate(length)
        del expected[length:]

    @precondition(lambda self: len(self.held) > 1)
    @rule(which=st.integers(0, 99))
    def drop(self, which: int) -> None:
        self.held.pop(which % len(self.held))[0].free()

    @invariant()
    def every_sequence_holds_its_tokens(self) -> None:
        for sequence, expected in self.held:
            slots = [slot for run in sequence.runs for slot in range(run.start, run.start + run.length)]
            assert [self.contents[slot] for slot in slots] == expected
            assert len(sequence) == len(expected)
            assert all(run.length for run in sequence.runs)

    def teardown(self) -> None:
        for sequence, _ in self.held:
            sequence.free()
        assert self.cache.taken == 0
        self.cache.take(self.cache.size)  # all in one piece again


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_memory_is_what_it_says_and_bounded() -> None:
    kv = cache(limit=3000)
    assert kv.bytes_per_slot == 3 * 2 * 2 * 8 * 8  # layers, keys and values, key heads, head size, float64
    extent = kv.take(100)
    assert (kv.size, kv.taken) == (1024, 100)
    extents = [extent, kv.take(2000)]
    assert sum(x.numel() * x.element_size() for layer in kv.layers for x in layer) == kv.size * kv.bytes_per_slot
    extents.append(kv.take(1000))
    assert extents[-1].size == 900  # what is left
    for one in extents:
        one.filled = one.size
    with pytest.raises(UserError, match=r"full: the maximum is 3000 tokens \(768 bytes each\)"):
        kv.take(1)
    kv.drop(extent)
    assert kv.take(100).start == 0


def test_slots_without_tokens_never_fill_a_cache() -> None:
    kv = cache(limit=3000)
    prompt = CachedSequence(kv)
    prompt.append(2000)
    rows = [prompt.copy() for _ in range(20)]
    rows[0].reserve(900)
    for row in rows:
        row.append(1)
    for row in rows:
        row.append(49)
    slots = [slot for row in rows for run in row.runs[1:] for slot in range(run.start, run.start + run.length)]
    assert len({*slots}) == 1000
    with pytest.raises(CacheFull):
        rows[3].append(1)
    for row in [prompt, *rows]:
        row.free()
    assert kv.taken == 0
    assert kv.take(3000).size == 3000  # all in one piece


def test_an_extent_that_was_taken_back_is_no_run() -> None:
    """PyTorch's attention kernel on a CPU divides by the length of a run."""
    kv = cache(limit=1024)
    waiting, other = CachedSequence(kv), CachedSequence(kv)
    waiting.append(10)
    waiting.reserve(900)
    other.append(200)  # more than is free: takes what is reserved
    waiting.append(5)
    assert [run.length for run in waiting.runs] == [10, 5]
    assert [run.position for run in waiting.runs] == [0, 10]


def test_a_full_cache_changes_nothing() -> None:
    kv = cache(limit=1024)
    rows = [CachedSequence(kv) for _ in range(3)]
    for row in rows:
        row.append(10)
    with pytest.raises(UserError, match="full"):
        cached_axis(rows, [[0] * 70, [0] * 20, [0] * 1024], [True] * 3, CPU)
    assert [len(row) for row in rows] == [10, 10, 10]
    axis = cached_axis(rows, [[0] * 2] * 3, [False, True, False], CPU)
    assert axis.read_rows_R.tolist() == [1, 2, 3, 5]
    assert np.unique(axis.slots_T).size == 6
