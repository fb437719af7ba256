"""Tokenizers: trained here or loaded with a checkpoint; the pad token; saving for transformers 4 and 5 alike."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.data.chat import end_tokens
from gcrm_fast.model.families import FAMILIES, Family

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"  # of a tokenizer that is trained here
# Texts on which a converted sentencepiece model must agree with sentencepiece: what its normalizer can change.
PROBES = (" a", "Hello  world 12", "a\n\nb", "naïve ﬁ 漢字", "tab\tand trailing ")
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")  # one is in every tokenizer
# Of tokenizer_config.json: what both transformers 4 and 5 read. All else is in tokenizer.json.
PORTABLE = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "model_max_length")
# Without the second, some versions of transformers return token_type_ids, which these models do not take.
PORTABLE_VALUES = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"],
}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder: whatever AutoTokenizer loads, or a bare sentencepiece ``tokenizer.model``.

    Code in the folder never runs: by default transformers asks on stdin, where records may answer "y".

    Raises:
        UserError: none that loads, one without character offsets or eos, a sentencepiece model that transformers
            cannot reproduce, or a chat template that never ends.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = _from_json(folder)
        elif (folder / "tokenizer.model").is_file():
            tokenizer = _from_sentencepiece(folder)
        else:  # files of other kinds, which transformers converts
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged tokenizer.json
        raise UserError(f"{_unloadable(folder, error)}: choose another with --tokenizer") from None
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: the tokenizer gives no character offsets: convert it to a fast one (tokenizer.json)"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no eos token, where the reward is read: add one")
    end_tokens(tokenizer)  # a chat template that never ends is an error at once
    return tokenizer


def _unloadable(folder: Path, error: Exception) -> str:
    """Why transformers loads no tokenizer from the folder."""
    if "custom code" in str(error):
        settings = folder / "tokenizer_config.json"
        return f"{settings}: field 'auto_map': this tokenizer is code in the folder, which never runs here"
    if not any(True for pattern in VOCABULARIES for _ in folder.glob(pattern)):
        return f"{folder}: holds no tokenizer.json or tokenizer.model"
    return f"{folder}: no tokenizer that transformers can load ({one_line(error)})"


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _from_json(folder: Path) -> PreTrainedTokenizerBase:
    """AutoTokenizer's, with the text rules of tokenizer.json unchanged, under transformers 4 and 5 alike.

    transformers 5 gives a Llama tokenizer that 4 saved another rule for leading spaces. transformers 4 knows neither
    the class nor the list of extra special tokens that 5 writes (which tokenizer.json has too).
    """
    known = _settings(folder).get("tokenizer_class") != "TokenizersBackend"
    tokenizer = (AutoTokenizer if known else PreTrainedTokenizerFast).from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, extra_special_tokens={}
    )
    stated = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.backend_tokenizer.normalizer = stated.normalizer
    tokenizer.backend_tokenizer.pre_tokenizer = stated.pre_tokenizer
    return tokenizer


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """A fast tokenizer with the ids of ``tokenizer.model``, bos first unless tokenizer_config.json says otherwise.

    Not AutoTokenizer's: without a tokenizer_config.json, transformers 5 silently omits bos and the space before the
    first word, and transformers 4 finds no class. They also differ in how they put that space before text that begins
    with one; sentencepiece always adds it.
    """
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    add_bos = _settings(folder).get("add_bos_token", True)
    tokenizer = LlamaTokenizerFast.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, legacy=True, add_bos_token=add_bos
    )
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    for text in PROBES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != original.encode(text):
            raise UserError(
                f"{folder / 'tokenizer.model'}: converted, it does not tokenize {text!r} as sentencepiece "
                f"does: use a Llama tokenizer (BPE, no text normalization) or a tokenizer.json"
            )
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Raises UserError where the tokenizer's ids exceed the embedding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"{where}: the tokenizer has ids up to {largest}, the model's vocab_size is {vocab_size}: "
            f"use the tokenizer that belongs to the model"
        )


def choose_pad(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str, family: Family = FAMILIES["llama"]
) -> int:
    """Sets and returns a pad token below ``vocab_size`` that never ends a completion (so not eos).

    transformers reads the reward at the last token that is not pad: with pad == eos it would read the one before.

    Raises:
        UserError: the tokenizer's ids exceed the embedding, or no token is suitable.
    """
    check_vocabulary(tokenizer, vocab_size, where)
    vocab = tokenizer.get_vocab()
    template = str(tokenizer.chat_template)
    own = (tokenizer.bos_token, tokenizer.eos_token)
    spare = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content not in template]
    reserved = sorted((t for t in spare if t not in own), key=lambda t: "reserved" not in t)
    for token in (tokenizer.pad_token, *family.pad_tokens, *reserved, tokenizer.bos_token):
        if token is not None and token in vocab and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return int(vocab[token])
    raise UserError(f"{where}: the tokenizer has no pad, unk or bos token that differs from eos: add a pad token")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer so that transformers 4 and 5 both load tokenizer.json unchanged.

    By itself, transformers 5 names a class that 4 does not know, lists special tokens in a way that 4 cannot read, and
    rebuilds a LlamaTokenizer that 4 saved with another rule for leading spaces.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    portable = {name: saved[name] for name in PORTABLE if name in saved}
    path.write_text(json.dumps({**portable, **PORTABLE_VALUES}, indent=2) + "\n")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single-digit numbers, trained on ``texts``; encodes any text, and starts it with bos."""
    smallest = 256 + len((BOS, EOS, PAD))
    if vocab_size < smallest:
        raise UserError(f"--vocab-size {vocab_size}: must be at least {smallest}: all bytes and three special tokens")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD)
