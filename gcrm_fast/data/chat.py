"""Prompts and completions as text: strings as they are, messages through the tokenizer's chat template.

Records, requests and trainers all come through here, so that a model is asked the way it was trained. A completion is
what follows the last message by anyone but the assistant and its tools; where no prompt is given as messages, it
starts no earlier than the first message in which the sides differ.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from gcrm_fast.common.errors import one_line
from gcrm_fast.data import fields
from gcrm_fast.data.fields import FieldError

Messages = Sequence[dict[str, Any]]
ANSWERING = ("assistant", "tool")  # roles of the messages that make up a completion


class Rendered(str):
    """Text that a chat template wrote, with all special tokens that belong in it."""


def as_text(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, completion: str | Messages) -> tuple[str, str]:
    """(prompt, completion) as text; unlike a record's, a sampled answer may be empty. Raises FieldError."""
    text, [answer] = as_texts(tokenizer, prompt, {"completion": completion})
    return text, answer


def as_texts(
    tokenizer: PreTrainedTokenizerBase | None, prompt: Any, sides: Mapping[str, Any], *, prompt_name: str = "prompt"
) -> tuple[str, list[str]]:
    """The prompt, and each of ``sides``, completions under the names of their fields.

    Messages of the sides that come before the completion belong to the prompt. A prompt that is text, next to sides
    that are messages, must repeat one of them.

    Raises:
        FieldError: neither text nor messages, messages that do not fit together or the chat template, or no template.
    """
    if not isinstance(prompt, list) and not any(isinstance(side, list) for side in sides.values()):
        return fields.text(prompt_name, prompt), [fields.text(*side) for side in sides.items()]
    dialogues = {name: _messages(name, side) for name, side in sides.items()}
    first = next(iter(dialogues))
    count = _shared(dialogues, implicit=not isinstance(prompt, list))
    context = dialogues[first][:count]
    if isinstance(prompt, list):
        context = _messages(prompt_name, prompt) + context
    elif prompt is not None and fields.text(prompt_name, prompt) not in [m["content"] for m in context]:
        raise FieldError(prompt_name, f"is text, and no message of '{first}' repeats it: give both as messages")
    if not context:
        raise FieldError(prompt_name, f"is missing, and '{first}' contains only the answer")
    text = _written(tokenizer, prompt_name if isinstance(prompt, list) else first, context, ask=True)
    completions: list[str] = []
    for name, messages in dialogues.items():
        whole = _written(tokenizer, name, [*context, *messages[count:]], ask=False)
        if not whole.startswith(text):
            raise FieldError(name, "changes how the chat template writes the prompt: the answer has no start")
        completions.append(Rendered(whole[len(text) :]))
    return text, completions


def is_empty(side: Any) -> bool:
    """Whether a completion has nothing to score: blank text, or a last message without any."""
    if isinstance(side, list):
        return bool(side) and not str(side[-1]["content"]).strip()
    return not side.strip()


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a completion: eos, and what the chat template, if there is one, writes after an answer."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        answer = "answer"
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
            tail = text[text.rindex(answer) + len(answer) :]
        except Exception:  # a template that expects other messages; a record's error will say so
            return frozenset(ends)
        added = tokenizer.added_tokens_decoder
        ends.update([i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in added][:1])
    return frozenset(ends)


def ending_at_the_reward(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The chat template, without white space after the end of the last turn, where other programs would read the
    reward; as it is, where the template writes none or writes more."""
    template, messages = tokenizer.chat_template, [{"role": r, "content": r} for r in ("user", "assistant")]
    if not isinstance(template, str):
        return template
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template that expects other messages
        return template
    ids = tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]
    if text == text.rstrip() or not ids or ids[-1] not in end_tokens(tokenizer):
        return template
    ended = "{{ written if add_generation_prompt else written.rstrip() }}"
    return f"{{% set written %}}{template}{{% endset %}}{ended}"


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise FieldError(name, f"is {fields.kind(value)}, not a list of messages")
    if not value:
        raise FieldError(name, "is an empty list: it must contain messages with 'role' and 'content'")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise FieldError(f"{name}[{i}]", f"is {fields.kind(message)}, not a message")
        for part in ("role", "content"):
            fields.text(f"{name}[{i}].{part}", message.get(part))
        # Tables give every message every key: null means absent.
        messages.append({key: part for key, part in message.items() if part is not None})
    return messages


def _shared(dialogues: Mapping[str, list[dict[str, Any]]], *, implicit: bool) -> int:
    """How many leading messages of the sides belong to the prompt; they must be equal in all of them."""
    first, *others = dialogues
    counts = {}
    for name, messages in dialogues.items():
        own = [i for i, message in enumerate(messages) if message["role"] not in ANSWERING]
        counts[name] = own[-1] + 1 if own else 0
        if counts[name] == len(messages):
            name, role = f"{name}[{len(messages) - 1}].role", messages[-1]["role"]
            raise FieldError(name, f"is {role[:20]!r}: the last message must be by the 'assistant'")
    count = counts[first]
    for name in others:
        if counts[name] != count or dialogues[name][:count] != dialogues[first][:count]:
            raise FieldError(name, f"differs from '{first}' before the answer: only the answer may differ")
    if implicit and others:
        last = min(map(len, dialogues.values())) - 1
        while count < last and all(dialogues[name][count] == dialogues[first][count] for name in others):
            count += 1
    return count


def _written(tokenizer: PreTrainedTokenizerBase | None, name: str, messages: Messages, *, ask: bool) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise FieldError(name, "is a list of messages, which needs a --model whose tokenizer has a chat template")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template is a program, and may fail in any way
        raise FieldError(name, f"does not suit the chat template ({one_line(error)})") from None
    return fields.text(name, text)
