"""Completions with a label or score, read one by one for --loss bce and mse."""

import json
from pathlib import Path
from typing import Any

import pytest

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.encoding import tokenize_pairs
from gcrm_fast.data.overlap import Overlap, overlap
from gcrm_fast.data.records import Pair, read_judged
from gcrm_fast.data.sources import BadRecords
from support.folders import tokenizer

ONE = {"prompt": "p", "completion": "a"}


def read(path: Path, *records: object, probability: bool = True, **options: Any) -> list[Pair]:
    path = path / "r.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_judged([str(path)], probability=probability, **options)


def test_each_completion_is_kept_with_its_label_or_score(tmp_path: Path) -> None:
    labels = [{"label": True}, {"is_correct": False, "kind": "x"}, {"label": 0.25}, {"response": "b", "kto_tag": True}]
    found = read(tmp_path, *({**ONE, "kind": "y"} | label for label in labels[:3]))
    assert [one.target for one in found] == [1, 0, 0.25]
    assert all(one.completions == (one.chosen,) == (one.rejected,) == ("a",) for one in found)
    assert [one.where for one in found] == [f"{tmp_path / 'r.jsonl'}:{line}" for line in (1, 2, 3)]
    assert [one.target for one in read(tmp_path, {"prompt": "p"} | labels[3])] == [1]
    assert [one.target for one in read(tmp_path, ONE | {"score": -7.5}, probability=False)] == [-7.5]
    assert read(tmp_path, ONE | {"label": 1, "kind": "x"}, fields=["kind"])[0].fields == {"kind": "x"}
    lists = {
        "prompt": "p",
        "completions": ["a", "b", "c"],
        "scores": [1, None, 0],
        "completions_cut": [True, None, None],
    }
    assert [(one.chosen, one.target, one.chosen_cut) for one in read(tmp_path, lists)] == [
        ("a", 1, True),
        ("c", 0, False),
    ]
    columns = {"prompt": "ask", "completion": "said", "is_correct": "good"}
    assert read(tmp_path, {"ask": "p", "said": "a", "good": 0.5, "label": 1}, columns=columns)[0].target == 0.5


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (ONE, "field 'is_correct' is missing"),
        (ONE | {"label": "good"}, "field 'label' is str, not a finite number"),
        (ONE | {"label": 1.5}, "field 'label' is 1.5: --loss bce needs true, false or a number from 0 to 1"),
        (ONE | {"score": -1}, "field 'score' is -1: --loss bce needs"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]}, r"field 'scores\[1\]' is 2: --loss bce needs"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1]}, "field 'scores' has 1 entries for 2 completions"),
        (
            ONE | {"label": True, "score": 4},
            "is judged by 'label' and 'score': name one of them, as in --columns prompt",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "field 'completion' is missing"),
        ({"prompt": "p", "completion": "", "label": True}, "field 'completion' is empty"),
    ],
)
def test_a_bad_record_is_named_by_file_line_and_field(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    good = ONE | {"label": True} if "completion" in record else {"prompt": "p", "completions": ["a"], "scores": [0]}
    with pytest.raises(UserError, match=rf"r\.jsonl:2: {said}") as refused:
        read(tmp_path, good, record)
    assert "\n" not in str(refused.value)
    bad = BadRecords(skip=True)
    assert len(read(tmp_path, good, record, bad=bad)) == 1
    assert len(bad.skipped) == 1


def test_infinite_scores_and_no_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"r\.jsonl:1: field 'score' is not a finite number"):
        read(tmp_path, ONE | {"score": float("nan")}, probability=False)
    with pytest.raises(UserError, match=r"r\.jsonl: contains no completion with a score"):
        read(tmp_path, {"prompt": "p", "completions": ["a"], "scores": [None]})


def test_tokens_and_overlap_count_a_completion_once(tmp_path: Path) -> None:
    judged = read(tmp_path, ONE | {"label": True}, {"prompt": "q", "completion": "b b", "label": False})
    tokenized, report = tokenize_pairs(tokenizer(), judged, 50)
    assert [one.target for one in tokenized] == [1, 0]
    assert len(report.completions) == 2
    assert overlap(judged, judged) == Overlap(prompts=2, completions=2, example=judged[0].where)
    with pytest.raises(UserError, match="all 2 completions are longer than --max-length 3"):
        tokenize_pairs(tokenizer(), judged, 3)
