"""Triton kernels of SwiGLU: a program takes BLOCK elements, wherever their rows begin. Maths and bytes: swiglu.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcrm_kernels.launch import LaunchConfig, pick


@triton.jit
def _swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    gate = tl.load(gate_ptr + i, mask=inside, other=0.0)
    g, u = gate.to(tl.float32), tl.load(up_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (g / (1.0 + tl.exp(-g)) * u).to(gate.dtype), mask=inside)


@triton.jit
def _swiglu_backward_kernel(grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    gate = tl.load(gate_ptr + i, mask=inside, other=0.0)
    g, u = gate.to(tl.float32), tl.load(up_ptr + i, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    tl.store(dgate_ptr + i, (dy * u * sigmoid * (1.0 + g * (1.0 - sigmoid))).to(gate.dtype), mask=inside)
    tl.store(dup_ptr + i, (dy * g * sigmoid).to(gate.dtype), mask=inside)


def candidates() -> list[LaunchConfig]:
    """Eight elements per lane: 16 bytes in 16-bit dtypes. First the rule, then autotuning's further candidates."""
    return [LaunchConfig(1024, 4, 1), LaunchConfig(2048, 4, 1), LaunchConfig(2048, 8, 1)]


def forward(gate: Tensor, up: Tensor) -> Tensor:
    count, out = gate.numel(), torch.empty_like(gate)

    def run(config: LaunchConfig) -> None:
        _swiglu_forward_kernel[(triton.cdiv(count, config.block),)](
            gate, up, out, count, BLOCK=config.block, num_warps=config.num_warps, num_stages=config.num_stages
        )

    if count:
        run(pick(("swiglu forward", gate.dtype), candidates(), run))
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)"""
    count, dgate, dup = gate.numel(), torch.empty_like(gate), torch.empty_like(up)

    def run(config: LaunchConfig) -> None:
        _swiglu_backward_kernel[(triton.cdiv(count, config.block),)](
            grad,
            gate,
            up,
            dgate,
            dup,
            count,
            BLOCK=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    if count:
        run(pick(("swiglu backward", gate.dtype), candidates(), run))
    return dgate, dup
