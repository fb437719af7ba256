"""Goal-conditioned contrastive loss of sampled positions, forward and analytic backward.

For a pair and a sign (positive or negative samples) with source rows a_i and goal rows b_j, i, j < S:

    c_ij = a_i.b_j / (|a_i| |b_j|),   x_ij = +-c_ij / tau,   l_ij = log sigmoid(x_ij)
    loss = -sum_ij p_ij l_ij  (log_then_mean, p_ij = 1 / count)   or   log(count) - logsumexp_ij l_ij  (mean_then_log)
    dloss/dc_ij = -+(1 - sigmoid(x_ij)) p_ij / tau                with p = softmax(l) for mean_then_log
    da_i = sum_j w_ij b_j - own_i a_i,   w_ij = dloss/dc_ij / (|a_i| |b_j|),   own_i = sum_j dloss/dc_ij c_ij / |a_i|^2

and db_j alike; ``paired`` keeps only i = j. Norms below eps = 1e-8 are clamped and then pass no gradient (own = 0).
So the forward leaves w [2, N, S, S] (paired: [2, N, S]) and own [4, N, S], and the backward reads each row again and
writes each row of the gradient once. Rows repeat, within a pair and across pairs: their gradients add, in an order
that the indices alone decide, without atomics: bitwise deterministic.

Shapes: hidden [R, H]; rows [4, N, S] (sources, goals, negative sources, negative goals); has_term [2, N] (a pair
without positive or negative samples has a term of 0); loss [N].
Dtypes: hidden and its gradient float32, float16 or bfloat16 (float64: PyTorch path); arithmetic and loss in float32.
Compulsory bytes: forward U rows read; backward U rows read, R rows written, for U distinct rows among the 4NS.
The PyTorch path serves the CPU and machines without triton; the kernels are in triton_contrastive.py.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gcrm_kernels.gather import InverseIndex, gather_rows
from gcrm_kernels.launch import HAS_TRITON, operator_body, use_triton
from gcrm_kernels.reference import EPS

if HAS_TRITON:
    from gcrm_kernels import triton_contrastive

TILE_ROWS = 64  # gradient rows that one program of the backward kernel writes
CHUNK_BYTES = 2**21  # of gathered rows in the PyTorch path: what stays in a core's cache is read several times

PAIRINGS = ("paired", "grid")
REDUCTIONS = ("log_then_mean", "mean_then_log")


class ContrastiveStatistics(NamedTuple):
    """Mean similarities of each pair, [N] each, detached; 0 where there is no positive."""

    positive_similarity: Tensor
    negative_similarity: Tensor


class RowTiles(NamedTuple):
    """Inverse of the sampled rows: which units touch which tile of at most TILE_ROWS consecutive rows (all int64).

    Tile t holds rows ``starts[t]:starts[t + 1]``; the tiles cover all R rows. A unit is a pair's positive (n) or
    negative (N + n) samples; those that touch tile t are ``units[offsets[t]:offsets[t + 1]]``, ascending.
    """

    starts: Tensor
    offsets: Tensor
    units: Tensor

    @staticmethod
    def of(rows_4NS: np.ndarray, rows: int) -> "RowTiles":
        """Built on the host, ``rows`` being R. Tiles start where pairs start, so that few pairs meet in one."""
        _, n, _ = rows_4NS.shape
        firsts = np.unique(np.append(rows_4NS.min(axis=(0, 2)) if rows_4NS.size else [], 0).astype(np.int64))
        lengths = np.diff(firsts, append=rows)
        parts = -(-lengths // TILE_ROWS)
        part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        starts = np.append(np.repeat(firsts, parts) + TILE_ROWS * part, rows)
        unit_4NS = np.broadcast_to(np.array([0, 0, n, n])[:, None, None] + np.arange(n)[:, None], rows_4NS.shape)
        tile_4NS = np.searchsorted(starts, rows_4NS, side="right") - 1
        touched = np.unique(tile_4NS * max(2 * n, 1) + unit_4NS)
        tile, unit = np.divmod(touched, max(2 * n, 1))
        offsets = np.searchsorted(tile, np.arange(len(starts)))
        return RowTiles(*(torch.from_numpy(np.asarray(v, dtype=np.int64)) for v in (starts, offsets, unit)))

    @staticmethod
    def on_device(rows_4NS: Tensor, rows: int) -> "RowTiles":
        """The same where the indices are, for tiles of TILE_ROWS rows each; shapes are static, so nothing waits."""
        _, n, _ = rows_4NS.shape
        device = rows_4NS.device
        starts = torch.arange(-(-rows // TILE_ROWS) + 1, device=device).mul_(TILE_ROWS).clamp_(max=rows)
        unit_4NS = torch.arange(4, device=device)[:, None, None] // 2 * n + torch.arange(n, device=device)[:, None]
        keys = (rows_4NS // TILE_ROWS * (2 * n) + unit_4NS).flatten().sort().values
        first = torch.cat([keys.new_ones(min(1, len(keys))), (keys[1:] != keys[:-1]).long()])
        position = first.cumsum(0)
        units = torch.zeros_like(keys).scatter_(0, position - 1, keys % max(2 * n, 1))
        before = torch.searchsorted(keys, torch.arange(len(starts), device=device) * (2 * n))
        return RowTiles(starts, F.pad(position, (1, 0))[before], units)


# ------------------------------------------------------------------------------------------------------ PyTorch path


def _chunks(rows_4NS: Tensor, width: int, itemsize: int) -> list[slice]:
    """Slices of pairs whose gathered rows fit in CHUNK_BYTES."""
    _, n, s = rows_4NS.shape
    size = max(1, CHUNK_BYTES // (4 * s * width * itemsize))
    return [slice(a, min(a + size, n)) for a in range(0, n, size)]


def _gathered(hidden_RH: Tensor, rows_4NS: Tensor, pairs: slice) -> tuple[Tensor, Tensor, Tensor]:
    """(row numbers [4CS], sources [2C, S, H], goals [2C, S, H]) of C pairs, positives before negatives."""
    s = rows_4NS.shape[2]
    index = rows_4NS[[0, 2, 1, 3], pairs].flatten()
    x = hidden_RH.index_select(0, index)
    x = x if x.dtype == torch.float64 else x.float()
    a, b = x.view(2, -1, s, x.shape[1])
    return index, a, b


def _analytic_forward(
    hidden_RH: Tensor, rows_4NS: Tensor, has_term_2N: Tensor, grid: bool, mean_then_log: bool, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, n, s = rows_4NS.shape
    dtype = torch.float64 if hidden_RH.dtype == torch.float64 else torch.float32
    dots = hidden_RH.new_empty((2, n, s, s) if grid else (2, n, s), dtype=dtype)
    norms_4NS = hidden_RH.new_empty((2, 2, n, s), dtype=dtype)  # [source or goal, sign, ...]
    for pairs in _chunks(rows_4NS, hidden_RH.shape[1], dtype.itemsize):
        _, a, b = _gathered(hidden_RH, rows_4NS, pairs)
        norms_4NS[0, :, pairs] = torch.linalg.vector_norm(a, dim=-1).view(2, -1, s)
        norms_4NS[1, :, pairs] = torch.linalg.vector_norm(b, dim=-1).view(2, -1, s)
        product = torch.bmm(a, b.mT) if grid else torch.linalg.vecdot(a, b)
        dots[:, pairs] = product.view(2, -1, *dots.shape[2:])
    inverse = norms_4NS.clamp_min(EPS).reciprocal()
    scale = inverse[0].unsqueeze(-1) * inverse[1].unsqueeze(-2) if grid else inverse[0] * inverse[1]
    cosine = dots.mul_(scale)

    sign = cosine.new_tensor([1.0, -1.0]).view(2, *[1] * (cosine.dim() - 1))
    x = cosine * (sign / temperature)
    log_sigmoid_2NK = F.logsigmoid(x).flatten(2)
    count = log_sigmoid_2NK.shape[2]
    if mean_then_log:
        p = log_sigmoid_2NK.softmax(2).view_as(x)
        loss_2N = float(np.log(count)) - log_sigmoid_2NK.logsumexp(2)
    else:
        p = x.new_full((), 1 / count)
        loss_2N = -log_sigmoid_2NK.mean(2)
    d_cosine = torch.sigmoid(-x).mul_(p).mul_(sign / -temperature)
    d_cosine.mul_(has_term_2N.view(2, n, *[1] * (x.dim() - 2)))
    share = d_cosine * cosine
    own = torch.stack([share.sum(-1), share.sum(-2)]) if grid else torch.stack([share, share])
    own = own.mul_(inverse.square()).mul_(norms_4NS > EPS)
    return (
        loss_2N.mul(has_term_2N).sum(0),
        cosine.flatten(2).mean(2) * has_term_2N,
        d_cosine.mul_(scale),
        own.transpose(0, 1).reshape(4, n, s),
    )


def _analytic_backward(grad_N: Tensor, hidden_RH: Tensor, rows_4NS: Tensor, weights: Tensor, own_4NS: Tensor) -> Tensor:
    grid, s = weights.dim() == 4, rows_4NS.shape[2]
    summed_RH = hidden_RH.new_zeros(hidden_RH.shape, dtype=weights.dtype)
    for pairs in _chunks(rows_4NS, hidden_RH.shape[1], weights.dtype.itemsize):
        index, a, b = _gathered(hidden_RH, rows_4NS, pairs)
        grad = grad_N[pairs]
        w = weights[:, pairs] * grad.view(-1, *[1] * (weights.dim() - 2))
        w = w.view(-1, s, s) if grid else w.view(-1, s, 1)
        own_ab = own_4NS[[0, 2, 1, 3], pairs].mul_(grad[:, None]).view(2, -1, s, 1)
        d_a, d_b = (torch.bmm(w, b), torch.bmm(w.mT, a)) if grid else (w * b, w * a)
        d_a.addcmul_(own_ab[0], a, value=-1)
        d_b.addcmul_(own_ab[1], b, value=-1)
        for rows, values in zip(index.view(2, -1), (d_a, d_b), strict=True):
            _add_rows(summed_RH, rows, values.flatten(0, 1))
    return summed_RH.to(hidden_RH.dtype)


def _add_rows(out_RH: Tensor, index_I: Tensor, values_IH: Tensor) -> None:
    """out[index] += values in a fixed order: index_add_ is serial on the CPU, index_put_ sorts on CUDA."""
    if out_RH.is_cpu:
        out_RH.index_add_(0, index_I, values_IH)
    else:
        out_RH.index_put_((index_I,), values_IH, accumulate=True)


# ---------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("gcrm::goal_contrastive_loss", mutates_args=())
@operator_body
def _forward(
    hidden: Tensor,
    rows: Tensor,
    has_term: Tensor,
    starts: Tensor,
    offsets: Tensor,
    units: Tensor,
    grid: bool,
    mean_then_log: bool,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [N], similarity [2, N], weights, own); the tiles are only for the backward."""
    run = triton_contrastive.forward if use_triton(hidden) else _analytic_forward
    return run(hidden, rows, has_term, grid, mean_then_log, temperature)


