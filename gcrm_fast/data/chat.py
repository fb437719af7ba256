"""Prompts and completions as text: strings as they are, messages through the tokenizer's chat template.

Records, requests and trainers all come through here, so that a model is asked the way it was trained. A completion is
what follows the last message by anyone but the assistant and its tools; where no prompt is given as messages, it
starts no earlier than the first message in which the sides differ.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from itertools import takewhile
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.common.notes import warn_once
from gcrm_fast.data import fields, rendering
from gcrm_fast.data.fields import FieldError
from gcrm_fast.data.messages import Messages, is_messages, messages_of, tools_of, with_text_arguments
from gcrm_fast.data.special_tokens import Rendered, protected

ANSWERING = ("assistant", "tool", "ipython", "function")  # roles of the messages that make up a completion
PROBE = "§"  # an answer that no generation prompt begins with


class _Dialogue(NamedTuple):
    """What a template writes out: messages and the tools that the assistant may call."""

    messages: list[dict[str, Any]]
    tools: Any  # a list of JSON objects, or None


_PROBE_DIALOGUE = _Dialogue([{"role": "user", "content": "question"}, {"role": "assistant", "content": PROBE}], None)
# What a template writes after a question, at least; text without it is not the template's.
_turns: WeakKeyDictionary[PreTrainedTokenizerBase, str] = WeakKeyDictionary()
# How the prompts read so far were written, and those of the training data, where gcrm.json records it.
Form = Literal["messages", "text"]
_read: WeakKeyDictionary[PreTrainedTokenizerBase, set[Form]] = WeakKeyDictionary()
_trained_on: WeakKeyDictionary[PreTrainedTokenizerBase, set[Form]] = WeakKeyDictionary()
# A dialogue that suits the template, for one that refuses the probe.
_rendered: WeakKeyDictionary[PreTrainedTokenizerBase, _Dialogue] = WeakKeyDictionary()


def as_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    completion: str | Messages,
    *,
    tools: Any = None,
    system: str | None = None,
) -> tuple[str, str]:
    """(prompt, completion) as text; unlike a record's, a sampled answer may be empty. Raises FieldError."""
    text, [answer] = as_texts(tokenizer, prompt, {"completion": completion}, tools=tools, system=system)
    return text, answer


def as_texts(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Any,
    sides: Mapping[str, Any],
    *,
    prompt_name: str = "prompt",
    tools: Any = None,
    system: str | None = None,
) -> tuple[str, list[str]]:
    """The prompt, and each of ``sides``, completions under the names of their fields.

    Messages of the sides that come before the completion belong to the prompt. A prompt that is text, next to sides
    that are messages, must repeat one of them; completions that are text, next to a prompt that is messages, a system
    message or tools, are answers of the assistant.

    Raises:
        FieldError: neither text nor messages, messages that do not fit together or the chat template, or no template.
    """
    tools, system = tools_of("tools", tools), fields.text("system", "" if system is None else system)
    plain = not any(map(is_messages, sides.values()))
    if plain and (is_messages(prompt) or tools or system.strip()):
        if not is_messages(prompt):
            prompt = [{"role": "user", "content": fields.text(prompt_name, prompt)}]
        sides = {name: [{"role": "assistant", "content": fields.text(name, side)}] for name, side in sides.items()}
    elif plain:
        question, texts = fields.text(prompt_name, prompt), [fields.text(*side) for side in sides.items()]
        if tokenizer is not None and tokenizer.chat_template and not _has_turns(tokenizer, question + texts[0]):
            _note_form(tokenizer, "text")
        return question, texts
    context, answers = _split(prompt, sides, prompt_name)
    context = _with_system(context, system)
    if tokenizer is not None and tokenizer.chat_template:
        _note_form(tokenizer, "messages")
    asked_name = prompt_name if is_messages(prompt) else next(iter(answers))
    asked = _written(tokenizer, asked_name, _Dialogue(context, tools), ask=True)
    wholes = {
        name: _written(tokenizer, name, _Dialogue([*context, *answer], tools), ask=False)
        for name, answer in answers.items()
    }
    if not all(whole.startswith(asked) for whole in wholes.values()):
        asked = _common_start(tokenizer, asked_name, _Dialogue(context, tools), asked, [*wholes.values()])
    for name, whole in wholes.items():
        if not asked or not whole.startswith(asked):
            raise FieldError(name, "changes how the chat template writes the prompt: the answer has no start")
        calls = [call for message in answers[name] for call in message.get("tool_calls", ())]
        if calls and not any(_texts(answers[name])) and not any(_name(call) in whole[len(asked) :] for call in calls):
            raise FieldError(name, "is a call, which the chat template of the model does not write")
    return Rendered(asked), [Rendered(whole[len(asked) :]) for whole in wholes.values()]


