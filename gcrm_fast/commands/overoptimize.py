"""``gcrm overoptimize``: gold against proxy over the number of samples that the proxy picks from."""

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from gcrm_fast.commands.options import OveroptimizeOptions
from gcrm_fast.commands.shared import questions_of
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.tables import columns, number
from gcrm_fast.data.chat import Form, trained_on
from gcrm_fast.data.fields import LARGEST
from gcrm_fast.data.records import COMPLETION_FORMATS, Candidate, parse_columns, read_completions
from gcrm_fast.data.tokenization import train_tokenizer
from gcrm_fast.evaluation.measures import COVERAGE, RESAMPLES, halves
from gcrm_fast.evaluation.overoptimization import Fall, Point, curve, fall, fit, gains, sizes
from gcrm_fast.evaluation.plots import plot_overoptimization
from gcrm_fast.evaluation.results import Row, check_folder, write_rows

# No model reads the messages: their text only says which samples have the same prompt.
TURNS = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def reader() -> PreTrainedTokenizerBase:
    """Turns messages into text, as the tokenizer of a model would."""
    tokenizer = train_tokenizer([TURNS], 259)
    tokenizer.chat_template = TURNS
    trained_on(tokenizer, get_args(Form))
    return tokenizer


def score_of(candidate: Candidate, name: str, option: str) -> float:
    """A field that holds a finite number, or true or false. Raises UserError."""
    value, what = candidate.field(name, f"named by {option}"), f"{candidate.where}: field '{name}', named by {option},"
    if not isinstance(value, (bool, int, float)):
        raise UserError(f"{what} is {str(value)[:20]!r}, not a number")
    # Compared, not converted: JSON integers have no bound. NaN fails it too.
    if not abs(value) <= LARGEST:
        raise UserError(f"{what} is not a finite number between {-LARGEST:g} and {LARGEST:g}")
    return float(value)


def read_scores(options: OveroptimizeOptions) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """Questions, and the proxies and golds of the samples of each. Raises UserError, also for one sample."""
    names = parse_columns(options.columns, COMPLETION_FORMATS)
    found = read_completions([options.data], fields=("*",), columns=names, tokenizer=reader())
    scores: dict[str, list[tuple[float, float]]] = {}
    for candidate, question in zip(found, questions_of(found, options.question), strict=True):
        pair = score_of(candidate, options.proxy, "--proxy"), score_of(candidate, options.gold, "--gold")
        scores.setdefault(question, []).append(pair)
    single = next((question for question, own in scores.items() if len(own) < 2), None)
    if single is not None:
        raise UserError(f"{options.data}: one sample of the question {single[:60]!r}: best of n needs several of each")
    both = [np.array(own) for own in scores.values()]
    for column, given in enumerate((f"--proxy {options.proxy}", f"--gold {options.gold}")):
        if all(len(np.unique(own[:, column])) == 1 for own in both):
            raise UserError(f"{options.data}: {given} is the same for all samples of each question: name another field")
    return list(scores), [own[:, 0] for own in both], [own[:, 1] for own in both]


def verdict(change: Fall) -> str:
    """Whether the reward is over-optimized, in words."""
    bounds = f"{change.change:+.3f} [{number(change.low)}, {number(change.high)}]"
    if change.shown:
        return f"over-optimized: from best of {change.peak} to best of {change.largest} gold changes by {bounds}"
    return f"no fall shown up to best of {change.largest} (gold from the peak on: {bounds})"


def fitted(alpha: float, beta: float) -> str:
    """The fit in words, or why there is none."""
    if math.isnan(alpha):
        return "no fit: it takes 3 or more samples of each question"
    return f"fit: gold = d ({alpha:.3f} - {beta:.3f} d), d = sqrt(KL)"


def table(points: Sequence[Point]) -> str:
    lines = [
        [str(p.n), f"{p.kl:.2f}", f"{p.gold:+.3f} [{number(p.low)}, {number(p.high)}]", f"{p.proxy:+.3f}"]
        for p in points
    ]
    return columns(["best of", "KL, nats", "gold gain", "proxy gain"], lines)


def overoptimize(options: OveroptimizeOptions) -> None:
    """Reads the samples and writes the results. Raises UserError."""
    check_folder(options.output, options.overwrite)
    questions, proxy, gold = read_scores(options)
    n_K = sizes(min(map(len, proxy)))
    gold_CK, proxy_CK = gains(proxy, gold, n_K)
    points = curve(gold_CK, proxy_CK, n_K)
    change, (alpha, beta) = fall(gold_CK, n_K, halves(questions)), fit(points)
    rows = [
        Row(options.data, "all", "questions", len(questions)),
        *(Row(options.data, "all", f"gold@{p.n}", p.gold, p.low, p.high) for p in points),
        *(Row(options.data, "all", f"proxy@{p.n}", p.proxy) for p in points),
        Row(options.data, "all", "peak", change.peak),
        Row(options.data, "all", "fall", change.change, change.low, change.high),
        Row(options.data, "all", "fit:alpha", alpha),
        Row(options.data, "all", "fit:beta", beta),
    ]
    about = {
        "gold": options.gold,
        "proxy": options.proxy,
        "intervals": f"{100 * COVERAGE:.0f} %, bootstrap of {RESAMPLES} draws of questions",
    }
    with written_aside(options.output) as folder:
        folder.mkdir(parents=True)
        write_rows(folder, rows, about)
        plot_overoptimization({options.data: points}, folder / "overoptimization.png")
    print(table(points))
    print(f"\n{verdict(change)}\n{fitted(alpha, beta)}")
