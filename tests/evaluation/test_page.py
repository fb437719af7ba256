"""``gcrm inspect``: what is marked where, and a page that makes no request and escapes everything."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gcrm_fast import cli
from gcrm_fast.commands import inspect
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.records import Candidate
from gcrm_fast.evaluation import page
from gcrm_fast.evaluation.page import Column
from gcrm_fast.inference.scoring import RewardModel
from support import models
from support.judged import write

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
        if tag not in ("meta", "input", "path", "polyline"):
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
        elif "div text" in self._inside:
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
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "link", "img", "iframe", "b"})
    assert not re.search(r"https?://|url\(|@import|\son\w+=", text)
    assert text.index('id="q"') < text.index('id="r"') < text.index("<main>")
    scored = RewardModel.from_pretrained(model)
    q_n = scored.q_values([PAIR["prompt"]], [PAIR["rejected"]])[0]  # type: ignore[list-item]
    tips = [attributes["title"] for tag, attributes in read.tags if attributes.get("class") == "t"]
    assert f"Q {q_n[-1]:.4f}" in str(tips[-1])
    assert f"token {len(q_n)} of {len(q_n)} '<|eos|>'" in str(tips[-1])


def test_one_completion_stands_alone_and_lists_stand_together(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    lone = {"question": "one", "completion": "two\n\nthree", "first_error_step": 1, "is_correct": False}
    listed = {"prompt": "one", "completions": ["two", "two", "three"], "error_step": [0, None, 1]}
    for record, titles, marks in (
        (lone, ["completion, wrong"], ["error: step 2"]),
        (
            listed,
            ["completions[0]", "completions[1]", "completions[2]"],
            ["error: step 1", "first difference"],
        ),  # the first two are the same
    ):
        file = write(tmp_path / "one.jsonl", [record])
        assert cli.run("inspect", [str(model), str(file), "--row", "0", "-o", str(out)]) == 0
        read = Reader(out.read_text())
        assert re.findall(r"<h2>([^<]+)</h2>", out.read_text()) == titles
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
    assert page.step_start(["a", "b;", "c", ";d"], 0, "") == 0
    assert page.step_start(["a", "b;", "c", ";d"], 1, "") == 2
    assert page.step_start(["a", "b;", "c", ";d"], 2, "") == 3  # the token that holds its first character
    assert page.step_start(["a", "b;", "c", ";d"], 3, "") is None
    assert page.step_start(["a\n", "", "\nb\n", "c"], 1, "") == 2  # blank lines come before line feeds
    assert page.step_start(["a\n", "", "\nb\n", "c"], 2, "\n") == 2
    assert page.step_start(["a.", "b"], 1, ".") == 1


def test_first_difference_counts_completion_tokens() -> None:
    def tokens(*ids: int) -> Completion:
        return Completion(np.array([7, 7, *ids], dtype=np.int32), 2, 0)

    assert page.first_difference(tokens(1, 2, 3), tokens(1, 2, 4)) == 2
    assert page.first_difference(tokens(1, 2), tokens(1, 2, 4)) == 2
    assert page.first_difference(tokens(1), tokens(1)) is None


def test_a_page_escapes_markup_within_a_token_and_everywhere_else() -> None:
    evil = "<script>'\"&</span>"
    column = Column(
        title=evil, text_n=[evil, "b"], q_n=np.array([0.5, 1]), reward_n=np.array([0.5, 1]), marks={0: [evil]}
    )
    read = Reader(page.page(title=evil, about=evil, prompt=evil, columns=[column]))
    assert read.sections == [evil + "b"]
    assert read.marks == [(0, evil, "")]
    assert "script" not in {tag for tag, _ in read.tags}


def test_values_that_do_not_vary_have_a_color() -> None:
    assert re.fullmatch("#[0-9a-f]{6}", page.Scale(np.array([0.5, 0.5])).color(0.5))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--row", "1"], r"--row 1: .*bad\.jsonl has 1 records, numbered from 0"),
        ({}, ["--row", "-1"], r"--row -1: must be 0 or more"),
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
