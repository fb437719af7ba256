"""Causal attention over packed segments by plain matrix products: the backend of the CPU, of float32 and of float64.

Letters: T query rows, K gathered key/value rows, N query heads, G key/value heads, D head size; b segments padded to q
queries and k keys. See attention.py for the segments and their mask.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from gcrm_fast.common.torch_compat import cpu_flash_attention, cpu_flash_attention_backward

PADDING = 16  # short segments are padded to a multiple of this, so that many of them share one matrix product
ALONE = 64  # a segment of this many queries or more has its own product, on views instead of copies


class _One(NamedTuple):
    """Rows of a flat axis that one segment takes."""

    rows: slice

    def take(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [1, n, ...]"""
        return x_T[self.rows].unsqueeze(0)

    def put(self, x_T: Tensor, values: Tensor) -> None:
        """Writes values [1, n, ...]."""
        x_T[self.rows] = values[0]

    def unpadded(self, values: Tensor) -> Tensor:
        return values


class _Many(NamedTuple):
    """Rows of a flat axis that b segments take, each padded to n with its last row."""

    rows: Tensor  # [b * n]
    real: Tensor  # [b, n, 1, 1]: 1 or, for padding, 0
    places: Tensor  # of the real ones among the rows

    @staticmethod
    def of(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> "_Many":
        start, length = torch.tensor([starts, lengths], device=device).unsqueeze(-1)
        n = torch.arange(max(lengths), device=device)
        real = n < length
        return _Many((start + n.minimum(length - 1)).flatten(), real[..., None, None], real.flatten().nonzero()[:, 0])

    def take(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [b, n, ...]"""
        return rearrange(x_T.index_select(0, self.rows), "(b n) ... -> b n ...", b=len(self.real))

    def put(self, x_T: Tensor, values: Tensor) -> None:
        """Writes the real ones of values [b, n, ...]."""
        real = rearrange(values, "b n ... -> (b n) ...").index_select(0, self.places)
        x_T.index_copy_(0, self.rows.index_select(0, self.places), real.to(x_T.dtype))

    def unpadded(self, values: Tensor) -> Tensor:
        """values [b, n, N, D], 0 in the padding."""
        return values * self.real


def _rows(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> _One | _Many:
    if len(starts) == 1:
        return _One(slice(starts[0], starts[0] + lengths[0]))
    return _Many.of(starts, lengths, device)


class _Bucket(NamedTuple):
    """Segments padded to one shape, and what their causal mask adds to the scores, [b, 1, q, k]: 0, or -inf for hidden
    keys. None where the kernel applies the mask and skips what it hides."""

    queries: _One | _Many
    keys: _One | _Many
    bias: Tensor | None


@functools.lru_cache(maxsize=1)  # of a pack, for all its layers
def _buckets(
    q_bounds: tuple[int, ...], k_bounds: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> list[_Bucket]:
    """All segments: long ones alone, short ones together where queries and keys have the same length, rounded up to
    ``PADDING``; those with as many keys as queries by themselves."""
    members: dict[tuple[int, int, bool, int], list[tuple[int, int, int, int]]] = defaultdict(list)
    for (q_start, q_end), (k_start, k_end) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        q_len, k_len = q_end - q_start, k_end - k_start
        alone = q_start if q_len >= ALONE else -1
        shape = -(-q_len // PADDING), -(-k_len // PADDING), q_len == k_len, alone
        members[shape].append((q_start, k_start, q_len, k_len))
    buckets = []
    for (_, _, square, _), segments in members.items():
        q_starts, k_starts, q_lens, k_lens = zip(*segments, strict=True)
        masked = not (square and device.type == "cpu")
        bias = _causal_bias(q_lens, k_lens, device, dtype) if masked else None
        buckets.append(_Bucket(_rows(q_starts, q_lens, device), _rows(k_starts, k_lens, device), bias))
    return buckets


def _causal_bias(q_lens: Sequence[int], k_lens: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[b, 1, q, k]. Aligned bottom-right, which also hides the padded keys from every real query."""
    q, k = torch.arange(max(q_lens), device=device), torch.arange(max(k_lens), device=device)
    earlier = torch.tensor(k_lens, device=device) - torch.tensor(q_lens, device=device)
    hidden = rearrange(k > q[:, None] + earlier[:, None, None], "b q k -> b 1 q k")
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def _cut(q_TND: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[_Bucket]:
    """The pack's buckets, with masks in the dtype of the scores."""
    dtype = torch.promote_types(q_TND.dtype, torch.float32) if not q_TND.is_cpu else q_TND.dtype
    return _buckets(tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist()), q_TND.device, dtype)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """q k^T / sqrt(D) + bias, [b, N, q, k], at least float32."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores if scores.dtype == torch.float64 else scores.float()) + bias


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [b, N, q, D] and logsumexp of the scores [b, N, q], for q [b, N, q, D], k and v [b, N, k, D]."""
    if q.is_cpu:
        return cpu_flash_attention(q, k, v, is_causal=bias is None, attn_mask=bias)
    scores = _scores(q, k, bias)
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


def _attend_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [b, N, q, D], k and v [b, N, k, D]."""
    if q.is_cpu:
        return cpu_flash_attention_backward(grad, q, k, v, out, lse, 0.0, bias is None, attn_mask=bias)
    p = (_scores(q, k, bias) - lse.unsqueeze(-1)).exp()
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    ds, p = ds.to(q.dtype), p.to(q.dtype)
    return ds @ k, ds.mT @ q, p.mT @ grad


def _heads_first(x: Tensor) -> Tensor:
    """[b, n, N, ...] -> [b, N, n, ...], and back."""
    return rearrange(x, "b n h ... -> b h n ...")


def for_heads(x_KGD: Tensor, heads: int) -> Tensor:
    """[K, G, D] -> [K, N, D]: each key/value head once for every query head that reads it."""
    return repeat(x_KGD, "k g d -> k (g r) d", r=heads // x_KGD.shape[1])


@torch.library.custom_op("gcrm::segment_attention", mutates_args=())
def _segment_attention(
    q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [T, N, D] and logsumexp [T, N], at least float32, for the backward."""
    out_TND, lse_TN = _empty_results(q_TND)
    k_KND, v_KND = (for_heads(x, q_TND.shape[1]) for x in (k_KGD, v_KGD))
    for queries, keys, bias in _cut(q_TND, cu_seqlens_q, cu_seqlens_k):
        q, k, v = (_heads_first(rows.take(x)) for rows, x in ((queries, q_TND), (keys, k_KND), (keys, v_KND)))
        out, lse = _attend(q, k, v, bias)
        queries.put(out_TND, _heads_first(out))
        queries.put(lse_TN, _heads_first(lse))
    return out_TND, lse_TN


def _empty_results(q_TND: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q_TND.dtype == torch.float64 else torch.float32
    return q_TND.new_empty(q_TND.shape), q_TND.new_empty(q_TND.shape[:2], dtype=lse_dtype)


@_segment_attention.register_fake
def _(q_TND: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_results(q_TND)


@torch.library.custom_op("gcrm::segment_attention_backward", mutates_args=())
def _segment_attention_backward(
    grad_TND: Tensor,
    out_TND: Tensor,
    lse_TN: Tensor,
    q_TND: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. Each row belongs to one segment, so writing is enough: nothing adds up here."""
    k_KND, v_KND = (for_heads(x, q_TND.shape[1]) for x in (k_KGD, v_KGD))
    dq_TND, dk_KND, dv_KND = (torch.empty_like(x) for x in (q_TND, k_KND, v_KND))
    for queries, keys, bias in _cut(q_TND, cu_seqlens_q, cu_seqlens_k):
        # Padding repeats a real query, which must not count again.
        grad = _heads_first(queries.unpadded(queries.take(grad_TND)))
        out, lse, q = (_heads_first(queries.take(x)) for x in (out_TND, lse_TN, q_TND))
        k, v = (_heads_first(keys.take(x)) for x in (k_KND, v_KND))
        dq, dk, dv = _attend_backward(grad, out, lse, q, k, v, bias)
        queries.put(dq_TND, _heads_first(dq))
        keys.put(dk_KND, _heads_first(dk))
        keys.put(dv_KND, _heads_first(dv))
    dk_KGD, dv_KGD = (reduce(x, "k (g r) d -> k g d", "sum", g=k_KGD.shape[1]) for x in (dk_KND, dv_KND))
    return dq_TND, dk_KGD, dv_KGD


@_segment_attention_backward.register_fake
def _(grad_TND: Tensor, out_TND: Tensor, lse_TN: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq_TND, dk_KGD, dv_KGD = (x.new_empty(x.shape) for x in inputs[:3])
    return dq_TND, dk_KGD, dv_KGD


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *inputs)


def _backward(ctx: Any, grad_TND: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_segment_attention_backward(grad_TND, *ctx.saved_tensors), None, None


_segment_attention.register_autograd(_backward, setup_context=_save)


def segment_attention(
    q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """The backend of the CPU, float32 and float64: one product over all segments of similar length.

    A custom operator, because its Python loop over segment lengths would break a compiled graph.
    """
    return _segment_attention(q_TND, k_KGD, v_KGD, cu_seqlens_q, cu_seqlens_k)[0]
