"""SwiGLU: silu(gate) up; the backward recomputes the product's factors from gate and up.

    y = g sigmoid(g) u,   dg = dy u sigmoid(g) (1 + g (1 - sigmoid(g))),   du = dy g sigmoid(g)

So only gate and up are kept for the backward: autograd's silu and multiplication also keep silu(gate).

Shapes: gate, up, y of any shape, the same. Dtypes: float32, float16 or bfloat16; arithmetic in float32, rounded once.
Compulsory bytes, of the elements of gate: forward 3, backward 5. Every element is computed alone: deterministic.
On a CPU, without triton and in float64 it is autograd's: there, computing silu again costs more than reading it
(bench/LOG.md). The kernels are in triton_swiglu.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gcrm_kernels.launch import HAS_TRITON, operator_body, use_triton

if HAS_TRITON:
    from gcrm_kernels import triton_swiglu


@torch.library.custom_op("gcrm::swiglu", mutates_args=())
@operator_body
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    """Inputs contiguous, in a dtype of the kernels."""
    return triton_swiglu.forward(gate, up)


@_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("gcrm::swiglu_backward", mutates_args=())
@operator_body
def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup); inputs contiguous."""
    return triton_swiglu.backward(grad, gate, up)


@_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(grad.contiguous(), *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) up, of the inputs' shape and dtype. Differentiable in both, by the kernels once.

    Args:
        gate_TF, up_TF: two tensors of one shape and one float dtype, usually [T, F].

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    if gate_TF.shape != up_TF.shape or gate_TF.dtype != up_TF.dtype:
        raise ValueError(
            f"gate {tuple(gate_TF.shape)} {gate_TF.dtype}, up {tuple(up_TF.shape)} {up_TF.dtype}: must be alike"
        )
    if use_triton(gate_TF):
        return _forward(gate_TF.contiguous(), up_TF.contiguous())
    return F.silu(gate_TF) * up_TF