def trained_on(tokenizer: PreTrainedTokenizerBase, forms: Iterable[Form]) -> None:
    """Records how the prompts of the training data were written, none where that is unknown."""
    _trained_on[tokenizer] = set(forms)


def prompt_forms(tokenizer: PreTrainedTokenizerBase) -> list[Form]:
    """How the prompts of the training data were written, to be saved with the model: those read so far, unless
    ``trained_on`` was called. Text that the chat template seems to have written counts as neither form."""
    return sorted(_trained_on.get(tokenizer, _read.get(tokenizer, ())))


def _note_form(tokenizer: PreTrainedTokenizerBase, form: Form) -> None:
    """Warns where prompts are written otherwise than those of the training data, or are plain text where those are
    unknown."""
    _read.setdefault(tokenizer, set()).add(form)
    trained = _trained_on.get(tokenizer, ())
    if form == "text" and form not in trained:
        warn_once(
            "prompts are plain text, although the model has a chat template: it reads them without its turns; for "
            'turns give prompts as [{"role": "user", "content": TEXT}]'
        )
    elif trained == {"text"} and form == "messages":
        warn_once(
            "prompts are messages, although the model was trained on plain text, without the turns of its chat "
            "template: give prompts as text"
        )


def _has_turns(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the chat template seems to have written the text."""
    if tokenizer not in _turns:
        written = ""
        with contextlib.suppress(UserError):  # a template that expects other messages, or never ends
            written = _written(tokenizer, "", _PROBE_DIALOGUE, ask=False)
        question = str(_PROBE_DIALOGUE.messages[0]["content"])
        _turns[tokenizer] = written.partition(question)[2].partition(PROBE)[0].strip().partition("\n")[0]
    return _turns[tokenizer] in text


# How a template writes today's date: strftime_now("%d %b %Y").
TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


def with_date(tokenizer: PreTrainedTokenizerBase, day: date) -> None:
    """Makes the chat template write ``day`` where it writes the day on which it runs."""
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = TODAY.sub(
            lambda match: json.dumps(day.strftime(match["format"])), tokenizer.chat_template
        )


def is_empty(side: Any) -> bool:
    """Whether a completion has nothing to score: blank text, or messages that end without text or calls."""
    if not is_messages(side):
        return not side.strip()
    last = messages_of("completion", side)[-1]
    return not (last["content"] or "").strip() and not last.get("tool_calls")


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a completion: eos, and the special tokens that the chat template, if any, writes after an answer."""
    ends = {tokenizer.eos_token_id}
    for dialogue in (_PROBE_DIALOGUE, _rendered.get(tokenizer)) if tokenizer.chat_template else ():
        if dialogue is None:
            continue
        answer = protected(tokenizer, dialogue.messages[-1]["content"] or "").strip()
        try:
            text = _written(tokenizer, "", dialogue, ask=False)
            tail = text[text.rindex(answer) + len(answer) :]
        except (ValueError, FieldError):  # a template that expects other messages, or rewrites them
            continue
        added = tokenizer.added_tokens_decoder
        ids = tokenizer(tail, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        return frozenset(ends.union(i for i in ids if i in added))
    return frozenset(ends)


def ending_at_the_reward(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The chat template, without white space after the end of the last turn, where other programs would read the
    reward; as it is, where the template writes none or writes more."""
    template, messages = tokenizer.chat_template, [{"role": r, "content": r} for r in ("user", "assistant")]
    if not isinstance(template, str):
        return template
    try:
        text = rendering.render(tokenizer, messages)
    except ValueError:  # a template that expects other messages
        return template
    ids = tokenizer(text.rstrip(), add_special_tokens=False, split_special_tokens=False)["input_ids"]
    if text == text.rstrip() or not ids or ids[-1] not in end_tokens(tokenizer):
        return template
    ended = "{{ written if add_generation_prompt else written.rstrip() }}"
    return f"{{% set written %}}{template}{{% endset %}}{ended}"


def _split(
    prompt: Any, sides: Mapping[str, Any], prompt_name: str
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """The messages of the prompt, and those of each completion."""
    dialogues = {name: messages_of(name, side) for name, side in sides.items()}
    first = next(iter(dialogues))
    count = _shared(dialogues, implicit=not is_messages(prompt))
    context = dialogues[first][:count]
    if is_messages(prompt):
        context = messages_of(prompt_name, prompt) + context
    elif prompt is not None and fields.text(prompt_name, prompt).strip() not in _texts(context):
        omit = f", or omit it: --columns {','.join(f'{name}={name}' for name in sides)}" if len(sides) > 1 else ""
        raise FieldError(prompt_name, f"is text, and no message of '{first}' repeats it: give both as messages{omit}")
    if not context:
        raise FieldError(prompt_name, f"is missing, and '{first}' contains only the answer")
    return context, {name: messages[count:] for name, messages in dialogues.items()}


def _name(call: dict[str, Any]) -> str:
    function = call.get("function")
    return str((function if isinstance(function, dict) else call).get("name"))


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    return [(message["content"] or "").strip() for message in messages]


def _shared(dialogues: Mapping[str, list[dict[str, Any]]], *, implicit: bool) -> int:
    """How many leading messages of the sides belong to the prompt; they must be equal in all of them."""
    first, *others = dialogues
    counts = {}
    for name, messages in dialogues.items():
        foreign = [i for i, message in enumerate(messages) if message["role"] not in ANSWERING]
        counts[name] = foreign[-1] + 1 if foreign else 0
        if messages[-1]["role"] != "assistant":
            role = messages[-1]["role"]
            name = f"{name}[{len(messages) - 1}].role"
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


def _with_system(context: list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    if not system.strip() or context[0] == {"role": "system", "content": system}:
        return context
    if context[0]["role"] == "system":
        raise FieldError("system", "differs from the system message of the prompt: keep one of them")
    return [{"role": "system", "content": system}, *context]


def _common_start(
    tokenizer: PreTrainedTokenizerBase | None, name: str, dialogue: _Dialogue, asked: str, wholes: list[str]
) -> str:
    """The prompt of a template whose generation prompt begins the answer, with a thought for example: what it shares
    with an answer that has none. Where that does not contain the whole dialogue, what precedes every answer: some
    templates write a system message only before a question without an answer. "" for none."""
    probe = dialogue._replace(messages=[*dialogue.messages, {"role": "assistant", "content": PROBE}])
    answered = _written(tokenizer, name, probe, ask=False)
    common = _shared_start(asked, answered)
    if common.startswith(_written(tokenizer, name, dialogue, ask=False)):
        return common
    common = _shared_start(answered.partition(PROBE)[0], *wholes)
    last = protected(tokenizer, _texts(dialogue.messages)[-1]) if tokenizer else ""
    if not last or last not in common:
        return ""
    warn_once("the chat template of this model writes an answered prompt otherwise, maybe without its system message")
    return common


def _shared_start(*texts: str) -> str:
    return texts[0][: sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))]


def _written(tokenizer: PreTrainedTokenizerBase | None, name: str, dialogue: _Dialogue, *, ask: bool) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise FieldError(name, "is a list of messages, which needs a model whose tokenizer has a chat template")

    def render(messages: list[dict[str, Any]], tools: Any = dialogue.tools) -> str:
        messages, tools = protected(tokenizer, [messages, tools])
        try:
            text = rendering.render(tokenizer, messages, tools, ask=ask)
        except rendering.EndlessTemplate:
            raise
        except Exception as error:  # a template is a program, and may fail in any way
            raise FieldError(name, f"does not suit the chat template ({one_line(error)})") from None
        return fields.text(name, text)

    def unread(messages: list[dict[str, Any]], tools: Any) -> bool:
        """Whether the text is the same without something: a template that fails without it does read it."""
        with contextlib.suppress(FieldError):
            return text == render(messages, tools)
        return False

    def spelled(messages: list[dict[str, Any]], content: str) -> list[dict[str, Any]]:
        return [m | {"content": content} if m["content"] is None else m for m in messages]

    messages = dialogue.messages
    forms = [messages]
    if any("tool_calls" in message for message in messages):
        # Some templates read only text: as the arguments of calls, as the content next to them.
        forms.append(with_text_arguments(messages))
        forms += [spelled(form, "") for form in forms]
    text, messages = _first_rendered(render, forms)
    if any(message["content"] is None for message in messages) and unread(spelled(messages, "None"), dialogue.tools):
        messages = spelled(messages, "")  # null was written as Jinja writes it
        text = render(messages)
    without = [{k: v for k, v in m.items() if k != "tool_calls"} for m in spelled(messages, "")]
    if len(forms) > 1 and unread(without, dialogue.tools):
        warn_once("the chat template of this model does not write tool calls: they are missing from the text")
    if dialogue.tools and unread(messages, None):
        warn_once("the chat template of this model does not write tools: they are missing from the text")
    if not ask and tokenizer not in _rendered and messages[-1]["content"]:
        _rendered[tokenizer] = dialogue
    return text


def _first_rendered(
    render: Callable[[list[dict[str, Any]]], str], forms: list[list[dict[str, Any]]]
) -> tuple[str, list[dict[str, Any]]]:
    """The text of the first form of the messages that the template takes, and the form. Raises the first FieldError."""
    errors = []
    for form in forms:
        try:
            return render(form), form
        except FieldError as error:
            errors.append(error)
    raise errors[0]
