"""Messages of a conversation, checked and brought into the one shape that chat templates read."""

import json
from collections.abc import Sequence
from typing import Any

from gcrm_fast.data import fields
from gcrm_fast.data.fields import FieldError

Messages = Sequence[dict[str, Any]]
# What the 'from' of ShareGPT's turns means; other names are roles themselves.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}


def messages_of(name: str, value: Any) -> list[dict[str, Any]]:
    """The messages, each with 'role' and 'content': text, or None next to 'tool_calls'. Raises FieldError.

    ``from`` and ``value`` are read as role and content, parts of type text are joined, null means absent, and the
    arguments of a call that are JSON text become an object, as templates expect them.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise FieldError(name, f"is {fields.kind(value)}, not a list of messages")
    if not value:
        raise FieldError(name, "is an empty list: it must contain messages with 'role' and 'content'")
    return [_message(f"{name}[{i}]", message) for i, message in enumerate(value)]


def is_messages(value: Any) -> bool:
    """Whether a value is meant as messages: a list, or a single message."""
    return isinstance(value, list) or (isinstance(value, dict) and not value.keys().isdisjoint(("role", "from")))


def decoded(value: Any) -> Any:
    """Messages that are stored as JSON text as messages; everything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        inner = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if isinstance(inner, list) and inner and all(isinstance(turn, dict) and is_messages(turn) for turn in inner):
        return inner
    return value


def tools_of(name: str, value: Any) -> list[dict[str, Any]] | None:
    """The list of tools, which may be JSON text; None for none."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise FieldError(name, "is text, but not a JSON list of tools") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise FieldError(name, "is not a list of tools, each a JSON object")
    return [without_nulls(tool) for tool in value]


def without_nulls(value: Any) -> Any:
    """Tables give every object the keys of all: what is null was never there."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _message(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(name, f"is {fields.kind(value)}, not a message")
    message = without_nulls(value)
    if "role" not in message and "from" in message:
        speaker = fields.text(f"{name}.from", message.pop("from"))
        message = {"role": SPEAKERS.get(speaker, speaker), "content": message.pop("value", None), **message}
    calls = message.get("tool_calls")
    for key in ("role",) if calls else ("role", "content"):
        if key not in message and key not in value:
            words = fields.misspelled(key, value) or "a message has 'role' and 'content'"
            raise FieldError(f"{name}.{key}", f"is missing: {words}")
    fields.text(f"{name}.role", message.get("role"))
    message["content"] = _content(f"{name}.content", message.get("content"), optional=bool(calls))
    message.pop("tool_calls", None)  # also an empty list, which some templates take for a call
    if calls:
        message["tool_calls"] = [_call(f"{name}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    return message


def with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with the arguments of calls as JSON text, which DeepSeek's templates expect."""

    def spelled(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if not isinstance(function, dict):
            return call
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return [m | {"tool_calls": [*map(spelled, m["tool_calls"])]} if "tool_calls" in m else m for m in messages]


def _content(name: str, value: Any, *, optional: bool) -> str | None:
    if value in (None, "") and optional:
        return None
    if not isinstance(value, list):
        return fields.text(name, value)
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            what = part.get("type") if isinstance(part, dict) else fields.kind(part)
            raise FieldError(f"{name}[{i}]", f"is of type {str(what)[:20]!r}: only parts of type 'text' are read")
    return "".join(fields.text(f"{name}[{i}].text", part.get("text")) for i, part in enumerate(value))


def _call(name: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        if not isinstance(call, dict):
            raise FieldError(name, f"is {fields.kind(call)}, not a call")
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}
    except (ValueError, RecursionError):
        raise FieldError(f"{name}.function.arguments", "is text, but not valid JSON") from None
