"""The page of ``gcrm inspect``: completions side by side, tokens colored by Q-value or by the reward up to each.

One file without scripts or requests. The template escapes all text of the record.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.colors import Normalize, to_hex

from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.sampling import shared_start

STEP_ENDS = ("\n\n", "\n", ";")  # what ends a step: the first of them that a completion contains
COLORS = matplotlib.colormaps["RdYlBu"]
PALE = (0.2, 0.8)  # part of the colors on which black text is easy to read
SHOWN = (0.02, 0.98)  # quantiles of the page's values at the ends of the colors


@dataclass(frozen=True, kw_only=True)
class Column:
    """A completion of n tokens as the page shows it.

    text_n: text of each token. q_n, reward_n: float, Q-value at each token and reward of the completion up to it.
    marks: labels shown before a token, by its index.
    """

    title: str
    text_n: list[str]
    q_n: np.ndarray
    reward_n: np.ndarray
    marks: dict[int, list[str]]


def step_start(text_n: Sequence[str], step: int, step_end: str) -> int | None:
    """Index of the token in which a step (counted from 0) begins; None where there are fewer steps."""
    text = "".join(text_n)
    end = step_end or next((known for known in STEP_ENDS if known in text), STEP_ENDS[0])
    parts = text.split(end)
    if step >= len(parts):
        return None
    position = sum(len(part) + len(end) for part in parts[:step])
    return int(np.searchsorted(np.cumsum([len(piece) for piece in text_n]), position, "right"))


def first_difference(one: Completion, other: Completion) -> int | None:
    """Number of leading tokens that two completions of a prompt share; None where they are the same."""
    a, b = one.ids[one.start :], other.ids[other.start :]
    n = shared_start(a, b)
    return n if n < max(len(a), len(b)) else None


class Scale:
    """Colors and heights of one kind of value, the same for all completions of a page."""

    def __init__(self, values_n: np.ndarray) -> None:
        low, high = (float(value) for value in np.quantile(values_n, SHOWN))
        self.low, self.high = low, high if high > low else low + 1
        self._place = Normalize(self.low, self.high, clip=True)

    def color(self, value: float) -> str:
        return to_hex(COLORS(PALE[0] + (PALE[1] - PALE[0]) * float(self._place(value))))

    def gradient(self) -> list[str]:
        return [self.color(value) for value in np.linspace(self.low, self.high, 9)]

    def points(self, value_n: np.ndarray) -> str:
        """The values as points of an SVG line, 100 wide and 40 high."""
        height_n = 2 + 36 * (1 - np.asarray(self._place(value_n), dtype=float))
        across = max(len(value_n) - 1, 1)
        return " ".join(f"{100 * i / across:.2f},{height:.2f}" for i, height in enumerate(height_n))


def page(*, title: str, about: str, prompt: str, columns: Sequence[Column]) -> str:
    """The page as HTML. ``about`` is the line below the title."""
    loader = PackageLoader("gcrm_fast.evaluation", package_path="")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page.html.jinja")
    return template.render(
        title=title,
        about=about,
        prompt=prompt,
        columns=columns,
        q=Scale(np.concatenate([column.q_n for column in columns])),
        reward=Scale(np.concatenate([column.reward_n for column in columns])),
    )
