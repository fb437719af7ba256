"""``gcrm inspect``: what is marked where, and a page that makes no request and escapes everything."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcrm_fast import cli
from gcrm_fast.commands import inspect
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.records import Candidate
from gcrm_fast.evaluation import page
from gcrm_fast.evaluation.page import Column, Record
from gcrm_fast.inference.scoring import RewardModel
from support import models
from support.judged import samples, write
from support.training_runs import torchrun

PAIR = {
    "prompt": "<b>one</b>\ntwo",
    "chosen": "three;four;<script>alert(1)</script>",
    "rejected": "three;five;</style>\"six'&",
    "error_step": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "model"
    models.save(folder)
    return folder


class Reader(HTMLParser):
    """Tags with their attributes, the text of each section, and the marks in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: list[str] = []
        self.marks: list[tuple[int, str, str]] = []  # section, mark, text of its section before it
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self._inside.append(tag + " " + (dict(attrs).get("class") or ""))
        if self._inside[-1] == "div text":
            self.sections.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1].startswith("mark"):
            self.marks.append((len(self.sections) - 1, data, self.sections[-1]))
        elif "div text" in self._inside and self._inside[-1] != "summary ":
            self.sections[-1] += data


def test_a_page_marks_difference_and_error_and_keeps_all_text(model: Path, tmp_path: Path) -> None:
    file, out = write(tmp_path / "pairs.jsonl", [PAIR | {"error_step": 1}, PAIR]), tmp_path / "page.html"
    assert cli.run("inspect", [str(model), str(file), "--row", "1", "-o", str(out)]) == 0
    text = out.read_text()
    read = Reader(text)
    assert read.sections == [PAIR["chosen"] + "<|eos|>", str(PAIR["rejected"]) + "<|eos|>"]
    assert (1, "error: step 2", "three;") in read.marks
    [chosen, rejected] = [before for _, name, before in read.marks if name == "first difference"]
    assert "three;f".startswith(chosen)
    assert chosen == rejected
    assert {name for _, name, _ in read.marks} == {"error: step 2", "first difference"}
    assert [section for section, name, _ in read.marks if name.startswith("error")] == [1]
    # Nothing is run or loaded, and the radio buttons come before what they switch.
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "link", "img", "iframe"})
    assert not re.search(r"https?://|url\(|@import|\son\w+=", text)
    assert text.index('id="q"') < text.index('id="r"') < text.index("<main>")
    scored = RewardModel.from_pretrained(model)
    q_n = scored.q_values([PAIR["prompt"]], [PAIR["rejected"]])[0]  # type: ignore[list-item]
    tips = [attributes["title"] for tag, attributes in read.tags if str(attributes.get("class")).startswith("t ")]
    assert str(tips[-1]).startswith(f"token {len(q_n)} of {len(q_n)}: Q {q_n[-1]:.3f}, reward so far ")


def test_the_title_of_a_record_shows_the_end_of_its_prompt() -> None:
    """Chats with the same system message differ there."""
    assert Record(title="Pair 1", prompt="1+1\n= ", columns=[]).preview == "1+1 ="
    assert Record(title="Pair 1", prompt="system " * 20 + "\nWho?", columns=[]).preview.endswith("system Who?")
    chat = "<|im_start|>system\n" + "helpful " * 9 + "<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
    preview = Record(title="Pair 1", prompt=chat, columns=[]).preview
    assert preview == "… " + "helpful " * 7 + "user Who?"


