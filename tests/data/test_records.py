"""Sources and formats of records, and what of them is in the training data."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.notes import warn_once
from gcrm_fast.data.chat import as_text
from gcrm_fast.data.encoding import tokenize_pairs
from gcrm_fast.data.overlap import Overlap, overlap
from gcrm_fast.data.records import Pair, ordered_pairs, read_pairs
from gcrm_fast.data.sources import BadRecords, check_present
from gcrm_fast.data.tokenization import train_tokenizer
from support.chat import CHATML, LLAMA2, TEMPLATES, TEXTS, TOOLS, chat_tokenizer

GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "yes"), ("assistant", "no"))
)


def write(path: Path, *records: object) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path, *records: object, **options: Any) -> list[Pair]:
    return read_pairs([str(write(path / "r.jsonl", *records))], **options)


def sides(pairs: list[Pair]) -> list[tuple[str, str, str]]:
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


# --------------------------------------------------------------------------------------------------------- sources


def test_reads_records_with_margin_fields_and_line_numbers(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n  \n" + json.dumps(GOOD | {"margin": 2, "kind": "x", "n": 3, "same": True}))
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: field 'kind'"):
        read_pairs([str(path)], fields=["kind"])
    first, second = read_pairs([str(path)])
    assert first == Pair("p", "a", "b", where=f"{path}:1")
    assert (second.margin, second.where) == (2.0, f"{path}:4")


def test_extra_fields_are_kept_with_their_types(tmp_path):
    extra = {"kind": "x", "n": 3, "share": 0.5, "same": True}
    assert read(tmp_path, GOOD | extra | {"other": None}, fields=list(extra))[0].fields == extra


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.jsonl"])
def test_gzip_is_told_by_content(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert sides(read_pairs([str(path)])) == [("p", "a", "b")]


RECORDS = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "n": i} for i in range(1500)]  # over one batch of rows


def test_every_source_gives_the_same_pairs_and_counts_from_one(tmp_path):
    table = pyarrow.Table.from_pylist(RECORDS)
    parquet.write_table(table, tmp_path / "rows.bin", row_group_size=400)  # told by content too
    dataset = datasets.Dataset.from_list(RECORDS)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk(tmp_path / "splits")
    write(tmp_path / "lines.jsonl", *RECORDS)
    for source in ("lines.jsonl", "rows.bin", "saved", "splits:train"):
        pairs = read_pairs([f"{tmp_path}/{source}"], fields=["n"])
        assert [(p.prompt, p.fields["n"]) for p in pairs] == [(r["prompt"], r["n"]) for r in RECORDS]
        assert pairs[1204].where == f"{tmp_path}/{source}:1205"
    several = read_pairs([f"{tmp_path}/splits:test", f"{tmp_path}/lines.jsonl"])
    assert [p.prompt for p in several] == ["p0", "p1", "p2"] + [r["prompt"] for r in RECORDS]


def test_hub_dataset_is_loaded_by_name_configuration_and_split(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_list(RECORDS[:2])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert read_pairs(["Some-one/pairs.v1"])[1].where == "Some-one/pairs.v1:2"
    read_pairs(["one/pairs/helpful:test[:10%]"])
    assert calls == [
        (("Some-one/pairs.v1", None), {"split": "train"}),
        (("one/pairs", "helpful"), {"split": "test[:10%]"}),
    ]
    with pytest.raises(UserError, match=r"^one/pairs\.jsonl: cannot be read \(No such file"):
        read_pairs(["one/pairs.jsonl"])
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "pairs", GOOD)
    assert sides(read_pairs(["one/pairs"])) == [("p", "a", "b")]  # what exists comes first


def test_a_source_that_is_absent_is_known_without_reading(tmp_path):
    file = write(tmp_path / "pairs.jsonl", GOOD)
    for source in (str(file), str(tmp_path), f"{tmp_path}:train", "owner/pairs", "owner/pairs/main:test[:10%]"):
        check_present(source)
    for source in (f"{file}x", "pairs", "owner/pairs.jsonl", "./owner/pairs"):
        with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\): expected a file"):
            check_present(source)


@pytest.mark.parametrize("module", ["datasets", "pyarrow"])
def test_missing_optional_library_is_named(tmp_path, monkeypatch, module):
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "r.parquet")
    monkeypatch.setitem(sys.modules, module, None)
    source = "one/pairs" if module == "datasets" else str(tmp_path / "r.parquet")
    with pytest.raises(UserError, match=rf"needs {module}: pip install 'gcrm-fast\[datasets\]'"):
        read_pairs([source])


def test_optional_libraries_are_imported_where_used_only():
    code = "import sys, gcrm_fast.data.sources; sys.exit(bool({'datasets', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


@pytest.mark.skipif("GCRM_DATA" not in os.environ, reason="GCRM_DATA does not name the folder of real data")
def test_reads_real_pairs():
    pairs = read_pairs([str(Path(os.environ["GCRM_DATA"]) / "gsm8k_pairs.jsonl.gz")], fields=["pair_type"])
    assert len(pairs) == 11294
    assert all(pair.chosen != pair.rejected and pair.fields["pair_type"] for pair in pairs)


# --------------------------------------------------------------------------------------------------------- formats


def test_question_correct_incorrect(tmp_path):
    [pair] = read(tmp_path, {"question": "q", "correct": "c", "incorrect": "i", "margin": 1, "incorrect_cut": True})
    assert sides([pair]) == [("q", "c", "i")]
    assert (pair.margin, pair.chosen_cut, pair.rejected_cut) == (1.0, False, True)


def test_raw_dialogue_is_split_at_its_last_assistant_turn(tmp_path):
    before = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert sides(read(tmp_path, {"chosen": before + " yes", "rejected": before + " no"})) == [(before, " yes", " no")]


@pytest.mark.parametrize(("order", "values"), [("scores", [0.5, 2, 0.5]), ("ranks", [2, 1, 2])])
def test_scores_and_ranks_give_better_and_worse(tmp_path, order, values):
    record = {"prompt": "p", "completions": ["x", "y", "z"], order: values, "completions_cut": [True, False, False]}
    tied = record | {"completions": ["x", "x", "x"], order: [1, 1, 1]}
    pairs = read(tmp_path, record, tied)
    assert sorted(sides(pairs)) == [("p", "y", "x"), ("p", "y", "z")]  # x and z tie, and all of the second record
    assert {(p.rejected, p.chosen_cut, p.rejected_cut) for p in pairs} == {("x", False, True), ("z", False, False)}
    assert len(read(tmp_path, record, pairs_per_prompt=1)) == 1


@given(st.lists(st.integers(0, 3), max_size=9), st.integers(0, 12))
def test_ordered_pairs_are_each_once_and_right_way_round(values, limit):
    every = {(i, j) for i, a in enumerate(values) for j, b in enumerate(values) if a > b}
    pairs = ordered_pairs(values, limit)
    assert len(set(pairs)) == len(pairs) == min(len(every), limit or len(every))
    assert set(pairs) <= every


def test_limited_pairs_take_every_completion_alike():
    values = [i % 2 for i in range(100)]
    pairs = ordered_pairs(values, 50)
    assert sorted(i for pair in pairs for i in pair) == list(range(100))


def test_columns(tmp_path):
    record = {"instruction": "p", "good": "a", "bad": "b", "prompt": 7, "chosen": None, "gap": 2, "rejected_cut": 7}
    columns = {"prompt": "instruction", "chosen": "good", "rejected": "bad", "margin": "gap"}
    [pair] = read(tmp_path, record, columns=columns, fields=["prompt"])
    assert (*sides([pair]), pair.margin, pair.fields) == (("p", "a", "b"), 2.0, {"prompt": 7})
    with pytest.raises(UserError, match=r"r.jsonl:1: field 'good', named by --columns for 'chosen', is missing"):
        read(tmp_path, {"instruction": "p"}, columns=columns)
    with pytest.raises(UserError, match=r"r.jsonl:1: field 'good' is int, not a string"):
        read(tmp_path, record | {"good": 1}, columns=columns)


# --------------------------------------------------------------------------------------------------- message lists


END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": "<|eos|>"}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": None, "chosen": [USER, YES | {"name": None}], "rejected": [USER, NO]},  # as tables have it
        {"prompt": "q", "chosen": [USER, YES], "rejected": [USER, NO]},  # as UltraFeedback has it
        {"prompt": [USER], "completions": [[YES], [NO]], "scores": [1, 0]},
        {"question": [USER], "correct": [YES], "incorrect": [NO]},
    ],
)
def test_messages_are_written_by_the_chat_template(tmp_path, name, record):
    tokenizer = chat_tokenizer(TEMPLATES[name])
    before = {
        "chatml": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "llama3": "<|bos|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "llama2": "<|bos|>[INST] q [/INST]",
    }[name]
    written = {"chatml": "{}<|im_end|>\n", "llama3": "{}<|eot_id|>", "llama2": " {} <|eos|>"}[name]
    pairs = read(tmp_path, record, tokenizer=tokenizer)
    assert sides(pairs) == [(before, written.format("yes"), written.format("no"))]
    [pair], report = tokenize_pairs(tokenizer, pairs, 100)
    for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
        assert np.flatnonzero(ids == tokenizer.bos_token_id).tolist() == [0]
        answer = tokenizer.decode(ids[start:])
        assert answer.removesuffix(END[name]).strip() in ("yes", "no")
        assert answer.endswith(END[name])
    assert report.ending_summary() == "2 of their own, 0 with eos added, 0 cut"


def test_only_the_last_message_is_the_completion(tmp_path):
    first = [USER, YES, USER]
    record = {"prompt": first[:1], "chosen": [*first[1:], NO], "rejected": [*first[1:], YES]}
    [pair] = read(tmp_path, record, tokenizer=chat_tokenizer(CHATML))
    assert pair.prompt.count("yes") == 1
    assert (pair.chosen, pair.rejected) == ("no<|im_end|>\n", "yes<|im_end|>\n")


# Its generation prompt opens a thought, which the answers of a finished dialogue do not have.
THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "wx", "arguments": {"city": "Oslo"}}}],
}
AFTER_CALL = [USER, CALL, {"role": "tool", "content": "7"}]
WRITTEN_USER, WRITTEN_CALL = "<|im_start|>user\nq<|im_end|>", "<|im_start|>assistant\n[wx Oslo]<|im_end|><|eot_id|>"
ASK, END_OF_TURN = "<|im_start|>assistant\n", "<|im_end|><|eot_id|>"


@pytest.mark.parametrize(
    ("record", "prompt", "chosen"),
    [
        (
            {"prompt": [USER], "chosen": [YES], "rejected": [NO], "tools": [{"name": "wx", "default": None}]},
            f"<|start_header_id|>wx<|end_header_id|>{WRITTEN_USER}{ASK}",
            f"yes{END_OF_TURN}",
        ),
        (
            {"prompt": [USER], "chosen": [YES], "rejected": [NO], "tools": '[{"name": "a"}, {"name": "b"}]'},
            f"<|start_header_id|>a,b<|end_header_id|>{WRITTEN_USER}{ASK}",
            f"yes{END_OF_TURN}",
        ),
        (
            {"prompt": AFTER_CALL, "chosen": [YES], "rejected": [NO]},
            f"{WRITTEN_USER}{WRITTEN_CALL}<|im_start|>tool\n7<|im_end|>{ASK}",
            f"yes{END_OF_TURN}",
        ),
        (
            {"chosen": [*AFTER_CALL, YES], "rejected": [*AFTER_CALL, NO]},
            f"{WRITTEN_USER}{WRITTEN_CALL}<|im_start|>tool\n7<|im_end|>{ASK}",
            f"yes{END_OF_TURN}",
        ),
        (
            {"prompt": [USER], "chosen": [*AFTER_CALL[1:], YES], "rejected": [NO]},
            f"{WRITTEN_USER}{ASK}",
            f"[wx Oslo]{END_OF_TURN}<|im_start|>tool\n7<|im_end|>{ASK}yes{END_OF_TURN}",
        ),
        ({"prompt": [USER], "chosen": [CALL], "rejected": [NO]}, f"{WRITTEN_USER}{ASK}", f"[wx Oslo]{END_OF_TURN}"),
        (
            {"prompt": "q", "chosen": "yes", "rejected": "no", "system": "s"},
            f"<|im_start|>system\ns<|im_end|>{WRITTEN_USER}{ASK}",
            f"yes{END_OF_TURN}",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
            | {"chosen": [YES], "rejected": [NO]},
            f"<|im_start|>user\nab<|im_end|>{ASK}",
            f"yes{END_OF_TURN}",
        ),
        (
            {"prompt": json.dumps([USER]), "chosen": json.dumps([YES]), "rejected": json.dumps([NO])},
            f"{WRITTEN_USER}{ASK}",
            f"yes{END_OF_TURN}",
        ),
        (
            {
                "prompt": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
            },
            f"{WRITTEN_USER}{ASK}",
            f"yes{END_OF_TURN}",
        ),
        ({"prompt": [USER], "chosen": "yes", "rejected": "no"}, f"{WRITTEN_USER}{ASK}", f"yes{END_OF_TURN}"),
    ],
    ids=[
        "tools",
        "tools as JSON text",
        "call in the prompt",
        "call in both dialogues",
        "answer of several messages",
        "answer that is a call",
        "system next to text",
        "parts of text",
        "messages as JSON text",
        "from and value",
        "answers as text",
    ],
)
def test_what_a_dialogue_may_hold(tmp_path, record, prompt, chosen):
    tokenizer = chat_tokenizer(TOOLS)
    pairs = read(tmp_path, record, tokenizer=tokenizer)
    assert [(pair.prompt, pair.chosen) for pair in pairs] == [(prompt, chosen)]
    [pair], report = tokenize_pairs(tokenizer, pairs, 1000)
    assert tokenizer.decode(pair.chosen_ids[-2:]) == END_OF_TURN
    assert report.ending_summary() == "2 of their own, 0 with eos added, 0 cut"
    sides = {name: record[name] for name in ("chosen", "rejected")}
    if "rejected_cut" not in record and isinstance(record.get("prompt"), list):
        for name, expected in (("chosen", chosen), ("rejected", f"no{END_OF_TURN}")):
            text = as_text(tokenizer, record["prompt"], sides[name], tools=record.get("tools"))
            assert text == (prompt, expected)


def test_cut_answer_loses_both_tokens_that_end_its_turn(tmp_path):
    tokenizer = chat_tokenizer(TOOLS)
    record = {"prompt": [USER], "chosen": [YES], "rejected": [NO], "chosen_cut": True}
    [pair], _ = tokenize_pairs(tokenizer, read(tmp_path, record, tokenizer=tokenizer), 1000)
    assert tokenizer.decode(pair.chosen_ids[pair.chosen_start :]) == "yes"


@pytest.mark.parametrize("thought", ["", "<think>\nhm</think>"])
def test_generation_prompt_that_opens_a_thought(tmp_path, thought):
    answer = YES | {"content": thought + "yes"}
    record = {"prompt": [USER], "chosen": [answer], "rejected": [NO]}
    pairs = read(tmp_path, record, tokenizer=chat_tokenizer(THOUGHT))
    assert sides(pairs) == [(WRITTEN_USER + ASK, "yes<|im_end|>", "no<|im_end|>")]


def test_ends_of_turns_come_from_the_record_where_the_probe_is_refused(tmp_path):
    tokenizer = chat_tokenizer(
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML
    )
    record = {"prompt": [USER], "chosen": [YES], "rejected": [NO], "system": "s"}
    pairs = read(tmp_path, record, tokenizer=tokenizer)
    _, report = tokenize_pairs(tokenizer, pairs, 1000)
    assert report.ending_summary() == "2 of their own, 0 with eos added, 0 cut"


def test_template_that_does_not_write_tools_is_named_once(tmp_path, capsys):
    warn_once.cache_clear()
    record = {"prompt": AFTER_CALL, "chosen": [YES], "rejected": [NO], "tools": [{"name": "wx"}]}
    [pair, _] = read(tmp_path, record, record, tokenizer=chat_tokenizer(CHATML))
    assert "None" not in pair.prompt
    assert capsys.readouterr().err.splitlines() == [
        f"gcrm: warning: the chat template of this model does not write {what}: they are missing from the text"
        for what in ("tool calls", "tools")
    ]


def test_arguments_of_calls_are_text_where_the_template_adds_them(tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + c.function.arguments }}{% endfor %}<|im_end|>{% endfor %}"
    )
    record = {"prompt": [USER], "chosen": [CALL | {"content": ""}], "rejected": [NO | {"tool_calls": []}]}
    [pair] = read(tmp_path, record, tokenizer=chat_tokenizer(template))
    assert (pair.chosen, pair.rejected) == ('<|im_start|>wx{"city": "Oslo"}<|im_end|>', "<|im_start|>no<|im_end|>")


def test_an_answer_that_the_template_does_not_write_is_refused(tmp_path):
    record = {"prompt": [USER], "chosen": [CALL], "rejected": [NO]}
    with pytest.raises(UserError, match="field 'chosen' is a call, which the chat template of the model does not"):
        read(tmp_path, record, tokenizer=chat_tokenizer(CHATML))


def test_template_that_writes_a_system_message_only_before_an_answer(tmp_path, capsys):
    """As Mistral's: the answer starts where it does in the whole dialogue, which is what other trainers read."""
    warn_once.cache_clear()
    tokenizer = chat_tokenizer(
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system }}\n{% endif %}"
        "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    record = {"system": "s", "prompt": [USER, YES, USER], "chosen": [YES], "rejected": [NO]}
    pairs = read(tmp_path, record, record, tokenizer=tokenizer)
    assert sides(pairs)[0] == ("[INST] q[/INST] yes<|eos|>[INST] q[/INST] ", "yes<|eos|>", "no<|eos|>")
    [warning] = capsys.readouterr().err.splitlines()
    assert "writes an answered prompt otherwise" in warning


