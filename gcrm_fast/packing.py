"""From tokenized pairs to packs: one flat token axis, shared prefixes stored once, the rows that a loss reads.

Letters: T tokens of a pack, K gathered key rows, R read rows, N pairs, S samples a pair.

A group is a set of sequences with a common token prefix P, laid out as [P C1, C2, C3, ...]. Queries are cut into
segments [P C1], [C2], [C3], ...; keys are gathered so that each segment sees its own whole path: [P C1 | P C2 | ...].
Positions are explicit, each completion going on from |P|. See attention.py for the mask.

Everything here is NumPy on the host and a pure function of (seed, epoch, step): neither the number of ranks nor the
cut into packs changes which pairs meet in a step or which positions are sampled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from gcrm_kernels import InverseIndex
from torch import Tensor

from gcrm_fast.data import TokenizedPair
from gcrm_fast.errors import UserError

QUANTILES = 11  # Q-values are read at 0, 10, ..., 100 % of a completion


@dataclass(frozen=True)
class Sampling:
    """How source and goal positions are drawn (SPEC: ``paper`` or ``repo``)."""

    samples: int = 16
    variant: str = "paper"
    negatives: str = "anywhere"  # or "after-divergence": negative goals only from the first differing token on
    seed: int = 0


@dataclass(frozen=True)
class PairRows:
    """What the losses read, as indices into the read rows R of a pack (all int64)."""

    end_2N: Tensor  # last token of chosen [0] and rejected [1]
    samples_4NS: Tensor  # sources, goals, negative sources, negative goals
    samples_inverse: InverseIndex
    quantiles_2NQ: Tensor  # rows at 0..100 % of chosen and rejected; Q = 0 unless asked for
    has_positive_N: Tensor  # bool; False where the chosen completion has one token and so no (i < j)
    shared_negatives_N: Tensor  # float32, share of the negative goals that lie before the completions diverge
    margin_N: Tensor  # float32
    pair_ids: tuple[int, ...]


@dataclass(frozen=True)
class Pack:
    """One micro-batch. All index tensors int64 except cu_seqlens, which are int32."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    kv_index_K: Tensor
    kv_inverse: InverseIndex
    read_rows_R: Tensor
    read_inverse: InverseIndex
    pairs: PairRows

    @property
    def n_pairs(self) -> int:
        return len(self.pairs.pair_ids)

    def to(self, device: torch.device) -> "Pack":
        """The pack with every tensor on ``device``."""
        return _to(self, device)


def _to(value: Any, device: torch.device) -> Any:
    """A field of a pack, or the pack itself, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, InverseIndex):
        return InverseIndex(*(_to(v, device) for v in value))
    if isinstance(value, (Pack, PairRows)):
        return replace(value, **{f.name: _to(getattr(value, f.name), device) for f in fields(value)})
    return value


# ---------------------------------------------------------------------------------------------- sampling of positions


def divergence(pair: TokenizedPair) -> int:
    """Number of leading tokens that chosen and rejected sequences share."""
    n = min(len(pair.chosen_ids), len(pair.rejected_ids))
    differs = pair.chosen_ids[:n] != pair.rejected_ids[:n]
    return int(differs.argmax()) if differs.any() else n


def draw_samples(pair: TokenizedPair, sampling: Sampling, epoch: int) -> np.ndarray:
    """Positions [4, S] in the completions (0 = first completion token): sources, goals, negative sources (of chosen),
    negative goals (of rejected). Counter-based: depends on (seed, epoch, pair id) alone.

    GCRM section 3 (``paper``) and its released code (``repo``). Where chosen has one token, positives are all 0.
    """
    rng = np.random.Generator(np.random.Philox(key=[sampling.seed, epoch], counter=[0, 0, 0, pair.pair_id]))
    n_chosen = len(pair.chosen_ids) - pair.chosen_start
    n_rejected = len(pair.rejected_ids) - pair.rejected_start
    first = max(divergence(pair) - pair.rejected_start, 0) if sampling.negatives == "after-divergence" else 0
    first = min(first, n_rejected - 1)
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


# ------------------------------------------------------------------------------------------------- layout of one pack


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Longest common token prefix, leaving each sequence at least one token of its own (0 for a single sequence)."""
    if len(sequences) == 1:
        return 0
    n = min(map(len, sequences)) - 1
    head = sequences[0][:n]
    same = np.logical_and.reduce([head == s[:n] for s in sequences[1:]])
    return n if same.all() else int(same.argmin())