@_forward.register_fake
def _(
    hidden: Tensor,
    rows: Tensor,
    has_term: Tensor,
    starts: Tensor,
    offsets: Tensor,
    units: Tensor,
    grid: bool,
    mean_then_log: bool,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, n, s = rows.shape
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    shapes: tuple[tuple[Any, ...], ...] = ((n,), (2, n), (2, n, s, s) if grid else (2, n, s), (4, n, s))
    loss, similarity, weights, own = (hidden.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, similarity, weights, own


@torch.library.custom_op("gcrm::goal_contrastive_loss_backward", mutates_args=())
@operator_body
def _backward(
    grad: Tensor,
    hidden: Tensor,
    rows: Tensor,
    weights: Tensor,
    own: Tensor,
    starts: Tensor,
    offsets: Tensor,
    units: Tensor,
) -> Tensor:
    if use_triton(hidden):
        return triton_contrastive.backward(grad, hidden, rows, weights, own, starts, offsets, units, TILE_ROWS)
    return _analytic_backward(grad, hidden, rows, weights, own)


@_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    rows: Tensor,
    weights: Tensor,
    own: Tensor,
    starts: Tensor,
    offsets: Tensor,
    units: Tensor,
) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, rows, _, starts, offsets, units, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, rows, *output[2:], starts, offsets, units)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return _backward(grad.contiguous(), *ctx.saved_tensors), *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_save)


