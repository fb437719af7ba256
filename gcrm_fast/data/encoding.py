"""Tokens of preference pairs: prompt and completion tokenized jointly, one end-token policy, one length policy.

A completion starts at the first token that ends after the prompt's last character, and ends with the tokenizer's eos
token, or the token with which its chat template ends a turn. That token belongs to the completion and is where the
reward is read. Only a completion that a length limit cut has none: it is read at its last token.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers
from tokenizers import Encoding
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gcrm_fast.common import processes
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.records import Pair
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.data.token_cache import TokenCache

CHUNK = 512  # pairs a tokenizer call
TOKENS_VERSION = "1"  # goes into the cache's keys: raise it when other tokens come from the same text
OWN_END, ADDED_END, CUT = range(3)  # how a completion ends


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids (int32) of prompt + completion for both sides, and the index of the first completion token.

    ``pair_id`` is the position in the data read; ``prompt_key`` is equal for pairs with the same prompt text.
    ``chosen_cut``: the chosen completion has no end token, so its last state is no end state.
    """

    pair_id: int
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_start: int
    rejected_start: int
    margin: float
    prompt_key: int
    fields: dict[str, Any]
    chosen_cut: bool = False
    where: str = ""  # 'source:line'

    @property
    def name(self) -> str:
        return f"pair {self.pair_id}"

    @property
    def sequences(self) -> tuple[np.ndarray, ...]:
        return self.chosen_ids, self.rejected_ids


@dataclass(frozen=True)
class TokenReport:
    """Lengths and ends of the completions kept, and what became of pairs over the length limit."""

    key: str  # of the text and the tokenizer, see cache_key

    dropped: int
    shortened: int  # prompts cut at the left
    own_end: int  # completions that bring their end token
    added_end: int  # completions that got eos appended
    cut: int  # completions without an end token
    prompt_lengths: np.ndarray
    completion_lengths: np.ndarray

    def prompt_summary(self) -> str:
        return _summary(self.prompt_lengths)

    def completion_summary(self) -> str:
        return _summary(self.completion_lengths)


def _summary(lengths: np.ndarray) -> str:
    low, median, high, top = np.percentile(lengths, [0, 50, 95, 100]).astype(int)
    return f"min {low}, median {median}, 95% {high}, max {top}"


# ------------------------------------------------------------------------------------------------- one completion


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a completion: eos, and what the chat template, if there is one, writes after an answer."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        answer = "answer"
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
            tail = text[text.rindex(answer) + len(answer) :]
        except Exception:  # a template that wants other messages than these; a record will say so
            return frozenset(ends)
        added = tokenizer.added_tokens_decoder
        ends.update([i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in added][:1])
    return frozenset(ends)


class Completion(NamedTuple):
    """Prompt and completion: ids int32, index of the first completion token, OWN_END, ADDED_END or CUT.

    Only of a cut completion there may be no token at all: then ``start`` is the number of ids.
    """

    ids: np.ndarray
    start: int
    ending: int


def encode_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    cuts: Sequence[bool] | None = None,
) -> list[Completion]:
    """Each prompt + completion, tokenized as one string; ``cuts`` tells completions that a length limit cut.

    BOS occurs once also where the text brings its own. The sequence ends with an end token (see end_tokens): what only
    pads it (white space) is dropped, and eos is appended where there is none. A cut completion ends without: an end
    token that a chat template put after it is dropped.
    """
    ends = end_tokens(tokenizer)
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    batch = tokenizer(texts, return_attention_mask=False, verbose=False)
    assert batch.encodings is not None  # load_tokenizer takes fast tokenizers only
    return [
        _completion(tokenizer, ends, encoding, texts[i], len(prompts[i]), bool(cuts and cuts[i]))
        for i, encoding in enumerate(batch.encodings)
    ]


