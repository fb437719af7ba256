"""Tokenizers, the start and the end of a completion, over-long pairs."""

from datetime import date

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.chat import as_text, end_tokens, with_date
from gcrm_fast.data.encoding import CUT, encode_completions, tokenize_pairs
from gcrm_fast.data.records import Pair
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.data.tokenization import BOS, EOS, train_tokenizer
from support.chat import CHATML, LLAMA2, LLAMA3, TEXTS, chat_tokenizer

TOKENIZER = train_tokenizer(TEXTS, 300)


def encode(prompt: str, completion: str, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> tuple[list[str], list[str]]:
    """(prompt tokens, completion tokens), as the vocabulary spells them: 'Ġ' is a space, 'Ċ' a line feed."""
    [(ids, start, _)] = encode_completions(tokenizer, [prompt], [completion])
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


@pytest.mark.parametrize("eos", [EOS, "<|im_end|>", "<|eot_id|>"])
@pytest.mark.parametrize(
    ("template", "written", "end"),
    [
        (CHATML, " world<|im_end|>\n", "<|im_end|>"),  # a template that ends in a line feed
        (LLAMA3, " world<|eot_id|>", "<|eot_id|>"),
        (LLAMA2, " world<|eos|>", None),  # writes eos, whatever that is
    ],
    ids=["chatml", "llama3", "llama2"],
)
def test_end_of_turn_ends_a_completion(template, written, end, eos):
    tokenizer = chat_tokenizer(template)
    tokenizer.eos_token = eos
    end = end or eos
    written = written.replace(EOS, eos)
    assert end_tokens(tokenizer) == set(tokenizer.convert_tokens_to_ids([end, eos]))
    assert encode("hello", written, tokenizer) == ([BOS, "hello"], ["Ġworld", end])
    # The template's end token of an earlier turn ends nothing, and what has none gets eos.
    assert encode(f"hello{end}", " world", tokenizer) == ([BOS, "hello", end], ["Ġworld", eos])


def test_bos_is_there_once_where_the_template_writes_it_too():
    tokenizer = chat_tokenizer(LLAMA3)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    before, after = encode(text, "world<|eot_id|>", tokenizer)
    assert before[:2] == [BOS, "<|start_header_id|>"]
    assert after == tokenizer.tokenize("world<|eot_id|>")


def test_template_that_refuses_the_probe_leaves_eos():
    assert end_tokens(chat_tokenizer("{{ raise_exception('no') }}")) == {TOKENIZER.eos_token_id}


@pytest.mark.parametrize("tokenizer", [chat_tokenizer(CHATML), with_added_eos()], ids=["chat", "adds eos"])
@pytest.mark.parametrize("written", [" world", " world<|im_end|>\n"])
def test_cut_completion_has_no_end_token(tokenizer, written):
    if "im_end" in written and not tokenizer.chat_template:
        pytest.skip("no end of turn without a template")
    [(ids, start, ending)] = encode_completions(tokenizer, ["hello"], [written], [True])
    assert tokenizer.convert_ids_to_tokens(ids[start:].tolist()) == ["Ġworld"]
    assert ending == CUT


# Without '|' no text spells a special token; surrogates are not text.
plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|"), max_size=30)


@settings(max_examples=200, deadline=None)
@given(plain_text, plain_text)
def test_no_text_is_lost(prompt, completion):
    [(ids, start, _)] = encode_completions(TOKENIZER, [prompt], [completion])
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
        [(ids, start, _)] = encode_completions(TOKENIZER, prompts[i : i + 1], completions[i : i + 1])
        assert (encoded[i][0].tolist(), encoded[i][1]) == (ids.tolist(), start)


# ----------------------------------------------------------------------------------------------------------- pairs


def test_tokenized_pairs():
    pairs = [
        Pair("hello", " world", " yes", margin=0.5, where="f:1", fields={"kind": "x"}),
        Pair("hello", " 1" * 50, " yes", where="f:2"),
        Pair("hel", "lo yes", "lo world yes", where="f:3"),
        Pair("hello", " 漢", " yes", where="f:4"),
    ]
    kept, report = tokenize_pairs(TOKENIZER, pairs, max_length=20)
    assert [p.pair_id for p in kept] == [0, 2, 3]
    assert kept[0].prompt_key == kept[2].prompt_key != kept[1].prompt_key
    assert (kept[0].margin, kept[0].fields) == (0.5, {"kind": "x"})
    for pair in kept:
        for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
            assert ids.dtype == np.int32
            assert 0 < start < len(ids) <= 20
            assert ids[-1] == TOKENIZER.eos_token_id
    assert report.dropped == 1
    assert [len(c.ids) for c in report.completions] == [len(ids) for p in kept for ids in p.sequences]
    assert report.prompt_summary() == "min 1, median 2, 95% 2, max 2"
    assert report.completion_summary() == "min 2, median 2, 95% 4, max 5"


def test_length_limit_is_inclusive():
    pairs = [Pair("hello", " world", " world 1", where="f:1")]
    [pair], _ = tokenize_pairs(TOKENIZER, pairs, max_length=1000)
    longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
    assert len(tokenize_pairs(TOKENIZER, pairs, longest)[0]) == 1
    with pytest.raises(UserError, match=f"all 1 pairs are longer than --max-length {longest - 1} tokens: raise it"):
        tokenize_pairs(TOKENIZER, pairs, longest - 1)


def test_truncation_takes_the_same_prompt_tokens_from_both_sides():
    pairs = [
        Pair("1 2 3 4 5 6 hello", " yes", " 7 8", where="f:1"),
        Pair("1", " yes", " 1 2 3 4 5 6 7 8 9", where="f:2"),  # the completion alone is too long
        Pair("1", " 2", " 3", where="f:3"),
    ]
    whole = tokenize_pairs(TOKENIZER, pairs, 100)[0]
    longest = len(whole[0].rejected_ids)
    for limit in range(7, longest):
        kept, report = tokenize_pairs(TOKENIZER, pairs, limit, overlong="truncate-prompt")
        cut = longest - limit
        assert [p.pair_id for p in kept] == [0, 2]
        assert (report.dropped, report.shortened) == (1, 1)
        short = kept[0]
        for before, after in ((whole[0].chosen_ids, short.chosen_ids), (whole[0].rejected_ids, short.rejected_ids)):
            assert after.tolist() == [before[0], *before[1 + cut :]]
        assert (short.chosen_start, short.rejected_start) == (
            whole[0].chosen_start - cut,
            whole[0].rejected_start - cut,
        )
        assert TOKENIZER.decode(short.chosen_ids[short.chosen_start :].tolist()) == f" yes{EOS}"


@pytest.mark.parametrize("bos", [True, False])
def test_truncation_down_to_no_prompt_at_all(bos):
    tokenizer = train_tokenizer(TEXTS, 300)
    if not bos:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    pairs = [Pair("1 2 3", " yes", " 7", where="f:1")]
    [pair], _ = tokenize_pairs(tokenizer, pairs, 100)
    room = max(len(pair.chosen_ids) - pair.chosen_start, len(pair.rejected_ids) - pair.rejected_start) + bos
    [short], _ = tokenize_pairs(tokenizer, pairs, room, overlong="truncate-prompt")
    assert (short.chosen_start, short.rejected_start) == (bos, bos)
    assert (short.chosen_ids[0] == tokenizer.bos_token_id) == bos
    with pytest.raises(UserError, match=f"all 1 pairs are longer than --max-length {room - 1}"):
        tokenize_pairs(tokenizer, pairs, room - 1, overlong="truncate-prompt")


def test_overlong_error_names_the_pair():
    pairs = [Pair("1", " 2", " 3", where="f:1"), Pair("1", " 2", " 3 4 5", where="f:2")]
    with pytest.raises(UserError, match=r"f:2: has 9 tokens, more than --max-length 8"):
        tokenize_pairs(TOKENIZER, pairs, 8, overlong="error")
    assert len(tokenize_pairs(TOKENIZER, pairs, 9, overlong="error")[0]) == 2


def test_ends_are_counted_and_cut_pairs_flagged():
    pairs = [
        Pair("hello", " yes", f" world{EOS}", where="f:1"),
        Pair("hello", " 1", " 2", where="f:2", chosen_cut=True),
        Pair("hello", " 3", " 4", where="f:3", rejected_cut=True),
    ]
    kept, report = tokenize_pairs(TOKENIZER, pairs, 100)
    assert report.ending_summary() == "1 of their own, 3 with eos added, 2 cut"
    assert [p.chosen_cut for p in kept] == [False, True, False]
    ends = [[ids[-1] == TOKENIZER.eos_token_id for ids in (p.chosen_ids, p.rejected_ids)] for p in kept]
    assert ends == [[True, True], [False, True], [True, False]]


def test_sides_that_differ_as_text_only():
    with pytest.raises(UserError, match="f:7: fields 'chosen' and 'rejected' have the same tokens"):
        tokenize_pairs(TOKENIZER, [Pair("hello", " yes", f" yes{EOS}\n", where="f:7")], 100)
    pairs = [Pair("hello", " yes", f" yes{EOS}\n", where="f:7"), Pair("hello", " yes", " no", where="f:8")]
    bad = BadRecords(skip=True)
    assert [p.pair_id for p in tokenize_pairs(TOKENIZER, pairs, 100, bad=bad)[0]] == [1]
    assert [line.split(": ")[0] for line in bad.skipped] == ["f:7"]


def test_a_date_in_the_chat_template_is_that_of_the_run() -> None:
    today = "{{ strftime_now('%d %b %Y') if strftime_now is defined }}|{% if strftime_now is defined %}"
    tokenizer = chat_tokenizer(today + '{% set year = strftime_now( "%Y" ) %}{{ year }}{% endif %}|' + CHATML)
    with_date(tokenizer, date(2024, 2, 29))
    prompt, _ = as_text(tokenizer, [{"role": "user", "content": "a"}], "b")
    assert prompt.startswith("29 Feb 2024|2024|")
