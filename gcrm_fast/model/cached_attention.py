"""Attention of new tokens to a cache, by plain matrix products on the cache itself: no key or value is copied.

Letters: T new tokens, S slots, N query heads, G key/value heads, r = N / G, D head size; b sequences of n new tokens
each and L slots in one product.

A query's keys lie in several runs of slots (see cache.py). Each run has its own product, whose outputs are put together
by their log-sums: out = sum_i exp(lse_i - lse) out_i. A run that several sequences hold, a prompt, is multiplied once
with the queries of all of them. Runs of similar length at equal distances, as those of a prompt's samples are, share a
product; the r query heads of one key head count as more queries, so that keys are not repeated either.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from gcrm_fast.common.torch_compat import cpu_flash_attention
from gcrm_fast.model.inputs import CachedAxis, Run
from gcrm_fast.model.segment_attention import ALONE, for_heads

SLACK = 64  # runs share a product if the longest is at most a quarter and this much longer than the shortest


class _Part(NamedTuple):
    """Queries of one sequence that see a run: rows ``first`` to ``first + queries``, the first of which sees the run's
    first ``seen`` slots, each further one one more, as far as the run goes."""

    first: int
    queries: int
    seen: int
    run: Run

    @property
    def whole(self) -> bool:
        """Whether all see the whole run."""
        return self.seen >= self.run.length


class Block(NamedTuple):
    """One product: queries [b * n] (None for all T in order) and b runs of L slots, ``stride`` slots apart. ``bias``
    [b, 1, n * r, L] hides slots; ``causal``: query i sees i + 1 slots, n = L. ``first``: no block had these queries
    before."""

    rows: Tensor | None
    start: int
    stride: int
    b: int
    length: int
    bias: Tensor | None
    causal: bool
    first: bool


def blocks_of(axis: CachedAxis, slots: int, r: int, dtype: torch.dtype) -> list[Block]:
    """How the attention of an axis is cut, for all its layers. ``dtype`` is that of the bias."""
    device, tokens = axis.slots_T.device, len(axis.slots_T)
    q_bounds = axis.cu_seqlens_q.tolist()
    shared: dict[Run, list[_Part]] = defaultdict(list)
    own: dict[int, list[_Part]] = defaultdict(list)
    squares: list[_Part] = []
    for first, end, runs in zip(q_bounds[:-1], q_bounds[1:], axis.runs, strict=True):
        for part in _parts(first, end - first, runs):
            if part.queries >= ALONE and not part.whole:
                squares.append(part)
            elif part.whole:
                shared[part.run].append(part)
            else:
                own[part.queries].append(part)
    for run, parts in list(shared.items()):
        if len(parts) == 1:
            own[parts[0].queries] += shared.pop(run)
    seen: set[int] = set()
    blocks = []

    def add(parts: Sequence[_Part], stride: int, b: int, *, causal: bool = False) -> None:
        rows = [row for part in parts for row in range(part.first, part.first + part.queries)]
        length = max(part.run.length for part in parts)
        index = None if rows == list(range(tokens)) else torch.tensor(rows, device=device)
        bias = None if causal and device.type == "cpu" else _bias(parts, length, r, dtype, device)
        start = parts[0].run.start
        blocks.append(Block(index, start, stride, b, length, bias, causal, first=seen.isdisjoint(rows)))
        seen.update(rows)

    for parts in shared.values():
        add(parts, 0, 1)
    for part in squares:
        add([part], 0, 1, causal=True)
    for parts in own.values():
        for group, stride in _at_equal_distances(sorted(parts, key=lambda part: part.run.start), slots):
            add(group, stride, len(group))
    return blocks


def _parts(first: int, count: int, runs: Sequence[Run]) -> list[_Part]:
    """One sequence's parts: new tokens are rows ``first`` to ``first + count`` and the last ``count`` of its runs."""
    start = runs[-1].position + runs[-1].length - count  # position of the first new token
    if count >= ALONE:  # what is before it needs no mask
        runs = [piece for run in runs for piece in _split(run, start)]
    parts = []
    for run in runs:
        skipped = max(0, run.position - start)  # queries before the run
        part = _Part(first + skipped, count - skipped, start + skipped + 1 - run.position, run)
        if part.queries >= ALONE and not part.whole and part.queries > run.length:  # the rest sees all of the run
            parts.append(
                part._replace(first=part.first + run.length, queries=part.queries - run.length, seen=run.length)
            )
            part = part._replace(queries=run.length)
        parts.append(part)
    return parts