def _completion(
    tokenizer: PreTrainedTokenizerBase,
    ends: frozenset[int],
    encoding: Encoding,
    text: str,
    prompt_length: int,
    cut: bool,
) -> Completion:
    ids, bos = encoding.ids, tokenizer.bos_token_id
    # An eos that the tokenizer adds has an empty span. Without it, one rule serves all: only the text's own end counts.
    if ids and ids[-1] == tokenizer.eos_token_id and _span(encoding, len(ids) - 1) == (0, 0):
        ids = ids[:-1]
    start = _first_after(encoding, prompt_length, len(text), len(ids))
    # Most completions hold no end token, and a set is quicker to ask than every token.
    found = [] if ends.isdisjoint(ids) else [k for k in range(start, len(ids)) if ids[k] in ends]
    # Text after the last end token is never dropped.
    own = bool(found) and not text[_span(encoding, found[-1])[1] :].strip()
    if own:
        ids = ids[: found[-1] + (not cut)]
    elif not cut:
        ids = [*ids, tokenizer.eos_token_id]
    if bos is not None and ids[:2] == [bos, bos]:
        ids, start = ids[1:], max(start - 1, 1)
    ending = CUT if cut else OWN_END if own else ADDED_END
    return Completion(np.array(ids, dtype=np.int32), start, ending)


def _span(encoding: Encoding, token: int) -> tuple[int, int]:
    """Characters of a token; (0, 0) where it stands for none."""
    return encoding.token_to_chars(token) or (0, 0)


def _first_after(encoding: Encoding, position: int, length: int, tokens: int) -> int:
    """Index of the first token that ends after character ``position``; ``tokens`` if there is none."""
    found = encoding.char_to_token(position) if position < length else None
    if found is None:  # at the end of the text, or a character that the tokenizer leaves out
        return next((k for k, (_, end) in enumerate(encoding.offsets[:tokens]) if end > position), tokens)
    return found


# ----------------------------------------------------------------------------------------------------------- pairs


def cache_key(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> str:
    """SHA-256 of all that the tokens of ``pairs`` depend on: their text, the tokenizer, the versions of the code."""
    digest = hashlib.sha256()

    def add(text: str) -> None:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)

    add(
        f"{TOKENS_VERSION} {tokenizers.__version__} {tokenizer.bos_token_id} {tokenizer.eos_token_id} "
        f"{sorted(end_tokens(tokenizer))} {tokenizer.split_special_tokens}"
    )
    add(tokenizer.backend_tokenizer.to_str())
    for pair in pairs:
        add(pair.prompt)
        add(pair.chosen)
        add(pair.rejected)
        digest.update(bytes([pair.chosen_cut, pair.rejected_cut]))
    return digest.hexdigest()


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, progress: bool = False
) -> dict[str, np.ndarray]:
    """Chosen and rejected of each pair in turn, 2N sequences on one axis of T tokens.

    ids [T] int32; lengths [2N] int64; starts [2N] int64, counted from the sequence's first token; endings [2N] uint8.
    """
    encoded: list[Completion] = []
    with tqdm(total=len(pairs), desc="tokenizing", unit="pair", disable=not progress, delay=1, leave=False) as bar:
        for a in range(0, len(pairs), CHUNK):
            chunk = pairs[a : a + CHUNK]
            encoded += encode_completions(
                tokenizer,
                [p.prompt for p in chunk for _ in range(2)],
                [side for p in chunk for side in (p.chosen, p.rejected)],
                [cut for p in chunk for cut in (p.chosen_cut, p.rejected_cut)],
            )
            bar.update(len(chunk))
    return {
        "ids": np.concatenate([c.ids for c in encoded]),
        "lengths": np.array([len(c.ids) for c in encoded], dtype=np.int64),
        "starts": np.array([c.start for c in encoded], dtype=np.int64),
        "endings": np.array([c.ending for c in encoded], dtype=np.uint8),
    }


