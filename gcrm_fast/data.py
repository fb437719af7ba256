"""Preference pairs: reading records, tokenizing prompt and completion jointly, one end-token policy.

A completion starts at the first token that ends after the prompt's last character, and ends with the tokenizer's eos
token, which belongs to it and is where the reward is read.
"""

import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gcrm_fast.errors import UserError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CHUNK = 1024  # texts a tokenizer call


@dataclass(frozen=True)
class Pair:
    """A preference pair as text. ``where`` is 'file:line'; ``fields`` holds the record's other fields asked for."""

    prompt: str
    chosen: str
    rejected: str
    margin: float = 0.0
    where: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids (int32) of prompt + completion for both sides, and the index of the first completion token.

    ``pair_id`` is the position in the data read; ``prompt_key`` is equal for pairs with the same prompt text.
    """

    pair_id: int
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_start: int
    rejected_start: int
    margin: float
    prompt_key: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class LengthReport:
    """Lengths in tokens of what was kept, and how many pairs were not."""

    dropped_too_long: int
    prompt_lengths: np.ndarray
    completion_lengths: np.ndarray

    def prompt_summary(self) -> str:
        return _summary(self.prompt_lengths)

    def completion_summary(self) -> str:
        return _summary(self.completion_lengths)


def _summary(lengths: np.ndarray) -> str:
    low, median, high, top = np.percentile(lengths, [0, 50, 95, 100]).astype(int)
    return f"min {low}, median {median}, 95% {high}, max {top}"


# --------------------------------------------------------------------------------------------------------- records


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, raw line) of a plain or gzipped file, told apart by content."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.open(raw) if packed else raw as file:
                number = 0
                try:
                    for number, line in enumerate(file, start=1):
                        yield number, line
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise UserError(
                        f"{path}:{number + 1}: gzip data is damaged ({error}): copy the file again"
                    ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): name a JSON-lines file") from None


def _text(record: dict[str, Any], name: str, where: str) -> str:
    if name not in record:
        raise UserError(f"{where}: field '{name}' is missing: a record needs 'prompt', 'chosen' and 'rejected'")
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{name}' is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: field '{name}' holds half of a surrogate pair: write the character whole") from None
    return value


def _pair(record: Any, where: str, fields: Sequence[str]) -> Pair:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record must be a JSON object, this is {type(record).__name__}")
    prompt, chosen, rejected = (_text(record, name, where) for name in ("prompt", "chosen", "rejected"))
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if not completion.strip():
            raise UserError(f"{where}: field '{name}' is empty: a completion needs text")
    if chosen == rejected:
        raise UserError(f"{where}: fields 'chosen' and 'rejected' are equal: a pair needs a difference")
    margin = record.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise UserError(f"{where}: field 'margin' is {type(margin).__name__}, not a finite number")
    # Compared, not converted: JSON integers have no bound, and a float holds only so much. NaN fails it too.
    if not abs(margin) <= sys.float_info.max:
        raise UserError(f"{where}: field 'margin' is not a finite number: write a number that a float can hold")
    for name in fields:
        if name not in record:
            raise UserError(f"{where}: field '{name}', named by --eval-by, is missing")
        if isinstance(record[name], str):
            _text(record, name, where)
        elif not isinstance(record[name], (int, float)):
            kind = type(record[name]).__name__
            raise UserError(f"{where}: field '{name}', named by --eval-by, is {kind}, not a string, number or boolean")
    return Pair(prompt, chosen, rejected, float(margin), where, {name: record[name] for name in fields})


def read_pairs(path: Path, fields: Sequence[str] = ()) -> list[Pair]:
    """Pairs of a JSON-lines file, plain or gzipped; blank lines are skipped.

    Records hold the strings ``prompt``, ``chosen``, ``rejected`` and may hold a finite number ``margin``.

    Raises:
        UserError: an unreadable or damaged file, no records, or a bad record, with file, line and field.
    """
    pairs = []
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: not UTF-8 text (byte {error.start} of the line): save the file as UTF-8"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}): one JSON object a line") from None
        pairs.append(_pair(record, where, fields))
    if not pairs:
        raise UserError(f"{path}: holds no records: one JSON object a line is expected")
    return pairs


# ------------------------------------------------------------------------------------------------------ tokenizers


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


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> list[tuple[np.ndarray, int]]:
    """(ids int32, index of the first completion token) of each prompt + completion, tokenized as one string.

    BOS occurs once also where the text brings its own. The sequence ends with eos: what only pads it (white space)
    is cut, and eos is appended where there is none.
    """
    encoded = []
    for a in range(0, len(prompts), CHUNK):
        texts = [p + c for p, c in zip(prompts[a : a + CHUNK], completions[a : a + CHUNK], strict=True)]
        batch = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        for i, text in enumerate(texts):
            ids, offsets = batch["input_ids"][i], batch["offset_mapping"][i]
            encoded.append(_cut(tokenizer, ids, offsets, text, len(prompts[a + i])))
    return encoded


def _cut(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], offsets: list[tuple[int, int]], text: str, prompt_length: int
) -> tuple[np.ndarray, int]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids, offsets = ids[:1] + ids[2:], offsets[:1] + offsets[2:]
    # An eos that the tokenizer adds has an empty span. Without it, one rule serves all: only the text's own eos counts.
    if ids and ids[-1] == eos and offsets[-1] == (0, 0):
        ids, offsets = ids[:-1], offsets[:-1]
    start = next((k for k, (_, end) in enumerate(offsets) if end > prompt_length), len(ids))
    last = next((k for k in range(len(ids) - 1, start - 1, -1) if ids[k] == eos), None)
    ids = [*ids, eos] if last is None or text[offsets[last][1] :].strip() else ids[: last + 1]
    return np.array(ids, dtype=np.int32), min(start, len(ids) - 1)


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int
) -> tuple[list[TokenizedPair], LengthReport]:
    """Pairs whose two sequences have at most ``max_length`` tokens, and how many had more.

    Raises:
        UserError: no pair is short enough, or a pair's two sides have the same tokens.
    """
    prompts = [pair.prompt for pair in pairs]
    chosen = encode_completions(tokenizer, prompts, [pair.chosen for pair in pairs])
    rejected = encode_completions(tokenizer, prompts, [pair.rejected for pair in pairs])
    prompt_keys: dict[str, int] = {}
    kept = []
    for i, pair in enumerate(pairs):
        (chosen_ids, chosen_start), (rejected_ids, rejected_start) = chosen[i], rejected[i]
        if np.array_equal(chosen_ids, rejected_ids):
            raise UserError(
                f"{pair.where}: fields 'chosen' and 'rejected' have the same tokens: a pair needs a difference"
            )
        if max(len(chosen_ids), len(rejected_ids)) > max_length:
            continue
        key = prompt_keys.setdefault(pair.prompt, len(prompt_keys))
        kept.append(
            TokenizedPair(i, chosen_ids, rejected_ids, chosen_start, rejected_start, pair.margin, key, pair.fields)
        )
    if not kept:
        raise UserError(f"all {len(pairs)} pairs are longer than --max-length {max_length} tokens: raise it")
    sides = [(p.chosen_ids, p.chosen_start) for p in kept] + [(p.rejected_ids, p.rejected_start) for p in kept]
    return kept, LengthReport(
        dropped_too_long=len(pairs) - len(kept),
        prompt_lengths=np.array([start for _, start in sides]),
        completion_lengths=np.array([len(ids) - start for ids, start in sides]),
    )