def _split(run: Run, position: int) -> list[Run]:
    left = min(max(position - run.position, 0), run.length)
    pieces = Run(run.start, left, run.position), Run(run.start + left, run.length - left, run.position + left)
    return [piece for piece in pieces if piece.length]


def _at_equal_distances(parts: Sequence[_Part], slots: int) -> list[tuple[list[_Part], int]]:
    """The parts, ascending by slot, in groups of similar length at one distance, and that distance."""
    groups: list[tuple[list[_Part], int]] = []
    for part in parts:
        if groups:
            group, stride = groups[-1]
            distance = part.run.start - group[-1].run.start
            lengths = [member.run.length for member in (*group, part)]
            similar = max(lengths) <= 1.25 * min(lengths) + SLACK and part.run.start + max(lengths) <= slots
            other = all(part.first != member.first for member in group)  # a sequence's runs are not independent
            if similar and other and (len(group) == 1 or distance == stride):
                groups[-1] = [*group, part], distance
                continue
        groups.append(([part], 0))
    return groups


def _bias(parts: Sequence[_Part], length: int, r: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[b, 1, n * r, L]: 0, or -inf where a query does not see a slot; None where all see all."""
    if all(part.whole and part.run.length == length for part in parts):
        return None
    seen = torch.tensor([part.seen for part in parts], device=device)[:, None]
    lengths = torch.tensor([part.run.length for part in parts], device=device)[:, None]
    visible = (seen + torch.arange(parts[0].queries, device=device)).minimum(lengths)
    hidden = torch.arange(length, device=device) >= visible[..., None]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    return repeat(bias, "b n l -> b 1 (n r) l", r=r)


def cached_attention(q_TND: Tensor, keys_SGD: Tensor, values_SGD: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Attention output [T, N, D]; scores are scaled by 1/sqrt(D). Not differentiable."""
    exact = torch.promote_types(q_TND.dtype, torch.float32)
    out_TND = q_TND.new_zeros(q_TND.shape, dtype=exact)
    lse_TN = q_TND.new_full(q_TND.shape[:2], -torch.inf, dtype=exact)
    for block in blocks:
        q = q_TND if block.rows is None else q_TND.index_select(0, block.rows)
        out, lse = _product(q, _strided(keys_SGD, block), _strided(values_SGD, block), block)
        out, lse = out.to(exact), lse.to(exact)
        if not block.first:
            before, lse_before = out_TND, lse_TN
            if block.rows is not None:
                before, lse_before = out_TND.index_select(0, block.rows), lse_TN.index_select(0, block.rows)
            out, lse = _together(out, lse, before, lse_before)
        if block.rows is None:
            out_TND, lse_TN = out, lse
        else:
            out_TND.index_copy_(0, block.rows, out)
            lse_TN.index_copy_(0, block.rows, lse)
    return out_TND.to(q_TND.dtype)


def _together(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from that to each."""
    total = torch.logaddexp(lse, lse_b)
    return torch.lerp(out_b, out, (lse - total).exp().unsqueeze(-1)), total


def _strided(x_SGD: Tensor, block: Block) -> Tensor:
    """[b, G, L, D], a view."""
    g, d = x_SGD.shape[1:]
    size, strides = (block.b, g, block.length, d), (block.stride * g * d, d, g * d, 1)
    return x_SGD.as_strided(size, strides, block.start * g * d)


def _product(q_TND: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """(output [b * n, N, D], log-sum of the scores [b * n, N]) for k and v [b, G, L, D]."""
    groups = k.shape[1]
    if block.causal and q_TND.is_cpu:  # the kernel skips what its mask hides, but knows no r queries in a row
        heads = q_TND.shape[1]
        k, v = (for_heads(rearrange(x, "1 g l d -> l g d"), heads) for x in (k, v))
        q, k, v = (rearrange(x, "n h d -> 1 h n d") for x in (q_TND, k, v))
        out, lse = cpu_flash_attention(q, k, v, is_causal=True)
        return rearrange(out, "1 h n d -> n h d"), rearrange(lse, "1 h n -> n h")
    q = rearrange(q_TND, "(b n) (g r) d -> b g (n r) d", b=block.b, g=groups)
    r = q_TND.shape[1] // groups
    if q.is_cpu:
        out, lse = cpu_flash_attention(q, k, v, attn_mask=block.bias)
    else:
        scores = (q @ k.mT * q.shape[-1] ** -0.5).to(torch.promote_types(q.dtype, torch.float32))
        scores = scores if block.bias is None else scores + block.bias
        out, lse = scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)
    return rearrange(out, "b g (n r) d -> (b n) (g r) d", r=r), rearrange(lse, "b g (n r) -> (b n) (g r)", r=r)
