"""The records that training and scoring are timed on: real text if GCRM_DATA is set, else random tokens of its lengths.

Lengths are those under a byte-level BPE of 32,000 tokens. With GCRM_DATA the tokenizer is trained on pairs of both
files, and the records are real text, including the shared starts of completions. Without it, lengths come from LENGTHS,
which was measured that way, and tokens are random, so only the prompt is shared.
"""

import functools
import os
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from gcrm_fast.data.encoding import OWN_END, Completion, TokenizedPair, encode_completions, tokenize_pairs
from gcrm_fast.data.records import Candidate, Pair, read_completions, read_pairs
from gcrm_fast.data.tokenization import train_tokenizer

VOCABULARY = 32_000
TOKENIZER_PAIRS = 2000  # of each file
MAX_LENGTH = 1024  # TRL's default; longer pairs are skipped for all contestants
BOS, EOS, PAD, FIRST = 0, 1, 2, 3  # as numbered by train_tokenizer; text starts at FIRST

DATA = ("gsm8k_pairs", "hh_pairs_train")
SAMPLES = "gsm8k_completions_test"  # about 80 completions per question

# (prompt, chosen, rejected) tokens of 32 pairs, evenly spaced in the order of their sum.
LENGTHS = {
    "gsm8k_pairs": (
        (48, 42, 67),
        (35, 85, 53),
        (50, 58, 79),
        (53, 65, 80),
        (55, 113, 40),
        (44, 68, 106),
        (63, 97, 66),
        (74, 87, 75),
        (43, 117, 84),
        (56, 121, 75),
        (59, 111, 89),
        (39, 169, 58),
        (44, 123, 106),
        (49, 119, 112),
        (81, 86, 120),
        (50, 139, 109),
        (47, 105, 155),
        (49, 127, 141),
        (81, 132, 118),
        (68, 131, 144),
        (68, 146, 144),
        (51, 187, 136),
        (28, 253, 113),
        (76, 223, 118),
        (63, 234, 142),
        (36, 238, 196),
        (36, 238, 236),
        (74, 262, 220),
        (36, 296, 271),
        (93, 283, 289),
        (62, 342, 363),
        (75, 431, 405),
    ),
    "hh_pairs_train": (
        (22, 14, 22),
        (14, 32, 22),
        (50, 17, 12),
        (21, 29, 40),
        (62, 5, 38),
        (51, 33, 34),
        (37, 17, 74),
        (49, 23, 71),
        (76, 30, 48),
        (26, 73, 67),
        (92, 74, 7),
        (16, 73, 94),
        (181, 3, 8),
        (17, 102, 84),
        (142, 39, 36),
        (156, 43, 29),
        (23, 89, 128),
        (193, 30, 34),
        (180, 46, 43),
        (218, 46, 26),
        (264, 3, 40),
        (214, 57, 56),
        (280, 49, 14),
        (125, 143, 93),
        (377, 7, 6),
        (18, 142, 247),
        (244, 155, 39),
        (290, 84, 97),
        (287, 130, 87),
        (472, 3, 73),
        (342, 126, 131),
        (401, 213, 115),
    ),
}
PAIRS_A_PROMPT = {"gsm8k_pairs": 12, "hh_pairs_train": 1}


def records(name: str, count: int, seed: int = 0) -> list[TokenizedPair]:
    """``count`` pairs of ``name``: all pairs of randomly chosen prompts, in random order."""
    folder = os.environ.get("GCRM_DATA")
    return real(name, count, seed, Path(folder)) if folder else sampled(name, count, seed)


def source() -> str:
    """Where ``records`` come from, as text."""
    return "real text from GCRM_DATA" if os.environ.get("GCRM_DATA") else "built-in lengths, random tokens"