def test_one_completion_stands_alone_and_lists_stand_together(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    lone = {"question": "one", "completion": "two\n\nthree", "first_error_step": 1, "is_correct": False}
    listed = {"prompt": "one", "completions": ["two", "two", "three"], "error_step": [0, None, 1]}
    for record, titles, marks in (
        (lone, [("wrong", "completion")], ["error: step 2"]),
        (
            listed,
            [("plain", "completions[0]"), ("plain", "completions[1]"), ("plain", "completions[2]")],
            ["error: step 1", "first difference"],
        ),  # the first two are the same
    ):
        file = write(tmp_path / "one.jsonl", [record])
        assert cli.run("inspect", [str(model), str(file), "--row", "0", "-o", str(out)]) == 0
        read = Reader(out.read_text())
        assert re.findall(r'<section><h3><span class="badge (\w+)">([^<]+)</span>', out.read_text()) == titles
        assert sorted(name for _, name, _ in read.marks) == marks


def candidate(name: str = "completion", **fields: object) -> Candidate:
    return Candidate(prompt="", completion="", where="file:1", row=0, name=name, cut=False, fields=fields)


@pytest.mark.parametrize(
    ("fields", "arguments", "expected"),
    [
        ({}, ("", ""), None),
        ({"first_error_step": -1}, ("", ""), None),
        ({"first_error_step": 0}, ("", ""), 0),
        ({"error_step": 0}, ("", ""), None),
        ({"error_step": 2}, ("", ""), 1),
        ({"error_steps": [5, 3, 8]}, ("", ""), 2),
        ({"error_steps": []}, ("", ""), None),
        ({"error_step": None}, ("", ""), None),
        ({"wrong": 2}, ("wrong", ""), 1),
        ({"wrong": 2}, ("wrong", "0"), 2),
    ],
)
def test_error_steps_are_counted_as_their_field_counts(
    fields: dict[str, object], arguments: tuple[str, str], expected: int | None
) -> None:
    assert inspect.error_step(candidate(**fields), *arguments) == expected
    assert inspect.error_step(candidate("chosen", **fields), *arguments) is None


def test_steps_begin_after_what_ends_them() -> None:
    assert page.step_starts(["a", "b;", "c", ";d"]) == [0, 2, 3]  # the token that holds the first character
    assert page.step_starts(["a\n", "", "\nb\n", "c"]) == [0, 2]  # blank lines come before line feeds
    assert page.step_starts(["a\n", "", "\nb\n", "c"], "\n") == [0, 2, 2, 3]
    assert page.step_starts(["a.", "b."], ".") == [0, 1, 2]


def test_first_difference_counts_completion_tokens() -> None:
    def tokens(*ids: int) -> Completion:
        return Completion(np.array([7, 7, *ids], dtype=np.int32), 2, 0)

    assert page.first_difference(tokens(1, 2, 3), tokens(1, 2, 4)) == 2
    assert page.first_difference(tokens(1, 2), tokens(1, 2, 4)) == 2
    assert page.first_difference(tokens(1), tokens(1)) is None


def column(text_n: list[str], q: list[float], reward: list[float] | None = None, **changes: Any) -> Column:
    return Column(title="one", text_n=text_n, q_n=np.array(q), reward_n=np.array(reward or q), **changes)


def rendered(columns: list[Column], prompt: str = "p") -> str:
    return page.page(title="t", about=[], groups={"": [Record(title="r", prompt=prompt, columns=columns)]}).html


def test_a_page_escapes_markup_within_a_token_and_everywhere_else() -> None:
    evil = "<script>'\"&</span>"
    bad = Column(title=evil, text_n=[evil, "b"], q_n=np.ones(2), reward_n=np.ones(2), marks={0: [evil]})
    made = page.page(title=evil, about=[evil], groups={evil: [Record(title=evil, prompt=evil, columns=[bad])]})
    read = Reader(made.html)
    assert read.sections == [evil + "b"]
    assert read.marks == [(0, evil, "")]
    assert "script" not in {tag for tag, _ in read.tags}
    # Within a notebook's frame it is the same page.
    [(_, attributes)] = Reader(made._repr_html_()).tags
    assert attributes["srcdoc"] == made.html


def test_the_last_token_has_no_say_in_colors_and_axes() -> None:
    scale = page.Scale([np.array([0.06, 0.02, 0.97]), np.array([0.04, -1.0])])
    assert (scale.level(0.02), scale.level(0.06)) == (0, page.LEVELS - 1)
    assert scale.level(0.97) == page.LEVELS - 1
    assert scale.ticks[0] <= 0.02
    assert 0.06 <= scale.ticks[-1] < 0.1
    assert (scale.height(0.97), scale.height(-1.0)) == (0, 100), "cut off at the edge"
    assert page.Scale([np.array([0.5, 0.5])]).level(0.5) == page.LEVELS // 2


def test_axes_show_zero_where_it_is_close() -> None:
    assert 0 in page.Scale([np.array([0.4, 0.9, 9])]).ticks
    assert 0 not in page.Scale([np.array([8.4, 8.9, 9])]).ticks
    assert page.Scale([np.array([-3.0, 5, 9])]).ticks[0] <= -3
    assert 'class="zero"' in rendered([column(["a", "b", "c"], [-0.5, 0.5, 0.1])])


def test_margins_compare_the_best_of_each_kind() -> None:
    assert page.margin([(True, 1.0), (True, 2.0), (False, 2.5), (False, -1.0), (None, 9.0)]) == -0.5
    assert page.margin([(True, 1.0), (None, 2.0)]) is None


def test_long_completions_have_a_mean_per_step_and_short_ones_none() -> None:
    scale = page.Scale([np.array([0.0, 1.0, 0.5])])
    assert scale.stairs(np.array([0.0, 1.0, 1.0, 1.0]), [0, 2, 4], 4) == "0.00,50.0 66.67,50.0 66.67,0.0 100.00,0.0"
    steps = [f"{word}\n" if i % 50 == 49 else word for i, word in enumerate(["x"] * page.LONG)]
    assert column(steps, [0.0] * page.LONG).segments() == [0, 50, 100, 150, page.LONG]
    windows = column(["x"] * 90, [0.0] * 90).segments()
    assert windows == [*range(0, 90, 3), 90]
    values = np.linspace(0, 1, page.LONG).tolist()
    assert 'class="is-right faint"' in rendered([column(steps, values, right=True)])
    assert "faint" not in rendered([column(steps[1:], values[1:], right=True)]).partition("<main>")[2]


def test_shared_starts_and_long_prompts_are_folded() -> None:
    n = 2 * page.KEPT + 1
    same, values = ["s"] * n, [0.5] * (n + 1)
    folded = rendered([column([*same, "a"], values), column([*same, "b"], values)], "p" * (page.FOLDED_PROMPT + 1))
    assert f"<summary>{n - page.KEPT} tokens that all completions share</summary>" in folded
    assert '<details class="prompt">' in folded
    assert Reader(folded).sections == ["s" * n + "a", "s" * n + "b"], "all tokens are there"
    short = rendered([column([*same[1:], "a"], values[1:]), column([*same[1:], "b"], values[1:])])
    assert "tokens that all completions share" not in short
    assert '<details class="prompt">' not in short
    assert "tokens that all completions share" not in rendered([column(same, values[1:])]), "nothing to share with"


def test_means_are_split_at_the_error() -> None:
    values = [1.0, 0.0, -1.0, -1.0]
    marks = {1: ["first difference"], 2: ["error: step 2"]}
    assert column(list("abcd"), values, marks=marks).means == "mean Q 0.50 before the error, -1.00 from there on"
    only = column(list("abcd"), values, marks={1: ["first difference"]}).means
    assert only == "mean Q 1.00 before the first difference, -0.67 from there on"
    assert column(list("abcd"), values).means == ""


def test_the_report_has_the_lowest_margins_in_order_and_others_at_random(model: Path, tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"one {'two ' * i}", "chosen": "three " * (i + 1), "rejected": "four " * (9 - i)} for i in range(8)
    ]
    file, out = write(tmp_path / "pairs.jsonl", pairs), tmp_path / "page.html"
    scored = RewardModel.from_pretrained(model)
    chosen, rejected = (
        scored.score([str(p["prompt"]) for p in pairs], [str(p[side]) for p in pairs])
        for side in ("chosen", "rejected")
    )
    order = np.argsort(chosen - rejected).tolist()
    assert cli.run("inspect", [str(model), str(file), "-o", str(out), "--worst", "3", "--random", "2"]) == 0
    text = out.read_text()
    numbers = [int(number) for number in re.findall(r"<h3>Record (\d+) \(pairs\.jsonl:\d+\)</h3>", text)]
    assert numbers[:3] == order[:3]
    assert len(set(numbers)) == 5
    assert [order.index(number) for number in numbers[3:]] == sorted(order.index(number) for number in numbers[3:])
    assert re.findall(r"<h2>([^<]+)</h2>", text) == ["Lowest 3 margins", "2 others, drawn at random"]
    won = int((chosen > rejected).sum())
    assert f"8 of 8 records scored; the right completion has the higher reward in {won} of 8" in text
    assert cli.run("inspect", [str(model), str(file), "-o", str(out), "--worst", "9", "--limit", "4"]) == 0
    assert "4 of 8 records scored" in out.read_text()


