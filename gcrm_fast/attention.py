"""Causal attention over packed segments: one variable-length call, three backends behind one signature.

Letters: T query rows, K gathered key/value rows, N query heads, G key/value heads, M = N / G, D head size, B segments;
b segments padded to q queries and k keys.

Segment b owns the queries cu_seqlens_q[b]:cu_seqlens_q[b + 1] and the keys cu_seqlens_k[b]:cu_seqlens_k[b + 1]. It has
at least as many keys as queries, and its causal mask is aligned bottom-right: the last query sees every key. With keys
gathered as [P C1 | P C2 | ...] that makes one call compute a shared prefix once (see packing.py).
"""

import importlib.util
import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

PADDING = 16  # rows to which the eager backend pads segments, so that many of them share one matrix product

BACKENDS = ("auto", "flash_attn", "torch_varlen", "eager")


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that ``auto`` means here: flash-attn where installed, else torch's varlen attention, both on CUDA in
    half precision only; everywhere else plain matrix products."""
    if name != "auto":
        return name
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "eager"
    return "flash_attn" if importlib.util.find_spec("flash_attn") else "torch_varlen"


# torch 2.11 takes fewer key/value heads as they come; 2.12 and later must be told.
_VARLEN_OPTIONS: dict[str, Any] = {"window_size": (-1, 0)}  # causal
if "enable_gqa" in inspect.signature(varlen_attn).parameters:
    _VARLEN_OPTIONS["enable_gqa"] = True


def packed_attention(
    q_TND: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    backend: str,
) -> Tensor:
    """Attention output [T, N, D]; scores are scaled by 1/sqrt(D).

    Args:
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, on the device of q.
        max_seqlen_q, max_seqlen_k: longest segment, in rows.
        backend: one of ``BACKENDS`` except ``auto``.
    """
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q_TND, k_KGD, v_KGD, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    if backend == "torch_varlen":
        out = varlen_attn(
            q_TND, k_KGD, v_KGD, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            **_VARLEN_OPTIONS,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out
    return segment_attention(q_TND, k_KGD, v_KGD, cu_seqlens_q, cu_seqlens_k)


class _Rows(NamedTuple):
    """Rows of a flat axis that segments take: a slice for a single one, else indices [b, n], padded with each segment's
    last row, and which of them are real."""

    at: slice | Tensor
    real: Tensor

    @staticmethod
    def of(starts: Sequence[int], lengths: Sequence[int], size: int, device: torch.device) -> "_Rows":
        if len(starts) == 1:
            return _Rows(slice(starts[0], starts[0] + size), torch.ones(1, size, dtype=torch.bool, device=device))
        start, length = torch.tensor([starts, lengths], device=device).unsqueeze(-1)
        n = torch.arange(size, device=device)
        return _Rows(start + n.minimum(length - 1), n < length)

    def take(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [b, n, ...]"""
        return x_T[self.at].unsqueeze(0) if isinstance(self.at, slice) else x_T[self.at]

    def put(self, x_T: Tensor, values: Tensor) -> None:
        """Writes the real ones of values [b, n, ...]."""
        if isinstance(self.at, slice):
            x_T[self.at] = values[0]
        else:
            x_T[self.at[self.real]] = values[self.real].to(x_T.dtype)


class _Bucket(NamedTuple):
    """Segments padded to one shape, and the mask [b, 1, 1, q, k] of the keys that a query must not see."""

    queries: _Rows
    keys: _Rows
    hidden: Tensor


