"""Options of commands: dataclasses that are checked field by field, and what a command does with an error."""

import contextlib
import difflib
import io
import math
import os
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

import tyro

from gcrm_fast.common import processes
from gcrm_fast.common.errors import RankError, UserError

T = TypeVar("T", bound="Options")


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
        words = {"at least": self.least, "more than": self.above, "at most": self.greatest, "less than": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if math.isfinite(bound))


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

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            if wanted := missed(getattr(self, name), kind):
                raise UserError(f"{flag(name)} {shown(getattr(self, name))}: must be {wanted}")

    @classmethod
    def defaults(cls, argv: list[str]) -> Self | None:
        """The options where ``argv`` sets none, for a class in which they depend on it. Raises UserError."""
        return None

    def check(self) -> None:
        """Raises UserError for fields that contradict one another."""


def flag(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """A value as the command line has it; bytes that are not UTF-8 as escapes."""
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
        return "" if -math.inf < value < math.inf else KINDS[float]
    text = "".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if "\0" in text:
        return "text without NUL characters"
    return "" if text.encode(errors="replace").decode() == text else "UTF-8 text"


def one_of(value: str, choices: Sequence[str]) -> str:
    """The choices in words, with the one that ``value`` probably means."""
    named = [choice for choice in choices if choice]
    near = difflib.get_close_matches(value, named, n=1)
    return f"one of {', '.join(named)}" + (f" (did you mean {near[0]}?)" if near else "")


def parse_options(kind: type[T], argv: list[str], prog: str) -> T:
    """``argv`` as an instance of ``kind``; ``--help`` prints the docstrings of its fields and exits.

    Raises:
        UserError: an option that does not exist, a value that its field does not accept, or fields that contradict one
            another.
    """
    default, complaint = kind.defaults(argv) or tyro.MISSING_NONPROP, io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options = tyro.cli(kind, args=argv, prog=prog, default=default)
    except SystemExit as end:
        if end.code != 2:
            raise
        # tyro draws a box of several lines; an error here is one line, like every other.
        words = " ".join(word for word in complaint.getvalue().split() if not set(word) & set("╭╮╰╯│─"))
        raise UserError(words) from None
    options.check()
    return options


def exit_code(prog: str, work: Callable[[], None]) -> int:
    """Does the work. Returns 0; 2 after one line on stderr, from the first process of each machine, for an error that
    the user can fix; 1 if the output is a closed pipe; 130 after Ctrl-C."""
    try:
        work()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more can be written there
        return 1
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        if isinstance(error, RankError):
            message = f"rank {processes.rank()}: {error}"
        if isinstance(error, RankError) or processes.local_rank() == 0:
            print(f"{prog}: {message}", file=sys.stderr, flush=True)
        return 2
    return 0
