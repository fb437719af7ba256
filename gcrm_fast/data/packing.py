"""From tokens to packs: one flat token axis, shared prefixes stored once, the rows that a loss or a score reads.

Letters: T tokens of a pack, K gathered key rows, R read rows, N pairs, S samples per pair.

A group is a set of sequences with a common token prefix P, laid out as [P C1, C2, C3, ...]. Queries are cut into
segments [P C1], [C2], [C3], ...; keys are gathered so that each segment sees its own whole path: [P C1 | P C2 | ...].
Positions are explicit, each completion continuing from |P|. See attention.py for the mask. A group of several prompts
is laid out prompt by prompt.

Everything here is NumPy on the host and a pure function of (seed, epoch, step): neither the number of ranks nor the
cut into packs changes which pairs meet in a step or which positions are sampled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gcrm_fast.data.encoding import Member, TokenizedPair, common_prefix
from gcrm_fast.data.on_policy import ViewPair
from gcrm_fast.data.sampling import (
    Sampling,
    divergence,
    draw_noise,
    draw_samples,
    first_negative,
    other_pair,
    quantile_positions,
)
from gcrm_fast.model.inputs import Pack, PairRows, Predictions, TokenAxis, ViewRows
from gcrm_kernels import InverseIndex, RowTiles


@dataclass(frozen=True)
class Item:
    """A completion to be scored: token ids of prompt + completion and the index of the first completion token.

    ``index`` is its place in the input.
    """

    index: int
    ids: np.ndarray
    start: int
    name: str
    prompt_key: int = 0

    @property
    def sequences(self) -> tuple[np.ndarray, ...]:
        return (self.ids,)


@dataclass(frozen=True)
class ScorePack(TokenAxis):
    """A pack whose completions are scored. ``rows_of[i]`` are item ``indices[i]``'s completion tokens, or its last
    token alone, as indices into the read rows."""

    indices: tuple[int, ...]
    rows_of: tuple[np.ndarray, ...]


class _Layout:
    """Grows the token axis group by group."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.kv: list[np.ndarray] = []
        self.q_lens: list[int] = []
        self.placed: list[tuple[bytes, int]] = []  # each sequence, and from which of its tokens on it lies here
        self.tokens = 0

    def add_group(self, group: Sequence[Member]) -> dict[bytes, np.ndarray]:
        """Places a group, each prompt apart; returns for each sequence the flat row of each of its tokens."""
        return {key: rows for part in distinct_sequences(group) for key, rows in self.add(part).items()}

    def add(self, sequences: Mapping[bytes, np.ndarray]) -> dict[bytes, np.ndarray]:
        """Places sequences with a common prefix; returns for each sequence the flat row of each of its tokens."""
        prefix = common_prefix(list(sequences.values()))
        prefix_rows = self.tokens + np.arange(prefix)
        rows_of: dict[bytes, np.ndarray] = {}
        for i, (key, sequence) in enumerate(sequences.items()):
            start = 0 if i == 0 else prefix
            own = self.tokens + np.arange(len(sequence) - start)
            self.placed.append((key, start))
            rows_of[key] = own if i == 0 else np.concatenate([prefix_rows, own])
            self.ids.append(sequence[start:])
            self.positions.append(np.arange(start, len(sequence)))
            self.q_lens.append(len(own))
            self.tokens += len(own)
        self.kv.extend(rows_of.values())
        return rows_of

    def axis(self, read_rows: np.ndarray, *, backward: bool) -> TokenAxis:
        """The axis so far; with ``backward`` with the inverse indices that gradients need."""
        kv_index = np.concatenate(self.kv)
        return TokenAxis(
            input_ids_T=_tensor(np.concatenate(self.ids), np.int64),
            position_ids_T=_tensor(np.concatenate(self.positions), np.int64),
            cu_seqlens_q=_tensor(_cumulative(self.q_lens), np.int32),
            cu_seqlens_k=_tensor(_cumulative([len(r) for r in self.kv]), np.int32),
            max_seqlen_q=max(self.q_lens),
            max_seqlen_k=max(len(r) for r in self.kv),
            kv_index_K=_tensor(kv_index, np.int64),
            kv_inverse=InverseIndex.of(kv_index, self.tokens) if backward else None,
            read_rows_R=_tensor(read_rows, np.int64),
            read_inverse=InverseIndex.of(read_rows, self.tokens) if backward else None,
        )