def _buckets(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[_Bucket]:
    """All segments, those of equal lengths after rounding up to ``PADDING`` side by side."""
    device = cu_seqlens_q.device
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    members: dict[tuple[int, int], list[tuple[int, int, int, int]]] = defaultdict(list)
    for b in range(len(q_bounds) - 1):
        q_len, k_len = q_bounds[b + 1] - q_bounds[b], k_bounds[b + 1] - k_bounds[b]
        shape = -(-q_len // PADDING), -(-k_len // PADDING)
        members[shape].append((q_bounds[b], k_bounds[b], q_len, k_len))
    buckets = []
    for segments in members.values():
        q_starts, k_starts, q_lens, k_lens = zip(*segments, strict=True)
        q, k = torch.arange(max(q_lens), device=device), torch.arange(max(k_lens), device=device)
        earlier = torch.tensor(k_lens, device=device) - torch.tensor(q_lens, device=device)
        # Bottom-right causal; this also hides the padded keys from every real query.
        hidden = k > q.unsqueeze(-1) + earlier[:, None, None]
        rows_q, rows_k = (_Rows.of(*of, device) for of in ((q_starts, q_lens, len(q)), (k_starts, k_lens, len(k))))
        buckets.append(_Bucket(rows_q, rows_k, hidden[:, None, None]))
    return buckets


def _folded(x_bGMqD: Tensor) -> Tensor:
    """[b, G, M, q, ...] -> [b, G, M * q, ...]: query heads that share keys are rows of one product."""
    return x_bGMqD.flatten(2, 3)


def _bias(hidden: Tensor, q_bGMqD: Tensor) -> Tensor:
    """-inf where hidden, else 0, for the folded queries: [b, 1, M * q, k]."""
    b, _, _, q, k = hidden.shape
    bias = q_bGMqD.new_zeros(b, 1, 1, q, k).masked_fill_(hidden, -torch.inf)
    return bias.expand(b, 1, q_bGMqD.shape[2], q, k).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """q k^T / sqrt(D), -inf where hidden, [b, G, M, q, k], at least float32."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores.masked_fill(hidden, -torch.inf)


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Output [b, G, M, q, D] and logsumexp of the scores [b, G, M, q], for q [b, G, M, q, D], k and v [b, G, 1, k, D].

    On a CPU PyTorch's flash kernel, called below autograd, where scaled_dot_product_attention itself would have no
    backward; elsewhere written out.
    """
    if q.is_cpu:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _folded(q), k.squeeze(2), v.squeeze(2), attn_mask=_bias(hidden, q)
        )
        return out.unflatten(2, q.shape[2:4]), lse.unflatten(2, q.shape[2:4])
    scores = _scores(q, k, hidden)
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


def _attend_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [b, G, M, q, D], k and v [b, G, k, D]."""
    if q.is_cpu:
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _folded(grad), _folded(q), k.squeeze(2), v.squeeze(2), _folded(out), _folded(lse), 0.0, False,
            attn_mask=_bias(hidden, q),
        )  # fmt: skip
        return dq.unflatten(2, q.shape[2:4]), dk, dv
    p = (_scores(q, k, hidden) - lse.unsqueeze(-1)).exp()
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    ds, p = ds.to(q.dtype), p.to(q.dtype)
    return ds @ k, (ds.mT @ q).sum(2), (p.mT @ grad).sum(2)


def _queries(x_bqN: Tensor, kv_heads: int) -> Tensor:
    """[b, q, N, ...] -> [b, G, M, q, ...]: the M = N / G query heads that share a key/value head side by side."""
    return x_bqN.unflatten(2, (kv_heads, -1)).movedim(1, 3)


def _keys(x_bkGD: Tensor) -> Tensor:
    """[b, k, G, D] -> [b, G, 1, k, D]."""
    return x_bkGD.transpose(1, 2).unsqueeze(2)


def _flat(x_bGMq: Tensor) -> Tensor:
    """[b, G, M, q, ...] -> [b, q, N, ...]."""
    return x_bGMq.movedim(3, 1).flatten(2, 3)


@torch.library.custom_op("gcrm::segment_attention", mutates_args=())
def _segment_attention(
    q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [T, N, D] and logsumexp [T, N], at least float32, for the backward."""
    out_TND, lse_TN = _empty_results(q_TND)
    for queries, keys, hidden in _buckets(cu_seqlens_q, cu_seqlens_k):
        k, v = _keys(keys.take(k_KGD)), _keys(keys.take(v_KGD))
        out, lse = _attend(_queries(queries.take(q_TND), k_KGD.shape[1]), k, v, hidden)
        queries.put(out_TND, _flat(out))
        queries.put(lse_TN, _flat(lse))
    return out_TND, lse_TN


def _empty_results(q_TND: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q_TND.dtype == torch.float64 else torch.float32
    return q_TND.new_empty(q_TND.shape), q_TND.new_empty(q_TND.shape[:2], dtype=lse_dtype)


@_segment_attention.register_fake
def _(q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_results(q_TND)


@torch.library.custom_op("gcrm::segment_attention_backward", mutates_args=())
def _segment_attention_backward(
    grad_TND: Tensor, out_TND: Tensor, lse_TN: Tensor, q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v. Each row belongs to one segment, so writing is enough: nothing adds up here."""
    dq_TND, dk_KGD, dv_KGD = (x.new_empty(x.shape) for x in (q_TND, k_KGD, v_KGD))
    kv_heads = k_KGD.shape[1]
    for queries, keys, hidden in _buckets(cu_seqlens_q, cu_seqlens_k):
        k, v = _keys(keys.take(k_KGD)), _keys(keys.take(v_KGD))
        grad, out, lse, q = (_queries(queries.take(x), kv_heads) for x in (grad_TND, out_TND, lse_TN, q_TND))
        grad = grad * queries.real[:, None, None, :, None]  # padding repeats a real query: it must not count again
        dq, dk, dv = _attend_backward(grad, out, lse, q, k, v, hidden)
        queries.put(dq_TND, _flat(dq))
        keys.put(dk_KGD, dk.transpose(1, 2))
        keys.put(dv_KGD, dv.transpose(1, 2))
    return dq_TND, dk_KGD, dv_KGD


@_segment_attention_backward.register_fake
def _(
    grad_TND: Tensor, out_TND: Tensor, lse_TN: Tensor, q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq_TND, dk_KGD, dv_KGD = (x.new_empty(x.shape) for x in (q_TND, k_KGD, v_KGD))
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

    An operator of its own because its Python loop over segment lengths would break a compiled graph.
    """
    return _segment_attention(q_TND, k_KGD, v_KGD, cu_seqlens_q, cu_seqlens_k)[0]
