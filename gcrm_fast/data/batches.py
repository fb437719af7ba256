"""Which pairs meet in a step, and in which packs they are computed: functions of (seed, epoch) and the data alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.encoding import M
from gcrm_fast.data.mixture import Mixture
from gcrm_fast.data.packing import GroupSize, group_size


@dataclass(frozen=True)
class Budget:
    """What one pack may hold: computed tokens and gathered key rows (read rows are a subset of the tokens)."""

    tokens: int
    hidden_size: int  # weighs attention against the linear layers

    @property
    def keys(self) -> int:
        return 2 * self.tokens

    def cost(self, size: GroupSize) -> float:
        """Relative time: a query-key product costs 4H operations per layer, a token about 24 H^2."""
        return size.tokens + size.products / (6 * self.hidden_size)


def batches_per_epoch(pairs: int, global_batch_pairs: int) -> int:
    """How many batches ``epoch_batches`` gives."""
    return -(-pairs // global_batch_pairs)


def epoch_batches(
    prompt_keys: np.ndarray,
    global_batch_pairs: int,
    group_prompts: int,
    seed: int,
    epoch: int,
    mixture: Mixture | None = None,
) -> Iterator[list[list[int]]]:
    """Global batches of one epoch: lists of groups, a group being positions in the data of up to ``group_prompts``
    pairs of one prompt. Every pair occurs once, unless a ``mixture`` says which ones do (its positions, see
    ``Mixture.drawn``); only the last batch may be smaller than ``global_batch_pairs``."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(mixture.drawn(seed, epoch) if mixture else len(prompt_keys))
    if group_prompts == 1:
        units = [[int(i)] for i in order]
    else:
        by_prompt: dict[int, list[int]] = {}
        for i in order:
            by_prompt.setdefault(int(prompt_keys[i % len(prompt_keys)]), []).append(int(i))
        units = [m[a : a + group_prompts] for m in by_prompt.values() for a in range(0, len(m), group_prompts)]
        units = [units[i] for i in rng.permutation(len(units))]
    batch: list[list[int]] = []
    room = global_batch_pairs
    for unit in units:
        rest = unit
        while rest:
            batch.append(rest[:room])
            rest, room = rest[room:], room - len(batch[-1])
            if room == 0:
                yield batch
                batch, room = [], global_batch_pairs
    if batch:
        yield batch


def split_to_budget(group: list[M], budget: Budget, *, whole: bool = False) -> list[list[M]]:
    """The group, halved until each part fits in a pack. Raises UserError where a single member (or, with ``whole``, the
    group) does not fit."""
    size = group_size(group)
    if size.tokens <= budget.tokens and size.keys <= budget.keys:
        return [group]
    if len(group) == 1 or whole:
        names = " and ".join(member.name for member in group) + (" needs" if len(group) == 1 else " together need")
        raise UserError(
            f"{names} {size.tokens} tokens, more than --tokens-per-batch {budget.tokens}: "
            f"raise --tokens-per-batch or skip the records that are so long"
        )
    half = len(group) // 2
    return split_to_budget(group[:half], budget) + split_to_budget(group[half:], budget)


def plan_packs(
    groups: Sequence[list[M]], budget: Budget, world_size: int, *, whole: bool = False
) -> list[list[list[M]]]:
    """Splits groups (with ``whole``, none in two) into packs of balanced cost; the number of packs is a multiple of
    ``world_size``.

    Pack i belongs to rank i % world_size. With fewer groups than packs some are empty (dummies).
    Longest-processing-time rule: the costliest group first, into the cheapest pack that has room.
    """
    parts = [part for group in groups for part in split_to_budget(group, budget, whole=whole)]
    sized = sorted(((group_size(part), i) for i, part in enumerate(parts)), key=lambda x: (-budget.cost(x[0]), x[1]))
    needed = max(
        -(-sum(size.tokens for size, _ in sized) // budget.tokens),
        -(-sum(size.keys for size, _ in sized) // budget.keys),
    )
    n_packs = max(-(-needed // world_size), 1) * world_size
    while True:
        packs = _fill(sized, n_packs, budget)
        if packs is not None:
            return [[parts[i] for i in sorted(members)] for members in packs]
        n_packs += world_size


def _fill(sized: Sequence[tuple[GroupSize, int]], n_packs: int, budget: Budget) -> list[list[int]] | None:
    """Members of each of n_packs packs, or None where they do not fit."""
    members: list[list[int]] = [[] for _ in range(n_packs)]
    tokens, keys, cost = np.zeros(n_packs, np.int64), np.zeros(n_packs, np.int64), np.zeros(n_packs)
    for size, i in sized:  # in NumPy, as an evaluation may have 10,000 groups and 1,000 packs
        room = (tokens + size.tokens <= budget.tokens) & (keys + size.keys <= budget.keys)
        if not room.any():
            return None
        p = int(np.where(room, cost, np.inf).argmin())
        members[p].append(i)
        tokens[p] += size.tokens
        keys[p] += size.keys
        cost[p] += budget.cost(size)
    return members
