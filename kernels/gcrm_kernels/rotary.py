"""Rotary embedding of queries and keys, and the gather of keys and values behind it. Forward and backward.

    R(x)_i = x_i c_i - x_(i + D/2) s_i,   R(x)_(i + D/2) = x_(i + D/2) c_i + x_i s_i,   i < D/2, c and s of the row
    q'_t = R_t(q_t),   k'_j = R_t(k_t),   v'_j = v_t,   t = index_j
    dq_t = R_t^-1(dq'_t),   dk_t = R_t^-1(sum of dk'_j over all j with index_j = t),   dv_t = the same sum of dv'_j

R^-1 is R with -s. The sum runs over the inverse index (gather.py) in its order, in float32, and is rotated and rounded
once: bitwise deterministic, whatever the launch, no atomics.

Shapes: q [T, N, D]; k, v [T, G, D]; cos, sin [T, D], both halves equal, D even; index [K]; results [T, N, D] and twice
[K, G, D]. Dtypes: float32, float16 or bfloat16, one for all; arithmetic in float32, rounded once.
Compulsory bytes, in elements: 2 TND + 2 (T + K) GD + TD, forward and backward alike; 8 K of the index.
On a CPU, without triton, in float64 and in mixed dtypes it is a composition of PyTorch's operators and ``gather_rows``.
The kernels are in triton_rotary.py.
"""

from typing import Any

import torch
from torch import Tensor

from gcrm_kernels.gather import InverseIndex, gather_rows
from gcrm_kernels.launch import HAS_TRITON, operator_body, use_triton
from gcrm_kernels.reference import rotate

if HAS_TRITON:
    from gcrm_kernels import triton_rotary


@torch.library.custom_op("gcrm::rotate_and_gather", mutates_args=())
@operator_body
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse index is only for the backward. Inputs of one dtype, one of the kernels'."""
    return triton_rotary.forward(q, k, v, cos, sin, index)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    gathered = (index.shape[0], *k.shape[1:])
    return q.new_empty(q.shape), k.new_empty(gathered), v.new_empty(gathered)


@torch.library.custom_op("gcrm::rotate_and_gather_backward", mutates_args=())
@operator_body
def _backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [T, N, D], dk [T, G, D], dv [T, G, D])"""
    return triton_rotary.backward(grad_q, grad_k, grad_v, cos, sin, order, offsets)


@_backward.register_fake
def _(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (grad_q.shape[0], *grad_k.shape[1:])
    return grad_q.new_empty(grad_q.shape), grad_k.new_empty(rows), grad_v.new_empty(rows)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[3:])


def _differentiate(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, index, order, offsets = ctx.saved_tensors
    if order is None:
        order, offsets = InverseIndex.on_device(index, cos.shape[0])
    return *_backward(grad_q, grad_k, grad_v, cos, sin, order, offsets), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def rotate_and_gather(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    kv_index_K: Tensor | None,
    kv_inverse: InverseIndex | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q [T, N, D] rotated, k [K, G, D] rotated and gathered, v [K, G, D] gathered). Differentiable, by the kernels
    once, in q, k and v.

    Args:
        q_TND, k_TGD, v_TGD: of one dtype. The kernels take any stride between rows of contiguous heads.
        cos_TD, sin_TD: of each row's angles, both halves equal.
        kv_index_K: int64, the row that each gathered row is read from; None for all rows in their order.
        kv_inverse: ``InverseIndex.of(kv_index_K, T)`` on q's device; None for inference (a backward then builds it).

    Raises:
        ValueError: shapes that do not fit each other, or an odd D.
    """
    t, d = q_TND.shape[0], q_TND.shape[-1]
    fits = q_TND.dim() == 3 and d % 2 == 0 and k_TGD.shape == (t, k_TGD.shape[1], d) and v_TGD.shape == k_TGD.shape
    if not fits or cos_TD.shape != (t, d) or sin_TD.shape != (t, d):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_TND, k_TGD, v_TGD, cos_TD, sin_TD))
        raise ValueError(f"{shapes}: must be [T, N, D], twice [T, G, D] and twice [T, D], D even")
    one_dtype = k_TGD.dtype == v_TGD.dtype == cos_TD.dtype == sin_TD.dtype == q_TND.dtype
    if one_dtype and use_triton(q_TND):
        if kv_index_K is None:
            kv_index_K = torch.arange(t, device=q_TND.device)
        order, offsets = (None, None) if kv_inverse is None else kv_inverse
        return _forward(q_TND, k_TGD, v_TGD, cos_TD, sin_TD, kv_index_K, order, offsets)
    q_TND, k_TGD = rotate(q_TND, cos_TD, sin_TD), rotate(k_TGD, cos_TD, sin_TD)
    if kv_index_K is None:
        return q_TND, k_TGD, v_TGD
    return q_TND, gather_rows(k_TGD, kv_index_K, kv_inverse), gather_rows(v_TGD, kv_index_K, kv_inverse)
