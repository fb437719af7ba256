"""Triton kernels of the contrastive loss of sampled positions: one launch forward (two where pairs are few), one
backward. Maths, shapes, dtypes and bytes: contrastive.py.

Forward: one program per pair. It walks over H once for the positives and once for the negatives, gathering S source and
S goal rows of BLOCK_H columns, and keeps S x S dot products and 2 S squared norms in registers; then cosines, loss,
weights and own coefficients. Dot products of 16-bit states are exact products summed in float32 on tensor cores; those
of float32 states are IEEE float32.
Where pairs are too few to keep a GPU busy (``column_parts``), positives, negatives and parts of H get separate
programs, which write partial dot products and squared norms [2N, parts, SP SP + 2 SP] (paired: 3 SP) in float32; a
second launch, again one program per pair, adds the parts in order and then continues as above.

Backward: one program per tile of consecutive gradient rows and BLOCK_H columns. For each unit (a pair's positives or
negatives) that touches the tile, the tile's rows look up their rows of w, repeated samples one after another, and
w [tile rows, S] @ partners [S, BLOCK_H] is added. Every gradient row, also one that no sample names, is written exactly
once: no atomics, no zero-filled buffer.
Coefficients of 16-bit states are split into two 16-bit terms, for float16 after scaling a gradient row's by a power of
two: what is lost is 2^-16 of each (bfloat16) or 2^-22 of the row's largest (float16), below the rounding of the 16-bit
gradient. A state that is not finite makes the gradients of all rows in the tiles of its pair not finite.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcrm_kernels.launch import LaunchConfig, pick
from gcrm_kernels.reference import EPS

MULTIPROCESSORS = 132  # of an H100, also where the device has another number
STEP = 4096  # elements that a program takes of each operand at a time: 8 KiB of 16-bit states
PARTIALS = 2**15  # dot products of one unit, of all parts together, that the forward's second launch adds: 128 KiB
MOST_PARTS = 16

# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _products(
    hidden_ptr, sources, goals, valid, first, end, SP: tl.constexpr, BLOCK_H: tl.constexpr, GRID: tl.constexpr
):
    """Dot products of source and goal rows and the squared norms of both, over columns from ``first`` to ``end``."""
    dots = tl.zeros((SP, SP) if GRID else (SP,), dtype=tl.float32)
    squares_a = tl.zeros((SP,), dtype=tl.float32)
    squares_b = tl.zeros((SP,), dtype=tl.float32)
    for start in range(first, end, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = valid[:, None] & (h < end)[None, :]
        a = tl.load(hidden_ptr + sources[:, None] + h[None, :], mask=inside, other=0.0)
        b = tl.load(hidden_ptr + goals[:, None] + h[None, :], mask=inside, other=0.0)
        a32, b32 = a.to(tl.float32), b.to(tl.float32)
        squares_a += tl.sum(a32 * a32, axis=1)
        squares_b += tl.sum(b32 * b32, axis=1)
        if GRID:
            dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
        else:
            dots += tl.sum(a32 * b32, axis=1)
    return dots, squares_a, squares_b


@triton.jit
def _places(partials_ptr, program, s, SP: tl.constexpr, GRID: tl.constexpr):
    """Where a program's partial dot products and squared norms lie; those of padding samples are written too."""
    size: tl.constexpr = SP * SP if GRID else SP
    start = partials_ptr + program * (size + 2 * SP)
    return start + (s[:, None] * SP + s[None, :] if GRID else s), start + size + s, start + size + SP + s


@triton.jit
def _summed(partials_ptr, first, s, SP: tl.constexpr, GRID: tl.constexpr, PARTS: tl.constexpr):
    """What the programs from ``first`` on wrote, added part after part."""
    dots = tl.zeros((SP, SP) if GRID else (SP,), dtype=tl.float32)
    squares_a = tl.zeros((SP,), dtype=tl.float32)
    squares_b = tl.zeros((SP,), dtype=tl.float32)
    for part in tl.static_range(PARTS):  # unrolled, so that one load need not wait for another
        at_dots, at_a, at_b = _places(partials_ptr, first + part, s, SP, GRID)
        dots += tl.load(at_dots)
        squares_a += tl.load(at_a)
        squares_b += tl.load(at_b)
    return dots, squares_a, squares_b


