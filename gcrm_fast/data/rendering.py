"""Chat templates, rendered in a process of their own, which ends with a rendering that takes too long.

A template is a program that comes with the model. Jinja's sandbox keeps it from files and from the network, but lets it
run forever or fill the memory.
"""

import functools
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.limited import EndedError, LimitedProcess, serve

SECONDS = 5.0  # per rendering, which takes a few milliseconds
MEMORY = 2 * 2**30  # bytes of address space
TOLERATED = 3  # renderings without an end, while bad records are skipped
LONGEST = 2**26  # characters


class EndlessTemplate(UserError):
    """A rendering took too long, or ended its process. After TOLERATED of them ``hopeless`` is true: a file of such
    records would take hours."""

    def __init__(self, message: str, *, hopeless: bool) -> None:
        super().__init__(message)
        self.hopeless = hopeless


_renderer = LimitedProcess(__name__)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Any = None, *, ask: bool = False
) -> str:
    """The text that the tokenizer's chat template writes; ``ask`` adds the start of an answer.

    Raises:
        EndlessTemplate: it does not end within SECONDS, or crashes.
        ValueError: one line that says what the template raised.
    """
    template = tokenizer.get_chat_template(tools=tools)
    try:
        return _renderer(SECONDS, template, list(messages), tools, ask, tokenizer.special_tokens_map)
    except EndedError as error:
        source = tokenizer.name_or_path or "the tokenizer"
        message = f"{source}: the chat template {error.reason}: correct it, or omit these messages"
        raise EndlessTemplate(message, hopeless=_renderer.endless > TOLERATED) from None


def _rendered(
    renderer: PreTrainedTokenizerBase, template: str, messages: Any, tools: Any, ask: bool, tokens: dict[str, Any]
) -> str:
    options = {"tools": tools, "tokenize": False, "add_generation_prompt": ask, **tokens}
    text = str(renderer.apply_chat_template(messages, chat_template=template, **options))
    if len(text) > LONGEST:
        raise ValueError(f"writes more than {LONGEST >> 20} Mi characters")
    return text


if __name__ == "__main__":
    serve(functools.partial(_rendered, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))), MEMORY)
