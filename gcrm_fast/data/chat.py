"""Messages as text, by the chat template of a tokenizer."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from gcrm_fast.common.errors import UserError, one_line

Messages = Sequence[dict[str, Any]]


def as_text(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, completion: str | Messages) -> tuple[str, str]:
    """(prompt, completion) as text: strings as they stand, messages through the chat template.

    Unlike a record's, a sampled answer may be empty, or go on over several messages.

    Raises:
        UserError: a string with messages, no chat template, messages that do not suit it, or half a surrogate pair.
    """
    texts = _rendered(tokenizer, prompt, completion)
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise UserError("the text holds half of a surrogate pair: write the character whole") from None
    return texts


def _rendered(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, completion: str | Messages
) -> tuple[str, str]:
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    if isinstance(prompt, str) or isinstance(completion, str):
        raise UserError("prompt and completion must both be text, or both be lists of messages")
    if not tokenizer.chat_template:
        raise UserError("messages need a model whose tokenizer has a chat template: give text")
    try:
        before = str(tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
    except Exception as error:  # a template is a program, and may fail in any way
        raise UserError(f"messages do not suit the chat template ({one_line(error)})") from None
    if not whole.startswith(before):
        raise UserError("the answer changes how the chat template writes the prompt: it has no start")
    return before, whole[len(before) :]