def test_records_without_two_kinds_are_drawn_at_random(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "lone.jsonl", samples()), tmp_path / "page.html"
    assert cli.run("inspect", [str(model), str(file), "-o", str(out), "--random", "4"]) == 0
    assert re.findall(r"<h2>([^<]+)</h2>", out.read_text()) == ["4 drawn at random"]
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("scoring: ")] == []
    assert cli.run("inspect", [str(model), str(file), "-o", str(out), "--random", "0"]) == 2
    assert "none has both a right and a wrong completion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--row", "1"], r"--row 1: .*bad\.jsonl has 1 records, numbered from 0"),
        ({}, ["--row", "-1"], r"--row -1: must be at least 0"),
        ({}, ["--worst", "0", "--random", "0"], r"--worst 0 --random 0: nothing to show"),
        ({"error_step": "two"}, ["--row", "0"], r"bad\.jsonl:1: field 'error_step' is 'two', not the number of a step"),
        (
            {},
            ["--row", "0", "--error-field", "wrong"],
            r"bad\.jsonl:1: field 'wrong', named by --error-field, is missing",
        ),
        ({"chosen": 3}, ["--row", "0"], r"bad\.jsonl:1: field 'chosen' is int, not a string"),
    ],
)
def test_bad_input_of_inspect(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    arguments: list[str],
    message: str,
) -> None:
    file = write(tmp_path / "bad.jsonl", [PAIR | change])
    assert cli.run("inspect", [str(model), str(file), "-o", str(tmp_path / "page.html"), *arguments]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err), err
    assert cli.run("inspect", [str(model), str(file), "--row", "0", "-o", str(tmp_path)]) == 2
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.slow
def test_a_run_writes_a_report_of_its_held_out_pairs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    sizes = ["--steps", "4", "--train-pairs", "300", "--eval-pairs", "40", "--goal-pairs", "50"]
    result = torchrun("--dtype", "float32", "--output", str(out), *sizes, processes=2)
    assert result.returncode == 0, result.stderr
    text = (out / "inspect.html").read_text()
    assert re.findall(r"<h2>([^<]+)</h2>", text) == ["Lowest 20 margins", "10 others, drawn at random"]
    margins = [float(number) for number in re.findall(r"<span>margin ([+-][\d.]+)</span>", text)]
    assert margins[:20] == sorted(margins[:20])
    assert "error: step" in text
    # What the sharded model computes is what the saved one gives.
    read = Reader(text)
    prompt = re.findall(r'<div class="prompt">([^<]*)</div>', text)[0]
    model = RewardModel.from_pretrained(out / "model")
    sides = [section.removesuffix("<|eos|>") for section in read.sections[:2]]
    q_n = np.concatenate(model.q_values([prompt] * 2, sides))
    tips = [str(attributes["title"]) for _, attributes in read.tags if str(attributes.get("class")).startswith("t ")]
    shown = [re.search(r"Q (\S+), reward so far (\S+)", tip) for tip in tips[: len(q_n)]]
    assert [float(match[1]) for match in shown if match] == pytest.approx(q_n.tolist(), abs=2e-3)
    chosen, rejected = model.score([prompt] * 2, sides).tolist()
    assert margins[0] == pytest.approx(chosen - rejected, abs=0.011)


