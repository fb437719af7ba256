"""The one exception that reaches people as a message."""


class UserError(Exception):
    """An error that the user can mend: one line that says what is wrong, where (file, line, field), what to do."""
