"""Contrastive loss over ALL positions of a pair: the exact expectation of what sampling estimates.

For a pair with chosen positions i < j (P = L_c (L_c - 1) / 2 of them) and rejected positions n:

    loss = -1/P sum_{i<j} log sigmoid(c_ij / tau) - 1/(L_c L_r) sum_{i,n} log sigmoid(-c_in / tau),   c = cosine

In the backward every row of a pair is treated alike, with e_ij = dloss/dc_ij, symmetric, 0 on the diagonal and between
two rejected positions:

    dz_i = sum_j w_ij z_j - own_i z_i,   w_ij = e_ij / (|z_i| |z_j|),   own_i = sum_j e_ij c_ij / |z_i|^2

Cosines are recomputed there, tile by tile; nothing of size L x L outlives a bounded scratch, so memory is O(MD).

Shapes: states [M, D], all compared positions of all pairs, contiguous; cu_seqlens [2N + 1] cuts them into chosen 0,
rejected 0, chosen 1, ... Rejected segments may not be empty; a chosen one of one position has no positive term.
Dtypes and eps as in contrastive.py. Deterministic: no atomics, every gradient row is written once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gcrm_kernels.contrastive import ContrastiveStatistics
from gcrm_kernels.launch import HAS_TRITON, operator_body, use_triton
from gcrm_kernels.reference import EPS

if HAS_TRITON:
    from gcrm_kernels import triton_dense

BLOCK_ROWS = 256  # rows of a pair's cosines that the PyTorch path holds at a time


# ------------------------------------------------------------------------------------------------------ PyTorch path


class _Block(NamedTuple):
    """Rows r of a pair n with L rows, and what its loss needs of their cosines [r, L] to all of them."""

    pair: int
    rows: slice  # among the pair's
    at: slice  # among all
    z: Tensor  # the pair's states [L, D]
    scale: Tensor  # [r, L]: of a product of two states, to their cosine
    own_scale: Tensor  # [L]: of the gradient of a norm
    cosine: Tensor
    positive: Tensor
    negative: Tensor
    weight: Tensor
    sign: Tensor
    counted_once: Tensor  # [r, L]: a couple of chosen states counts in one of its two rows


def _blocks(states_MD: Tensor, cu_seqlens: Tensor) -> Iterator[_Block]:
    """At most BLOCK_ROWS rows of one pair each."""
    cuts = cu_seqlens.tolist()
    for n, (a, b, c) in enumerate(zip(cuts[0:-1:2], cuts[1::2], cuts[2::2], strict=True)):
        z = states_MD[a:c]
        z = z if z.dtype == torch.float64 else z.float()
        norm = torch.linalg.vector_norm(z, dim=1)
        inverse = norm.clamp_min(EPS).reciprocal()
        own_scale = torch.where(norm > EPS, inverse.square(), 0.0)
        position = torch.arange(c - a, device=z.device)
        chosen = position < b - a
        for start in range(0, c - a, BLOCK_ROWS):
            rows = slice(start, min(start + BLOCK_ROWS, c - a))
            scale = inverse[rows, None] * inverse
            cosine = (z[rows] @ z.mT).mul_(scale)
            positive = chosen[rows, None] & chosen & (position[rows, None] != position)
            negative = chosen[rows, None] ^ chosen
            weight = positive.to(z.dtype) * (2 / ((b - a) * (b - a - 1)) if b - a > 1 else 0.0)
            weight += negative.to(z.dtype) * (1 / ((b - a) * (c - b)))
            sign = torch.where(positive, 1.0, -1.0).to(z.dtype)
            counted_once = chosen[rows, None] & (position > position[rows, None])
            at = slice(a + rows.start, a + rows.stop)
            yield _Block(n, rows, at, z, scale, own_scale, cosine, positive, negative, weight, sign, counted_once)


def _analytic_forward(states_MD: Tensor, cu_seqlens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    n_pairs = (len(cu_seqlens) - 1) // 2
    dtype = torch.float64 if states_MD.dtype == torch.float64 else torch.float32
    loss_N, similarity_2N = states_MD.new_zeros(n_pairs, dtype=dtype), states_MD.new_zeros(2, n_pairs, dtype=dtype)
    for block in _blocks(states_MD, cu_seqlens):
        weight, kinds = block.weight * block.counted_once, (block.positive, block.negative)
        loss_N[block.pair] -= (F.logsigmoid(block.cosine * (block.sign / temperature)) * weight).sum()
        similarity_2N[:, block.pair] += torch.stack([(block.cosine * weight * kind).sum() for kind in kinds])
    return loss_N, similarity_2N


def _analytic_backward(grad_N: Tensor, states_MD: Tensor, cu_seqlens: Tensor, temperature: float) -> Tensor:
    out_MD = states_MD.new_zeros(states_MD.shape)
    for block in _blocks(states_MD, cu_seqlens):
        slope = block.sign * (-grad_N[block.pair] / temperature)
        e = torch.sigmoid(block.cosine * (-block.sign / temperature)) * block.weight * slope
        own = (e * block.cosine).sum(1, keepdim=True) * block.own_scale[block.rows, None]
        grad_rD = (e.mul_(block.scale) @ block.z).addcmul_(own, block.z[block.rows], value=-1)
        out_MD[block.at] = grad_rD.to(out_MD.dtype)
    return out_MD


# ---------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("gcrm::dense_contrastive_loss", mutates_args=())
@operator_body
def _forward(states: Tensor, cu_seqlens: Tensor, max_pair_length: int, temperature: float) -> tuple[Tensor, Tensor]:
    """(loss [N], mean similarity [2, N])"""
    if use_triton(states):
        return triton_dense.forward(states, cu_seqlens, max_pair_length, temperature)
    return _analytic_forward(states, cu_seqlens, temperature)


@_forward.register_fake
def _(states: Tensor, cu_seqlens: Tensor, max_pair_length: int, temperature: float) -> tuple[Tensor, Tensor]:
    n = (cu_seqlens.shape[0] - 1) // 2
    dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
    return states.new_empty(n, dtype=dtype), states.new_empty((2, n), dtype=dtype)


@torch.library.custom_op("gcrm::dense_contrastive_loss_backward", mutates_args=())
@operator_body
def _backward(grad: Tensor, states: Tensor, cu_seqlens: Tensor, max_pair_length: int, temperature: float) -> Tensor:
    if use_triton(states):
        return triton_dense.backward(grad, states, cu_seqlens, max_pair_length, temperature)
    return _analytic_backward(grad, states, cu_seqlens, temperature)


@_backward.register_fake
def _(grad: Tensor, states: Tensor, cu_seqlens: Tensor, max_pair_length: int, temperature: float) -> Tensor:
    return states.new_empty(states.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    states, cu_seqlens, ctx.max_pair_length, ctx.temperature = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(states, cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None]:
    return _backward(grad.contiguous(), *ctx.saved_tensors, ctx.max_pair_length, ctx.temperature), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def dense_contrastive_loss(
    states_MD: Tensor, cu_seqlens: Tensor, max_pair_length: int, *, temperature: float = 1.0
) -> tuple[Tensor, ContrastiveStatistics]:
    """Contrastive loss of each pair over all its positions, [N] (float32, or float64 for float64 states), and the mean
    similarities. Differentiable, once, in ``states_MD``.

    Args:
        states_MD: the compared states of all positions, [M, D], any float dtype.
        cu_seqlens: [2N + 1] int32 or int64; segments chosen 0, rejected 0, chosen 1, ... none of them empty.
        max_pair_length: at least the longest chosen + rejected of a pair, known on the host.
        temperature: tau in sigmoid(cos / tau).

    Raises:
        ValueError: an even number of ``cu_seqlens``, or temperature <= 0.
    """
    if len(cu_seqlens) % 2 == 0:
        raise ValueError(f"cu_seqlens of length {len(cu_seqlens)}: must be 2 N + 1, two segments per pair")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be more than 0")
    loss_N, similarity_2N = _forward(states_MD, cu_seqlens.contiguous(), max_pair_length, temperature)
    return loss_N, ContrastiveStatistics(*similarity_2N)
