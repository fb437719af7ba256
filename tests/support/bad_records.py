"""Bad data: files, records, fields, options that do not go with the data."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
from pyarrow import parquet

from gcrm_fast.checkpoints.saving import save_model
from gcrm_fast.data.tokenization import choose_pad
from support.bad_input import Case
from support.chat import CHATML, LLAMA2, chat_tokenizer
from support.small import small_config, small_model

Build = Callable[[Path], list[str]]

GOOD = {"prompt": "p", "chosen": "yes", "rejected": "no"}
QUESTION = {"question": "q", "correct": "yes", "incorrect": "no"}
SCORED = {"prompt": "p", "completions": ["yes", "no"], "scores": [1, 0]}
HEAD = "\n\nHuman: a\n\nAssistant:"
DIALOGUE = {"chosen": HEAD + " yes", "rejected": HEAD + " no"}
USER = {"role": "user", "content": "q"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
CHAT = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
LINE = json.dumps(GOOD).encode() + b"\n"
PACKED = gzip.compress(LINE * 50)


def raw(content: bytes, name: str = "pairs.jsonl") -> Build:
    """A file of these bytes."""

    def build(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return ["--data", name]

    return build


def lines(*records: Any, options: tuple[str, ...] = ()) -> Build:
    """A file of these records."""
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    return lambda folder: [*raw(content)(folder), *options]


def after(good: dict[str, Any], **changes: Any) -> Build:
    """A good record, then the same with changes; a field changed to ``...`` is omitted."""
    return lines(good, {k: v for k, v in {**good, **changes}.items() if v is not ...})


def chat(template: str, *records: Any) -> Build:
    """Records for a model whose tokenizer has this chat template, '' for none."""

    def build(folder: Path) -> list[str]:
        tokenizer = chat_tokenizer(template)
        config = small_config(vocab_size=len(tokenizer))
        choose_pad(tokenizer, len(tokenizer), "test")
        state = {name: p.detach() for name, p in small_model(config, torch.float32).named_parameters()}
        save_model(folder / "model", state, config, tokenizer, torch.ones(config.hidden_size), 1)
        return [*lines(*records)(folder), "--model", "model"]

    return build


def table(*records: Any, damage: Callable[[bytes], bytes] = bytes) -> Build:
    """A Parquet file of these records, its bytes changed by ``damage``."""

    def build(folder: Path) -> list[str]:
        path = folder / "pairs.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
        path.write_bytes(damage(path.read_bytes()))
        return ["--data", path.name]

    return build


def not_text_in_parquet(folder: Path) -> list[str]:
    bad = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(np.array([0, 3, 5], dtype=np.int32)), pyarrow.py_buffer(b"yes\xff\xfe")
    )
    columns = {"prompt": pyarrow.array(["p", "p"]), "chosen": bad, "rejected": pyarrow.array(["no", "no"])}
    parquet.write_table(pyarrow.table(columns), folder / "pairs.parquet")
    return ["--data", "pairs.parquet"]


def saved(folder: Path) -> Path:
    datasets.DatasetDict({"train": datasets.Dataset.from_list([GOOD])}).save_to_disk(folder / "saved")
    return folder / "saved"


def no_split(folder: Path) -> list[str]:
    saved(folder)
    return ["--data", "saved"]


def no_such_split(folder: Path) -> list[str]:
    saved(folder)
    return ["--data", "saved:test"]


def damaged_dataset(folder: Path) -> list[str]:
    [arrow] = (saved(folder) / "train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    return ["--data", "saved:train"]


def folder_of_files(folder: Path) -> list[str]:
    (folder / "data").mkdir()
    (folder / "data" / "pairs.jsonl").write_bytes(LINE)
    return ["--data", "data"]


def no_such_shards(folder: Path) -> list[str]:
    (folder / "data").mkdir()
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        parquet.write_table(pyarrow.Table.from_pylist([GOOD]), folder / "data" / name)
    return ["--data", "data:dev"]


def looped_link(folder: Path) -> list[str]:
    (folder / "pairs.jsonl").symlink_to("pairs.jsonl")
    return ["--data", "pairs.jsonl"]


def second_source(folder: Path) -> list[str]:
    (folder / "good.jsonl").write_bytes(LINE)
    return ["--data", "good.jsonl", *lines(GOOD, {})(folder)[1:]]


def held_out(*records: Any) -> Build:
    def build(folder: Path) -> list[str]:
        (folder / "train.jsonl").write_bytes(LINE)
        return ["--eval-data", lines(*records)(folder)[1], "--data", "train.jsonl"]

    return build


def unknown_to_the_hub(folder: Path) -> list[str]:
    return ["--data", "no-such-owner/no-such-data"]


def endless_line(folder: Path) -> list[str]:
    """A line of 300 MiB in a small file, while bad records are skipped."""
    packed = gzip.compress(LINE) + gzip.compress(b"x" * 2**20) * 300  # members of one file
    return [*raw(packed)(folder), "--on-bad-record", "skip"]


def pipe(folder: Path) -> list[str]:
    os.mkfifo(folder / "pairs.jsonl")
    return ["--data", "pairs.jsonl"]


AT = r"pairs\.jsonl:2: "

CASES = [
    # ---- the file
    Case("no such file", lambda _: ["--data", "none.jsonl"], r"none\.jsonl: cannot be read \(No such file"),
    Case("pipe", pipe, r"pairs\.jsonl: is not a regular file"),
    Case(
        "field named twice",
        raw(LINE + b'{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "c"}\n'),
        AT + r"not valid JSON \(field 'chosen' occurs twice",
    ),
    Case("folder of files", folder_of_files, r"data: not a folder .*: pass a file, such as data/pairs\.jsonl$"),
    Case("link to itself", looped_link, r"pairs\.jsonl: cannot be read \(Too many levels"),
    Case("name too long", lambda _: ["--data", "x" * 300], r"xx: cannot be read \(File name too long"),
    Case("empty name", lambda _: ["--data", ""], r"--data: must be at least one source"),
    Case("no source at all", lambda _: ["--data"], r"--data: must be at least one source"),
    Case("not on the hub", unknown_to_the_hub, r"no-such-owner/no-such-data: neither a file nor a dataset"),
    Case("empty file", raw(b""), r"pairs\.jsonl: contains no records"),
    Case("blank lines", raw(b" \n\n\t\n"), r"pairs\.jsonl: contains no records"),
    Case("blank lines without end", raw(gzip.compress(LINE + b"\n" * 2**21)), r":1048578: more than 1 MiB of blank"),
    Case("line without end", endless_line, r"pairs\.jsonl:2: the line has more than 256 MiB"),
    Case("JSON array of spaces", raw(gzip.compress(b"[" + b" " * 2**25)), "the array begins with more than 16 MiB"),
    Case("bzip2", raw(bz2.compress(LINE)), r"pairs\.jsonl: is bzip2: decompress it"),
    Case("xz", raw(lzma.compress(LINE)), r"pairs\.jsonl: is xz: decompress it"),
    Case("Zstandard", raw(b"(\xb5/\xfd$\0\x01\0\0"), r"pairs\.jsonl: is Zstandard: decompress it"),
    Case("empty gzip", raw(gzip.compress(b"")), r"pairs\.jsonl: contains no records"),
    Case("broken UTF-8", raw(LINE + b'{"prompt": "\xff"}\n'), AT + r"not UTF-8 text \(byte 12 of the line\)"),
    Case("UTF-16", raw(json.dumps(GOOD).encode("utf-16")), r"pairs\.jsonl:1: not UTF-8 text \(byte 0"),
    Case("byte-order mark", raw(b"\xef\xbb\xbf" + LINE), r"pairs\.jsonl:1: not valid JSON \(Unexpected UTF-8 BOM"),
    *(
        Case(
            f"{name} of text",
            raw(b"prompt,chosen,rejected\np,yes,no\n", name),
            rf"{name}: is a table of text \(CSV\), which is not read: convert it to JSON lines: pandas\.read_csv",
        )
        for name in ("pairs.csv", "PAIRS.TSV")
    ),
    Case("cut line", raw(LINE + b'{"prompt": "p",\n'), AT + "not valid JSON"),
    Case("two records on a line", raw(LINE + LINE.strip() + LINE), AT + r"not valid JSON \(Extra data"),
    Case("JSON array cut short", raw(json.dumps([GOOD, GOOD]).encode()[:-1]), r"jsonl:3: not a valid JSON array"),
    Case("JSON array with a number in it", raw(json.dumps([GOOD, 7]).encode()), AT + "a record must be a JSON object"),
    Case("JSON array in a damaged gzip", raw(gzip.compress(json.dumps([GOOD]).encode())[:-9]), "gzip data is damaged"),
    Case("JSON array with more after it", raw(json.dumps([GOOD]).encode() + LINE), r"jsonl:2: not a valid JSON array"),
    Case(
        "no such split of Parquet files", no_such_shards, r"data:dev: has Parquet files of other splits: .*data:train"
    ),
    Case(
        "judgments of one kind",
        lines({"prompt": "p", "completion": "a", "label": True}, {"prompt": "p", "completion": "b", "label": True}),
        r"jsonl: contains no pairs: the completions of every prompt have the same judgment",
    ),
    Case(
        "judgment as text",
        lines({"prompt": "p", "completion": "a", "label": "x"}),
        "field 'label' is str, not a finite number",
    ),
    Case(
        "fields of another data set",
        lines({"instruction": "p", "preferred": "x", "worse": "y"}),
        "a record needs .*: pass --columns prompt=instruction,chosen=preferred,rejected=worse",
    ),
    Case(
        "choice of no response",
        lines({"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 2}),
        "field 'better_response_id' is '2', not one of 0, 1",
    ),
    Case("deep nesting", raw(LINE + b"[" * 100_000 + b"\n"), AT + "not valid JSON"),
    Case("number too long to read", raw(LINE + b'{"margin": ' + b"9" * 5000 + b"}\n"), AT + "not valid JSON"),
    Case("huge row", raw(LINE + b'{"prompt": "' + b"x" * 2**24 + b'"}\n'), AT + "the line has more than 16 MiB"),
    Case("spaces before a record", raw(LINE + b" " * 2**24 + LINE), AT + "the line has more than 16 MiB"),
    Case(
        "100,000 fields, two of one name",
        raw(b"{" + b"".join(b'"%d":0,' % i for i in range(100_000)) + b'"7":1}\n'),
        r"jsonl:1: not valid JSON \(field '7' occurs twice",
    ),
    Case(
        "no line feed in sight",
        raw(LINE + gzip.compress(bytes(1), mtime=0) * 2**20),
        AT + "the line has more than 16 MiB",
    ),
    Case("gzip that unpacks to one line", raw(gzip.compress(b"x" * 2**26)), r"jsonl:1: the line has more than 16 MiB"),
    Case("gzip cut in the middle", raw(PACKED[:-20]), r"jsonl:\d+: gzip data is damaged"),
    Case("gzip cut in its trailer", raw(PACKED[:-4]), r"jsonl:51: gzip data is damaged"),
    Case("gzip with a wrong checksum", raw(PACKED[:-8] + bytes(4) + PACKED[-4:]), r"jsonl:51: gzip data is damaged"),
    Case("gzip with a wrong byte", raw(PACKED[:12] + b"\xff" + PACKED[13:]), r"jsonl:1: gzip data is damaged"),
    Case("gzip with more after it", raw(PACKED + b"more"), r"jsonl:51: gzip data is damaged"),
    Case("pickle", raw(b"\x80\x05\x95\x1a\x00\n\x00"), r"jsonl:1: not UTF-8 text"),
    Case("Parquet without an end", table(GOOD, damage=lambda b: b[:-10]), r"parquet:1: Parquet data is damaged"),
    Case(
        "Parquet with a wrong page",
        table(GOOD, damage=lambda b: b[:4] + bytes(40) + b[44:]),
        r"Parquet data is damaged",
    ),
    Case("Parquet with text that is none", not_text_in_parquet, r"pairs\.parquet:2: the row cannot be read"),
    Case(
        "Parquet with a null",
        table(GOOD, GOOD | {"chosen": None}),
        r"parquet:2: field 'chosen' is null: a record",
    ),
    Case("Parquet without rows", table(), r"pairs\.parquet: contains no records"),
    Case("saved splits, none named", no_split, r"saved: has several splits: .*saved:train"),
    Case("saved splits, another named", no_such_split, r"saved:test: has several splits: .*saved:train"),
    Case("saved dataset cut short", damaged_dataset, r"saved:train: not a folder that datasets can load"),
    Case("second of two sources", second_source, r"pairs\.jsonl:2: field 'chosen' is missing"),
    Case("held-out data", held_out({**GOOD, "prompt": "q"}, {}), AT + "field 'chosen' is missing"),
    # ---- a record's shape
    Case("list for a record", lines(GOOD, [1, 2]), AT + "a record must be a JSON object, this is list"),
    Case("null for a record", lines(GOOD, None), AT + "a record must be a JSON object, this is null"),
    Case("no fields", lines(GOOD, {}), AT + "field 'chosen' is missing: a record needs 'prompt', 'chosen', 'rejected'"),
    Case("fields unknown", lines({"instruction": "p", "output": "x"}), r"jsonl:1: field 'chosen' is missing"),
    Case("prompt missing", lines({"chosen": "a", "rejected": "b"}), r"jsonl:1: field 'prompt' is missing"),
    Case("rejected missing", after(GOOD, rejected=...), AT + "field 'rejected' is missing"),
    Case("incorrect missing", after(QUESTION, incorrect=...), AT + "field 'incorrect' is missing"),
    Case(
        "misspelled chosen",
        lines(GOOD, {"prompt": "p", "chosne": "yes", "rejected": "no"}),
        AT + "field 'chosen' is missing: did you misspell it as 'chosne'\\?$",
    ),
    Case(
        "misspelled prompt",
        lines(GOOD, {"promt": "p", "chosen": "yes", "rejected": "no"}),
        AT + "field 'prompt' is missing: did you misspell it as 'promt'\\?$",
    ),
    Case(
        "misspelled completions",
        lines(SCORED, {"prompt": "p", "completons": ["yes", "no"], "score": [1, 0]}),
        AT + "field 'completions' is missing: did you misspell it as 'completons'\\?$",
    ),
    Case(
        "other names than a misspelled one",
        lines(GOOD, {"prompt": "p", "chosen_id": 1, "chosen2": "yes", "rejected": "no"}),
        AT + "field 'chosen' is missing: a record needs .* it has 'prompt', 'chosen_id', 'chosen2', 'rejected': name",
    ),
    Case("scores missing", after(SCORED, scores=...), AT + "field 'scores' is missing"),
    Case("fields of two formats", after(SCORED, ranks=[1, 2]), AT + "has the fields of two formats, scores and ranks"),
    Case("mixed formats", lines(GOOD, QUESTION), AT + "has the format 'question', but .*jsonl:1 'prompt, chosen"),
    Case("dialogue among pairs", lines(GOOD, DIALOGUE), AT + "has the format 'dialogue', but"),
    # ---- a field's value
    Case("number for text", after(GOOD, prompt=1), AT + "field 'prompt' is int, not a string"),
    Case("null for text", after(GOOD, rejected=None), AT + "field 'rejected' is null"),
    Case("object for text", after(GOOD, chosen={"text": "yes"}), AT + "field 'chosen' is dict, not a string"),
    Case("empty completion", after(GOOD, chosen=""), AT + "field 'chosen' is empty"),
    Case("blank completion", after(GOOD, rejected=" \n\t"), AT + "field 'rejected' is empty"),
    Case(
        "equal completions",
        after(GOOD, rejected="yes"),
        AT + "field 'rejected' is equal to 'chosen', which is preferred",
    ),
    Case(
        "same tokens", after(GOOD, rejected="yes<|eos|>\n"), AT + "fields 'chosen' and 'rejected' have the same tokens"
    ),
    Case(
        "cut before its first token",
        after(GOOD, rejected="<|eos|>", rejected_cut=True),
        AT + "field 'rejected' is cut and has no token",
    ),
    Case(
        "half a surrogate pair", after(GOOD, prompt="\ud800"), AT + "field 'prompt' contains half of a surrogate pair"
    ),
    Case("NaN margin", after(GOOD, margin=float("nan")), AT + "field 'margin' is not a finite number"),
    Case("infinite margin", after(GOOD, margin=-float("inf")), AT + "field 'margin' is not a finite number"),
    Case("margin over every float", after(GOOD, margin=10**400), AT + "field 'margin' is not a finite number"),
    Case("text for a margin", after(GOOD, margin="1"), AT + "field 'margin' is str, not a finite number"),
    Case("boolean for a margin", after(GOOD, margin=True), AT + "field 'margin' is bool, not a finite number"),
    Case("number for a cut", after(GOOD, chosen_cut=1), AT + "field 'chosen_cut' is int, not true or false"),
    Case("question is null", after(QUESTION, question=None), AT + "field 'question' is null"),
    Case("incorrect is empty", after(QUESTION, incorrect=""), AT + "field 'incorrect' is empty"),
    Case("every chosen one cut", lines(GOOD | {"chosen_cut": True}), r"--data pairs\.jsonl: every chosen .* is cut"),
    # ---- completions with scores or ranks
    Case("completions no list", after(SCORED, completions="yes"), AT + "field 'completions' is str, not a list"),
    Case("scores null", after(SCORED, scores=None), AT + "field 'scores' is null"),
    Case("a score too few", after(SCORED, scores=[1]), AT + "field 'scores' has 1 entries for 2 completions"),
    Case(
        "one completion",
        after(SCORED, completions=["a"], scores=[1]),
        AT + "field 'completions' has 1 entry: at least two",
    ),
    Case("null completion", after(SCORED, completions=["a", None]), AT + r"field 'completions\[1\]' is null"),
    Case("empty one of many", after(SCORED, completions=["a", " "]), AT + r"field 'completions\[1\]' is empty"),
    Case("NaN score", after(SCORED, scores=[1, float("nan")]), AT + r"field 'scores\[1\]' is not a finite number"),
    Case(
        "text for a rank",
        lines({"prompt": "p", "completions": ["a", "b"], "ranks": [1, "2"]}),
        r"jsonl:1: field 'ranks\[1\]' is str",
    ),
    Case(
        "equal text, other score", after(SCORED, completions=["a", "a"]), AT + r"field 'completions\[1\]' is equal to"
    ),
    Case("all scores tie", lines(SCORED | {"scores": [1, 1]}), r"pairs\.jsonl: contains no pairs"),
    Case("cuts too few", after(SCORED, completions_cut=[True]), AT + "field 'completions_cut' has 1 entries"),
    # ---- raw dialogues
    Case(
        "no assistant turn",
        after(DIALOGUE, chosen="\n\nHuman: a"),
        AT + r"field 'prompt' is missing, and field 'chosen' is not a dialogue of .*: name the prompt's field, as in "
        r"--columns prompt=NAME,chosen=chosen,rejected=rejected",
    ),
    Case("no answer", after(DIALOGUE, chosen=HEAD + " "), AT + "field 'chosen' is empty"),
    Case(
        "ends with a human turn", after(DIALOGUE, rejected=HEAD + " b\n\nHuman: c"), AT + "field 'rejected' ends with a"
    ),
    Case(
        "other dialogues",
        after(DIALOGUE, rejected="\n\nHuman: b\n\nAssistant: c"),
        AT + "field 'rejected' differs from",
    ),
    # ---- message lists
    Case(
        "messages without a model", lines(CHAT), r"jsonl:1: field 'prompt' is a list of messages, which needs a model"
    ),
    Case("no chat template", chat("", CHAT), r"jsonl:1: field 'prompt' is a list of messages, which needs a model"),
    Case(
        "template refuses",
        chat(LLAMA2, CHAT, {**CHAT, "prompt": [YES]}),
        AT + r"field 'prompt' does not suit .*alternate",
    ),
    Case("null among messages", chat(CHATML, CHAT, {**CHAT, "chosen": [None]}), AT + r"field 'chosen\[0\]' is null"),
    Case(
        "null content",
        chat(CHATML, CHAT, {**CHAT, "rejected": [{**NO, "content": None}]}),
        AT + r"field 'rejected\[0\].content' is null, not a string",
    ),
    Case(
        "picture in a message",
        chat(CHATML, CHAT, {**CHAT, "prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}),
        AT + r"field 'prompt\[0\].content\[0\]' is of type 'image': only parts of type 'text' are read",
    ),
    Case(
        "number for a part of a message",
        chat(CHATML, CHAT, {**CHAT, "chosen": [{**YES, "content": [7]}]}),
        AT + r"field 'chosen\[0\].content\[0\]' is of type 'int'",
    ),
    Case(
        "call without an object",
        chat(CHATML, CHAT, {**CHAT, "chosen": [{**YES, "tool_calls": [7]}]}),
        AT + r"field 'chosen\[0\].tool_calls\[0\]' is int, not a call",
    ),
    Case(
        "arguments of a call that are no JSON",
        chat(CHATML, CHAT, {**CHAT, "chosen": [{**YES, "tool_calls": [{"function": {"arguments": "{"}}]}]}),
        AT + r"field 'chosen\[0\].tool_calls\[0\].function.arguments' is text, but not valid JSON",
    ),
    Case("tools no list", chat(CHATML, CHAT, {**CHAT, "tools": {"a": 1}}), AT + "field 'tools' is not a list of tools"),
    Case("tools no JSON", chat(CHATML, CHAT, {**CHAT, "tools": "wx"}), AT + "field 'tools' is text, but not a JSON"),
    Case(
        "two system messages",
        chat(CHATML, CHAT, {**CHAT, "prompt": [{"role": "system", "content": "a"}, USER], "system": "b"}),
        AT + "field 'system' differs from the system message of the prompt",
    ),
    Case(
        "system without a template", lines(GOOD | {"system": "s"}), "field 'prompt' is a list of messages, which needs"
    ),
    Case(
        "no role",
        chat(CHATML, CHAT, {**CHAT, "prompt": [{"content": "q"}]}),
        AT + r"field 'prompt\[0\].role' is missing: a message has 'role' and 'content'",
    ),
    Case(
        "null role",
        chat(CHATML, CHAT, {**CHAT, "prompt": [{**USER, "role": None}]}),
        AT + r"field 'prompt\[0\].role' is null, not a string",
    ),
    Case(
        "misspelled role",
        chat(CHATML, CHAT, {**CHAT, "prompt": [{"rol": "user", "content": "q"}]}),
        AT + r"field 'prompt\[0\].role' is missing: did you misspell it as 'rol'\?",
    ),
    Case(
        "no content",
        chat(CHATML, CHAT, {**CHAT, "prompt": [{"role": "user", "text": "q"}]}),
        AT + r"field 'prompt\[0\].content' is missing: a message has 'role' and 'content'",
    ),
    Case("no messages", chat(CHATML, CHAT, {**CHAT, "chosen": []}), AT + "field 'chosen' is an empty list"),
    Case(
        "text among messages",
        chat(CHATML, CHAT, {**CHAT, "rejected": "no"}),
        AT + "field 'rejected' is str, not a list",
    ),
    Case(
        "answer by the user", chat(CHATML, CHAT, {**CHAT, "chosen": [USER]}), AT + r"field 'chosen\[0\].role' is 'user'"
    ),
    Case(
        "empty answer",
        chat(CHATML, CHAT, {**CHAT, "chosen": [{**YES, "content": " "}]}),
        AT + "field 'chosen' is empty",
    ),
    Case("answer alone", chat(CHATML, {"chosen": [YES], "rejected": [NO]}), r"jsonl:1: field 'prompt' is missing, and"),
    Case(
        "dialogues that part early",
        chat(CHATML, CHAT, {**CHAT, "chosen": [NO, USER, YES], "rejected": [YES, USER, NO]}),
        AT + "field 'rejected' differs from 'chosen' before the answer",
    ),
    Case(
        "prompt of another dialogue",
        chat(CHATML, {**CHAT, "prompt": "other"}),
        r"jsonl:1: field 'prompt' is text, and no message of 'chosen' repeats it",
    ),
    Case(
        "template without a start",
        chat("{{ messages | length }}{{ messages[-1]['content'] }}", CHAT),
        r"jsonl:1: field 'chosen' changes how the chat template",
    ),
    # ---- options and the data
    Case(
        "column missing",
        lines(GOOD, options=("--columns", "chosen=good,rejected=rejected")),
        "field 'good', named by --columns",
    ),
    Case(
        "columns of half a format",
        lines(GOOD, options=("--columns", "prompt=prompt,chosen=good")),
        "--columns prompt=prompt,chosen=good: no other fields are read, so name all fields of a format",
    ),
    Case(
        "column of no field",
        lines(GOOD, options=("--columns", "choosen=chosen")),
        "--columns .*'choosen' is not one of",
    ),
    Case("columns not named", lines(GOOD, options=("--columns", "chosen")), "--columns chosen: must be NAME=COLUMN"),
    Case(
        "column read as text",
        lines(GOOD | {"good": 5}, options=("--columns", "prompt=prompt,chosen=good,rejected=rejected")),
        r"jsonl:1: field 'good' is int, not a string",
    ),
    Case(
        "--eval-by missing",
        lines(GOOD, options=("--eval-by", "kind", "--eval-data", "pairs.jsonl")),
        "field 'kind', named by --eval-by, is missing",
    ),
    Case(
        "--eval-by null",
        lines(GOOD | {"kind": None}, options=("--eval-by", "kind", "--eval-data", "pairs.jsonl")),
        "field 'kind', .* is null",
    ),
    Case(
        "all too long",
        lines(GOOD | {"chosen": "a b c d"}, options=("--max-length", "3")),
        "all 1 pairs are longer than --max-length 3",
    ),
    Case(
        "one too long",
        lines(GOOD, GOOD | {"chosen": "y " * 99}, options=("--max-length", "50", "--overlong", "error")),
        AT + "has .* tokens, more than --max-length 50",
    ),
    Case(
        "trained-on prompt",
        held_out({**GOOD, "prompt": "q"}, {**GOOD, "prompt": " p "}),
        AT + "field 'prompt' is also in the training data, as in 1 of 2",
    ),
    Case(
        "nothing but bad records",
        lines({}, {}, options=("--on-bad-record", "skip")),
        r"pairs\.jsonl: every record is bad; the first: .*pairs\.jsonl:1: field 'chosen'",
    ),
    Case(
        "same tokens everywhere",
        lines(GOOD | {"rejected": "yes<|eos|>"}, options=("--on-bad-record", "skip")),
        r"every pair is bad; the first: .*jsonl:1: fields 'chosen' and 'rejected' have the same tokens",
    ),
    Case("pack too small", lines(GOOD, options=("--tokens-per-batch", "4")), "--tokens-per-batch"),
    Case(
        "generated and read data",
        lambda _: ["--data", "arithmetic", "x.jsonl"],
        "--data arithmetic: generated data cannot be combined",
    ),
]