@dataclass(frozen=True)
class GroupSize:
    """What a group costs: tokens computed, key rows gathered, query-key products."""

    tokens: int
    keys: int
    products: int


def distinct_sequences(group: Sequence[Member]) -> list[dict[bytes, np.ndarray]]:
    """The group's sequences by prompt, repeated ones once, in order of appearance."""
    of_prompt: dict[int, dict[bytes, np.ndarray]] = {}
    for member in group:
        of_prompt.setdefault(member.prompt_key, {}).update({ids.tobytes(): ids for ids in member.sequences})
    return list(of_prompt.values())


def group_size(group: Sequence[Member]) -> GroupSize:
    tokens = keys = products = 0
    for of_prompt in distinct_sequences(group):
        sequences = list(of_prompt.values())
        prefix = common_prefix(sequences)
        lens = np.array([len(s) for s in sequences])
        q_lens = lens - prefix
        q_lens[0] = lens[0]
        tokens, keys = tokens + int(q_lens.sum()), keys + int(lens.sum())
        products += int((q_lens * lens).sum())
    return GroupSize(tokens, keys, products)


def build_pack(
    groups: Sequence[Sequence[TokenizedPair | ViewPair]], sampling: Sampling, epoch: int, *, quantiles: bool = False
) -> Pack:
    """The pack of ``groups``; no groups give a dummy of one token and no pairs, which counts for nothing.

    ``quantiles`` adds the rows at 0, 10, ..., 100 % of both completions (index max(n * i // 10 - 1, 0) of n), and at
    the last token but one. With positions ``rs`` a group is a block whose pairs give each other their negative goals;
    a group of views is one whose pairs give each other their negative views.
    """
    layout = _Layout()
    pairs, wanted = [], []
    views: list[ViewPair] = []
    ends, others = [], []
    for group in groups:
        rows_of = layout.add_group(group)
        own = [member for member in group if isinstance(member, TokenizedPair)]
        for pair in own:
            other = other_pair(pair, own) if sampling.positions == "rs" else pair
            pairs.append(pair)
            wanted.append(_wanted_rows(pair, other, rows_of, sampling, epoch, quantiles))
        block = [member for member in group if isinstance(member, ViewPair)]
        ends += [[rows_of[ids.tobytes()][-1] for ids in view.sequences] for view in block]
        others += [len(views) + block.index(other_pair(view, block) or view) for view in block]
        views += block
    if not groups:
        layout.add({b"": np.zeros(1, dtype=np.int32)})
    flat_2V = np.array(ends, dtype=np.int64).reshape(-1, 2).T
    read_rows, pair_rows, end_2V = _read_rows(pairs, wanted, sampling, flat_2V)
    axis = replace(layout.axis(read_rows, backward=True), states_TH=_states(layout, pairs))
    return Pack(
        **vars(axis), pairs=pair_rows, views=_view_rows(views, others, end_2V, sampling) if sampling.views else None
    )


def _view_rows(views: Sequence[ViewPair], others: list[int], end_2V: np.ndarray, sampling: Sampling) -> ViewRows:
    noise = np.array([view.noise(sampling.seed, sampling.views) for view in views]).reshape(-1, 2, sampling.views)
    return ViewRows(
        end_2V=_tensor(end_2V, np.int64),
        other_V=_tensor(np.array(others), np.int64),
        noise_2VZ=_tensor(noise.swapaxes(0, 1), np.float32),
    )


