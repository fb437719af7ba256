"""An experiment that bench/contrastive_loss.py times on a GPU: the projection fused into the sampled loss's forward.

The shipped code gathers (or takes all read rows), lets cuBLAS compute z = W h, and runs the loss on z. Here one program
takes the positives or the negatives of a pair and accumulates S source and S goal projections [S, D] as it loops over
H, so that neither the gathered rows nor z are written. The price: every program reads W from the L2 cache, and the
products have 16 rows instead of cuBLAS's thousands. Only the forward can gain: the gradient of W sums over all pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcrm_kernels.reference import EPS


@triton.jit
def _kernel(
    hidden_ptr,
    rows_ptr,
    w_ptr,
    loss_ptr,
    n_pairs,
    width,
    d_width,
    EPS: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    n, sign = unit % n_pairs, unit // n_pairs
    s, d = tl.arange(0, SP), tl.arange(0, DP)
    valid = s < S
    sample = (2 * sign * n_pairs + n) * S + s
    sources = tl.load(rows_ptr + sample, mask=valid, other=0) * width
    goals = tl.load(rows_ptr + sample + n_pairs * S, mask=valid, other=0) * width
    z_a = tl.zeros((SP, DP), dtype=tl.float32)
    z_b = tl.zeros((SP, DP), dtype=tl.float32)
    for start in range(0, width, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = valid[:, None] & (h < width)[None, :]
        w = tl.load(
            w_ptr + d[None, :] * width + h[:, None], mask=(d < d_width)[None, :] & (h < width)[:, None], other=0.0
        )
        a = tl.load(hidden_ptr + sources[:, None] + h[None, :], mask=inside, other=0.0)
        z_a = tl.dot(a, w, z_a, input_precision="ieee")
        b = tl.load(hidden_ptr + goals[:, None] + h[None, :], mask=inside, other=0.0)
        z_b = tl.dot(b, w, z_b, input_precision="ieee")
    norm_a = tl.maximum(tl.sqrt(tl.sum(z_a * z_a, axis=1)), EPS)
    norm_b = tl.maximum(tl.sqrt(tl.sum(z_b * z_b, axis=1)), EPS)
    cosine = tl.dot(z_a, tl.trans(z_b), input_precision="ieee") / (norm_a[:, None] * norm_b[None, :])
    probability = 1.0 / (1.0 + tl.exp(-cosine * (1 - 2 * sign)))
    counted = valid[:, None] & valid[None, :]
    tl.store(loss_ptr + unit, -tl.log(tl.sum(tl.where(counted, probability, 0.0)) / (S * S)))


def fused_forward(hidden_RH: Tensor, rows_4NS: Tensor, projection_DH: Tensor) -> Tensor:
    """Loss [N] float32 (grid, mean_then_log, tau 1) of contiguous states and W [D, H], D at most 256."""
    _, n, s = rows_4NS.shape
    d, width = projection_DH.shape
    loss_2N = hidden_RH.new_empty((2, n), dtype=torch.float32)
    _kernel[(2 * n,)](
        hidden_RH,
        rows_4NS,
        projection_DH,
        loss_2N,
        n,
        width,
        d,
        EPS=EPS,
        S=s,
        SP=max(16, triton.next_power_of_2(s)),
        DP=max(16, triton.next_power_of_2(d)),
        BLOCK_H=64,
        num_warps=8,
        num_stages=3,
    )
    return loss_2N.sum(0)
