"""Records, tokenizers, the start and the end of a completion."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from gcrm_fast.data import (
    BOS,
    EOS,
    Pair,
    encode_completions,
    read_pairs,
    tokenize_pairs,
    train_tokenizer,
)
from gcrm_fast.errors import UserError

GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
TEXTS = ["hello world 123 yes.\n", "naïve café 漢字 漢字\n"] * 20
TOKENIZER = train_tokenizer(TEXTS, 300)


def write(path: Path, *records: object) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def encode(prompt: str, completion: str, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> tuple[list[str], list[str]]:
    """(prompt tokens, completion tokens), as the vocabulary spells them: 'Ġ' is a space, 'Ċ' a line feed."""
    [(ids, start)] = encode_completions(tokenizer, [prompt], [completion])
    assert ids.dtype == np.int32
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    return tokens[:start], tokens[start:]


def with_added_eos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts eos after every text, as some models' tokenizers do."""
    tokenizer = train_tokenizer(TEXTS, 300)
    special = [(BOS, tokenizer.bos_token_id), (EOS, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=special
    )
    return tokenizer


# --------------------------------------------------------------------------------------------------------- records


def test_reads_records_with_margin_fields_and_line_numbers(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n  \n" + json.dumps(GOOD | {"margin": 2, "kind": "x", "n": 3, "same": True}))
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: field 'kind'"):
        read_pairs(path, ["kind"])
    first, second = read_pairs(path)
    assert first == Pair("p", "a", "b", 0.0, f"{path}:1", {})
    assert (second.margin, second.where) == (2.0, f"{path}:4")


def test_extra_fields_are_kept_with_their_types(tmp_path):
    extra = {"kind": "x", "n": 3, "share": 0.5, "same": True}
    path = write(tmp_path / "pairs.jsonl", GOOD | extra | {"other": None})
    assert read_pairs(path, list(extra))[0].fields == extra


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.jsonl"])
def test_gzip_is_told_by_content(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert [pair.chosen for pair in read_pairs(path)] == ["a"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1, 2], "a record must be a JSON object, this is list"),
        ("text", "a record must be a JSON object, this is str"),
        ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
        ({"prompt": "p", "rejected": "b"}, "field 'chosen' is missing"),
        ({"prompt": "p", "chosen": "a"}, "field 'rejected' is missing"),
        (GOOD | {"prompt": 1}, "field 'prompt' is int, not a string"),
        (GOOD | {"chosen": ["a"]}, "field 'chosen' is list, not a string"),
        (GOOD | {"rejected": None}, "field 'rejected' is NoneType, not a string"),
        (GOOD | {"chosen": ""}, "field 'chosen' is empty"),
        (GOOD | {"rejected": " \n\t"}, "field 'rejected' is empty"),
        (GOOD | {"rejected": "a"}, "fields 'chosen' and 'rejected' are equal"),
        (GOOD | {"prompt": "\ud800"}, "field 'prompt' holds half of a surrogate pair"),
        (GOOD | {"rejected": "b\udfff"}, "field 'rejected' holds half of a surrogate pair"),
        (GOOD | {"margin": float("nan")}, "field 'margin' is not a finite number"),
        (GOOD | {"margin": float("-inf")}, "field 'margin' is not a finite number"),
        (GOOD | {"margin": 10**400}, "field 'margin' is not a finite number"),
        (GOOD | {"margin": True}, "field 'margin' is bool, not a finite number"),
        (GOOD | {"margin": "1"}, "field 'margin' is str, not a finite number"),
        (GOOD | {"margin": None}, "field 'margin' is NoneType, not a finite number"),
        (GOOD, "field 'kind', named by --eval-by, is missing"),
        (GOOD | {"kind": {}}, "field 'kind', named by --eval-by, is dict"),
        (GOOD | {"kind": None}, "field 'kind', named by --eval-by, is NoneType"),
        (GOOD | {"kind": "\ud800"}, "field 'kind' holds half of a surrogate pair"),
    ],
)
def test_bad_record_is_one_line_with_place_and_field(tmp_path, record, message):
    path = write(tmp_path / "pairs.jsonl", GOOD | {"kind": "x"}, record)
    with pytest.raises(UserError) as error:
        read_pairs(path, ["kind"])
    assert str(error.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(error.value)


LINE = json.dumps(GOOD).encode() + b"\n"
PACKED = gzip.compress(LINE * 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": holds no records"),
        (b" \n\n", ": holds no records"),
        (LINE + b'{"prompt": "p",\n', ":2: not valid JSON"),
        (LINE + b"[" * 100_000 + b"\n", ":2: not valid JSON"),
        (LINE + b'{"prompt": "\xff"}\n', ":2: not UTF-8 text (byte 12 of the line)"),
        (PACKED[:-9], ":"),  # inside the compressed data
        (PACKED[:-4], ":"),  # inside the trailer
        (PACKED[:-8] + bytes(4) + PACKED[-4:], ":"),  # wrong checksum
        (PACKED[:12] + b"\xff" + PACKED[13:], ":1: gzip data is damaged"),
        (PACKED + b"more", ":"),
    ],
)
def test_bad_file_is_one_line_with_place(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)
    if content[:2] == PACKED[:2]:
        assert "gzip data is damaged" in str(error.value)