def test_a_model_inspects_completions_in_a_notebook(model: Path) -> None:
    scored = RewardModel.from_pretrained(model)
    made = scored.inspect("one", ["two three", "two four"])
    read = Reader(made.html)
    assert read.sections == ["two three<|eos|>", "two four<|eos|>"]
    assert len([name for _, name, _ in read.marks if name == "first difference"]) == 2
    assert made._repr_html_().startswith("<iframe srcdoc=")
    q_n = scored.q_values(["one"], ["two three"])[0]
    assert f"Q {q_n[0]:.3f}" in made.html
    assert made.html.count('<details class="record"') == 1
    assert scored.inspect(["one", "six"], ["two", "two"]).html.count('<details class="record"') == 2
    assert Reader(scored.inspect("one", "two").html).sections == ["two<|eos|>"]
    with pytest.raises(ValueError, match="completions are empty: there is nothing to show"):
        scored.inspect("one", [])


def test_lines_of_completions_without_labels_are_distinct_and_in_the_legend(model: Path) -> None:
    html = RewardModel.from_pretrained(model).inspect("one", ["two", "three", "four"]).html
    for kind in ("dash0", "dash1", "dash2"):
        assert html.count(f'<polyline class="{kind}" ') == 3  # of Q, of the reward, and next to its title
    assert "dash" not in Reader(html).sections
    assert 'class="sample"' not in RewardModel.from_pretrained(model).inspect("one", "two").html


@pytest.mark.parametrize("length", [1, 2, 5, 13, 19, 20, 99, 1400])
def test_the_axis_names_the_first_and_the_last_token_and_few_others(length: int) -> None:
    ticks = page.token_ticks(length)
    assert ticks == sorted(set(ticks))
    assert (ticks[0], ticks[-1]) == (1, length)
    assert len(ticks) <= 8
    assert all(b - a > length / 20 for a, b in pairwise(ticks)), "labels do not overlap"


def test_a_last_token_beyond_the_axis_has_an_arrow_at_its_place() -> None:
    short, long = (
        Column(title=f"{n} tokens", text_n=["x"] * n, q_n=np.r_[np.linspace(0, 0.1, n - 1), last], reward_n=np.zeros(n))
        for n, last in ((6, 0.99), (11, -0.99))
    )
    html = page.page(title="t", about=[], groups={"": [Record(title="r", prompt="p", columns=[short, long])]}).html
    arrows = re.findall(r'<span class="beyond ?" style="left:calc\(([\d.]+) .*?;(\w+):.*?title="(.*?)">(.)<', html)
    assert arrows == [
        ("0.5", "top", "6 tokens, last token: 0.99", "▲"),
        ("1.0", "bottom", "11 tokens, last token: -0.99", "▼"),
    ]
