"""Values of a record's fields, checked. What is wrong is a FieldError; records.py adds the record's place."""

import difflib
from collections.abc import Iterable
from typing import Any

from gcrm_fast.common.errors import UserError

LIKENESS = 0.8  # of a field's name to its misspelling: a letter wrong, missing, too many or exchanged
LARGEST = 1e30  # margin or score: float32 holds it and sums of it


class FieldError(UserError):
    """A problem with one field; ``name`` may end with an index: 'completions[2]'."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"field '{name}' {problem}")
        self.name, self.problem = name, problem


def kind(value: Any) -> str:
    """The type of a value, as errors name it."""
    return "null" if value is None else type(value).__name__


def misspelled(name: str, present: Iterable[str]) -> str:
    """The question whether one of the fields that are ``present`` is meant as ``name``; empty where none is like it.
    prompt_id and completion2 are names of their own."""
    likely = [key for key in present if abs(len(key) - len(name)) < 2 and not key[-1:].isdigit()]
    near = difflib.get_close_matches(name, likely, n=1, cutoff=LIKENESS)
    return f"did you misspell it as {near[0]!r}?" if near else ""


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FieldError(name, f"is {kind(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FieldError(name, "contains half of a surrogate pair: write the whole character") from None
    return value


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FieldError(name, f"is {kind(value)}, not a finite number")
    # Compared, not converted: JSON integers have no bound. NaN fails it too.
    if not abs(value) <= LARGEST:
        raise FieldError(name, f"is not a finite number between {-LARGEST:g} and {LARGEST:g}")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise FieldError(name, f"is {kind(value)}, not true or false")
    return value


def entries(name: str, value: Any, count: int | None = None) -> list[Any]:
    """A list, of ``count`` entries where there is one for each completion."""
    if not isinstance(value, list):
        raise FieldError(name, f"is {kind(value)}, not a list")
    if count is not None and len(value) != count:
        raise FieldError(name, f"has {len(value)} entries for {count} completions")
    return value
