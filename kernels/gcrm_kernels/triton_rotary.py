"""Triton kernels of the rotary embedding with the gather of keys and values: one launch forward, one backward.

A program takes one row and all its heads, [heads, D/2] pairs. The first programs take rows of keys and values: forward
the gathered ones, backward those that they were gathered from; the others take rows of queries. Every row is written
once; a row that no position was gathered from gets zeros. Maths, shapes, dtypes and bytes: rotary.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcrm_kernels.launch import LaunchConfig, pick

LANES = 64 if torch.version.hip else 32  # of a warp


@triton.jit
def _pairs(heads, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Of all heads of a row: offsets of the first halves in it, offsets of their angles, which of them are there."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    return head * (2 * HALF) + i, tl.broadcast_to(i, (BLOCK_HEADS, BLOCK_HALF)), (head < heads) & (i < HALF)


@triton.jit
def _load(ptr, inside):
    return tl.load(ptr, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_rotated(out_ptr, a, b, cos_ptr, sin_ptr, inside, BACK: tl.constexpr, HALF: tl.constexpr):
    """Pairs (a, b) rotated, or rotated back."""
    cos, sin = _load(cos_ptr, inside), _load(sin_ptr, inside)
    if BACK:
        sin = -sin
    tl.store(out_ptr, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _queries(
    q_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    t,
    heads,
    stride,
    BACK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    own, angle, inside = _pairs(heads, HALF, BLOCK_HEADS, BLOCK_HALF)
    at = t * stride + own
    a, b = _load(q_ptr + at, inside), _load(q_ptr + at + HALF, inside)
    out = t * heads * (2 * HALF) + own
    angle += t * (2 * HALF)
    _store_rotated(out_ptr + out, a, b, cos_ptr + angle, sin_ptr + angle, inside, BACK, HALF)


@triton.jit
def _gather(
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    index_ptr,
    out_k_ptr,
    out_v_ptr,
    j,
    heads,
    k_stride,
    v_stride,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    own, angle, inside = _pairs(heads, HALF, BLOCK_HEADS, BLOCK_HALF)
    t = tl.load(index_ptr + j)
    at = t * v_stride + own
    v_a = tl.load(v_ptr + at, mask=inside, other=0.0)
    v_b = tl.load(v_ptr + at + HALF, mask=inside, other=0.0)
    at = t * k_stride + own
    a, b = _load(k_ptr + at, inside), _load(k_ptr + at + HALF, inside)
    out = j * heads * (2 * HALF) + own
    tl.store(out_v_ptr + out, v_a, mask=inside)
    tl.store(out_v_ptr + out + HALF, v_b, mask=inside)
    angle += t * (2 * HALF)
    _store_rotated(out_k_ptr + out, a, b, cos_ptr + angle, sin_ptr + angle, inside, False, HALF)


@triton.jit
def _add(
    grad_k_ptr,
    grad_v_ptr,
    cos_ptr,
    sin_ptr,
    order_ptr,
    offsets_ptr,
    dk_ptr,
    dv_ptr,
    t,
    heads,
    k_stride,
    v_stride,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    own, angle, inside = _pairs(heads, HALF, BLOCK_HEADS, BLOCK_HALF)
    k_a = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
    k_b = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
    v_a = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
    v_b = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
    for i in range(tl.load(offsets_ptr + t), tl.load(offsets_ptr + t + 1)):
        j = tl.load(order_ptr + i)
        k_at, v_at = j * k_stride + own, j * v_stride + own
        k_a += _load(grad_k_ptr + k_at, inside)
        k_b += _load(grad_k_ptr + k_at + HALF, inside)
        v_a += _load(grad_v_ptr + v_at, inside)
        v_b += _load(grad_v_ptr + v_at + HALF, inside)
    out = t * heads * (2 * HALF) + own
    tl.store(dv_ptr + out, v_a.to(dv_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + out + HALF, v_b.to(dv_ptr.dtype.element_ty), mask=inside)
    angle += t * (2 * HALF)
    _store_rotated(dk_ptr + out, k_a, k_b, cos_ptr + angle, sin_ptr + angle, inside, True, HALF)


@triton.jit
def _rotary_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    index_ptr,
    out_q_ptr,
    out_k_ptr,
    out_v_ptr,
    gathered,
    q_heads,
    kv_heads,
    q_stride,
    k_stride,
    v_stride,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row < gathered:
        _gather(
            k_ptr,
            v_ptr,
            cos_ptr,
            sin_ptr,
            index_ptr,
            out_k_ptr,
            out_v_ptr,
            row,
            kv_heads,
            k_stride,
            v_stride,
            HALF,
            BLOCK_G,
            BLOCK_HALF,
        )
    else:
        _queries(
            q_ptr, cos_ptr, sin_ptr, out_q_ptr, row - gathered, q_heads, q_stride, False, HALF, BLOCK_N, BLOCK_HALF
        )


@triton.jit
def _rotary_backward_kernel(
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    cos_ptr,
    sin_ptr,
    order_ptr,
    offsets_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    tokens,
    q_heads,
    kv_heads,
    q_stride,
    k_stride,
    v_stride,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row < tokens:
        _add(
            grad_k_ptr,
            grad_v_ptr,
            cos_ptr,
            sin_ptr,
            order_ptr,
            offsets_ptr,
            dk_ptr,
            dv_ptr,
            row,
            kv_heads,
            k_stride,
            v_stride,
            HALF,
            BLOCK_G,
            BLOCK_HALF,
        )
    else:
        _queries(grad_q_ptr, cos_ptr, sin_ptr, dq_ptr, row - tokens, q_heads, q_stride, True, HALF, BLOCK_N, BLOCK_HALF)


# ----------------------------------------------------------------------------------------------------------- launchers


def candidates(heads: int, half: int, lanes: int) -> list[LaunchConfig]:
    """A block of all pairs of a row, sixteen pairs a lane (four loads of 16 bytes in 16-bit dtypes), and at most 1024
    lanes. First the rule, then the further candidates of autotuning."""
    block, most = triton.next_power_of_2(heads) * triton.next_power_of_2(half), 1024 // lanes
    warps = min(most, max(1, block // (16 * lanes)))
    return [LaunchConfig(block, count, 1) for count in (warps, max(1, warps // 2), min(most, 2 * warps))]


def blocks(q_heads: int, kv_heads: int, half: int) -> dict[str, int]:
    """The kernels' constants."""
    padded = (triton.next_power_of_2(size) for size in (q_heads, kv_heads, half))
    return {"HALF": half, **dict(zip(("BLOCK_N", "BLOCK_G", "BLOCK_HALF"), padded, strict=True))}


