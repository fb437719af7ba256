"""Special tokens that prompts and completions spell out: read as tokens, as transformers does, or kept as plain text.

``tokenizer.split_special_tokens`` says which. Plain text applies to what people wrote: what a chat template writes, and
bos and eos where this project adds them, are always tokens. To separate them, a special token in a message is
replaced by one private character before the template sees it; when the text is tokenized, private characters become the
plain text again, and the special tokens of the template other private characters, which a copy of the tokenizer knows.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

Reading = Literal["tokens", "text"]
AS_TEXT, AS_TOKEN = 0x100000, 0xF0000  # first of the private characters for each
PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
UNKNOWN = "\ufffd"  # replaces private characters of people's text
TURNS = re.compile(r"<[|\uff5c].*[|\uff5c]>")  # of turns, although some tokenizers do not call these tokens special


class Rendered(str):
    """Text that a chat template wrote, with all special tokens that belong in it."""


class Tokenized(NamedTuple):
    """``text`` as it was tokenized, the length of the prompt in it, token ids, and their places in the text."""

    text: str
    prompt: int
    ids: list[int]
    encoding: Encoding


class _Reader:
    """Special tokens of a tokenizer by their private characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        protected = [t for t in state["added_tokens"] if t["special"] or TURNS.fullmatch(t["content"])]
        for token in protected:
            token["special"] = True
        self.backend = Tokenizer.from_str(json.dumps(state))
        self.backend.encode_special_tokens = True  # the library's name for reading them as text
        self.backend.no_truncation()
        self.backend.no_padding()
        texts = [token["content"] for token in protected]
        self.as_text = {text: chr(AS_TEXT + i) for i, text in enumerate(texts)}
        self.as_token = {text: chr(AS_TOKEN + i) for i, text in enumerate(texts)}
        same = ("lstrip", "rstrip", "normalized", "single_word")
        added = [AddedToken(chr(AS_TOKEN + i), **{k: t[k] for k in same}) for i, t in enumerate(protected)]
        self.backend.add_tokens(added)
        self.ids = {self.backend.token_to_id(t.content): p["id"] for t, p in zip(added, protected, strict=True)}
        longest_first = map(re.escape, sorted(texts, key=len, reverse=True))
        self.written = re.compile("|".join((*longest_first, PRIVATE.pattern)))
        self.originals = {private: text for text, private in self.as_text.items()}

    def marked(self, text: str) -> str:
        return self.written.sub(lambda m: self.as_token.get(m[0]) or self.originals.get(m[0], UNKNOWN), text)


_readers: WeakKeyDictionary[PreTrainedTokenizerBase, _Reader] = WeakKeyDictionary()


def _reader(tokenizer: PreTrainedTokenizerBase) -> _Reader:
    if tokenizer not in _readers:
        _readers[tokenizer] = _Reader(tokenizer)
    return _readers[tokenizer]


def protected(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    """What people wrote, text or JSON values; special tokens as private characters where they are kept as text. What a
    chat template wrote stays as it is."""
    if not tokenizer.split_special_tokens or isinstance(value, Rendered):
        return value
    if isinstance(value, dict):
        return {key: protected(tokenizer, part) for key, part in value.items()}
    if isinstance(value, list):
        return [protected(tokenizer, part) for part in value]
    reader = _reader(tokenizer)
    return reader.written.sub(lambda m: reader.as_text.get(m[0], UNKNOWN), value) if isinstance(value, str) else value


def readable(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text as people wrote it."""
    if not tokenizer.split_special_tokens:
        return text
    return PRIVATE.sub(lambda m: _reader(tokenizer).originals.get(m[0], UNKNOWN), text)


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    add_special_tokens: bool = True,
) -> list[Tokenized]:
    """Each prompt + completion, tokenized as one string. Both are ``protected`` already where the completion is
    ``Rendered``; a prompt that is may have a completion that people or a policy wrote."""
    pairs = list(zip(prompts, completions, strict=True))
    if not tokenizer.split_special_tokens:
        texts = [prompt + completion for prompt, completion in pairs]
        batch = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
        encodings = batch.encodings
        assert encodings is not None  # load_tokenizer takes fast tokenizers only
        ids = [encoding.ids for encoding in encodings]
    else:
        reader = _reader(tokenizer)
        pairs = [
            (reader.marked(prompt), reader.marked(completion))
            for prompt, completion in (
                pair if isinstance(pair[1], Rendered) else protected(tokenizer, list(pair)) for pair in pairs
            )
        ]
        texts = [prompt + completion for prompt, completion in pairs]
        encodings = reader.backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        ids = [[reader.ids.get(token, token) for token in encoding.ids] for encoding in encodings]
    return [Tokenized(texts[i], len(prompt), ids[i], encodings[i]) for i, (prompt, _) in enumerate(pairs)]
