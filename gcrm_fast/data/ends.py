"""Where the reward of a completion is read, for models of this project and of others.

A model scores well only where its trainer read it. This project's read an end token (encoding.py). transformers'
sequence classifiers, and with them TRL, read the last token that is not ``pad_token_id``: where pad is eos that is the
token before it, and where a chat template writes more after the end of the turn, it is what comes last.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from gcrm_fast.data.encoding import OWN_END, Completion, encode_completions
from gcrm_fast.data.special_tokens import Rendered, Tokenized, protected, tokenize

Kind = Literal["eos", "transformers", "as-is"]
Choice = Literal["auto", "eos", "as-is"]  # of --end


class End(NamedTuple):
    """``eos``: at an end token, which is appended where there is none. ``transformers``: at the last token that is not
    ``pad``, after an eos that plain text is given. ``as-is``: the same, with nothing appended."""

    kind: Kind = "eos"
    pad: int | None = None


def encode_to(
    end: End,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    cuts: Sequence[bool],
) -> list[Completion]:
    """Tokens up to where the reward is read; a completion that a length limit cut is always read at its last token."""
    kept = [i for i, cut in enumerate(cuts) if not cut and end.kind != "eos"]
    cut_or_eos = sorted(set(range(len(cuts))) - set(kept))
    parts = [prompts[i] for i in cut_or_eos], [completions[i] for i in cut_or_eos], [cuts[i] for i in cut_or_eos]
    encoded = dict(zip(cut_or_eos, encode_completions(tokenizer, *parts), strict=True)) if cut_or_eos else {}
    for special in (True, False):  # a chat template writes all special tokens itself
        which = [i for i in kept if isinstance(completions[i], Rendered) != special]
        if not which:
            continue
        texts = [(prompts[i], completions[i]) for i in which]
        if end.kind == "transformers" and special:
            texts = [_with_eos(tokenizer, *text) for text in texts]
        tokenized = tokenize(tokenizer, *zip(*texts, strict=True), add_special_tokens=special)
        encoded |= {i: _as_given(one, end.pad) for i, one in zip(which, tokenized, strict=True)}
    return [encoded[i] for i in range(len(cuts))]


def _with_eos(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[str, str]:
    prompt, completion, eos = protected(tokenizer, prompt), protected(tokenizer, completion), str(tokenizer.eos_token)
    return prompt, Rendered(completion if (prompt + completion).endswith(eos) else completion + eos)


def _as_given(one: Tokenized, pad: int | None) -> Completion:
    """The tokens without trailing pads. If none of the completion is left, the last one counts as the completion."""
    ids, end = one.ids, len(one.ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    start = next((k for k, (_, stop) in enumerate(one.encoding.offsets) if stop > one.prompt), end)
    return Completion(np.array(ids[:end], dtype=np.int32), min(start, max(end - 1, 0)), OWN_END)