def _rows(x: Tensor) -> Tensor:
    """x [rows, heads, D] with contiguous heads, as it comes if it has them."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def forward(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor, index_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(q [T, N, D], k [K, G, D], v [K, G, D])"""
    tokens, q_heads, size = q_TND.shape
    gathered, kv_heads = len(index_K), k_TGD.shape[1]
    out_q, out_k, out_v = q_TND.new_empty(q_TND.shape), *(x.new_empty(gathered, kv_heads, size) for x in (k_TGD, v_TGD))
    q_TND, k_TGD, v_TGD = _rows(q_TND), _rows(k_TGD), _rows(v_TGD)
    cos_TD, sin_TD, index_K = cos_TD.contiguous(), sin_TD.contiguous(), index_K.contiguous()

    def run(config: LaunchConfig) -> None:
        _rotary_forward_kernel[(gathered + tokens,)](
            q_TND,
            k_TGD,
            v_TGD,
            cos_TD,
            sin_TD,
            index_K,
            out_q,
            out_k,
            out_v,
            gathered,
            q_heads,
            kv_heads,
            q_TND.stride(0),
            k_TGD.stride(0),
            v_TGD.stride(0),
            **blocks(q_heads, kv_heads, size // 2),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    if out_q.numel():
        key = ("rotary forward", q_heads, kv_heads, size, q_TND.dtype)
        run(pick(key, candidates(max(q_heads, kv_heads), size // 2, LANES), run))
    return out_q, out_k, out_v


def backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos_TD: Tensor, sin_TD: Tensor, order_K: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [T, N, D], dk [T, G, D], dv [T, G, D])"""
    tokens, q_heads, size = grad_q.shape
    kv_heads = grad_k.shape[1]
    dq, dk, dv = grad_q.new_empty(grad_q.shape), *(g.new_empty(tokens, kv_heads, size) for g in (grad_k, grad_v))
    grad_q, grad_k, grad_v = _rows(grad_q), _rows(grad_k), _rows(grad_v)
    cos_TD, sin_TD, order_K, offsets = (x.contiguous() for x in (cos_TD, sin_TD, order_K, offsets))

    def run(config: LaunchConfig) -> None:
        _rotary_backward_kernel[(2 * tokens,)](
            grad_q,
            grad_k,
            grad_v,
            cos_TD,
            sin_TD,
            order_K,
            offsets,
            dq,
            dk,
            dv,
            tokens,
            q_heads,
            kv_heads,
            grad_q.stride(0),
            grad_k.stride(0),
            grad_v.stride(0),
            **blocks(q_heads, kv_heads, size // 2),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    if dq.numel():
        key = ("rotary backward", q_heads, kv_heads, size, grad_q.dtype)
        run(pick(key, candidates(max(q_heads, kv_heads), size // 2, LANES), run))
    return dq, dk, dv
