"""The network's input: a flat axis of packed tokens, and the rows of it that a loss reads.

Letters: T tokens of a pack, K gathered key rows, R read rows, N pairs, S samples per pair, M tokens that an lm_head
predicts, D width of the head's noise, V pairs of views, Z width of their latents. Layout: packing.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from gcrm_kernels import InverseIndex, RowTiles


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The tokens of the chosen completions that an lm_head predicts, pair after pair."""

    rows_M: Tensor  # int64, read rows of the tokens before
    inverse: InverseIndex
    tokens_M: Tensor  # int64
    pairs_M: Tensor  # int64, number of the pair in the pack
    counts_M: Tensor  # float32, number of predicted tokens of that pair


@dataclass(frozen=True, kw_only=True)
class PairRows:
    """The rows that the losses read, as indices into the read rows R of a pack (int64 unless noted)."""

    end_2N: Tensor  # last token of chosen [0] and rejected [1]
    samples_4NS: Tensor  # sources, goals, negative sources, negative goals; S = 0 where all positions are compared
    samples_tiles: RowTiles
    positions_M: Tensor  # all compared positions: chosen 0, rejected 0, chosen 1, ...; M = 0 where they are sampled
    positions_inverse: InverseIndex
    positions_cu_seqlens: Tensor  # int32, [2N + 1]
    max_pair_length: int  # longest chosen + rejected among the positions
    quantiles_2NQ: Tensor  # rows at 0..100 % of both sides and at the last token but one; or Q = 0
    has_positive_N: Tensor  # bool; False where the chosen completion has one token and so no (i < j)
    has_negative_N: Tensor  # bool; False where negative goals come from another prompt and there is none
    shared_negatives_N: Tensor  # float32, share of the negative goals that lie before the completions diverge
    margin_N: Tensor  # float32
    target_N: Tensor  # float32, label or score of a completion that is both chosen and rejected; 0 for a pair
    noise_2ND: Tensor  # float32, standard normal, for the latents of a bottleneck head; D = 0 for other heads
    predictions: Predictions | None  # None where none are wanted
    pair_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ViewRows:
    """Pairs of samples of one prompt without a label, V of them, for the multi-view loss (see views.py)."""

    end_2V: Tensor  # int64, read rows of the last tokens of both samples
    other_V: Tensor  # int64, number of the pair of another prompt that gives the negative view; its own without one
    noise_2VZ: Tensor  # float32, standard normal, for the latents


@dataclass(frozen=True, kw_only=True)
class TokenAxis:
    """The trunk's input: packed tokens, and the rows that are read of the last layer.

    All index tensors int64 except cu_seqlens, which are int32. The inverse indices are the gathers' backward: None
    where no gradient is taken.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    kv_index_K: Tensor
    kv_inverse: InverseIndex | None
    read_rows_R: Tensor
    read_inverse: InverseIndex | None
    states_TH: Tensor | None = None  # input of the lowest block, for a trunk without embeddings; bfloat16 as int16

    def to(self, device: torch.device) -> Self:
        """A copy with every tensor on ``device``; does not wait for copies from pinned memory."""
        return mapped(self, Tensor, lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """A copy with every tensor in page-locked memory."""
        return mapped(self, Tensor, Tensor.pin_memory)


class Run(NamedTuple):
    """``length`` consecutive slots from ``start`` on, which hold the tokens of a sequence from ``position`` on."""

    start: int
    length: int
    position: int


@dataclass(frozen=True, kw_only=True)
class CachedAxis(TokenAxis):
    """New tokens that continue sequences in a cache. ``kv_index_K`` are slots; the keys and values of the new tokens go
    to ``slots_T`` (int64); segment b holds the ``runs[b]``, its new tokens last."""

    slots_T: Tensor
    runs: tuple[tuple[Run, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Pack(TokenAxis):
    """One micro-batch of training."""

    pairs: PairRows
    views: ViewRows | None = None  # None without the multi-view loss

    @property
    def n_pairs(self) -> int:
        return len(self.pairs.pair_ids)

    def __getstate__(self) -> dict[str, Any]:
        # Between processes as arrays: a tensor would take a file descriptor and a shared-memory segment each.
        return vars(mapped(self, Tensor, Tensor.numpy))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: mapped(value, np.ndarray, torch.from_numpy) for name, value in state.items()})


def mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """A pack, or a field of one, with ``function`` of every value of type ``kind`` in its place."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (InverseIndex, RowTiles)):
        return type(value)(*(mapped(v, kind, function) for v in value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: mapped(getattr(value, f.name), kind, function) for f in fields(value)})
    return value