def sampled(name: str, count: int, seed: int) -> list[TokenizedPair]:
    """Random tokens with lengths from LENGTHS. Pairs of one prompt share its length but not their completions."""
    rng = np.random.default_rng(seed)
    lengths, group = LENGTHS[name], PAIRS_A_PROMPT[name]
    order = rng.permutation(count) % len(lengths)
    pairs = []
    for i, k in enumerate(order):
        prompt = lengths[order[i - i % group]][0]
        pairs.append(random_pair(i, i // group, prompt, *lengths[k][1:], seed))
    return [pairs[i] for i in rng.permutation(count)]


def completions(name: str, prompts: int, each: int, seed: int = 0) -> list[Completion]:
    """``each`` completions of each of ``prompts`` random prompts of ``name``, all in random order: answers to GSM8K
    questions if GCRM_DATA has them; else, and for HH (two per prompt), lengths from LENGTHS."""
    rng = np.random.default_rng(seed)
    folder = os.environ.get("GCRM_DATA")
    if folder and name == "gsm8k_pairs":
        encoded = _answers(Path(folder), prompts, each, rng)
    else:
        encoded = _drawn(name, prompts, each, rng)
    return [encoded[i] for i in rng.permutation(len(encoded))]


def _answers(folder: Path, prompts: int, each: int, rng: np.random.Generator) -> list[Completion]:
    by_prompt: dict[str, list[Candidate]] = {}
    for candidate in _read_samples(folder):
        by_prompt.setdefault(candidate.prompt, []).append(candidate)
    enough = [of_prompt for of_prompt in by_prompt.values() if len(of_prompt) >= each]
    of_prompts = [enough[i] for i in rng.permutation(len(enough))[:prompts]]
    chosen = [of_prompt[i] for of_prompt in of_prompts for i in rng.permutation(len(of_prompt))[:each]]
    return encode_completions(_tokenizer(folder), [c.prompt for c in chosen], [c.completion for c in chosen])


def _drawn(name: str, prompts: int, each: int, rng: np.random.Generator) -> list[Completion]:
    lengths, encoded = LENGTHS[name], []
    for p in rng.integers(len(lengths), size=prompts):
        head = np.r_[BOS, rng.integers(FIRST, VOCABULARY, size=lengths[p][0] - 1)]
        for k in rng.integers(len(lengths), size=each):
            answer = np.r_[rng.integers(FIRST, VOCABULARY, size=lengths[k][rng.integers(1, 3)] - 1), EOS]
            encoded.append(Completion(np.r_[head, answer].astype(np.int32), len(head), OWN_END))
    return encoded


def random_pair(pair_id: int, prompt_key: int, prompt: int, chosen: int, rejected: int, seed: int = 0) -> TokenizedPair:
    """A pair of the given lengths: bos and prompt depend on ``prompt_key`` alone, completions end with eos."""
    head = np.random.default_rng([seed, prompt_key]).integers(FIRST, VOCABULARY, size=prompt)
    head[:1] = BOS
    rng = np.random.default_rng([seed, prompt_key, pair_id])
    sides = [np.r_[head, rng.integers(FIRST, VOCABULARY, size=n - 1), EOS].astype(np.int32) for n in (chosen, rejected)]
    return TokenizedPair(
        pair_id=pair_id,
        chosen_ids=sides[0],
        rejected_ids=sides[1],
        chosen_start=prompt,
        rejected_start=prompt,
        margin=0.0,
        prompt_key=prompt_key,
        fields={},
    )


def real(name: str, count: int, seed: int, folder: Path) -> list[TokenizedPair]:
    """Records of the file ``name`` of ``folder``, tokenized as the trainer does."""
    tokenizer = _tokenizer(folder)
    by_prompt: dict[str, list[Pair]] = {}
    for pair in _read(folder, name):
        by_prompt.setdefault(pair.prompt, []).append(pair)
    rng = np.random.default_rng(seed)
    prompts = list(by_prompt)
    chosen: list[Pair] = []
    for i in rng.permutation(len(prompts)):
        chosen += by_prompt[prompts[i]]
        if len(chosen) >= 2 * count:  # some will be too long
            break
    pairs = tokenize_pairs(tokenizer, chosen, MAX_LENGTH)[0][:count]
    return [pairs[i] for i in rng.permutation(len(pairs))]


@functools.cache
def _read(folder: Path, name: str) -> list[Pair]:
    return read_pairs([str(folder / f"{name}.jsonl.gz")])


@functools.cache
def _read_samples(folder: Path) -> list[Candidate]:
    return read_completions([str(folder / f"{SAMPLES}.jsonl.gz")])


@functools.cache
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    texts = (
        pair.prompt + side
        for name in DATA
        for pair in _every(_read(folder, name), TOKENIZER_PAIRS)
        for side in (pair.chosen, pair.rejected)
    )
    return train_tokenizer(texts, VOCABULARY)


def _every(pairs: list[Pair], count: int) -> list[Pair]:
    """About ``count`` pairs, evenly spaced."""
    return pairs[:: max(len(pairs) // count, 1)]
