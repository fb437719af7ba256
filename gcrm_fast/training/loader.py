"""The packs of each step, built ahead of it by worker processes."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gcrm_fast.common.torch_compat import end_workers
from gcrm_fast.data.batches import Budget, batches_per_epoch, epoch_batches, plan_packs, split_to_budget
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.mixture import Mixture
from gcrm_fast.data.on_policy import OnPolicy, ViewPair, view_blocks
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling, negative_blocks
from gcrm_fast.model.inputs import Pack
from gcrm_fast.training.interrupts import STOPPING, end_with_parent

AHEAD = 4  # steps that a worker may be ahead of the training process


class Step(NamedTuple):
    """Pairs of the global batch, and the packs of it that this rank runs."""

    n_pairs: int
    packs: list[Pack]


@dataclass(kw_only=True)
class Steps(Dataset[Step]):
    """``steps[i]``, i from 0: a pure function of (data, seed, i), in any order and any process."""

    pairs: Sequence[TokenizedPair]
    budget: Budget
    sampling: Sampling
    global_batch_pairs: int
    group_prompts: int
    rank: int
    world_size: int
    mixture: Mixture | None = None
    on_policy: OnPolicy | None = None

    def __post_init__(self) -> None:
        self._prompt_keys = np.array([pair.prompt_key for pair in self.pairs])
        self._ids = 1 + max(pair.pair_id for pair in self.pairs)
        self._epoch, self._batches = -1, list[list[list[int]]]()

    def groups(self, step: int) -> tuple[int, list[list[TokenizedPair]]]:
        """Epoch and global batch of a step: groups of pairs of one prompt."""
        epoch, position = divmod(step, batches_per_epoch(len(self.pairs), self.global_batch_pairs))
        if epoch != self._epoch:
            batches = epoch_batches(
                self._prompt_keys, self.global_batch_pairs, self.group_prompts, self.sampling.seed, epoch, self.mixture
            )
            self._epoch, self._batches = epoch, list(batches)
        return epoch, [[self._pair(i) for i in group] for group in self._batches[position]]

    def _pair(self, position: int) -> TokenizedPair:
        """The pair at a position of ``epoch_batches``; one of a source's later pass has another id, and so other
        samples."""
        number, i = divmod(position, len(self.pairs))
        pair = self.pairs[i]
        return replace(pair, pair_id=pair.pair_id + number * self._ids) if number else pair

    def __getitem__(self, step: int) -> Step:
        epoch, groups = self.groups(step)
        plan = plan_pairs(groups, self.budget, self.world_size, self.sampling, self.views(step))
        packs = [build_pack(part, self.sampling, epoch) for part in plan[self.rank :: self.world_size]]
        return Step(sum(map(len, groups)), packs)

    def views(self, step: int) -> list[ViewPair]:
        """The pairs of views of a step, as many as it has pairs; none without samples of a policy."""
        if not self.on_policy:
            return []
        epoch, position = divmod(step, batches_per_epoch(len(self.pairs), self.global_batch_pairs))
        done = position * self.global_batch_pairs
        count = min(self.global_batch_pairs, len(self.pairs) - done)
        return self.on_policy.views(epoch * len(self.pairs) + done, count)


def plan_pairs(
    groups: list[list[TokenizedPair]],
    budget: Budget,
    world_size: int,
    sampling: Sampling,
    views: Sequence[ViewPair] = (),
) -> list[list[list[TokenizedPair | ViewPair]]]:
    """The packs of a step; pairs that give each other negative goals, or negative views, stay together."""
    if sampling.positions == "rs":
        whole = negative_blocks(groups)
    else:
        whole = [part for group in groups for part in split_to_budget(group, budget)]
    blocks: list[list[TokenizedPair | ViewPair]] = [[*group] for group in whole]
    blocks += [[*block] for block in view_blocks(views)]
    return plan_packs(blocks, budget, world_size, whole=True)


@contextlib.contextmanager
def load(steps: Steps, first: int, end: int, workers: int, device: torch.device) -> Iterator[Iterator[Step]]:
    """Steps ``first`` to ``end`` - 1 in order, in pinned memory where the device is a GPU.

    Inside the context, ``workers`` processes build them ahead; with 0 the calling process builds each on demand.
    """
    # Forked workers share the tokenized data; a spawned one would get a copy of it.
    fork = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, end),
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        multiprocessing_context=fork if workers else None,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=device.type == "cuda",
    )
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        # An error's traceback holds the iterator, which ends its workers when it is deleted; they ignore SIGTERM, so
        # the program would wait for them forever.
        end_workers(iterator)


def _leave_signals_to_the_parent(worker: int) -> None:
    """torchrun sends signals to all processes of a rank; a worker ends when its parent does."""
    for number in (*STOPPING, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(os.getppid())
