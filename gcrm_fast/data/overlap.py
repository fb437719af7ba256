"""How much of the held-out data is also trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

from gcrm_fast.data.records import Pair


@dataclass(frozen=True)
class Overlap:
    """How much of the held-out data is also in the training data, not counting white space."""

    prompts: int  # held-out pairs whose prompt is trained on
    completions: int  # held-out completions (two per pair) that are trained on, after any prompt
    example: str = ""  # place of the first such pair, by prompt


def overlap(train: Sequence[Pair], held_out: Sequence[Pair]) -> Overlap:
    """White space does not count: copies of one problem often differ in it. Empty prompts are no overlap."""

    def bare(text: str) -> str:
        return "".join(text.split())

    # Only the held-out side, which is small, is held as a set.
    prompts = {bare(p.prompt) for p in held_out} - {""}
    completions = {bare(side) for p in held_out for side in (p.chosen, p.rejected)}
    prompts &= {text for p in train if (text := bare(p.prompt)) in prompts}
    completions &= {text for p in train for side in (p.chosen, p.rejected) if (text := bare(side)) in completions}
    same = [p for p in held_out if bare(p.prompt) in prompts]
    return Overlap(
        prompts=len(same),
        completions=sum(bare(side) in completions for p in held_out for side in (p.chosen, p.rejected)),
        example=same[0].where if same else "",
    )
