"""The one exception that reaches people as a message."""


class UserError(Exception):
    """An error that the user can mend: one line that says what is wrong, where (file, line, field), what to do."""


class RankError(UserError):
    """A UserError of one rank alone, which therefore tells it itself."""


def one_line(error: BaseException) -> str:
    """The start of another library's message, to be quoted in a UserError."""
    first = next(iter(str(error).strip().splitlines()), "").strip() or type(error).__name__
    return first if len(first) <= 200 else first[:200] + "..."