def _states(layout: _Layout, pairs: Sequence[TokenizedPair]) -> Tensor | None:
    """States of the pack's tokens that enter its lowest block, where the pairs bring them."""
    if not pairs or pairs[0].states is None:
        return None
    states_of = {}
    for pair in pairs:
        assert pair.states is not None
        for ids, states in zip(pair.sequences, pair.states.sequences(), strict=True):
            states_of[ids.tobytes()] = states
    return torch.from_numpy(np.concatenate([states_of[key][start:] for key, start in layout.placed]))


def build_score_pack(groups: Sequence[Sequence[Item]], *, per_token: bool) -> ScorePack:
    """The pack of ``groups``, without what only a backward needs; reads the last token of each item, or with
    ``per_token`` all its completion tokens."""
    layout = _Layout()
    items: list[Item] = []
    wanted: list[np.ndarray] = []
    for group in groups:
        rows_of = layout.add_group(group)
        items += group
        wanted += [rows_of[item.ids.tobytes()][item.start if per_token else -1 :] for item in group]
    read_rows, index = np.unique(np.concatenate(wanted), return_inverse=True)
    return ScorePack(
        **vars(layout.axis(read_rows, backward=False)),
        indices=tuple(item.index for item in items),
        rows_of=tuple(np.split(index, np.cumsum([len(rows) for rows in wanted])[:-1])),
    )


@dataclass(frozen=True, kw_only=True)
class _WantedRows:
    """Flat rows of one pair's tokens that a loss or a metric reads."""

    end_2: list[int]
    samples_4S: np.ndarray
    positions: list[np.ndarray]  # chosen and rejected positions that are all compared, or empty
    quantiles_2Q: list[np.ndarray]
    shared_negatives: float
    has_negative: bool
    noise_2D: np.ndarray
    before: np.ndarray  # the token before each that is predicted
    predicted: np.ndarray  # token ids


def _wanted_rows(
    pair: TokenizedPair,
    other: TokenizedPair | None,
    rows_of: Mapping[bytes, np.ndarray],
    sampling: Sampling,
    epoch: int,
    quantiles: bool,
) -> _WantedRows:
    """``other`` is the pair that has the negative goals, usually ``pair``; None: no pair of another prompt is near."""
    of_chosen = rows_of[pair.chosen_ids.tobytes()]
    chosen = of_chosen[pair.chosen_start :]
    rejected = rows_of[pair.rejected_ids.tobytes()][pair.rejected_start :]
    if sampling.variant == "dense":
        samples_4S = np.zeros((4, 0), dtype=np.int64)
        negative_goals = np.arange(first_negative(pair, sampling), len(rejected))
        positions = [chosen, rejected[negative_goals]]
    else:
        drawn_4S = draw_samples(pair, sampling, epoch, other)
        goals_of = other or pair
        goals = rows_of[goals_of.rejected_ids.tobytes()][goals_of.rejected_start :]
        samples_4S = np.concatenate([chosen[drawn_4S[:3]], goals[drawn_4S[3:]]])
        negative_goals, positions = drawn_4S[3], [chosen[:0], rejected[:0]]
    return _WantedRows(
        end_2=[chosen[-1], rejected[-1]],
        samples_4S=samples_4S,
        positions=positions,
        quantiles_2Q=[
            c[[*quantile_positions(len(c)), max(len(c) - 2, 0)]] if quantiles else c[:0] for c in (chosen, rejected)
        ],
        shared_negatives=(negative_goals < divergence(pair) - pair.rejected_start).mean()
        if other is pair and sampling.samples
        else 0.0,
        has_negative=other is not None,
        noise_2D=draw_noise(pair, sampling, epoch),
        before=of_chosen[max(pair.chosen_start - 1, 0) : -1],
        predicted=pair.chosen_ids[max(pair.chosen_start, 1) :],
    )