@triton.jit
def _contrastive_partial_kernel(
    hidden_ptr,
    rows_ptr,
    partials_ptr,
    n_pairs,
    width,
    row_stride,
    columns,
    parts,
    S: tl.constexpr,
    SP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GRID: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    unit, first = program // parts, (tl.program_id(0) % parts) * columns
    s = tl.arange(0, SP)
    valid = s < S
    sample = (unit // n_pairs * 2 * n_pairs + unit % n_pairs) * S + s
    sources = tl.load(rows_ptr + sample, mask=valid, other=0) * row_stride
    goals = tl.load(rows_ptr + sample + n_pairs * S, mask=valid, other=0) * row_stride
    end = tl.minimum(first + columns, width)
    dots, squares_a, squares_b = _products(hidden_ptr, sources, goals, valid, first, end, SP, BLOCK_H, GRID)
    at_dots, at_a, at_b = _places(partials_ptr, program, s, SP, GRID)
    tl.store(at_dots, dots)
    tl.store(at_a, squares_a)
    tl.store(at_b, squares_b)


@triton.jit
def _contrastive_forward_kernel(
    hidden_ptr,
    partials_ptr,
    rows_ptr,
    has_term_ptr,
    loss_ptr,
    similarity_ptr,
    weights_ptr,
    own_ptr,
    n_pairs,
    width,
    row_stride,
    inverse_temperature,
    EPS: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GRID: tl.constexpr,
    MEAN_THEN_LOG: tl.constexpr,
    PARTS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SP)
    valid = s < S
    counted = valid[:, None] & valid[None, :] if GRID else valid
    loss = 0.0
    for sign in range(2):
        sample = (2 * sign * n_pairs + n) * S + s
        if PARTS == 1:
            sources = tl.load(rows_ptr + sample, mask=valid, other=0) * row_stride
            goals = tl.load(rows_ptr + sample + n_pairs * S, mask=valid, other=0) * row_stride
            dots, squares_a, squares_b = _products(hidden_ptr, sources, goals, valid, 0, width, SP, BLOCK_H, GRID)
        else:
            first = (sign * n_pairs + n) * PARTS
            dots, squares_a, squares_b = _summed(partials_ptr, first, s, SP, GRID, PARTS)
        inverse_a = 1.0 / tl.maximum(tl.sqrt(squares_a), EPS)
        inverse_b = 1.0 / tl.maximum(tl.sqrt(squares_b), EPS)
        if GRID:
            scale = inverse_a[:, None] * inverse_b[None, :]
            count = 1.0 * S * S
        else:
            scale = inverse_a * inverse_b
            count = 1.0 * S
        cosine = dots * scale
        direction = (1 - 2 * sign) * inverse_temperature
        has_term = tl.load(has_term_ptr + sign * n_pairs + n).to(tl.float32)

        x = cosine * direction
        log_sigmoid = tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))
        if MEAN_THEN_LOG:
            log_sigmoid = tl.where(counted, log_sigmoid, float("-inf"))
            largest = tl.max(log_sigmoid)
            powers = tl.exp(log_sigmoid - largest)
            total = tl.sum(powers)
            p = powers / total
            term = tl.log(count / total) - largest
        else:
            p = tl.where(counted, 1.0 / count, 0.0)
            term = -tl.sum(p * log_sigmoid)
        d_cosine = -p * tl.exp(-tl.maximum(x, 0.0)) / (1.0 + tl.exp(-tl.abs(x))) * direction * has_term

        loss += term * has_term
        similarity = tl.sum(tl.where(counted, cosine, 0.0)) / count
        tl.store(similarity_ptr + sign * n_pairs + n, similarity * has_term)
        share = d_cosine * cosine
        if GRID:
            share_a, share_b = tl.sum(share, axis=1), tl.sum(share, axis=0)
            entry = ((sign * n_pairs + n) * S + s[:, None]) * S + s[None, :]
        else:
            share_a, share_b = share, share
            entry = (sign * n_pairs + n) * S + s
        tl.store(weights_ptr + entry, d_cosine * scale, mask=counted)
        own_a = tl.where(squares_a > EPS * EPS, share_a * inverse_a * inverse_a, 0.0)
        own_b = tl.where(squares_b > EPS * EPS, share_b * inverse_b * inverse_b, 0.0)
        tl.store(own_ptr + sample, own_a, mask=valid)
        tl.store(own_ptr + sample + n_pairs * S, own_b, mask=valid)
    tl.store(loss_ptr + n, loss)


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit
def add_product(acc, coefficients, states):
    """acc + coefficients [M, K] float32 @ states [K, B], with float32 coefficients also for 16-bit states."""
    if states.dtype == tl.float32:
        acc = tl.dot(coefficients, states, acc, input_precision="ieee")
    elif states.dtype == tl.bfloat16:  # has the exponents of float32
        high = coefficients.to(tl.bfloat16)
        low = (coefficients - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(low, states, tl.dot(high, states, acc))
    else:
        largest = tl.max(tl.abs(coefficients), axis=1)
        # Not below 2^-100: a subnormal power would be flushed to 0.
        power = tl.exp2(tl.maximum(tl.ceil(tl.log2(tl.where(largest > 0.0, largest, 1.0))), -100.0))[:, None]
        high = (coefficients / power).to(tl.float16)
        low = (coefficients / power - high.to(tl.float32)).to(tl.float16)
        acc += power * tl.dot(low, states, tl.dot(high, states))
    return acc


@triton.jit
def _add_role(
    acc,
    own,
    r,
    hidden_ptr,
    rows_ptr,
    weights_ptr,
    own_ptr,
    sample,
    partner_sample,
    stride,
    partner_stride,
    grad,
    row_stride,
    h,
    width,
    S: tl.constexpr,
    SP: tl.constexpr,
    GRID: tl.constexpr,
):
    """Adds what rows ``r`` get as sources (or as goals) of a unit: (acc, own) after it."""
    s = tl.arange(0, SP)
    named = r[:, None] == tl.load(rows_ptr + sample + s, mask=s < S, other=-1)[None, :]
    own_s = tl.load(own_ptr + sample + s, mask=s < S, other=0.0)
    own += grad * tl.sum(tl.where(named, own_s[None, :], 0.0), axis=1)
    first = tl.max(tl.where(named, s[None, :], -1), axis=1)
    for start in range(0, SP, 16):  # partners, so many that registers do not depend on S
        p = start + tl.arange(0, 16)
        w = tl.zeros((r.shape[0], 16), dtype=tl.float32)
        if GRID:
            slot = first
            while tl.max(slot) >= 0:  # once more for each repetition of a row among the samples
                at = weights_ptr + slot[:, None] * stride + p[None, :] * partner_stride
                w += tl.load(at, mask=(slot >= 0)[:, None] & (p < S)[None, :], other=0.0)
                slot = tl.max(tl.where(named & (s[None, :] < slot[:, None]), s[None, :], -1), axis=1)
        else:
            names = tl.load(rows_ptr + sample + p, mask=p < S, other=-1)
            w = tl.where(r[:, None] == names[None, :], tl.load(weights_ptr + p, mask=p < S, other=0.0)[None, :], 0.0)
        partners = tl.load(rows_ptr + partner_sample + p, mask=p < S, other=0)
        at = hidden_ptr + partners[:, None] * row_stride + h[None, :]
        states = tl.load(at, mask=(p < S)[:, None] & (h < width)[None, :], other=0.0)
        acc = add_product(acc, grad * w, states)
    return acc, own


@triton.jit
def _contrastive_backward_kernel(
    grad_ptr,
    hidden_ptr,
    rows_ptr,
    weights_ptr,
    own_ptr,
    starts_ptr,
    offsets_ptr,
    units_ptr,
    out_ptr,
    n_pairs,
    width,
    row_stride,
    column_blocks,
    S: tl.constexpr,
    SP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GRID: tl.constexpr,
):
    tile = (tl.program_id(0) // column_blocks).to(tl.int64)
    h = (tl.program_id(0) % column_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    r = tl.load(starts_ptr + tile) + tl.arange(0, TILE)
    end = tl.load(starts_ptr + tile + 1)
    wanted = tl.where(r < end, r, -2)  # no sample names row -2
    acc = tl.zeros((TILE, BLOCK_H), dtype=tl.float32)
    own = tl.zeros((TILE,), dtype=tl.float32)
    for i in range(tl.load(offsets_ptr + tile), tl.load(offsets_ptr + tile + 1)):
        unit = tl.load(units_ptr + i)
        sign, n = unit // n_pairs, unit % n_pairs
        grad = tl.load(grad_ptr + n)
        source = (2 * sign * n_pairs + n) * S
        goal = source + n_pairs * S
        w_ptr = weights_ptr + unit * S * (S if GRID else 1)
        acc, own = _add_role(
            acc,
            own,
            wanted,
            hidden_ptr,
            rows_ptr,
            w_ptr,
            own_ptr,
            source,
            goal,
            S,
            1,
            grad,
            row_stride,
            h,
            width,
            S,
            SP,
            GRID,
        )
        acc, own = _add_role(
            acc,
            own,
            wanted,
            hidden_ptr,
            rows_ptr,
            w_ptr,
            own_ptr,
            goal,
            source,
            1,
            S,
            grad,
            row_stride,
            h,
            width,
            S,
            SP,
            GRID,
        )
    inside = (r < end)[:, None] & (h < width)[None, :]
    x = tl.load(hidden_ptr + r[:, None] * row_stride + h[None, :], mask=inside, other=0.0)
    out = acc - tl.where(own[:, None] != 0.0, own[:, None] * x.to(tl.float32), 0.0)  # rows not named may hold inf
    tl.store(out_ptr + r[:, None] * width + h[None, :], out.to(x.dtype), mask=inside)


# ----------------------------------------------------------------------------------------------------------- launchers


def _padded(samples: int) -> int:
    """Samples as a power of two; tensor-core products need 16."""
    return max(16, triton.next_power_of_2(samples))


def forward_candidates(samples: int, itemsize: int, grid: bool) -> list[LaunchConfig]:
    """8 KiB of each operand per step: four or five programs per multiprocessor then keep enough loads in flight to
    cover memory latency. First the rule, then the further candidates of autotuning.

    On an H100, S = 16 in bfloat16: a product of 16 rows is done sooner by two warps (0.19 ms against 0.26 by four at
    N = 512, H = 4096), row by row by eight (0.096 against 0.112).
    """
    padded = _padded(samples)
    block, warps = 8192 // (padded * itemsize), 4 if padded <= 32 else 8
    if padded == 16 and itemsize == 2:
        warps = 2 if grid else 8
    return [LaunchConfig(block, warps, 2), LaunchConfig(block // 2, warps, 4), LaunchConfig(block, 2 * warps, 2)]


def column_parts(n_pairs: int, samples: int, width: int) -> tuple[int, int]:
    """(parts of H, columns of a part) of the forward; one part: a single launch.

    A power of two, less the parts that H leaves empty: as many as make four programs of each of MULTIPROCESSORS (a part
    is 2N programs), while a part keeps two steps of loads and the second launch adds at most MOST_PARTS parts and
    PARTIALS dot products of a unit. From N, S and H alone, so that sums have the same order on every device.
    """
    padded = _padded(samples)
    step = STEP // padded
    steps = triton.cdiv(width, step)
    most = min(triton.cdiv(2 * MULTIPROCESSORS, max(n_pairs, 1)), steps // 2, PARTIALS // padded**2, MOST_PARTS)
    if most < 2:
        return 1, width
    columns = triton.cdiv(steps, 2 ** (most.bit_length() - 1)) * step
    return triton.cdiv(width, columns), columns


def backward_candidates(samples: int, itemsize: int) -> list[LaunchConfig]:
    """A tile of 64 rows by 64 columns, a 128-byte line of bfloat16 each, or by 128 where S is small: the weights of a
    unit are then found half as often (on an H100 at N = 512, S = 16, H = 4096, bfloat16, grid, with the forward: 0.83
    ms against 1.25; eight warps are slower at every width)."""
    if itemsize == 2 and _padded(samples) == 16:
        return [LaunchConfig(128, 4, 2), LaunchConfig(64, 4, 2), LaunchConfig(256, 8, 2)]
    return [LaunchConfig(64, 8, 2), LaunchConfig(64, 8, 3), LaunchConfig(128, 8, 2)]


def forward(
    hidden_RH: Tensor, rows_4NS: Tensor, has_term_2N: Tensor, grid: bool, mean_then_log: bool, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [N], similarity [2, N], weights [2, N, S, S] or [2, N, S], own [4, N, S]), all float32."""
    _, n, s = rows_4NS.shape
    width, padded = hidden_RH.shape[1], _padded(s)
    parts, columns = column_parts(n, s, width)
    hidden_RH = hidden_RH if hidden_RH.stride(-1) == 1 else hidden_RH.contiguous()
    loss, similarity, weights, own = (
        hidden_RH.new_empty(shape, dtype=torch.float32)
        for shape in ((n,), (2, n), (2, n, s, s) if grid else (2, n, s), (4, n, s))
    )

    partials = None
    if parts > 1:
        partials = hidden_RH.new_empty(2 * n, parts, (padded + 2 if grid else 3) * padded, dtype=torch.float32)

    def run(config: LaunchConfig) -> None:
        if partials is not None:
            _contrastive_partial_kernel[(2 * n * parts,)](
                hidden_RH,
                rows_4NS,
                partials,
                n,
                width,
                hidden_RH.stride(0),
                columns,
                parts,
                S=s,
                SP=padded,
                BLOCK_H=config.block,
                GRID=grid,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
        _contrastive_forward_kernel[(n,)](
            hidden_RH,
            partials,
            rows_4NS,
            has_term_2N,
            loss,
            similarity,
            weights,
            own,
            n,
            width,
            hidden_RH.stride(0),
            1.0 / temperature,
            EPS=EPS,
            S=s,
            SP=padded,
            BLOCK_H=config.block,
            GRID=grid,
            MEAN_THEN_LOG=mean_then_log,
            PARTS=parts,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    if n:
        key = ("forward", s, width, hidden_RH.dtype, grid, parts)
        run(pick(key, forward_candidates(s, hidden_RH.itemsize, grid), run))
    return loss, similarity, weights, own


def backward(
    grad_N: Tensor,
    hidden_RH: Tensor,
    rows_4NS: Tensor,
    weights: Tensor,
    own_4NS: Tensor,
    starts: Tensor,
    offsets: Tensor,
    units: Tensor,
    tile_rows: int,
) -> Tensor:
    """Gradient of hidden [R, H], in its dtype, for the gradient of each pair's loss [N] float32."""
    _, n, s = rows_4NS.shape
    rows, width = hidden_RH.shape
    hidden_RH = hidden_RH if hidden_RH.stride(-1) == 1 else hidden_RH.contiguous()
    out_RH = hidden_RH.new_empty(rows, width)
    tiles = len(starts) - 1

    def run(config: LaunchConfig) -> None:
        column_blocks = triton.cdiv(width, config.block)
        _contrastive_backward_kernel[(tiles * column_blocks,)](
            grad_N,
            hidden_RH,
            rows_4NS,
            weights,
            own_4NS,
            starts,
            offsets,
            units,
            out_RH,
            n,
            width,
            hidden_RH.stride(0),
            column_blocks,
            S=s,
            SP=_padded(s),
            TILE=tile_rows,
            BLOCK_H=config.block,
            GRID=weights.dim() == 4,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    if out_RH.numel():
        key = ("backward", s, width, hidden_RH.dtype, weights.dim())
        run(pick(key, backward_candidates(s, hidden_RH.itemsize), run))
    return out_RH