@pytest.mark.parametrize("template", [CHATML, THOUGHT, TOOLS, LLAMA2])
def test_plain_text_for_a_chat_model_is_warned_of_once(tmp_path, capsys, template):
    warn_once.cache_clear()
    tokenizer = chat_tokenizer(template)
    [rendered] = read(tmp_path, {"prompt": [USER], "chosen": [YES], "rejected": [NO]}, tokenizer=tokenizer)
    written = {"prompt": rendered.prompt, "chosen": rendered.chosen, "rejected": rendered.rejected}
    read(tmp_path, written, tokenizer=tokenizer)
    read(tmp_path, {"prompt": "", **{side: rendered.prompt + written[side] for side in ("chosen", "rejected")}})
    assert capsys.readouterr().err == ""
    read(tmp_path, GOOD, GOOD, tokenizer=tokenizer)
    [line] = capsys.readouterr().err.splitlines()
    assert "plain text, although the model has a chat template" in line
    tokenizer.chat_template = None
    warn_once.cache_clear()
    read(tmp_path, GOOD, tokenizer=tokenizer)
    assert capsys.readouterr().err == ""


def test_template_that_fails_without_text_or_tools(tmp_path):
    """It adds strings, so null fails; and it cannot be asked what it writes without tools."""
    template = (
        "{{ tools[0].name }}{% for m in messages %}{{ '<|im_start|>' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    record = {"prompt": AFTER_CALL, "chosen": [YES], "rejected": [NO], "tools": [{"name": "wx"}]}
    [pair] = read(tmp_path, record, tokenizer=chat_tokenizer(template))
    assert pair.prompt == "wx<|im_start|>q<|im_end|><|im_start|>wx<|im_end|><|im_start|>7<|im_end|><|im_start|>"


def test_judgments_are_paired_within_a_prompt_and_capped(tmp_path):
    records = [{"prompt": f"p{i % 2}", "completion": f"c{i}", "is_correct": i % 4 < 2} for i in range(16)]
    bad = BadRecords()
    pairs = read(tmp_path, *records, {"prompt": "alone", "completion": "c", "is_correct": True}, bad=bad)
    assert len(pairs) == 2 * 4 * 4
    assert all(pair.prompt == f"p{int(side[1:]) % 2}" for pair in pairs for side in (pair.chosen, pair.rejected))
    assert bad.tied == 1
    assert len(read(tmp_path, *records, pairs_per_prompt=3)) == 6


def test_json_array_and_shards_of_the_hub(tmp_path):
    (tmp_path / "array.json").write_text(json.dumps(RECORDS[:3], indent=1))
    packed = tmp_path / "array.json.gz"
    packed.write_bytes(gzip.compress((tmp_path / "array.json").read_bytes()))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for name, part in (("train-00001-of-00002", 2), ("train-00000-of-00002", 1), ("test-00000-of-00001", 0)):
        parquet.write_table(pyarrow.Table.from_pylist([RECORDS[part]]), tmp_path / "hub" / "data" / f"{name}.parquet")
    for source, expected in (
        ("array.json", [0, 1, 2]),
        ("array.json.gz", [0, 1, 2]),
        ("hub", [1, 2]),
        ("hub:test", [0]),
    ):
        pairs = read_pairs([f"{tmp_path}/{source}"], fields=["n"])
        assert [pair.fields["n"] for pair in pairs] == expected
    assert read_pairs([str(packed)])[2].where == f"{packed}:3"


def test_null_means_absent(tmp_path):
    optional = {"margin": None, "chosen_cut": None, "tools": None, "system": None, "completions": None}
    [pair] = read(tmp_path, GOOD | optional)
    assert (pair.margin, pair.chosen_cut) == (0.0, False)
    lists = {"prompt": "p", "completions": ["x", "y", "z"], "completions_cut": [True, None, None]}
    for order, values in (("scores", [1, None, 0]), ("ranks", [1, None, 2]), ("is_correct", [True, None, False])):
        [pair] = read(tmp_path, lists | {order: values})
        assert (*sides([pair]), pair.chosen_cut, pair.rejected_cut) == (("p", "x", "z"), True, False)
    with pytest.raises(UserError, match=r"completions\[1\]' is null"):
        read(tmp_path, lists | {"completions": ["x", None, "z"], "scores": [1, 2, 3]})


# ------------------------------------------------------------------------------------------------------ bad records


def test_skipped_records_are_listed_and_the_rest_is_read(tmp_path):
    path = write(tmp_path / "r.jsonl", GOOD, GOOD | {"chosen": 1}, 7, GOOD | {"chosen": "c"})
    with path.open("ab") as file:
        file.write(b'{"prompt": "\xff"}\n' + b"{" + b" " * (2**24 + 5) + b"\n" + json.dumps(GOOD).encode())
    bad = BadRecords(skip=True)
    assert [p.where for p in read_pairs([str(path)], bad=bad)] == [f"{path}:{n}" for n in (1, 4, 7)]
    assert [line.split(": ")[0] for line in bad.skipped] == [f"{path}:{n}" for n in (2, 3, 5, 6)]


VALID = [
    GOOD,
    {"question": "q", "correct": "c", "incorrect": "i"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "p", "completions": ["x", "y"], "scores": [1, 2.5], "completions_cut": [False, True]},
    {"prompt": "p", "completions": ["x", "y"], "ranks": [2, 1]},
    {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    {"chosen": [USER, YES], "rejected": [USER, NO], "margin": 0.5, "chosen_cut": True},
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A valid record with some of its parts, at any depth, replaced, removed or doubled."""
    record = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = record
        while parent:
            key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
            if not isinstance(parent[key], (dict, list)) or not parent[key] or draw(st.booleans()):
                break
            parent = parent[key]
        if not parent:
            continue
        action = draw(st.sampled_from(["replace", "remove", "double", "other"]))
        if action == "replace":
            parent[key] = draw(junk)
        elif action == "remove":
            del parent[key]
        elif action == "other" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["prompt", "chosen", "scores", "role", "content", "margin"]))] = parent[key]
        elif isinstance(parent, list):
            parent.append(parent[key])
    return record


PLAIN = train_tokenizer(TEXTS, 300)
MUTATED_TOKENIZERS = [None, *map(chat_tokenizer, TEMPLATES.values())]


@settings(max_examples=400, deadline=None)
@given(record=mutated(), tokenizer=st.sampled_from(MUTATED_TOKENIZERS), flip=st.integers(0, 400) | st.none())
def test_a_mutated_record_is_read_or_refused_in_one_line(tmp_path_factory, record, tokenizer, flip):
    line = bytearray(json.dumps(record), "utf-8")
    if flip is not None:
        line[flip % len(line)] ^= 0x81
    path = tmp_path_factory.mktemp("mutated") / "r.jsonl"
    path.write_bytes(bytes(line))
    bad = BadRecords(skip=True)
    pairs, end = [], ""
    try:
        pairs, _ = tokenize_pairs(
            tokenizer or PLAIN, read_pairs([str(path)], tokenizer=tokenizer, bad=bad), 10**6, bad=bad
        )
    except UserError as error:
        end = str(error)
    assert bool(end) != bool(pairs)
    assert all(line.split(": ")[0] == f"{path}:1" and len(line.splitlines()) == 1 for line in bad.skipped)
    assert len(end.splitlines()) <= 1
    assert end.startswith((str(path), "every pair is bad; the first: ")) or not end
    assert all(p.chosen_start < len(p.chosen_ids) and p.rejected_start < len(p.rejected_ids) for p in pairs)


# --------------------------------------------------------------------------------------------------------- overlap


def test_overlap_by_prompt_and_by_completion():
    train = [Pair("What is  1+1?", "2", "3"), Pair("", "c", "d")]
    held_out = [
        Pair("What is\n1+1? ", "4", "5", where="e:1"),  # white space aside, the same prompt
        Pair("another", " 3\n", "2", where="e:2"),  # both completions
        Pair("", "x", "y", where="e:3"),  # an empty prompt says nothing
    ]
    assert overlap(train, held_out) == Overlap(prompts=1, completions=2, example="e:1")
    assert overlap(train, []) == Overlap(0, 0)


@pytest.mark.parametrize("limit", [0, 20])
def test_ties_by_the_ten_thousand_are_no_work(limit: int) -> None:
    """Each pair of tied items looked at by itself would take minutes."""
    assert ordered_pairs([1.0] * 30_000, limit) == []
    pairs = ordered_pairs([1.0] * 30_000 + [2.0], limit)
    assert len(pairs) == (limit or 30_000)
    assert all(better == 30_000 for better, _ in pairs)


def test_all_pairs_of_thousands_need_a_limit() -> None:
    """They would fill the memory."""
    with pytest.raises(UserError, match="2000 completions give more than 1,000,000 pairs: limit them with --pairs-per"):
        ordered_pairs(range(2000), 0)
    assert len(ordered_pairs(range(2000), 20)) == 20
