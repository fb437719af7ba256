"""The page of ``gcrm inspect``: completions side by side, tokens coloured by Q-value or by the reward up to each.

One file: no script, nothing loaded from elsewhere, and all text of the record escaped.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.colors import Normalize, to_hex

from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.sampling import shared_start

STEP_ENDS = ("\n\n", "\n", ";")  # what ends a step: the first of them that a completion holds
COLOURS = matplotlib.colormaps["RdYlBu"]
PALE = (0.2, 0.8)  # part of the colours on which black text is easy to read
SHOWN = (0.02, 0.98)  # quantiles of the page's values at the ends of the colours


@dataclass(frozen=True)
class Column:
    """A completion as the page shows it. n tokens; ``marks`` are texts before a token, by its number."""

    title: str
    text_n: list[str]
    q_n: np.ndarray
    reward_n: np.ndarray
    marks: dict[int, list[str]]


def step_start(text_n: Sequence[str], step: int, step_end: str) -> int | None:
    """Number of the token in which a step (from 0) begins; None where there are fewer steps."""
    text = "".join(text_n)
    end = step_end or next((known for known in STEP_ENDS if known in text), STEP_ENDS[0])
    parts = text.split(end)
    if step >= len(parts):
        return None
    position = sum(len(part) + len(end) for part in parts[:step])
    return int(np.searchsorted(np.cumsum([len(piece) for piece in text_n]), position, "right"))


def first_difference(one: Completion, other: Completion) -> int | None:
    """How many leading tokens two completions of a prompt share; None where they are the same."""
    a, b = one.ids[one.start :], other.ids[other.start :]
    n = shared_start(a, b)
    return n if n < max(len(a), len(b)) else None


STYLE = """
:root { color-scheme: light; font: 15px/1.5 system-ui, sans-serif; color: #222; }
body { margin: 1.5rem auto; max-width: 110rem; padding: 0 1.5rem; }
h1 { font-size: 1.25rem; margin: 0; } h2 { font-size: 1.05rem; margin: 0 0 .4rem; }
small, .legend { color: #555; }
.prompt, .text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { background: #f4f4f4; border-radius: 6px; padding: .7rem 1rem; margin: 1rem 0; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem; }
section { border: 1px solid #ddd; border-radius: 6px; padding: .8rem 1rem; }
.text { font: 14px/1.9 ui-monospace, "DejaVu Sans Mono", monospace; }
.t { padding: .12em 0; border-radius: 2px; } .t:hover { outline: 1.5px solid #000; }
.gone { opacity: .45; }
mark { background: #222; color: #fff; font: 11px/1.4 system-ui, sans-serif; padding: .1em .45em; border-radius: 3px;
  margin: 0 .25em; white-space: nowrap; }
mark.error { background: #a50026; }
.bar { display: inline-block; width: 16rem; height: .8em; border-radius: 2px; margin: 0 .5em; }
label { margin-right: 1rem; cursor: pointer; }
svg { width: 100%; height: 7rem; } polyline { fill: none; stroke: #333; stroke-width: 1.2; }
#q:checked ~ * .by-r, #r:checked ~ * .by-q { display: none; }
#q:checked ~ main .t { background: var(--q); } #r:checked ~ main .t { background: var(--r); }
"""


class Scale:
    """Colours of one kind of value, the same all over the page."""

    def __init__(self, values_n: np.ndarray) -> None:
        low, high = (float(value) for value in np.quantile(values_n, SHOWN))
        self.low, self.high = low, high if high > low else low + 1
        self._place = Normalize(self.low, self.high, clip=True)

    def colour(self, value: float) -> str:
        return to_hex(COLOURS(PALE[0] + (PALE[1] - PALE[0]) * float(self._place(value))))

    def legend(self) -> str:
        stops = [self.low + (self.high - self.low) * i / 8 for i in range(9)]
        bar = f'<span class="bar" style="background:linear-gradient(90deg,{",".join(map(self.colour, stops))})"></span>'
        middle = (self.low + self.high) / 2
        return f"{self.low:.3f} or less{bar}{self.high:.3f} or more, {middle:.3f} in between; the lines span the same"

    def line(self, value_n: np.ndarray, marks: Sequence[int]) -> str:
        """The values of a completion's tokens as a line, with upright strokes at the marks."""
        place_n = 1 - np.asarray(self._place(value_n), dtype=float)
        across = max(len(value_n) - 1, 1)
        points = " ".join(f"{100 * i / across:.2f},{2 + 36 * y:.2f}" for i, y in enumerate(place_n))
        strokes = "".join(
            f'<path d="M{100 * i / across:.2f} 0V40" stroke="#a50026" stroke-dasharray="1.5 1.5" '
            'vector-effect="non-scaling-stroke"/>'
            for i in marks
        )
        return (
            f'<svg viewBox="0 0 100 40" preserveAspectRatio="none"><polyline points="{points}" '
            f'vector-effect="non-scaling-stroke"/>{strokes}</svg>'
        )


def section(column: Column, q: Scale, reward: Scale) -> str:
    """One completion: its numbers, the values along it, its tokens."""
    pieces = []
    for i, (text, q_value, r_value) in enumerate(zip(column.text_n, column.q_n, column.reward_n, strict=True)):
        for name in column.marks.get(i, ()):
            kind = "error" if name.startswith("error") else "difference"
            pieces.append(f'<mark class="{kind}">{html.escape(name)}</mark>')
        place = f"token {i + 1} of {len(column.text_n)} {text!r}"
        tip = html.escape(f"{place}\nQ {q_value:.4f}\nreward so far {r_value:.4f}").replace("\n", "&#10;")
        # A token that is a part of a character only, and a line feed, would have no place to colour.
        shown = html.escape(text).replace("\n", '<span class="gone">↵</span>\n') or '<span class="gone">·</span>'
        pieces.append(
            f'<span class="t" style="--q:{q.colour(q_value)};--r:{reward.colour(r_value)}" title="{tip}">{shown}</span>'
        )
    marks = sorted(column.marks)
    end = "".join(f"<mark>{html.escape(name)}</mark>" for name in column.marks.get(len(column.text_n), ()))
    return (
        f"<section><h2>{html.escape(column.title)}</h2><small>reward {column.reward_n[-1]:.4f}; Q {column.q_n[-1]:.4f} "
        f"at the end, lowest {column.q_n.min():.4f} at token {column.q_n.argmin() + 1} of {len(column.q_n)}"
        f'</small><div class="by-q">{q.line(column.q_n, marks)}</div>'
        f'<div class="by-r">{reward.line(column.reward_n, marks)}</div>'
        f'<div class="text">{"".join(pieces)}{end}</div></section>'
    )


def page(title: str, about: str, prompt: str, columns: Sequence[Column]) -> str:
    """The whole page."""
    q = Scale(np.concatenate([column.q_n for column in columns]))
    reward = Scale(np.concatenate([column.reward_n for column in columns]))
    sections = "\n".join(section(column, q, reward) for column in columns)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1><small>{html.escape(about)}</small>
<div class="prompt">{html.escape(prompt)}</div>
<input type="radio" name="by" id="q" checked><label for="q">Q-value</label>
<input type="radio" name="by" id="r"><label for="r">running reward</label>
<p class="legend"><span class="by-q">Q-value {q.legend()}</span><span class="by-r">reward {reward.legend()}</span></p>
<main>
{sections}
</main></body></html>
"""