class _Layout:
    """Grows the token axis group by group."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.kv: list[np.ndarray] = []
        self.q_lens: list[int] = []
        self.tokens = 0

    def add(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Places a group; returns for each sequence the flat row of each of its tokens."""
        prefix = common_prefix(sequences)
        prefix_rows = self.tokens + np.arange(prefix)
        rows = []
        for i, sequence in enumerate(sequences):
            start = 0 if i == 0 else prefix
            own = self.tokens + np.arange(len(sequence) - start)
            rows.append(own if i == 0 else np.concatenate([prefix_rows, own]))
            self.ids.append(sequence[start:])
            self.positions.append(np.arange(start, len(sequence)))
            self.q_lens.append(len(own))
            self.tokens += len(own)
        self.kv.extend(rows)
        return rows


@dataclass(frozen=True)
class GroupSize:
    """What a group costs: tokens computed, key rows gathered, query-key products."""

    tokens: int
    keys: int
    products: int


def distinct_sequences(group: Sequence[TokenizedPair]) -> dict[bytes, np.ndarray]:
    """The group's sequences, repeated ones once, in order of appearance."""
    return {ids.tobytes(): ids for pair in group for ids in (pair.chosen_ids, pair.rejected_ids)}


def group_size(group: Sequence[TokenizedPair]) -> GroupSize:
    sequences = list(distinct_sequences(group).values())
    prefix = common_prefix(sequences)
    lens = np.array([len(s) for s in sequences])
    q_lens = lens - prefix
    q_lens[0] = lens[0]
    return GroupSize(int(q_lens.sum()), int(lens.sum()), int((q_lens * lens).sum()))


def build_pack(
    groups: Sequence[Sequence[TokenizedPair]], sampling: Sampling, epoch: int, *, quantiles: bool = False
) -> Pack:
    """The pack of ``groups``; no groups give a dummy of one token and no pairs, which counts for nothing.

    ``quantiles`` adds the rows at 0, 10, ..., 100 % of both completions (index max(n * i // 10 - 1, 0) of n).
    """
    layout = _Layout()
    end, samples, quantile_rows, has_positive, shared, margins, ids = [], [], [], [], [], [], []
    for group in groups:
        distinct = distinct_sequences(group)
        rows_of = dict(zip(distinct, layout.add(list(distinct.values())), strict=True))
        for pair in group:
            chosen = rows_of[pair.chosen_ids.tobytes()][pair.chosen_start :]
            rejected = rows_of[pair.rejected_ids.tobytes()][pair.rejected_start :]
            drawn_4S = draw_samples(pair, sampling, epoch)
            samples.append(np.concatenate([chosen[drawn_4S[:3]], rejected[drawn_4S[3:]]]))
            end.append([chosen[-1], rejected[-1]])
            if quantiles:
                quantile_rows.append(
                    [completion[quantile_positions(len(completion))] for completion in (chosen, rejected)]
                )
            has_positive.append(len(chosen) > 1)
            shared.append((drawn_4S[3] < divergence(pair) - pair.rejected_start).mean())
            margins.append(pair.margin)
            ids.append(pair.pair_id)
    if not groups:
        layout.add([np.zeros(1, dtype=np.int32)])

    n, s = len(ids), sampling.samples
    rows = [
        np.array(end, dtype=np.int64).reshape(n, 2).swapaxes(0, 1),
        np.array(samples, dtype=np.int64).reshape(n, 4, s).swapaxes(0, 1),
        np.array(quantile_rows, dtype=np.int64).reshape(n, 2, QUANTILES if quantiles else 0).swapaxes(0, 1),
    ]
    # Each row once, in order; what is wanted becomes indices into them. A dummy pack reads its only token.
    flat = np.concatenate([r.ravel() for r in rows])
    read_rows, index = np.unique(flat if n else np.zeros(1, dtype=np.int64), return_inverse=True)
    cuts = np.cumsum([0] + [r.size for r in rows])
    end_2N, samples_4NS, quantiles_2NQ = (
        index[a:b].reshape(r.shape) for r, a, b in zip(rows, cuts[:-1], cuts[1:], strict=True)
    )

    kv_index = np.concatenate(layout.kv)
    return Pack(
        input_ids_T=_tensor(np.concatenate(layout.ids), np.int64),
        position_ids_T=_tensor(np.concatenate(layout.positions), np.int64),
        cu_seqlens_q=_tensor(_cumulative(layout.q_lens), np.int32),
        cu_seqlens_k=_tensor(_cumulative([len(r) for r in layout.kv]), np.int32),
        max_seqlen_q=max(layout.q_lens),
        max_seqlen_k=max(len(r) for r in layout.kv),
        kv_index_K=_tensor(kv_index, np.int64),
        kv_inverse=InverseIndex.of(kv_index, layout.tokens),
        read_rows_R=_tensor(read_rows, np.int64),
        read_inverse=InverseIndex.of(read_rows, layout.tokens),
        pairs=PairRows(
            end_2N=_tensor(end_2N, np.int64),
            samples_4NS=_tensor(samples_4NS, np.int64),
            samples_inverse=InverseIndex.of(samples_4NS.ravel(), len(read_rows)),
            quantiles_2NQ=_tensor(quantiles_2NQ, np.int64),
            has_positive_N=_tensor(np.array(has_positive), np.bool_),
            shared_negatives_N=_tensor(np.array(shared), np.float32),
            margin_N=_tensor(np.array(margins), np.float32),
            pair_ids=tuple(ids),
        ),
    )