@pytest.mark.parametrize(("name", "message"), [("none.jsonl", "No such file"), ("", "Is a directory")])
def test_path_that_is_no_file(tmp_path, name, message):
    with pytest.raises(UserError, match=f"cannot be read .{message}.*: name a JSON-lines file"):
        read_pairs(tmp_path / name)


@pytest.mark.skipif("GCRM_DATA" not in os.environ, reason="GCRM_DATA does not name the folder of real data")
def test_reads_real_pairs():
    pairs = read_pairs(Path(os.environ["GCRM_DATA"]) / "gsm8k_pairs.jsonl.gz", ["pair_type"])
    assert len(pairs) == 11294
    assert all(pair.chosen != pair.rejected and pair.fields["pair_type"] for pair in pairs)


# ------------------------------------------------------------------------------------------------------ tokenizers


def test_training_is_deterministic_and_splits_digits():
    assert train_tokenizer(TEXTS, 300).backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert TOKENIZER.tokenize("123") == ["1", "2", "3"]


def test_vocabulary_that_is_too_small():
    assert len(train_tokenizer(TEXTS, 259)) == 259
    with pytest.raises(UserError, match="--vocab-size 258: must be at least 259"):
        train_tokenizer(TEXTS, 258)


# ----------------------------------------------------------------------------- where a completion starts and ends


@pytest.mark.parametrize(
    ("prompt", "completion", "before", "after"),
    [
        ("hello", " world", [BOS, "hello"], ["Ġworld", EOS]),
        ("hel", "lo world", [BOS], ["hello", "Ġworld", EOS]),  # one token over the boundary: of the completion
        ("hello ", "world", [BOS, "hello"], ["Ġworld", EOS]),
        ("", "hello", [BOS], ["hello", EOS]),
        ("1", "23", [BOS, "1"], ["2", "3", EOS]),
        ("ö", "ß", [BOS, "Ã", "¶"], ["Ã", "Ł", EOS]),  # offsets count characters, tokens here are bytes
        ("😀", "1", [BOS, "ð", "Ł", "ĺ", "Ģ"], ["1", EOS]),
        (f"{BOS}hello", " world", [BOS, "hello"], ["Ġworld", EOS]),  # bos once
        ("", f"{BOS}hello", [BOS], ["hello", EOS]),
        ("hello", f" world{EOS}", [BOS, "hello"], ["Ġworld", EOS]),  # eos once
        ("hello", f" world{EOS}\n \n", [BOS, "hello"], ["Ġworld", EOS]),
        ("hello", f" world{EOS} hello", [BOS, "hello"], ["Ġworld", EOS, "Ġ", "hello", EOS]),  # text is never dropped
        ("hello", f" world{EOS}\n1{EOS}\n", [BOS, "hello"], ["Ġworld", EOS, "Ċ", "1", EOS]),
        ("hello", " world\n", [BOS, "hello"], ["Ġworld", "Ċ", EOS]),  # white space that no eos precedes stays
        (f"hello{EOS}", "1", [BOS, "hello", EOS], ["1", EOS]),  # eos of the prompt ends nothing
        (f"hello{EOS}", "\n", [BOS, "hello", EOS], ["Ċ", EOS]),
        ("hello", "", [BOS, "hello"], [EOS]),
    ],
)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, with_added_eos()], ids=["plain", "adds eos"])
def test_start_and_end(tokenizer, prompt, completion, before, after):
    assert encode(prompt, completion, tokenizer) == (before, after)


