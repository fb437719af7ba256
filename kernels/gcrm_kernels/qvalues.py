"""Q-values: the cosine of every token's state to each of a few goal states (GCRM, arXiv 2407.13887, section 4.2).

    q_tg = z_t.g / (max(|z_t|, eps) max(|g|, eps)),   z = h or W h

Shapes: hidden [T, H], goals [G, H or D], projection [D, H]; float32 result [T, G] (float64 for float64 states).
Compulsory bytes: hidden read once, 4TG written. For inference: no gradient is defined.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gcrm_kernels.launch import HAS_TRITON, operator_body, use_triton
from gcrm_kernels.reference import EPS, unit_rows

if HAS_TRITON:
    from gcrm_kernels import triton_qvalues

CHUNK_BYTES = 2**21  # of states that are converted at a time in the PyTorch path


@torch.library.custom_op("gcrm::q_values", mutates_args=())
@operator_body
def _q_values(states: Tensor, goals: Tensor) -> Tensor:
    """[T, G] of states [T, D] and goals [G, D]."""
    unit_GD = unit_rows(goals)
    if use_triton(states):
        return triton_qvalues.q_values(states, unit_GD.float())
    dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
    unit_GD = unit_GD.to(dtype)
    q_TG = states.new_empty((len(states), len(goals)), dtype=dtype)
    chunk = max(1, CHUNK_BYTES // (states.shape[1] * dtype.itemsize))
    for start in range(0, len(states), chunk):
        part = states[start : start + chunk].to(dtype)
        norms = torch.linalg.vector_norm(part, dim=1, keepdim=True).clamp_min_(EPS)
        q_TG[start : start + chunk] = (part @ unit_GD.mT).div_(norms)
    return q_TG


@_q_values.register_fake
def _(states: Tensor, goals: Tensor) -> Tensor:
    dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
    return states.new_empty((len(states), len(goals)), dtype=dtype)


@torch.no_grad()
def q_values(hidden_TH: Tensor, goals: Tensor, projection_DH: Tensor | None = None) -> Tensor:
    """Q-values [T, G], float32 (float64 for float64 states), without a gradient.

    Args:
        hidden_TH: states, [T, H], any float dtype.
        goals: goal states, [G, H], or [G, D] with a projection; usually float32.
        projection_DH: W [D, H]; goals are then compared with W h.

    Raises:
        ValueError: goals and states of different widths.
    """
    states = hidden_TH if projection_DH is None else F.linear(hidden_TH, projection_DH.to(hidden_TH.dtype))
    if goals.shape[1] != states.shape[1]:
        raise ValueError(f"goals of width {goals.shape[1]}, states of width {states.shape[1]}: must be equal")
    return _q_values(states, goals)
