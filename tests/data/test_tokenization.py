"""Tokenizers of all kinds of folders: ids, offsets and special tokens, and what is saved for others to load."""

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.encoding import encode_completions
from gcrm_fast.data.tokenization import choose_pad, load_tokenizer, save_tokenizer, train_tokenizer
from support.folders import tokenizer
from support.small import VOCAB

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "12", "345", "runs", "naïve", "café"]
TEXTS = ["hello world", "  the  fox", "\n\nHuman: 12\n\nAssistant:", "naïve 漢字 😀", " ", "fox</s>"]


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a sentencepiece model trained with the settings of Llama 2's."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    texts = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(12)) for i in range(200)]
    with (folder / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type="bpe",
            vocab_size=380,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    return folder


def test_sentencepiece_model_alone_gives_its_own_ids_with_bos_and_offsets(llama2: Path) -> None:
    original = SentencePieceProcessor(model_file=str(llama2 / "tokenizer.model"))
    converted = load_tokenizer(llama2)
    assert (converted.bos_token_id, converted.eos_token_id) == (original.bos_id(), original.eos_id()) == (1, 2)
    for text in [*TEXTS[:-1], " ".join(WORDS)]:
        encoded = converted(text, return_offsets_mapping=True)
        assert encoded["input_ids"] == [1, *original.encode(text)]
        assert [text[a:b] for a, b in encoded["offset_mapping"]][-1] == text[encoded["offset_mapping"][-1][0] :]
    # "▁jumps" of the completion brings its space along: the completion starts with it.
    [(ids, start, _)] = encode_completions(converted, ["the quick fox"], [" jumps over"])
    assert ids[:start].tolist() == [1, *original.encode("the quick fox")]
    assert ids[start:].tolist() == [*original.encode("jumps over"), 2]
    [(ids, _, _)] = encode_completions(converted, ["the"], [" fox</s>"])
    assert ids.tolist() == [1, *original.encode("the fox"), 2]  # the text's own eos is one token, and the last


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_sentencepiece_model_follows_its_tokenizer_config(llama2: Path, tmp_path: Path, add_bos_token: bool) -> None:
    (tmp_path / "tokenizer.model").write_bytes((llama2 / "tokenizer.model").read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": add_bos_token, "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path)
    assert (loaded("fox")["input_ids"][0] == 1) is add_bos_token
    assert loaded.chat_template == "{{ messages }}"


# What transformers 4.57 and 5 write next to the tokenizer.json of a Llama 2, and 5 next to that of a Llama 3.
WRITTEN: dict[str, dict[str, Any]] = {
    "4.57": {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "extra_special_tokens": {},
        "additional_special_tokens": ["fox"],
    },
    "4.57, CodeLlama": {"tokenizer_class": "CodeLlamaTokenizer", "additional_special_tokens": ["fox"]},
    "5": {
        "tokenizer_class": "LlamaTokenizer",
        "backend": "tokenizers",
        "is_local": True,
        "add_bos_token": True,
        "extra_special_tokens": ["fox"],
    },
    "5, other classes": {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "is_local": True,
        "extra_special_tokens": ["fox"],
    },
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN.keys())
def test_tokenizer_json_counts_as_it_stands(written: dict[str, Any], llama2: Path, tmp_path: Path) -> None:
    original = load_tokenizer(llama2)
    original.add_tokens(AddedToken("fox", special=True))
    save_tokenizer(original, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    special = {name: token for name, token in json.loads(path.read_text()).items() if name.endswith("_token")}
    path.write_text(json.dumps(special | written))
    loaded, stated = load_tokenizer(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.bos_token_id == 1
    for text in TEXTS:
        assert loaded(text)["input_ids"] == stated.encode(text).ids


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_saved_tokenizer_loads_as_it_was(kind: str, llama2: Path, tmp_path: Path) -> None:
    before = train_tokenizer(["one two three"] * 30, 270) if kind == "byte-level" else load_tokenizer(llama2)
    before.chat_template = "{{ messages }}"
    save_tokenizer(before, tmp_path)
    for after in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert after.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template"):
            assert getattr(after, name) == getattr(before, name)
        for text in TEXTS:
            assert after(text)["input_ids"] == before(text)["input_ids"]


def test_saved_tokenizer_has_only_what_transformers_4_and_5_both_read(tmp_path: Path) -> None:
    save_tokenizer(tokenizer(), tmp_path)
    saved: dict[str, Any] = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not saved.keys() & {"backend", "extra_special_tokens", "is_local", "local_files_only"}


def test_pad_is_never_eos() -> None:
    mine = train_tokenizer(["one two three"] * 30, 300)
    mine.pad_token = mine.eos_token
    assert choose_pad(mine, 300, "test") == mine.pad_token_id != mine.eos_token_id


def test_tokens_must_fit_the_embedding() -> None:
    mine = train_tokenizer(["one two three"] * 30, 270)
    choose_pad(mine, len(mine), "test")
    with pytest.raises(UserError, match=f"test: .* ids up to {len(mine) - 1}, .*vocab_size is {len(mine) - 1}"):
        choose_pad(mine, len(mine) - 1, "test")


def test_pad_falls_back_on_unk_then_an_unused_token_then_bos(llama2: Path) -> None:
    mine = load_tokenizer(llama2)
    assert choose_pad(mine, 380, "test") == mine.unk_token_id
    bare = train_tokenizer(["one two three"] * 30, 270).backend_tokenizer.to_str().replace("<|pad|>", "<|other|>")
    backend = PreTrainedTokenizerFast(tokenizer_object=type(tokenizer().backend_tokenizer).from_str(bare))
    backend.bos_token, backend.eos_token = "<|bos|>", "<|eos|>"
    assert choose_pad(backend, VOCAB * 9, "test") == backend.convert_tokens_to_ids("<|other|>")
    backend.pad_token, backend.chat_template = None, "{{ messages }}<|other|>"
    assert choose_pad(backend, VOCAB * 9, "test") == backend.bos_token_id
    backend.pad_token = None
    backend.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_1|>"]})
    reserved = backend.convert_tokens_to_ids("<|reserved_special_token_1|>")
    assert choose_pad(backend, VOCAB * 9, "test") == reserved


def test_code_of_a_folder_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where stdin, which may hold records, says yes to the question that transformers would ask."""
    tokenizer().save_pretrained(str(tmp_path))
    path = tmp_path / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own:\n    pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: field 'auto_map': .* never runs here"):
        load_tokenizer(tmp_path)
    assert not ran.exists()