def quantile_positions(n: int) -> np.ndarray:
    """Positions at 0, 10, ..., 100 % of a completion of n tokens: max(n * i // 10 - 1, 0), [11]."""
    return np.maximum(n * np.arange(QUANTILES) // 10 - 1, 0)


def _cumulative(lens: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lens)])


def _tensor(array: np.ndarray, dtype: type) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))


# --------------------------------------------------------------------------------------- which pairs, in which packs


@dataclass(frozen=True)
class Budget:
    """What one pack may hold: computed tokens and gathered key rows (read rows are a subset of the tokens)."""

    tokens: int
    hidden_size: int  # weighs attention against the linear layers

    @property
    def keys(self) -> int:
        return 2 * self.tokens

    def cost(self, size: GroupSize) -> float:
        """Relative time: a query-key product costs 4H operations a layer where a token costs about 24 H^2."""
        return size.tokens + size.products / (6 * self.hidden_size)


def epoch_batches(
    prompt_keys: np.ndarray, global_batch_pairs: int, group_prompts: int, seed: int, epoch: int
) -> Iterator[list[list[int]]]:
    """Global batches of one epoch: lists of groups, a group being positions in the data of up to ``group_prompts``
    pairs of one prompt. Every pair occurs once; only the last batch may be smaller than ``global_batch_pairs``."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(prompt_keys))
    if group_prompts == 1:
        units = [[int(i)] for i in order]
    else:
        by_prompt: dict[int, list[int]] = {}
        for i in order:
            by_prompt.setdefault(int(prompt_keys[i]), []).append(int(i))
        units = [m[a : a + group_prompts] for m in by_prompt.values() for a in range(0, len(m), group_prompts)]
        units = [units[i] for i in rng.permutation(len(units))]
    batch: list[list[int]] = []
    room = global_batch_pairs
    for unit in units:
        rest = unit
        while rest:
            batch.append(rest[:room])
            rest, room = rest[room:], room - len(batch[-1])
            if room == 0:
                yield batch
                batch, room = [], global_batch_pairs
    if batch:
        yield batch


def split_to_budget(group: list[TokenizedPair], budget: Budget) -> list[list[TokenizedPair]]:
    """The group, halved until each part fits in a pack. Raises UserError where a single pair does not fit."""
    size = group_size(group)
    if size.tokens <= budget.tokens and size.keys <= budget.keys:
        return [group]
    if len(group) == 1:
        raise UserError(
            f"pair {group[0].pair_id} needs {size.tokens} tokens, more than --tokens-per-batch {budget.tokens}: "
            f"raise --tokens-per-batch or lower --max-length"
        )
    half = len(group) // 2
    return split_to_budget(group[:half], budget) + split_to_budget(group[half:], budget)


def plan_packs(
    groups: Sequence[list[TokenizedPair]], budget: Budget, world_size: int
) -> list[list[list[TokenizedPair]]]:
    """Cuts a global batch into packs of balanced cost; their number is a multiple of ``world_size``.

    Pack i belongs to rank i % world_size. With fewer groups than packs some are empty (dummies).
    Longest-processing-time rule: the costliest group first, into the cheapest pack that has room.
    """
    parts = [part for group in groups for part in split_to_budget(group, budget)]
    sized = sorted(((group_size(part), i) for i, part in enumerate(parts)), key=lambda x: (-budget.cost(x[0]), x[1]))
    needed = max(
        -(-sum(size.tokens for size, _ in sized) // budget.tokens),
        -(-sum(size.keys for size, _ in sized) // budget.keys),
    )
    n_packs = max(-(-needed // world_size), 1) * world_size
    while True:
        packs = _fill(sized, n_packs, budget)
        if packs is not None:
            return [[parts[i] for i in sorted(members)] for members in packs]
        n_packs += world_size


def _fill(sized: Sequence[tuple[GroupSize, int]], n_packs: int, budget: Budget) -> list[list[int]] | None:
    """Members of each of n_packs packs, or None where they do not fit."""
    members: list[list[int]] = [[] for _ in range(n_packs)]
    tokens, keys, cost = [0] * n_packs, [0] * n_packs, [0.0] * n_packs
    for size, i in sized:
        room = [
            p for p in range(n_packs) if tokens[p] + size.tokens <= budget.tokens and keys[p] + size.keys <= budget.keys
        ]
        if not room:
            return None
        p = min(room, key=lambda p: cost[p])
        members[p].append(i)
        tokens[p] += size.tokens
        keys[p] += size.keys
        cost[p] += budget.cost(size)
    return members
