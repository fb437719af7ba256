"""Tokens of preference pairs: prompt and completion tokenized jointly, one end-token policy, one length policy.

A completion starts at the first token that ends after the prompt's last character, and ends with the tokenizer's eos
token, or the token with which its chat template ends a turn. That token belongs to the completion and is where the
reward is read. Only a completion that a length limit cut has none: it is read at its last token.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import tokenizers
from tokenizers import Encoding
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from gcrm_fast.common import processes
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.progress import progress_bar
from gcrm_fast.data.chat import end_tokens
from gcrm_fast.data.records import Pair
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.data.special_tokens import Tokenized, tokenize
from gcrm_fast.data.token_cache import TokenCache

CHUNK = 512  # pairs per tokenizer call
TOKENS_VERSION = "1"  # goes into the cache's keys: raise it when other tokens come from the same text
OWN_END, ADDED_END, CUT = range(3)  # how a completion ends


class Member(Protocol):
    """What groups are made of: token sequences that stay in one pack."""

    @property
    def name(self) -> str:
        """Its name in errors."""

    @property
    def prompt_key(self) -> int:
        """Equal for members that share their prompt."""

    @property
    def sequences(self) -> tuple[np.ndarray, ...]: ...


M = TypeVar("M", bound=Member)


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Longest common token prefix, leaving each sequence at least one token of its own (0 for a single sequence)."""
    if len(sequences) == 1:
        return 0
    n = min(map(len, sequences)) - 1
    head = sequences[0][:n]
    same = np.logical_and.reduce([head == s[:n] for s in sequences[1:]])
    return n if same.all() else int(same.argmin())


class PairStates(NamedTuple):
    """States of a pair's tokens that enter the trained layers, float32 or bfloat16 as int16: of the chosen sequence
    [n, H], and of the rejected one after the ``shared`` tokens that both start with."""

    chosen: np.ndarray
    own: np.ndarray
    shared: int

    def sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all tokens of the chosen and of the rejected sequence."""
        return self.chosen, np.concatenate([self.chosen[: self.shared], self.own])


@dataclass(frozen=True, kw_only=True)
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
    margin: float = 0.0
    prompt_key: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    chosen_cut: bool = False
    where: str = ""  # 'source:line'
    source: int = 0  # its number in the list of sources
    target: float | None = None  # label or score of one completion, which is both chosen and rejected
    states: PairStates | None = None

    @property
    def name(self) -> str:
        return f"pair {self.pair_id}"

    @property
    def sequences(self) -> tuple[np.ndarray, ...]:
        return self.chosen_ids, self.rejected_ids


def preferred(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Those whose chosen completion has an end and is good: any of a pair; of completions with a label or score those
    that have at least the mean."""
    uncut = [pair for pair in pairs if not pair.chosen_cut]
    targets = [pair.target for pair in uncut if pair.target is not None]
    if not targets:
        return uncut
    least = min(float(np.mean(targets)), max(targets))  # rounded, the mean of equal numbers may be above them
    return [pair for pair in uncut if pair.target is not None and pair.target >= least]


class Completion(NamedTuple):
    """Prompt and completion: ids int32, index of the first completion token, OWN_END, ADDED_END or CUT.

    Only a cut completion may have no token at all: then ``start`` is the number of ids.
    """

    ids: np.ndarray
    start: int
    ending: int


@dataclass(frozen=True, kw_only=True)
class TokenReport:
    """The completions that were kept, and what became of pairs over the length limit."""

    key: str  # of the text and the tokenizer, see cache_key
    dropped: int
    shortened: int  # pairs whose prompt was cut at the left
    completions: list[Completion]  # chosen and rejected in turn, or those with a label or score

    def ending_summary(self) -> str:
        own, added, cut = np.bincount([completion.ending for completion in self.completions], minlength=3)
        return f"{own} of their own, {added} with eos added, {cut} cut"

    def prompt_summary(self) -> str:
        return _summary([completion.start for completion in self.completions])

    def completion_summary(self) -> str:
        return _summary([len(completion.ids) - completion.start for completion in self.completions])


def _summary(lengths: list[int]) -> str:
    low, median, high, top = np.percentile(lengths, [0, 50, 95, 100]).astype(int)
    return f"min {low}, median {median}, 95% {high}, max {top}"


