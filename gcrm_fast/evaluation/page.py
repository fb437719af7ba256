"""The inspect report: records with their completions side by side, tokens colored by Q-value or by running reward.

One HTML file without scripts or requests. The template escapes all text. Letters: n tokens of a completion.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.sampling import shared_start

STEP_ENDS = ("\n\n", "\n", ";")  # what ends a step: the first of them that a completion contains
LEVELS = 17  # of color
COLORED = (0.02, 0.98)  # quantiles of the values at the ends of the colors
LONG = 200  # tokens from which the charts show means per step
WINDOWS = 40  # of equal length, instead of steps, in a long completion with fewer than MIN_STEPS
MIN_STEPS = 4
DIFFERENCE = "first difference"
KEPT = 12  # shared tokens that stay visible in front of the first difference; more are folded
PREVIEWED = 70  # characters of a prompt next to the title of its record
MARK = re.compile(r"<\|[^<>|]*\|>")  # a special token of a chat template
FOLDED_PROMPT = 400  # characters from which the prompt is folded


@dataclass(frozen=True, kw_only=True)
class Column:
    """A completion of n tokens as the page shows it.

    text_n: text of each token. q_n, reward_n: float, Q-value at each token and reward of the completion up to it.
    right: whether it is known to be right or wrong. marks: labels shown before a token, by its index.
    """

    title: str
    text_n: list[str]
    q_n: np.ndarray
    reward_n: np.ndarray
    right: bool | None = None
    marks: dict[int, list[str]] = field(default_factory=dict)
    step_end: str = ""

    @property
    def means(self) -> str:
        """Mean Q-values before and from the error, or the first difference; "" without either."""
        at = min((i for i, names in self.marks.items() if names != [DIFFERENCE]), default=None)
        what = "the error" if at is not None else "the first difference"
        at = min(self.marks, default=None) if at is None else at
        if not at or at >= len(self.q_n):
            return ""
        return f"mean Q {self.q_n[:at].mean():.2f} before {what}, {self.q_n[at:].mean():.2f} from there on"

    def segments(self) -> list[int]:
        """Bounds of the steps, or of windows where there are too few steps, in tokens from 0 to n."""
        n = len(self.text_n)
        starts = sorted({start for start in step_starts(self.text_n, self.step_end) if start < n})
        if len(starts) < MIN_STEPS:
            starts = list(range(0, n, -(-n // WINDOWS)))
        return [*starts, n]


@dataclass(frozen=True, kw_only=True)
class Record:
    """A prompt and its completions."""

    title: str
    prompt: str
    columns: list[Column]

    @property
    def margin(self) -> float | None:
        """Reward of the best right completion minus that of the best wrong one; None without both kinds."""
        return margin([(column.right, float(column.reward_n[-1])) for column in self.columns])

    @property
    def preview(self) -> str:
        """The end of the prompt in one line, from a whole word on: chats often begin with the same system message."""
        text = " ".join(MARK.sub(" ", self.prompt).split())
        return text if len(text) <= PREVIEWED else "… " + text[-PREVIEWED:].partition(" ")[2]

    @property
    def folded(self) -> int:
        """Number of leading tokens, the same in all completions, that are folded."""
        first, *others = (column.text_n for column in self.columns)
        same = [len(set(texts)) == 1 for texts in zip(first, *others, strict=False)] if others else []
        shared = same.index(False) if False in same else len(same)
        return shared - KEPT if shared > 2 * KEPT else 0

    @property
    def length(self) -> int:
        return max(len(column.text_n) for column in self.columns)


@dataclass(frozen=True, kw_only=True)
class Page:
    """An HTML page. A notebook shows it in a frame."""

    title: str
    html: str

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.html, encoding="utf-8")

    def __repr__(self) -> str:
        return f"<{self.title}: shows itself in a notebook; .save(path) writes it>"

    def _repr_html_(self) -> str:
        # A frame keeps the styles of page and notebook apart.
        return f'<iframe srcdoc="{escape(self.html)}" style="width:100%;height:40rem;border:0"></iframe>'


def margin(rewards: Sequence[tuple[bool | None, float]]) -> float | None:
    """Of (whether right, reward): the best right reward minus the best wrong one; None without both kinds."""
    right, wrong = ([reward for is_right, reward in rewards if is_right is kind] for kind in (True, False))
    return max(right) - max(wrong) if right and wrong else None


def step_starts(text_n: Sequence[str], step_end: str = "") -> list[int]:
    """Index of the token that holds the first character of each step; n for a step without text at the end."""
    text = "".join(text_n)
    end = step_end or next((known for known in STEP_ENDS if known in text), STEP_ENDS[0])
    lengths = [len(part) + len(end) for part in text.split(end)]
    positions = np.cumsum([0, *lengths[:-1]])
    return np.searchsorted(np.cumsum([len(piece) for piece in text_n]), positions, "right").tolist()


def selected(margins: Sequence[float | None], worst: int, random: int) -> dict[str, list[int]]:
    """Indices of records by heading: those of the lowest margins, and others drawn at random, the same each time. Both
    in the order of their margins."""
    order = sorted((i for i, value in enumerate(margins) if value is not None), key=lambda i: margins[i] or 0.0)
    lowest = order[:worst]
    others = [*order[worst:], *(i for i, value in enumerate(margins) if value is None)]
    drawn = sorted(np.random.default_rng(0).permutation(len(others))[:random].tolist())
    groups = {
        f"Lowest {len(lowest)} margins": lowest,
        f"{len(drawn)} {'others, ' if lowest else ''}drawn at random": [others[i] for i in drawn],
    }
    return {heading: chosen for heading, chosen in groups.items() if chosen}


def marks_of(
    completions: Sequence[Completion], texts: Sequence[Sequence[str]], errors: Sequence[int | None], step_end: str = ""
) -> list[dict[int, list[str]]]:
    """The marks of a prompt's completions: their first difference (of the first from the second, of all others from the
    first) and the start of the wrong step, a number from 0."""
    result = []
    for i, (completion, text_n, error) in enumerate(zip(completions, texts, errors, strict=True)):
        marks: dict[int, list[str]] = {}
        other = completions[0] if i else completions[1] if len(completions) == 2 else None
        difference = first_difference(completion, other) if other else None
        if difference is not None:
            marks[difference] = [DIFFERENCE]
        starts = step_starts(text_n, step_end)
        if error is not None and error < len(starts):
            marks.setdefault(starts[error], []).append(f"error: step {error + 1}")
        result.append(marks)
    return result


def first_difference(one: Completion, other: Completion) -> int | None:
    """Number of leading tokens that two completions of a prompt share; None where they are the same."""
    a, b = one.ids[one.start :], other.ids[other.start :]
    n = shared_start(a, b)
    return n if n < max(len(a), len(b)) else None


class Scale:
    """Colors and heights of one kind of value, the same for all completions of a page.

    Made without the last token of each completion: an end token's value is often far from all others and would hide
    what happens before it.
    """

    def __init__(self, columns: Sequence[np.ndarray]) -> None:
        values = np.concatenate([value_n[: max(len(value_n) - 1, 1)] for value_n in columns]).astype(float)
        self.low, self.high = (float(value) for value in np.quantile(values, COLORED))
        near, far = sorted((float(values.min()), float(values.max())), key=abs)
        if near * far > 0 and abs(near) <= abs(far - near):  # zero is close: show it
            near = 0.0
        self.ticks = [
            float(tick) for tick in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2).tick_values(near, far)
        ]

    def level(self, value: float) -> int:
        """Index of a color, 0 to LEVELS - 1."""
        place = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return int(np.clip(round(place * (LEVELS - 1)), 0, LEVELS - 1))

    def height(self, value: float) -> float:
        """Distance from the top of a chart, in % of its height."""
        bottom, top = self.ticks[0], self.ticks[-1]
        return round(float(np.clip(100 * (top - value) / (top - bottom), 0, 100)), 2)

    def beyond(self, value: float) -> str:
        """An arrow to a value that the axis does not reach; "" for others."""
        return "▲" if value > self.ticks[-1] else "▼" if value < self.ticks[0] else ""

    def line(self, value_n: np.ndarray, length: int) -> str:
        """Points of an SVG line through the value of each token, on an axis of ``length`` tokens, 100 by 100."""
        across = max(length - 1, 1)
        return " ".join(f"{100 * i / across:.2f},{self.height(value)}" for i, value in enumerate(value_n.tolist()))

    def stairs(self, value_n: np.ndarray, bounds: Sequence[int], length: int) -> str:
        """Points of an SVG line at the mean of each segment."""
        across, points = max(length - 1, 1), []
        for a, b in pairwise(bounds):
            mean = self.height(float(value_n[a:b].mean()))
            points += [f"{100 * i / across:.2f},{mean}" for i in (a, min(b, length - 1))]
        return " ".join(points)


def token_ticks(length: int) -> list[int]:
    """Token numbers along an axis of ``length`` tokens: the first, the last and some between them."""
    ticks = MaxNLocator(5, integer=True).tick_values(1, length)
    between = [int(tick) for tick in ticks if length / 20 < tick - 1 and tick < 0.92 * length]
    return [1, *between, *([length] if length > 1 else [])]


def page(*, title: str, about: Sequence[str], groups: dict[str, list[Record]]) -> Page:
    """The report. ``about``: lines below the title; ``groups``: records by heading, "" for none."""
    columns = [column for records in groups.values() for record in records for column in record.columns]
    html = rendered(
        "page.html.jinja",
        title=title,
        about=about,
        groups=groups,
        scales={"q": Scale([c.q_n for c in columns]), "r": Scale([c.reward_n for c in columns])},
        token_ticks=token_ticks,
        levels=LEVELS,
        long=LONG,
        folded_prompt=FOLDED_PROMPT,
    )
    return Page(title=title, html=html)


def rendered(template: str, **values: Any) -> str:
    """The HTML of a template of this folder, which escapes all text."""
    environment = Environment(
        loader=PackageLoader("gcrm_fast.evaluation", package_path=""), autoescape=True, undefined=StrictUndefined
    )
    line_feed = Markup('<span class="gone">↵</span>\n')
    return environment.get_template(template).render(line_feed=line_feed, **values)