def _shortened(
    ids: tuple[np.ndarray, np.ndarray], starts: tuple[int, int], max_length: int, bos: int | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Both sequences without the same number of prompt tokens after bos, so that they share what they shared.

    None where a completion does not fit even without a prompt.
    """
    excess = max(map(len, ids)) - max_length
    kept = int(ids[0][0] == bos)
    if kept + excess > min(starts):
        return None
    chosen, rejected = (np.concatenate([side[:kept], side[kept + excess :]]) for side in ids)
    return chosen, rejected


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    max_length: int,
    *,
    overlong: Literal["drop", "truncate-prompt", "error"] = "drop",
    bad: BadRecords | None = None,
    cache: TokenCache | None = None,
) -> tuple[list[TokenizedPair], TokenReport]:
    """Pairs whose two sequences have at most ``max_length`` tokens, and a report of the rest.

    ``overlong`` says what becomes of longer pairs: dropped; shortened by prompt tokens at the left, after bos, and
    dropped where that is not enough; or an error. The arrays of a pair are views of one axis of tokens.

    Raises:
        UserError: no pair is left, or a pair is too long for ``overlong='error'``; unless ``bad`` skips them, a pair
            whose two sides have the same tokens, or one of them none.
    """
    bad = bad or BadRecords()
    cache = cache or TokenCache(None)
    first_process = processes.local_rank() == 0
    cache_name = cache_key(tokenizer, pairs)
    encoded = cache.get(
        cache_name,
        lambda: encode_pairs(tokenizer, pairs, progress=cache.holds_lock or first_process),
    )
    sequences = np.split(encoded["ids"], np.cumsum(encoded["lengths"])[:-1])
    prompt_keys: dict[str, int] = {}
    kept: list[TokenizedPair] = []
    dropped = shortened = 0
    endings: list[int] = []
    for i, pair in enumerate(pairs):
        ids = sequences[2 * i], sequences[2 * i + 1]
        starts = int(encoded["starts"][2 * i]), int(encoded["starts"][2 * i + 1])
        empty = [name for k, name in enumerate(("chosen", "rejected")) if starts[k] == len(ids[k])]
        what = f"field '{empty[0]}' is cut and has no token: leave the record out" if empty else ""
        if np.array_equal(*ids):
            what = "fields 'chosen' and 'rejected' have the same tokens: a pair needs a difference"
        if what:
            bad.add(UserError(f"{pair.where}: {what}"))
            continue
        longest = max(map(len, ids))
        if longest > max_length:
            if overlong == "error":
                raise UserError(
                    f"{pair.where}: has {longest} tokens, more than --max-length {max_length}: raise it, or let "
                    "--overlong drop or truncate-prompt"
                )
            shorter = _shortened(ids, starts, max_length, tokenizer.bos_token_id) if overlong != "drop" else None
            if shorter is None:
                dropped += 1
                continue
            shortened += 1
            ids, starts = shorter, (starts[0] - longest + max_length, starts[1] - longest + max_length)
        key = prompt_keys.setdefault(pair.prompt, len(prompt_keys))
        kept.append(TokenizedPair(i, *ids, *starts, pair.margin, key, pair.fields, pair.chosen_cut, pair.where))
        endings += encoded["endings"][2 * i : 2 * i + 2].tolist()
    if not kept and dropped:
        raise UserError(f"all {dropped} pairs are longer than --max-length {max_length} tokens: raise it")
    if not kept:
        raise UserError(f"every pair is bad; the first: {bad.skipped[-len(pairs)]}")
    sides = [(p.chosen_ids, p.chosen_start) for p in kept] + [(p.rejected_ids, p.rejected_start) for p in kept]
    return kept, TokenReport(
        key=cache_name,
        dropped=dropped,
        shortened=shortened,
        own_end=endings.count(OWN_END),
        added_end=endings.count(ADDED_END),
        cut=endings.count(CUT),
        prompt_lengths=np.array([start for _, start in sides]),
        completion_lengths=np.array([len(ids) - start for ids, start in sides]),
    )