# ------------------------------------------------------------------------------------------------- one completion


def token_texts(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> list[str]:
    """The text of each completion token, special ones included; the completion when joined. A character of several
    tokens is in the text of its last."""
    stream, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
    pieces = [stream.step(backend, int(token)) or "" for token in completion.ids]
    return pieces[completion.start :]


def prompt_text(tokenizer: PreTrainedTokenizerBase, pair: TokenizedPair) -> str:
    """The prompt as its tokens read, special ones included, without a start token that the tokenizer adds."""
    ids, bos = pair.chosen_ids[: pair.chosen_start].tolist(), tokenizer.bos_token_id
    added = ids[:1] == [bos] and bos in tokenizer("")["input_ids"]
    return str(tokenizer.decode(ids[int(added) :], clean_up_tokenization_spaces=False))


def encode_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    cuts: Sequence[bool] | None = None,
) -> list[Completion]:
    """Each prompt + completion, tokenized as one string; ``cuts`` marks completions that a length limit cut.

    BOS occurs once even where the text has its own. The sequence ends with an end token (see chat.end_tokens): white
    space after it is dropped, and eos is appended where there is none. A cut completion has no end token: one that a
    chat template put after it is dropped.
    """
    ends = end_tokens(tokenizer)
    tokenized = tokenize(tokenizer, prompts, completions)
    return [_completion(tokenizer, ends, one, bool(cuts and cuts[i])) for i, one in enumerate(tokenized)]


def _completion(tokenizer: PreTrainedTokenizerBase, ends: frozenset[int], one: Tokenized, cut: bool) -> Completion:
    text, prompt_length, ids, encoding = one
    bos = tokenizer.bos_token_id
    # An eos that the tokenizer adds has an empty span. It is removed, so that only the text's own end counts.
    if ids and ids[-1] == tokenizer.eos_token_id and _span(encoding, len(ids) - 1) == (0, 0):
        ids = ids[:-1]
    start = _first_after(encoding, prompt_length, len(text), len(ids))
    # Few completions contain an end token, which a set shows faster than a look at every token.
    at_ends = [] if ends.isdisjoint(ids) else [k for k in range(start, len(ids)) if ids[k] in ends]
    # Text after the last end token is never dropped.
    own = bool(at_ends) and not text[_span(encoding, at_ends[-1])[1] :].strip()
    if own:
        last = at_ends[-1]
        while cut and last > start and ids[last - 1] in ends:  # a turn may end with several tokens
            last -= 1
        ids = ids[: last + (not cut)]
    elif not cut:
        ids = [*ids, tokenizer.eos_token_id]
    if bos is not None and ids[:2] == [bos, bos]:
        ids, start = ids[1:], max(start - 1, 1)
    ending = CUT if cut else OWN_END if own else ADDED_END
    return Completion(np.array(ids, dtype=np.int32), start, ending)


def _span(encoding: Encoding, token: int) -> tuple[int, int]:
    """First and last character of a token + 1; (0, 0) for a token without text."""
    return encoding.token_to_chars(token) or (0, 0)


def _first_after(encoding: Encoding, position: int, length: int, tokens: int) -> int:
    """Index of the first token that ends after character ``position``; ``tokens`` if there is none."""
    token = encoding.char_to_token(position) if position < length else None
    if token is None:  # at the end of the text, or a character that the tokenizer skips
        return next((k for k, (_, end) in enumerate(encoding.offsets[:tokens]) if end > position), tokens)
    return token


# ----------------------------------------------------------------------------------------------------------- pairs