# --------------------------------------------------------------------------------------------------------- public


def goal_contrastive_loss(
    hidden_RH: Tensor,
    sources_NS: Tensor,
    goals_NS: Tensor,
    negative_sources_NS: Tensor,
    negative_goals_NS: Tensor,
    projection_DH: Tensor | None = None,
    *,
    has_positive_N: Tensor,
    has_negative_N: Tensor | None = None,
    pairing: str = "paired",
    reduce: str = "log_then_mean",
    temperature: float = 1.0,
    tiles: RowTiles | None = None,
) -> tuple[Tensor, ContrastiveStatistics]:
    """Contrastive loss of each pair, [N] (float32, or float64 for float64 states), and its statistics.

    Differentiable, once, in ``hidden_RH`` and ``projection_DH``.

    Args:
        hidden_RH: hidden states, [R, H], any float dtype: all tokens, or only the rows that are read.
        sources_NS, goals_NS: rows of ``hidden_RH`` of the positive samples, [N, S] integers, 1 <= S <= 64.
        negative_sources_NS, negative_goals_NS: the same for the negative samples. Rows may repeat: gradients add.
        projection_DH: W [D, H]; states are compared as W h. None compares h itself.
        has_positive_N: [N] bool; False (a chosen completion of one token) makes the positive term 0.
        has_negative_N: the same for the negative term; None: every pair has one.
        pairing: ``paired`` compares sample k with sample k, ``grid`` every source with every goal.
        reduce: ``log_then_mean`` (the paper) or ``mean_then_log`` (the released code).
        temperature: tau in sigmoid(cos / tau).
        tiles: ``RowTiles.of`` the four index arguments stacked as [4, N, S], on the device of the states; without
            it an equivalent is computed there. Ignored where states are gathered before they are projected.

    Raises:
        ValueError: an unknown ``pairing`` or ``reduce``, index shapes that differ, S not in 1..64, another shape of
            ``has_positive_N`` or ``has_negative_N``, temperature <= 0.
    """
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing={pairing!r}: must be one of {', '.join(PAIRINGS)}")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r}: must be one of {', '.join(REDUCTIONS)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be more than 0")
    indices = (sources_NS, goals_NS, negative_sources_NS, negative_goals_NS)
    shapes = [tuple(index.shape) for index in indices]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2 or not 1 <= shapes[0][1] <= 64:
        raise ValueError(f"index shapes {shapes}: must be four times the same [N, S], S from 1 to 64")
    if has_negative_N is None:
        has_negative_N = torch.ones_like(has_positive_N)
    for name, has_N in (("has_positive_N", has_positive_N), ("has_negative_N", has_negative_N)):
        if has_N.shape != shapes[0][:1]:
            raise ValueError(f"{name} of shape {tuple(has_N.shape)}: must be [N] = [{shapes[0][0]}]")
    rows_4NS = torch.stack(indices).long()
    states = hidden_RH
    if projection_DH is not None:
        if len(hidden_RH) > rows_4NS.numel():  # fewer rows are projected if they are gathered first
            flat = rows_4NS.flatten()
            states = gather_rows(states, flat, InverseIndex.on_device(flat, len(states)))
            rows_4NS, tiles = torch.arange(flat.numel(), device=flat.device).view_as(rows_4NS), None
        states = F.linear(states, projection_DH.to(states.dtype))
    if tiles is None:
        tiles = RowTiles.on_device(rows_4NS, len(states))
    loss_N, similarity_2N, _, _ = _forward(
        states,
        rows_4NS,
        torch.stack([has_positive_N, has_negative_N]),
        *tiles,
        pairing == "grid",
        reduce == "mean_then_log",
        temperature,
    )
    return loss_N, ContrastiveStatistics(*similarity_2N)
