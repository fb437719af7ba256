"""Triton kernel of the Q-values: one pass over the states. Maths, shapes and bytes: qvalues.py.

A program takes BLOCK_T tokens and up to 64 goals and walks over the width, summing squares and dot products. Goals are
unit vectors divided by their largest entry; for 16-bit states they come as a sum of two 16-bit terms, so that
tensor-core products keep 16 (bfloat16) or 22 (float16) bits of them. float32 states are multiplied in IEEE float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcrm_kernels.launch import LaunchConfig, pick
from gcrm_kernels.reference import EPS

GOALS = 64  # goals a program: more are another pass over the states


@triton.jit
def _q_kernel(
    states_ptr,
    high_ptr,
    low_ptr,
    largest_ptr,
    out_ptr,
    tokens,
    goals,
    width,
    row_stride,
    EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    g = tl.program_id(1) * GP + tl.arange(0, GP)
    squares = tl.zeros((BLOCK_T,), dtype=tl.float32)
    dots = tl.zeros((BLOCK_T, GP), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (t < tokens)[:, None] & (d < width)[None, :]
        z = tl.load(states_ptr + t[:, None] * row_stride + d[None, :], mask=inside, other=0.0)
        at = g[None, :].to(tl.int64) * width + d[:, None]
        wanted = (g < goals)[None, :] & (d < width)[:, None]
        dots = tl.dot(z, tl.load(high_ptr + at, mask=wanted, other=0.0), dots, input_precision="ieee")
        if z.dtype != tl.float32:
            dots = tl.dot(z, tl.load(low_ptr + at, mask=wanted, other=0.0), dots)
        z32 = z.to(tl.float32)
        squares += tl.sum(z32 * z32, axis=1)
    largest = tl.load(largest_ptr + g, mask=g < goals, other=0.0)
    q = dots * largest[None, :] / tl.maximum(tl.sqrt(squares), EPS)[:, None]
    tl.store(out_ptr + t[:, None] * goals + g[None, :], q, mask=(t < tokens)[:, None] & (g < goals)[None, :])


def candidates(itemsize: int) -> list[LaunchConfig]:
    """8 KiB of states per step, of 64, 32 or 16 tokens. First the rule, then the further candidates of
    autotuning."""
    block = 128 // itemsize
    return [LaunchConfig(block, 4, 3), LaunchConfig(2 * block, 4, 3), LaunchConfig(4 * block, 4, 3)]


def tokens_per_program(block: int, itemsize: int) -> int:
    """So many that a step of ``block`` columns takes 8 KiB of states."""
    return 8192 // (block * itemsize)


def q_values(states_TD: Tensor, unit_GD: Tensor) -> Tensor:
    """[T, G] float32 of states [T, D] in float32, float16 or bfloat16 and unit goals [G, D] float32."""
    tokens, width = states_TD.shape
    goals = len(unit_GD)
    states_TD = states_TD if states_TD.stride(-1) == 1 else states_TD.contiguous()
    largest_G = unit_GD.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    scaled_GD = unit_GD / largest_G[:, None]
    high_GD = scaled_GD.to(states_TD.dtype)
    low_GD = (scaled_GD - high_GD.float()).to(states_TD.dtype)
    out_TG = states_TD.new_empty((tokens, goals), dtype=torch.float32)
    padded = min(GOALS, max(16, triton.next_power_of_2(goals)))

    def run(config: LaunchConfig) -> None:
        block_t = tokens_per_program(config.block, states_TD.itemsize)
        _q_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(goals, padded))](
            states_TD,
            high_GD,
            low_GD,
            largest_G,
            out_TG,
            tokens,
            goals,
            width,
            states_TD.stride(0),
            EPS=EPS,
            BLOCK_T=block_t,
            GP=padded,
            BLOCK_D=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    if out_TG.numel():
        key = ("q_values", padded, width, states_TD.dtype)
        run(pick(key, candidates(states_TD.itemsize), run))
    return out_TG