def cache_key(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> str:
    """SHA-256 of what the tokens of ``pairs`` depend on: their text, the tokenizer, the versions of the code."""
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
    with progress_bar(total=len(pairs), desc="tokenizing", unit="pair", brief=True, shown=progress) as bar:
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


def _sides(encoded: dict[str, np.ndarray]) -> Iterator[tuple[Completion, Completion]]:
    """Chosen and rejected of each pair, as views of the one axis of tokens."""
    ids = np.split(encoded["ids"], np.cumsum(encoded["lengths"])[:-1])
    each = map(Completion, ids, encoded["starts"].tolist(), encoded["endings"].tolist())
    return zip(each, each, strict=True)


def _unusable(chosen: Completion, rejected: Completion, *, single: bool) -> str:
    """What is wrong with the tokens of a pair, or of a ``single`` completion, or ""."""
    for name, side in (("completion" if single else "chosen", chosen), ("rejected", rejected)):
        if side.start == len(side.ids):
            return f"field '{name}' is cut and has no token: remove the record"
    if not single and np.array_equal(chosen.ids, rejected.ids):
        return "fields 'chosen' and 'rejected' have the same tokens: a pair needs a difference"
    return ""


def _shortened(sides: tuple[Completion, Completion], excess: int, bos: int | None) -> tuple[Completion, ...] | None:
    """Both sequences with ``excess`` fewer prompt tokens after bos, so that they share what they shared.

    None where a completion does not fit even without a prompt.
    """
    kept = int(sides[0].ids[0] == bos)
    if kept + excess > min(side.start for side in sides):
        return None
    return tuple(
        side._replace(ids=np.delete(side.ids, slice(kept, kept + excess)), start=side.start - excess) for side in sides
    )


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    max_length: int,
    *,
    overlong: Literal["drop", "truncate-prompt", "error"] = "drop",
    bad: BadRecords | None = None,
    cache: TokenCache | None = None,
) -> tuple[list[TokenizedPair], TokenReport]:
    """Pairs whose two sequences have a maximum of ``max_length`` tokens, and a report of the rest.

    ``overlong`` says what becomes of longer pairs: dropped; shortened by prompt tokens at the left, after bos, and
    dropped where that is not enough; or an error.

    Raises:
        UserError: no pair is left, or a pair is too long for ``overlong='error'``; unless ``bad`` skips them, a pair
            whose two sides have the same tokens, or one of them none.
    """
    bad, cache = bad or BadRecords(), cache or TokenCache(None)
    key = cache_key(tokenizer, pairs)
    show = processes.local_rank() == 0
    encoded = cache.get(key, lambda: encode_pairs(tokenizer, pairs, progress=cache.holds_lock or show))
    prompt_keys: dict[str, int] = {}
    kept: list[TokenizedPair] = []
    completions: list[Completion] = []
    dropped = shortened = 0
    for i, (pair, sides) in enumerate(zip(pairs, _sides(encoded), strict=True)):
        if problem := _unusable(*sides, single=pair.target is not None):
            bad.add(UserError(f"{pair.where}: {problem}"))
            continue
        fitting: tuple[Completion, ...] | None = sides
        longest = max(len(side.ids) for side in sides)
        if longest > max_length:
            if overlong == "error":
                raise UserError(
                    f"{pair.where}: has {longest} tokens, more than --max-length {max_length}: raise it, or use "
                    "--overlong drop or truncate-prompt"
                )
            excess = longest - max_length
            fitting = _shortened(sides, excess, tokenizer.bos_token_id) if overlong != "drop" else None
            dropped, shortened = dropped + (fitting is None), shortened + (fitting is not None)
        if fitting is not None:
            prompt_key = prompt_keys.setdefault(pair.prompt, len(prompt_keys))
            kept.append(_tokenized(i, pair, *fitting, prompt_key=prompt_key))
            completions += fitting[: len(pair.completions)]
    what = "pair" if pairs[0].target is None else "completion"
    if not kept and dropped:
        raise UserError(f"all {dropped} {what}s are longer than --max-length {max_length} tokens: raise it")
    if not kept:
        raise UserError(f"every {what} is bad; the first: {bad.skipped[-len(pairs)]}")
    return kept, TokenReport(key=key, dropped=dropped, shortened=shortened, completions=completions)


def _tokenized(i: int, pair: Pair, chosen: Completion, rejected: Completion, *, prompt_key: int) -> TokenizedPair:
    return TokenizedPair(
        pair_id=i,
        chosen_ids=chosen.ids,
        rejected_ids=rejected.ids,
        chosen_start=chosen.start,
        rejected_start=rejected.start,
        margin=pair.margin,
        prompt_key=prompt_key,
        fields=pair.fields,
        chosen_cut=pair.chosen_cut,
        where=pair.where,
        source=pair.source,
        target=pair.target,
    )
