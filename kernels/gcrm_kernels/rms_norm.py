"""RMSNorm, with the addition of a residual before it: y = w s / rms(s), s = x + residual. Forward and backward.

    r_t = 1 / sqrt(mean_h s_th^2 + eps),   y_th = w_h r_t s_th
    ds_th = r_t (w_h dy_th - r_t s_th m_t) + (gradient that arrives through s),   m_t = mean_h(w_h dy_th r_t s_th)
    dx = dresidual = ds,   dw_h = sum_t dy_th r_t s_th

s is rounded to the dtype of x before it is normalized, as if the addition were a separate operator: the backward
reads that s again, and r. Sums over rows have an order that the shape alone decides (parts of consecutive rows, then
the sum of the parts): bitwise deterministic, no atomics.

Shapes: x, residual, y, s [T, H]; w [H]; r [T]. Dtypes: x, residual, y, s and gradients float32, float16 or bfloat16
(float64: PyTorch path); w any of them; arithmetic and r in float32.
Compulsory bytes, of TH elements: forward 2 (x, y), with a residual 4; backward 3 (dy, s, dx), with a residual 4.
The PyTorch path serves the CPU and machines without triton; the kernels are in triton_rms_norm.py.
"""

from typing import Any, overload

import torch
from torch import Tensor

from gcrm_kernels.launch import HAS_TRITON, operator_body, use_triton

if HAS_TRITON:
    from gcrm_kernels import triton_rms_norm


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------ PyTorch path


def _analytic_forward(x_TH: Tensor, residual_TH: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, ...]:
    s_TH = x_TH if residual_TH is None else x_TH + residual_TH
    s = s_TH.to(_exact(x_TH))
    inverse_T = torch.linalg.vector_norm(s, dim=1).square_().div_(s.shape[1]).add_(eps).rsqrt_()
    y_TH = (s * inverse_T[:, None]).mul_(weight_H).to(x_TH.dtype)
    return y_TH, x_TH.new_empty(0) if residual_TH is None else s_TH, inverse_T


def _analytic_backward(
    grad_y: Tensor, grad_s: Tensor | None, s_TH: Tensor, weight_H: Tensor, inverse_T: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Few passes over [T, H], most of them in place: on a CPU, touching new memory costs as much as computing."""
    dy, s, w = (t.to(inverse_T.dtype) for t in (grad_y, s_TH, weight_H))
    product_TH = dy * s
    dweight = (inverse_T @ product_TH).to(weight_H.dtype) if needs_weight else weight_H.new_empty(0)
    own_T = (product_TH @ w).mul_(inverse_T).mul_(inverse_T).mul_(inverse_T / -s.shape[1])
    ds_TH = torch.mul(dy, w, out=product_TH).mul_(inverse_T[:, None]).addcmul_(s, own_T[:, None])
    if grad_s is not None:
        ds_TH += grad_s
    return ds_TH.to(s_TH.dtype), dweight


# ---------------------------------------------------------------------------------------------------------- operators


@operator_body
def _computed(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y [T, H], s [T, H], or empty where it would be x, r [T]); all inputs contiguous."""
    run = triton_rms_norm.forward if use_triton(x) else _analytic_forward
    y, s, inverse = run(x, residual, weight, eps)
    return y, s, inverse


_forward = torch.library.custom_op("gcrm::rms_norm", _computed, mutates_args=())


@_forward.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    s = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), s, x.new_empty(x.shape[0], dtype=_exact(x))


@torch.library.custom_op("gcrm::rms_norm_backward", mutates_args=())
@operator_body
def _backward(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, inverse: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """(ds [T, H], dw [H], or empty where it is not needed); all inputs contiguous."""
    run = triton_rms_norm.backward if use_triton(s) else _analytic_backward
    return run(grad_y, grad_s, s, weight, inverse, needs_weight)


@_backward.register_fake
def _(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, inverse: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(s), torch.empty_like(weight) if needs_weight else weight.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _ = inputs
    _, s, inverse = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(*((inverse,) if ctx.has_residual else (s, inverse)))
    ctx.save_for_backward(s if ctx.has_residual else x, weight, inverse)


def _differentiate(ctx: Any, grad_y: Tensor, grad_s: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    through_s = grad_s.contiguous() if ctx.has_residual and grad_s is not None else None
    needs_weight = ctx.needs_input_grad[2]
    ds, dweight = _backward(grad_y.contiguous(), through_s, *ctx.saved_tensors, needs_weight)
    return ds, ds if ctx.has_residual else None, dweight if needs_weight else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


# ------------------------------------------------------------------------------------------------------------- public


@overload
def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, residual_TH: None = None) -> Tensor: ...
@overload
def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, residual_TH: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x_TH: Tensor, weight_H: Tensor, eps: float, residual_TH: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y [T, H], or with a residual (y, s), in the dtype of x. Differentiable, once, in all tensors.

    Args:
        x_TH: what is normalized, [T, H], any float dtype.
        weight_H: [H], any float dtype.
        eps: added to the mean square.
        residual_TH: added to x first, [T, H], of x's dtype; the sum s is then the second result.

    Raises:
        ValueError: a weight or a residual that does not fit x.
    """
    if x_TH.dim() != 2 or weight_H.shape != x_TH.shape[1:]:
        raise ValueError(f"x {tuple(x_TH.shape)}, weight {tuple(weight_H.shape)}: must be [T, H] and [H]")
    # An operator's own cost is that of several small products: text is written a few rows at a time.
    forward = _forward if torch.is_grad_enabled() or torch.compiler.is_compiling() else _computed
    if residual_TH is None:
        return forward(x_TH.contiguous(), None, weight_H.contiguous(), eps)[0]
    if residual_TH.shape != x_TH.shape or residual_TH.dtype != x_TH.dtype:
        raise ValueError(
            f"residual {tuple(residual_TH.shape)} {residual_TH.dtype}: must be like x, {tuple(x_TH.shape)} {x_TH.dtype}"
        )
    y_TH, s_TH, _ = forward(x_TH.contiguous(), residual_TH.contiguous(), weight_H.contiguous(), eps)
    return y_TH, s_TH
