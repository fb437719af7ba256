"""Options of commands: dataclasses that are checked field by field."""

import difflib
import math
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from gcrm_fast.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a field accepts, in its type: ``Annotated[int, Range(least=1)]``."""

    least: float = -math.inf
    greatest: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.greatest and self.above < value < self.below

    def __str__(self) -> str:
        if math.isfinite(self.least) and math.isfinite(self.greatest):
            return f"between {self.least} and {self.greatest}"
        words = {"at least": self.least, "more than": self.above, "at most": self.greatest, "less than": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if math.isfinite(bound))


@dataclass(frozen=True, kw_only=True)
class Argument:
    """How a field appears on the command line, in its type; by default as ``--its-name``."""

    metavar: str = ""
    short: str = ""
    positional: bool = False


AtLeastOne = Annotated[int, Range(least=1)]
ZeroOrMore = Annotated[int, Range(least=0)]
KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", tuple: "a list of texts"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the options of every command: a field accepts what its type says, a Literal its choices and an Annotated
    number its Range.

    Raises:
        UserError: a value that its field does not accept.
    """

    GROUPS: ClassVar[dict[str, str]] = {}
    """The titles of the groups in ``--help``, each with the first field of its group."""

    ELSEWHERE: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Names of options in other programs that stand for one here: a wrong option is answered with it."""

    NOT_HERE: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Names of options in other programs that have none here, under the words that answer them."""

    def __post_init__(self) -> None:
        for name, kind in kinds_of(type(self)).items():
            check_value(name, getattr(self, name), kind)

    @classmethod
    def defaults(cls, given: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Values of fields that are not ``given``, with their source in words; later ones win. Raises UserError."""
        return []

    def check(self) -> None:
        """Raises UserError for fields that contradict one another."""


def kinds_of(options: type[Options]) -> dict[str, Any]:
    """The type of each field, with its Range and Argument."""
    kinds = typing.get_type_hints(options, include_extras=True).items()
    return {name: kind for name, kind in kinds if typing.get_origin(kind) is not ClassVar}


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raises UserError for a value that the field ``name`` of type ``kind`` does not accept."""
    if wanted := missed(value, kind):
        raise UserError(f"{flag(name)} {shown(value)}: must be {wanted}")


def check_fields(name: str, values: Sequence[str]) -> None:
    """Raises UserError for names of fields that are joined with commas."""
    if any("," in value for value in values):
        apart = " ".join(part.strip() for value in values for part in value.split(",") if part.strip())
        raise UserError(f"{flag(name)} {shown(tuple(values))}: separate fields with spaces: {flag(name)} {apart}")


def flag(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """A value as the command line has it, with escapes for bytes that are not UTF-8."""
    return (" ".join(map(str, value)) if isinstance(value, tuple) else str(value)).encode(errors="replace").decode()


def missed(value: Any, kind: Any) -> str:
    """What a field of type ``kind`` accepts, in words, if ``value`` is something else; otherwise empty."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Annotated:
        ranges = [one for one in arguments[1:] if isinstance(one, Range)]
        return missed(value, arguments[0]) or next((str(one) for one in ranges if value not in one), "")
    if origin is Literal:
        return "" if value in arguments else one_of(str(value), arguments)
    if arguments and origin is not tuple:  # a union
        wanted = [missed(value, one) for one in arguments]
        return " or ".join(wanted) if all(wanted) else ""
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else origin):
        return KINDS.get(origin, f"of type {origin.__name__}")
    if kind is float:
        return "" if abs(value) <= sys.float_info.max else KINDS[float]
    if isinstance(value, tuple):
        wanted = [missed(one, arguments[0]) for one in value]
        return next((KINDS[tuple] if one == KINDS[str] else one for one in wanted if one), "")
    text = str(value)
    if "\0" in text:
        return "text without NUL characters"
    return "" if text.encode(errors="replace").decode() == text else "UTF-8 text"


def one_of(value: str, choices: Sequence[str]) -> str:
    """The choices in words, with the one that ``value`` probably means."""
    named = [choice for choice in choices if choice]
    near = difflib.get_close_matches(value, named, n=1)
    return f"one of {', '.join(named)}" + (f" (did you mean {near[0]}?)" if near else "")