def _read_rows(
    pairs: Sequence[TokenizedPair], wanted: Sequence[_WantedRows], sampling: Sampling, ends_2V: np.ndarray
) -> tuple[np.ndarray, PairRows, np.ndarray]:
    """The distinct rows that are read, ascending; what is wanted, and the ends of views, as indices into them."""
    n, s = len(pairs), 0 if sampling.variant == "dense" else sampling.samples
    segments = [p for w in wanted for p in w.positions]
    before = [w.before for w in wanted if sampling.predict]
    lengths = [len(p) for p in segments]
    parts = [
        np.array([w.end_2 for w in wanted], dtype=np.int64).reshape(n, 2).swapaxes(0, 1),
        np.array([w.samples_4S for w in wanted], dtype=np.int64).reshape(n, 4, s).swapaxes(0, 1),
        np.concatenate([*segments, np.zeros(0, dtype=np.int64)]),
        np.array([w.quantiles_2Q for w in wanted], dtype=np.int64).reshape(n, 2, -1 if n else 0).swapaxes(0, 1),
        np.concatenate([*before, np.zeros(0, dtype=np.int64)]),
        ends_2V,
    ]
    flat = np.concatenate([part.ravel() for part in parts])
    # A dummy pack reads its only token.
    read_rows, index = np.unique(flat if flat.size else np.zeros(1, dtype=np.int64), return_inverse=True)
    cuts = np.cumsum([0] + [part.size for part in parts])
    end_2N, samples_4NS, positions_M, quantiles_2NQ, before_M, end_2V = (
        index[a:b].reshape(part.shape) for part, a, b in zip(parts, cuts[:-1], cuts[1:], strict=True)
    )
    pair_rows = PairRows(
        end_2N=_tensor(end_2N, np.int64),
        samples_4NS=_tensor(samples_4NS, np.int64),
        samples_tiles=RowTiles.of(samples_4NS, len(read_rows)),
        positions_M=_tensor(positions_M, np.int64),
        positions_inverse=InverseIndex.of(positions_M, len(read_rows)),
        positions_cu_seqlens=_tensor(_cumulative(lengths), np.int32),
        max_pair_length=max((a + b for a, b in zip(lengths[::2], lengths[1::2], strict=True)), default=0),
        quantiles_2NQ=_tensor(quantiles_2NQ, np.int64),
        has_positive_N=_tensor(np.array([len(p.chosen_ids) - p.chosen_start > 1 for p in pairs]), np.bool_),
        has_negative_N=_tensor(np.array([w.has_negative for w in wanted]), np.bool_),
        shared_negatives_N=_tensor(np.array([w.shared_negatives for w in wanted]), np.float32),
        margin_N=_tensor(np.array([p.margin for p in pairs]), np.float32),
        target_N=_tensor(np.array([p.target or 0.0 for p in pairs]), np.float32),
        noise_2ND=_tensor(
            np.array([w.noise_2D for w in wanted]).reshape(n, 2, sampling.noise).swapaxes(0, 1), np.float32
        ),
        predictions=_predictions(before_M, wanted, len(read_rows)) if sampling.predict else None,
        pair_ids=tuple(p.pair_id for p in pairs),
    )
    return read_rows, pair_rows, end_2V


def _predictions(before_M: np.ndarray, wanted: Sequence[_WantedRows], read_rows: int) -> Predictions:
    """``before_M``: indices into the ``read_rows`` rows."""
    counts = np.array([len(w.predicted) for w in wanted], dtype=np.int64)
    return Predictions(
        rows_M=_tensor(before_M, np.int64),
        inverse=InverseIndex.of(before_M, read_rows),
        tokens_M=_tensor(np.concatenate([*(w.predicted for w in wanted), np.zeros(0)]), np.int64),
        pairs_M=_tensor(np.repeat(np.arange(len(wanted)), counts), np.int64),
        counts_M=_tensor(np.repeat(counts, counts), np.float32),
    )


def _cumulative(lens: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lens)])


def _tensor(array: np.ndarray, dtype: type) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