def test_tokenizer_without_bos():
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert encode("hello", " world", tokenizer) == (["hello"], ["Ġworld", EOS])


# Without '|' no text spells a special token; surrogates are not text.
plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|"), max_size=30)


@settings(max_examples=200, deadline=None)
@given(plain_text, plain_text)
def test_no_text_is_lost(prompt, completion):
    [(ids, start)] = encode_completions(TOKENIZER, [prompt], [completion])
    assert (ids == TOKENIZER.bos_token_id).tolist() == [True] + [False] * (len(ids) - 1)
    assert (ids == TOKENIZER.eos_token_id).tolist() == [False] * (len(ids) - 1) + [True]
    assert TOKENIZER.decode(ids[1:-1].tolist()) == prompt + completion
    # A token over the boundary brings the prompt's last characters along.
    assert TOKENIZER.decode(ids[start:-1].tolist()).endswith(completion)
    assert (prompt + completion).startswith(TOKENIZER.decode(ids[1:start].tolist()).rstrip("\ufffd"))


def test_many_texts_are_encoded_as_one_by_one():
    prompts = [f"hello {i}" for i in range(1500)]  # more than one tokenizer call
    completions = [f" world {i % 7}" for i in range(1500)]
    encoded = encode_completions(TOKENIZER, prompts, completions)
    for i in (0, 1, 1023, 1024, 1499):
        [(ids, start)] = encode_completions(TOKENIZER, prompts[i : i + 1], completions[i : i + 1])
        assert (encoded[i][0].tolist(), encoded[i][1]) == (ids.tolist(), start)


# ----------------------------------------------------------------------------------------------------------- pairs


def test_tokenized_pairs():
    pairs = [
        Pair("hello", " world", " yes", 0.5, "f:1", {"kind": "x"}),
        Pair("hello", " 1" * 50, " yes", 0.0, "f:2"),
        Pair("hel", "lo yes", "lo world yes", 0.0, "f:3"),
        Pair("hello", " 漢", " yes", 0.0, "f:4"),
    ]
    kept, lengths = tokenize_pairs(TOKENIZER, pairs, max_length=20)
    assert [p.pair_id for p in kept] == [0, 2, 3]
    assert kept[0].prompt_key == kept[2].prompt_key != kept[1].prompt_key
    assert (kept[0].margin, kept[0].fields) == (0.5, {"kind": "x"})
    for pair in kept:
        for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
            assert ids.dtype == np.int32
            assert 0 < start < len(ids) <= 20
            assert ids[-1] == TOKENIZER.eos_token_id
    assert lengths.dropped_too_long == 1
    assert lengths.prompt_lengths.tolist() == [2, 1, 2] * 2
    assert lengths.completion_lengths.tolist() == [len(p.chosen_ids) - p.chosen_start for p in kept] + [
        len(p.rejected_ids) - p.rejected_start for p in kept
    ]
    assert lengths.prompt_summary() == "min 1, median 2, 95% 2, max 2"


def test_length_limit_is_inclusive():
    pairs = [Pair("hello", " world", " world 1", 0.0, "f:1")]
    [pair], _ = tokenize_pairs(TOKENIZER, pairs, max_length=1000)
    longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
    assert len(tokenize_pairs(TOKENIZER, pairs, longest)[0]) == 1
    with pytest.raises(UserError, match=f"all 1 pairs are longer than --max-length {longest - 1} tokens: raise it"):
        tokenize_pairs(TOKENIZER, pairs, longest - 1)


def test_sides_that_differ_as_text_only():
    with pytest.raises(UserError, match="f:7: fields 'chosen' and 'rejected' have the same tokens"):
        tokenize_pairs(TOKENIZER, [Pair("hello", " yes", f" yes{EOS}\n", 0.0, "f:7")], 100)
