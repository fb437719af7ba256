"""Triton kernels of the dense contrastive loss. Maths, shapes and dtypes: dense.py.

One kernel computes tiles of cosines: a program takes TILE rows of a pair and walks over the pair's columns. Forward, it
sums loss and similarities of its rows. Backward, it stores w for its rows into a scratch and own into a vector; a
second kernel then adds up w @ z, a program for TILE rows and BLOCK_D columns. The scratch is no larger than the states
(or one row tile): row tiles are taken in as many turns as that needs. Sums have a fixed order; there are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcrm_kernels.launch import LaunchConfig
from gcrm_kernels.reference import EPS
from gcrm_kernels.triton_contrastive import add_product

TILE = 64


@triton.jit
def _cosine_kernel(
    states_ptr,
    cu_seqlens_ptr,
    inverse_ptr,
    own_scale_ptr,
    grad_ptr,
    loss_ptr,
    similarity_ptr,
    scratch_ptr,
    own_ptr,
    first_pair,
    first_tile,
    tiles,
    width,
    row_stride,
    scratch_width,
    inverse_temperature,
    BACKWARD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)  # of this launch: pair slot // tiles, row tile slot % tiles
    n = first_pair + slot // tiles
    a = tl.load(cu_seqlens_ptr + 2 * n).to(tl.int64)
    b = tl.load(cu_seqlens_ptr + 2 * n + 1).to(tl.int64)
    c = tl.load(cu_seqlens_ptr + 2 * n + 2).to(tl.int64)
    row_start = a + (first_tile + slot % tiles) * TILE
    i = row_start + tl.arange(0, TILE)
    inverse_i = tl.load(inverse_ptr + i, mask=i < c, other=0.0)
    chosen_i = i < b
    l_c, l_r = (b - a).to(tl.float32), (c - b).to(tl.float32)
    weight_positive = tl.where(l_c > 1.0, 2.0 / tl.maximum(l_c * (l_c - 1.0), 1.0), 0.0)
    weight_negative = 1.0 / (l_c * l_r)
    loss, positive_sum, negative_sum = 0.0, 0.0, 0.0
    own = tl.zeros((TILE,), dtype=tl.float32)
    if BACKWARD:
        start, end = a, tl.where(row_start < c, c, a)
        scale_grad = tl.load(grad_ptr + n) * inverse_temperature
    else:  # only columns after the row, and only chosen rows
        start, end = row_start, tl.where(row_start < b, c, row_start)
    for column_start in range(start, end, TILE):
        j = column_start + tl.arange(0, TILE)
        dots = tl.zeros((TILE, TILE), dtype=tl.float32)
        for d_start in range(0, width, BLOCK_D):
            d = d_start + tl.arange(0, BLOCK_D)
            left = tl.load(
                states_ptr + i[:, None] * row_stride + d[None, :],
                mask=(i < c)[:, None] & (d < width)[None, :],
                other=0.0,
            )
            right = tl.load(
                states_ptr + j[:, None] * row_stride + d[None, :],
                mask=(j < c)[:, None] & (d < width)[None, :],
                other=0.0,
            )
            dots = tl.dot(left, tl.trans(right), dots, input_precision="ieee")
        scale = inverse_i[:, None] * tl.load(inverse_ptr + j, mask=j < c, other=0.0)[None, :]
        cosine = dots * scale
        chosen_j = j < b
        inside = (i < c)[:, None] & (j < c)[None, :]
        positive = chosen_i[:, None] & chosen_j[None, :] & (i[:, None] != j[None, :]) & inside
        negative = (chosen_i[:, None] != chosen_j[None, :]) & inside
        weight = tl.where(positive, weight_positive, 0.0) + tl.where(negative, weight_negative, 0.0)
        sign = tl.where(positive, 1.0, -1.0)
        x = cosine * sign * inverse_temperature
        if BACKWARD:
            e = -sign * scale_grad * weight * tl.exp(-tl.maximum(x, 0.0)) / (1.0 + tl.exp(-tl.abs(x)))
            own += tl.sum(e * cosine, axis=1)
            at = (slot * TILE + tl.arange(0, TILE))[:, None] * scratch_width + (j - a)[None, :]
            tl.store(scratch_ptr + at, e * scale, mask=(j - a < scratch_width)[None, :])
        else:
            weight = tl.where(chosen_i[:, None] & (j[None, :] > i[:, None]), weight, 0.0)
            loss -= tl.sum(weight * (tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))))
            positive_sum += tl.sum(tl.where(positive, weight * cosine, 0.0))
            negative_sum += tl.sum(tl.where(negative, weight * cosine, 0.0))
    if BACKWARD:
        tl.store(own_ptr + i, own * tl.load(own_scale_ptr + i, mask=i < c, other=0.0), mask=i < c)
    else:
        tl.store(loss_ptr + slot, loss)
        tl.store(similarity_ptr + slot, positive_sum)
        tl.store(similarity_ptr + tl.num_programs(0) + slot, negative_sum)


@triton.jit
def _gradient_kernel(
    states_ptr,
    cu_seqlens_ptr,
    scratch_ptr,
    own_ptr,
    out_ptr,
    first_pair,
    first_tile,
    tiles,
    width,
    row_stride,
    scratch_width,
    column_blocks,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = (tl.program_id(0) // column_blocks).to(tl.int64)
    n = first_pair + slot // tiles
    a = tl.load(cu_seqlens_ptr + 2 * n).to(tl.int64)
    c = tl.load(cu_seqlens_ptr + 2 * n + 2).to(tl.int64)
    i = a + (first_tile + slot % tiles) * TILE + tl.arange(0, TILE)
    d = (tl.program_id(0) % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((TILE, BLOCK_D), dtype=tl.float32)
    end = tl.where(tl.min(i) < c, c, a)
    for column_start in range(a, end, 16):
        j = column_start + tl.arange(0, 16)
        at = (slot * TILE + tl.arange(0, TILE))[:, None] * scratch_width + (j - a)[None, :]
        w = tl.load(scratch_ptr + at, mask=(i < c)[:, None] & (j < c)[None, :], other=0.0)
        z = tl.load(
            states_ptr + j[:, None] * row_stride + d[None, :], mask=(j < c)[:, None] & (d < width)[None, :], other=0.0
        )
        acc = add_product(acc, w, z)
    inside = (i < c)[:, None] & (d < width)[None, :]
    z = tl.load(states_ptr + i[:, None] * row_stride + d[None, :], mask=inside, other=0.0)
    out = acc - tl.load(own_ptr + i, mask=i < c, other=0.0)[:, None] * z.to(tl.float32)
    tl.store(out_ptr + i[:, None] * width + d[None, :], out.to(z.dtype), mask=inside)


# ----------------------------------------------------------------------------------------------------------- launchers


def _inverse_norms(states_MD: Tensor) -> tuple[Tensor, Tensor]:
    """1 / max(norm, eps), and its square where the norm is not clamped, else 0: [M] float32 each."""
    norm_M = torch.linalg.vector_norm(states_MD, dim=1, dtype=torch.float32)
    inverse_M = norm_M.clamp_min(EPS).reciprocal()
    return inverse_M, torch.where(norm_M > EPS, inverse_M.square(), 0.0)


def cosine_config(itemsize: int) -> LaunchConfig:
    """Two operands of TILE rows, 128 bytes of each per step."""
    return LaunchConfig(128 // itemsize, 8, 3)


def gradient_config(itemsize: int) -> LaunchConfig:
    """TILE rows by 64 columns: 32 accumulators a thread, 16 with the float32 products that use no tensor cores."""
    return LaunchConfig(64, 4 if itemsize == 2 else 8, 3)


def forward(states_MD: Tensor, cu_seqlens: Tensor, max_pair_length: int, temperature: float) -> tuple[Tensor, Tensor]:
    """(loss [N], similarity [2, N]), float32."""
    states_MD = states_MD if states_MD.stride(-1) == 1 else states_MD.contiguous()
    n, tiles = (len(cu_seqlens) - 1) // 2, triton.cdiv(max_pair_length, TILE)
    inverse_M, own_scale_M = _inverse_norms(states_MD)
    config = cosine_config(states_MD.itemsize)
    loss = states_MD.new_empty((n, tiles), dtype=torch.float32)
    similarity = states_MD.new_empty((2, n, tiles), dtype=torch.float32)
    if loss.numel():
        _cosine_kernel[(n * tiles,)](
            states_MD,
            cu_seqlens,
            inverse_M,
            own_scale_M,
            None,
            loss,
            similarity,
            None,
            None,
            0,
            0,
            tiles,
            states_MD.shape[1],
            states_MD.stride(0),
            0,
            1.0 / temperature,
            BACKWARD=False,
            TILE=TILE,
            BLOCK_D=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return loss.sum(-1), similarity.sum(-1)


def backward(grad_N: Tensor, states_MD: Tensor, cu_seqlens: Tensor, max_pair_length: int, temperature: float) -> Tensor:
    """Gradient of the states, [M, D] in their dtype."""
    states_MD = states_MD if states_MD.stride(-1) == 1 else states_MD.contiguous()
    m, width = states_MD.shape
    config, gradient = cosine_config(states_MD.itemsize), gradient_config(states_MD.itemsize)
    n, all_tiles = (len(cu_seqlens) - 1) // 2, triton.cdiv(max_pair_length, TILE)
    inverse_M, own_scale_M = _inverse_norms(states_MD)
    own_M = torch.empty_like(inverse_M)
    out_MD = states_MD.new_empty(m, width)
    # So many row tiles a turn that the scratch is no larger than the states: whole pairs, or tiles of one pair.
    scratch_width = max(1, triton.cdiv(max_pair_length, 16)) * 16
    affordable = max(1, m * width * states_MD.itemsize // (4 * TILE * scratch_width))
    pairs, tiles = max(1, min(n, affordable // max(1, all_tiles))), min(all_tiles, affordable)
    scratch = states_MD.new_empty((pairs * tiles * TILE, scratch_width), dtype=torch.float32)
    for first_pair in range(0, n, pairs):
        for first_tile in range(0, all_tiles, tiles):
            turn_pairs, turn_tiles = min(pairs, n - first_pair), min(tiles, all_tiles - first_tile)
            _cosine_kernel[(turn_pairs * turn_tiles,)](
                states_MD,
                cu_seqlens,
                inverse_M,
                own_scale_M,
                grad_N,
                None,
                None,
                scratch,
                own_M,
                first_pair,
                first_tile,
                turn_tiles,
                width,
                states_MD.stride(0),
                scratch_width,
                1.0 / temperature,
                BACKWARD=True,
                TILE=TILE,
                BLOCK_D=config.block,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
            column_blocks = triton.cdiv(width, gradient.block)
            _gradient_kernel[(turn_pairs * turn_tiles * column_blocks,)](
                states_MD,
                cu_seqlens,
                scratch,
                own_M,
                out_MD,
                first_pair,
                first_tile,
                turn_tiles,
                width,
                states_MD.stride(0),
                scratch_width,
                column_blocks,
                TILE=TILE,
                BLOCK_D=gradient.block,
                num_warps=gradient.num_warps,
                num_stages=gradient.num_stages,
            )
    return out_MD
