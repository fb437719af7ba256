"""Triton kernels of RMSNorm: one launch forward, one backward. Maths, shapes, dtypes and bytes: rms_norm.py.

Forward: one program per row, which stays in registers between the sum of squares and the product. Backward: a program
takes consecutive rows, writes their gradient and keeps its part of the weight's gradient in registers; the parts [P,
H] in float32 are then summed. The weight is read again for each row, from the cache: kept, it would take as many
registers as the row. A whole row is one block of the next power of two, 2^20 columns at most; up to 16384 it fits in
registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcrm_kernels.launch import LaunchConfig, pick

# Programs of the backward: about what a large GPU runs at once, and so few that their float32 parts are small next to
# the rows (8 MiB at H = 4096, where 8192 rows of bfloat16 are 64 MiB). Not queried from the device: the order of the
# sums is then the same everywhere.
PARTS = 512
LANES = 64 if torch.version.hip else 32  # of a warp


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    s_ptr,
    inverse_ptr,
    width,
    eps,
    RESIDUAL: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    inside = h < width
    at = t * width + h
    s = tl.load(x_ptr + at, mask=inside, other=0.0)
    if RESIDUAL:
        s = (s.to(tl.float32) + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(s.dtype)
        tl.store(s_ptr + at, s, mask=inside)
    s32 = s.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(s32 * s32) / width + eps)
    tl.store(inverse_ptr + t, inverse)
    w = tl.load(weight_ptr + h, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (s32 * inverse * w).to(s.dtype), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    grad_y_ptr,
    grad_s_ptr,
    s_ptr,
    weight_ptr,
    inverse_ptr,
    out_ptr,
    part_ptr,
    tokens,
    width,
    rows,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    inside = h < width
    dweight = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for t in range(part * rows, tl.minimum((part + 1) * rows, tokens)):
        at = t * width + h
        inverse = tl.load(inverse_ptr + t)
        s = tl.load(s_ptr + at, mask=inside, other=0.0)
        normal = s.to(tl.float32) * inverse
        dy = tl.load(grad_y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT:
            dweight += dy * normal
        dy *= tl.load(weight_ptr + h, mask=inside, other=0.0).to(tl.float32)
        ds = inverse * (dy - normal * (tl.sum(dy * normal) / width))
        if RESIDUAL:
            ds += tl.load(grad_s_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, ds.to(s.dtype), mask=inside)
    if WEIGHT:
        tl.store(part_ptr + part * width + h, dweight, mask=inside)


# ----------------------------------------------------------------------------------------------------------- launchers


def candidates(width: int, lanes: int) -> list[LaunchConfig]:
    """Sixteen columns a lane, two loads of 16 bytes in 16-bit dtypes, and at most 1024 lanes. First the rule,
    then the further candidates of autotuning."""
    block, most = triton.next_power_of_2(width), 1024 // lanes
    warps = min(most, max(1, block // (16 * lanes)))
    return [LaunchConfig(block, count, 1) for count in (warps, max(1, warps // 2), min(most, 2 * warps))]


def forward(x_TH: Tensor, residual_TH: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, or empty without a residual, 1 / rms [T] float32)."""
    tokens, width = x_TH.shape
    y_TH, inverse_T = torch.empty_like(x_TH), x_TH.new_empty(tokens, dtype=torch.float32)
    s_TH = x_TH.new_empty(0) if residual_TH is None else torch.empty_like(x_TH)

    def run(config: LaunchConfig) -> None:
        _rms_norm_forward_kernel[(tokens,)](
            x_TH,
            residual_TH,
            weight_H,
            y_TH,
            s_TH,
            inverse_T,
            width,
            eps,
            RESIDUAL=residual_TH is not None,
            BLOCK_H=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    if y_TH.numel():
        key = ("rms_norm forward", width, x_TH.dtype, residual_TH is None)
        run(pick(key, candidates(width, LANES), run))
    return y_TH, s_TH, inverse_T


def backward(
    grad_y: Tensor, grad_s: Tensor | None, s_TH: Tensor, weight_H: Tensor, inverse_T: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """(ds, dw in the weight's dtype, or empty)."""
    tokens, width = s_TH.shape
    rows = triton.cdiv(tokens, PARTS)
    parts = triton.cdiv(tokens, rows) if tokens else 0
    ds_TH = torch.empty_like(s_TH)
    part_PH = s_TH.new_empty((parts, width) if needs_weight else 0, dtype=torch.float32)

    def run(config: LaunchConfig) -> None:
        _rms_norm_backward_kernel[(parts,)](
            grad_y,
            grad_s,
            s_TH,
            weight_H,
            inverse_T,
            ds_TH,
            part_PH,
            tokens,
            width,
            rows,
            RESIDUAL=grad_s is not None,
            WEIGHT=needs_weight,
            BLOCK_H=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    if ds_TH.numel():
        key = ("rms_norm backward", width, s_TH.dtype, grad_s is None, needs_weight)
        run(pick(key, candidates(width, LANES), run))
    return ds_TH, part_PH.sum(0).to(weight_H.dtype) if needs_weight else weight_H.new_empty(0)
