"""The page of generated texts: the samples or beams of each prompt as a tree, tokens colored by Q-value.

Texts of a prompt share a branch as far as their tokens are the same. One HTML file without scripts or requests; the
template escapes all text. Letters: n tokens of a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gcrm_fast.common.errors import UserError
from gcrm_fast.evaluation.page import FOLDED_PROMPT, LEVELS, Page, Scale, rendered

ENDINGS = ("stop", "length", "dropped")  # by itself, by a limit, by the method


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text of n tokens and their Q-values; its reward, None where none was read; whether it is the answer."""

    number: int
    text_n: Sequence[str]
    q_n: np.ndarray
    ending: str
    reward: float | None
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Tokens that ``samples`` texts share, the first of which is number ``start`` of each; the texts that end here, and
    the branches in which the others continue."""

    start: int
    text_n: Sequence[str]
    q_n: np.ndarray
    samples: int
    ends: Sequence[Sample]
    branches: Sequence["Branch"]


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The texts of one prompt."""

    title: str
    prompt: str
    root: Branch

    @classmethod
    def of(cls, title: str, prompt: str, samples: Sequence[Sample]) -> "Tree":
        return cls(title=title, prompt=prompt, root=_branch(samples, 0))


def _branch(samples: Sequence[Sample], start: int) -> Branch:
    first = samples[0]
    end = start
    while all(len(one.text_n) > end and one.text_n[end] == first.text_n[end] for one in samples):
        end += 1
    by_next: dict[str, list[Sample]] = {}
    for one in samples:
        if len(one.text_n) > end:
            by_next.setdefault(one.text_n[end], []).append(one)
    return Branch(
        start=start,
        text_n=first.text_n[start:end],
        q_n=first.q_n[start:end],
        samples=len(samples),
        ends=[one for one in samples if len(one.text_n) == end],
        branches=[_branch(own, end) for own in by_next.values()],
    )


def samples_of(record: dict[str, Any], where: str) -> list[Sample]:
    """The samples of a record of gcrm generate. Raises UserError for another record, or one without Q-values."""
    try:
        samples = [
            Sample(
                number=i,
                text_n=[str(text) for text in one["tokens"]["texts"]],
                q_n=np.array(one["tokens"]["q_values"], dtype=np.float64),
                ending=ENDINGS[ENDINGS.index(one["ending"])],
                reward=None if one["reward"] is None else float(one["reward"]),
                chosen=i == record["chosen_sample"],
            )
            for i, one in enumerate(record["samples"])
        ]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: field 'samples': is not as gcrm generate writes it") from None
    if any(one.q_n.shape != (len(one.text_n),) for one in samples):
        raise UserError(f"{where}: field 'samples': tokens and Q-values must be equally many")
    if not any(len(one.text_n) for one in samples):
        raise UserError(f"{where}: field 'samples': has no Q-values: run gcrm generate with --reward")
    return samples


def tree_page(*, title: str, about: Sequence[str], trees: Sequence[tuple[Tree, Sequence[Sample]]]) -> Page:
    """The page of all trees, each with its samples. ``about``: lines below the title."""
    html = rendered(
        "tree.html.jinja",
        title=title,
        about=about,
        trees=[tree for tree, _ in trees],
        scale=Scale([one.q_n for _, samples in trees for one in samples if len(one.q_n)]),
        levels=LEVELS,
        folded_prompt=FOLDED_PROMPT,
    )
    return Page(title=title, html=html)
