"""Training and held-out data: pairs held out by prompt, and how much of the held-out data is also trained on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.records import Pair


@dataclass(frozen=True)
class Overlap:
    """How much of the held-out data is also in the training data, not counting white space."""

    prompts: int  # held-out pairs whose prompt is trained on
    completions: int  # held-out completions (both of a pair) that are trained on, after any prompt
    example: str = ""  # place of the first such pair, by prompt


def bare(text: str) -> str:
    """The text without white space, in which copies of one problem often differ."""
    return "".join(text.split())


def split_by_prompt(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs, in order: all pairs of ``fraction`` of the prompts, at least one, are held out.

    Prompts are compared without white space and ordered by a hash of text and seed: the same at each call, whatever the
    order of the pairs. Raises UserError where nothing is left to train on.
    """

    def key(pair: Pair) -> bytes:
        return hashlib.sha256(f"{seed} {bare(pair.prompt)}".encode()).digest()

    prompts = sorted({key(pair) for pair in pairs})
    held = set(prompts[: max(1, round(fraction * len(prompts)))])
    if len(held) == len(prompts):
        raise UserError(f"--eval-split {fraction}: holds out all prompts of the data, {len(prompts)}: pass --eval-data")
    return [pair for pair in pairs if key(pair) not in held], [pair for pair in pairs if key(pair) in held]


def overlap(train: Sequence[Pair], held_out: Sequence[Pair]) -> Overlap:
    """White space does not count. Empty prompts are no overlap."""
    # Only the held-out side, which is small, is held as a set.
    prompts = {bare(p.prompt) for p in held_out} - {""}
    completions = {bare(side) for p in held_out for side in p.completions}
    prompts &= {text for p in train if (text := bare(p.prompt)) in prompts}
    completions &= {text for p in train for side in p.completions if (text := bare(side)) in completions}
    same = [p for p in held_out if bare(p.prompt) in prompts]
    return Overlap(
        prompts=len(same),
        completions=sum(bare(side) in completions for p in held_out for side in p.completions),
        example=same[0].where if same else "",
    )
