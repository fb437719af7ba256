"""``gcrm inspect`` of generated texts: which tokens branch where, what is dropped, errors."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcrm_fast import cli
from gcrm_fast.evaluation.tree import Branch, Sample, Tree, samples_of


def sample(texts: str, number: int = 0, **changes: Any) -> Sample:
    known: dict[str, Any] = {"ending": "stop", "reward": None, "chosen": False, **changes}
    q_n = np.arange(len(texts)) + 10.0 * number
    return Sample(number=number, text_n=list(texts), q_n=q_n, **known)


def told(branch: Branch) -> Any:
    """(tokens, numbers of the samples that end there, branches)."""
    return "".join(branch.text_n), [one.number for one in branch.ends], [told(own) for own in branch.branches]


def test_texts_share_a_branch_as_far_as_they_are_the_same() -> None:
    samples = [sample(text, i) for i, text in enumerate(("abcd", "abx", "abcde", "ab", "q", "abcd"))]
    root = Tree.of("title", "prompt", samples).root
    expected = [("ab", [3], [("cd", [0, 5], [("e", [2], [])]), ("x", [1], [])]), ("q", [4], [])]
    assert told(root) == ("", [], expected)
    assert root.samples == 6
    shared = root.branches[0]
    assert (shared.start, shared.samples, shared.branches[0].start) == (0, 5, 2)
    assert shared.branches[0].q_n.tolist() == [2, 3]
    assert shared.branches[1].q_n.tolist() == [12]


def test_a_single_sample_and_one_without_tokens() -> None:
    assert told(Tree.of("title", "prompt", [sample("ab", 0)]).root) == ("ab", [0], [])
    assert told(Tree.of("title", "prompt", [sample("", 0), sample("a", 1)]).root) == ("", [0], [("a", [1], [])])


def record(*texts: str, **changes: Any) -> dict[str, Any]:
    """As gcrm generate writes it; the second sample is dropped, the third cut, the first the answer."""
    samples = [
        {
            "text": text,
            "reward": None if i == 1 else i + 0.5,
            "ending": ("stop", "dropped", "length")[i % 3],
            "parent": None,
            "log_p": -1.0,
            "ids": list(range(len(text))),
            "tokens": {"texts": list(text), "q_values": [i / 10 + k / 100 for k in range(len(text))]},
        }
        for i, text in enumerate(texts)
    ]
    costs = {"policy_tokens": 9, "reward_tokens": 9, "saved_tokens": 0, "seconds": 0.1}
    return {"prompt": "<b>one</b>", "text": texts[0], "chosen_sample": 0, "samples": samples, **costs, **changes}


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


class Reader(HTMLParser):
    """Tags, and the text inside main without what is about a sample."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [value for name, value in attrs if name == "title" and value]


def test_the_page_shows_every_token_once_and_how_each_sample_ended(tmp_path: Path) -> None:
    evil = record("ab", prompt="two")
    evil["samples"][0]["tokens"]["texts"] = ["</style>", "<script>"]
    file = written(tmp_path / "out.jsonl", record("ab<c", "abx", "ab\ny"), evil)
    out = tmp_path / "page.html"
    assert cli.run("inspect", ["nowhere", str(file), "-o", str(out)]) == 0  # the model is not loaded
    text = out.read_text()
    made = Reader(text)
    assert len(made.titles) == len("ab") + len("<c") + len("x") + len("\ny") + 2
    assert made.titles[:3] == ["token 1: Q 0.000", "token 2: Q 0.010", "token 3: Q 0.020"]
    assert "token 3: Q 0.120" in made.titles
    assert "script" not in made.tags
    assert made.tags.count("style") == 1
    assert "<b>one" not in text
    ends = [
        re.sub(r"<[^>]+>|\s+", " ", end).split() for end in re.findall(r'<span class="end">(.*?)</small>', text, re.S)
    ]
    assert [" ".join(end) for end in ends] == [
        "answer sample 0, reward 0.50, lowest Q of all tokens 0.00",
        "dropped after token 3 sample 1, lowest Q of all tokens 0.10",
        "cut by the limit sample 2, reward 2.50, lowest Q of all tokens 0.20",
        "answer sample 0, reward 0.50, lowest Q of all tokens 0.00",
    ]
    assert "filter does not judge the first few" in text
    assert "2 of 2 records" in text
    assert not re.search(r"https?://|url\(|@import", text)


def test_records_by_number_and_drawn_at_random(tmp_path: Path) -> None:
    file = written(tmp_path / "out.jsonl", *(record("ab", prompt=f"prompt {i}") for i in range(6)))
    out = tmp_path / "page.html"

    def shown(*options: str) -> list[int]:
        assert cli.run("inspect", ["nowhere", str(file), "-o", str(out), *options]) == 0
        return [int(number) for number in re.findall(r"<h3>Record (\d) \(out\.jsonl", out.read_text())]

    assert shown("--row", "4", "--row", "1") == [4, 1]
    assert shown() == [0, 1, 2, 3, 4, 5]
    assert len(shown("--random", "3")) == 3
    messages = [{"role": "user", "content": "how?"}]
    written(file, record("ab", prompt=messages))
    assert shown() == [0]
    assert "user: how?" in out.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": [{"text": "a"}]}, "out.jsonl:1: field 'samples': is not as gcrm generate writes it"),
        ({"samples": [record("a")["samples"][0] | {"ending": "odd"}]}, "is not as gcrm generate writes it"),
        (
            {"samples": [record("a")["samples"][0] | {"tokens": {"texts": [], "q_values": []}}]},
            "has no Q-values: run gcrm generate with --reward",
        ),
        (
            {"samples": [record("a")["samples"][0] | {"tokens": {"texts": ["a"], "q_values": []}}]},
            "tokens and Q-values must be equally many",
        ),
    ],
)
def test_records_that_cannot_be_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    file = written(tmp_path / "out.jsonl", record("a", **changes))
    assert cli.run("inspect", ["nowhere", str(file), "-o", str(tmp_path / "page.html")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_record_number_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "out.jsonl", record("a"))
    assert cli.run("inspect", ["nowhere", str(file), "-o", str(tmp_path / "page.html"), "--row", "1"]) == 2
    assert "--row 1: there are 1 records, numbered from 0" in capsys.readouterr().err
    assert len(samples_of(record("a"), "here")) == 1


def test_records_whose_prompt_has_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As gcrm generate --prompt-field writes them."""
    one = record("a", "b")
    file = written(tmp_path / "texts.jsonl", {"task": one.pop("prompt"), **one})
    given = ["nowhere", str(file), "-o", str(tmp_path / "page.html"), "--on-bad-record", "skip"]
    assert cli.run("inspect", given) == 2
    assert "every record is bad; the first: " in capsys.readouterr().err
