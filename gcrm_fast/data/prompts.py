"""Records that are prompts: text, or messages up to the answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gcrm_fast.common.errors import UserError
from gcrm_fast.data import fields
from gcrm_fast.data.fields import FieldError
from gcrm_fast.data.messages import Messages, decoded, is_messages, messages_of
from gcrm_fast.data.sources import BadRecords, rows

NAMES = ("prompt", "question", "messages")  # the first that a record has


@dataclass(frozen=True)
class Prompt:
    """A prompt, text or messages; ``where`` is 'source:line'; ``fields`` holds its whole record."""

    prompt: str | Messages
    where: str
    fields: dict[str, Any]


def read_prompts(sources: Sequence[str], *, field: str = "", bad: BadRecords | None = None) -> Iterator[Prompt]:
    """The prompts of all sources (see sources.rows), from ``field`` or the first of NAMES that a record has.

    Messages by the assistant at the end are its answer, which is not part of the prompt.

    Raises:
        UserError: unless ``bad`` skips it, a record without a prompt; a source without records.
    """
    bad = bad or BadRecords()
    for source in sources:
        count = 0
        for where, raw in rows(source, bad):
            count += 1
            try:
                yield Prompt(_prompt(raw, field), where, raw)
            except FieldError as error:
                bad.add(UserError(f"{where}: field '{error.name}' {error.problem}"))
        if not count:
            raise UserError(f"{source}: contains no records: one JSON object per line, or rows, are expected")


def _prompt(raw: Any, field: str) -> str | Messages:
    name = field or next((name for name in NAMES if isinstance(raw, dict) and raw.get(name) is not None), NAMES[0])
    if not isinstance(raw, dict) or raw.get(name) is None:
        raise FieldError(name, "is missing: a record needs a prompt, a question or messages")
    for context in ("system", "tools"):
        if raw.get(context):
            raise FieldError(context, "is not read here: give the prompt as messages with a system message")
    value = decoded(raw[name])
    if not is_messages(value):
        return fields.text(name, value)
    messages = messages_of(name, value)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise FieldError(name, "has only the answer: a prompt needs a message that asks")
    return messages
