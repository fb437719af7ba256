"""Completions to score, in every format that records may have."""

import json
from pathlib import Path
from typing import Any

import pytest

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.records import COMPLETION_FORMATS, Candidate, parse_columns, read_completions
from gcrm_fast.data.sources import BadRecords
from support.chat import CHATML, chat_tokenizer

USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "yes"), ("assistant", "no"))
)
ASKED = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(path: Path, *records: object, **options: Any) -> list[Candidate]:
    return read_completions([write(path / "r.jsonl", *records)], tokenizer=chat_tokenizer(CHATML), **options)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, [("p", "c", "completion", False)]),
        ({"question": "p", "completion": "c", "completion_cut": True}, [("p", "c", "completion", True)]),
        (
            {"prompt": "p", "completions": ["c", "d"], "completions_cut": [False, True], "scores": [1, 2]},
            [("p", "c", "completions[0]", False), ("p", "d", "completions[1]", True)],
        ),
        ({"question": "p", "completions": ["c"]}, [("p", "c", "completions[0]", False)]),
        (
            {"prompt": "p", "chosen": "c", "rejected": "d", "rejected_cut": True},
            [("p", "c", "chosen", False), ("p", "d", "rejected", True)],
        ),
        (
            {"question": "p", "correct": "c", "incorrect": "d"},
            [("p", "c", "correct", False), ("p", "d", "incorrect", False)],
        ),
        (
            {"chosen": "\n\nHuman: p\n\nAssistant: c", "rejected": "\n\nHuman: p\n\nAssistant: d"},
            [
                ("\n\nHuman: p\n\nAssistant:", " c", "chosen", False),
                ("\n\nHuman: p\n\nAssistant:", " d", "rejected", False),
            ],
        ),
        ({"messages": [USER, YES]}, [(ASKED, "yes<|im_end|>\n", "messages", False)]),
        (
            {"messages": [USER, YES], "prompt": "q", "messages_cut": True},
            [(ASKED, "yes<|im_end|>\n", "messages", True)],
        ),
        ({"prompt": [USER], "completion": [YES]}, [(ASKED, "yes<|im_end|>\n", "completion", False)]),
        (
            {"prompt": [USER], "completions": [[YES], [NO]]},
            [(ASKED, "yes<|im_end|>\n", "completions[0]", False), (ASKED, "no<|im_end|>\n", "completions[1]", False)],
        ),
        (
            {"chosen": [USER, YES], "rejected": [USER, NO]},
            [(ASKED, "yes<|im_end|>\n", "chosen", False), (ASKED, "no<|im_end|>\n", "rejected", False)],
        ),
    ],
)
def test_formats(tmp_path: Path, record: dict[str, Any], expected: list[tuple[str, str, str, bool]]) -> None:
    found = read(tmp_path, record)
    assert [(c.prompt, c.completion, c.name, c.cut) for c in found] == expected
    assert {(c.where, c.row) for c in found} == {(f"{tmp_path}/r.jsonl:1", 0)}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "field 'completion' is missing: a record needs 'prompt', 'completion', or"),
        ({"question": "p"}, "field 'completion' is missing: a record needs 'question', 'completion', or"),
        ({"prompt": "p", "question": "p", "completion": "c"}, "has the fields of two formats"),
        ({"prompt": "p", "completion": 3}, "field 'completion' is int, not a string"),
        ({"prompt": None, "completion": "c"}, "field 'prompt' is null"),
        ({"prompt": "p", "completion": "c", "completion_cut": 1}, "field 'completion_cut' is int, not true or false"),
        ({"prompt": "p", "completions": "c"}, "field 'completions' is str, not a list"),
        ({"prompt": "p", "completions": []}, "field 'completions' is an empty list: at least one"),
        ({"prompt": "p", "completions": ["c", ""]}, r"field 'completions\[1\]' is empty"),
        ({"prompt": "p", "completions": ["c"], "completions_cut": []}, "'completions_cut' has 0 entries for 1 comp"),
        ({"messages": "m"}, "field 'messages' is str, not a list"),
        ({"messages": [USER]}, r"field 'messages\[0\].role' is 'user': the last message must be by the 'assistant'"),
        ({"messages": [YES]}, "field 'prompt' is missing, and 'messages' contains only the answer"),
        ([1], "a record must be a JSON object"),
    ],
)
def test_bad_records_say_where(tmp_path: Path, record: object, message: str) -> None:
    with pytest.raises(UserError, match=rf"r\.jsonl:1: .*{message}"):
        read(tmp_path, record)
    bad = BadRecords(skip=True)
    good = {"prompt": "p", "completion": "c"}
    assert [c.row for c in read(tmp_path, good, record, good, bad=bad)] == [0, 1]
    assert len(bad.skipped) == 1


def test_fields_columns_and_several_sources(tmp_path: Path) -> None:
    record = {"prompt": "p", "completion": "c", "family": "x", "steps": [1]}
    assert read(tmp_path, record, fields=["steps", "family"])[0].fields == {"steps": [1], "family": "x"}
    assert read(tmp_path, record, fields=["*"])[0].fields == record
    with pytest.raises(UserError, match=r"r\.jsonl:1: field 'model' is missing"):
        read(tmp_path, record, fields=["family", "model"])
    columns = parse_columns("question=family,completion=prompt", COMPLETION_FORMATS)
    assert [(c.prompt, c.completion) for c in read(tmp_path, record, columns=columns)] == [("x", "p")]
    with pytest.raises(UserError, match="'margin' is not one of the fields chosen, chosen_cut, completion,"):
        parse_columns("margin=x", COMPLETION_FORMATS)
    with pytest.raises(UserError, match="so name all fields of a format: prompt, completion; "):
        parse_columns("completion=x", COMPLETION_FORMATS)
    first = write(tmp_path / "a", record, {"prompt": 1, "completion": "c"}, record)
    second = write(tmp_path / "b", {"question": "p", "correct": "c", "incorrect": "d"})
    found = read_completions([first, second], bad=BadRecords(skip=True))
    assert [(Path(c.where).name, c.row) for c in found] == [("a:1", 0), ("a:3", 1), ("b:1", 2), ("b:1", 2)]
    with pytest.raises(UserError, match=r"has the format 'completions', but .*:1 'completion': split the data"):
        read(tmp_path, record, {"prompt": "p", "completions": ["c"]})
