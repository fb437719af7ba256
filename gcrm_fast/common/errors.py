"""The one exception that reaches people as a message."""

import contextlib
from collections.abc import Callable, Iterator


class UserError(Exception):
    """An error that the user can fix: one line that says what is wrong, where (file, line, field) and what to do."""


class RankError(UserError):
    """A UserError that only one rank has, which therefore prints it itself."""


@contextlib.contextmanager
def kept_if_interrupted(kept: Callable[[], str]) -> Iterator[None]:
    """A KeyboardInterrupt inside carries ``kept()``, what is kept and how to continue, unless it already says that."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(*(interrupt.args or (kept(),))) from None


def printable(text: object) -> str:
    """Text for a terminal: what it cannot show, or would obey, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(error: BaseException) -> str:
    """The first line of another library's message, to quote in a UserError."""
    first = next(iter(str(error).strip().splitlines()), "").strip() or type(error).__name__
    return first if len(first) <= 200 else first[:200] + "..."
