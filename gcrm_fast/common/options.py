"""What every command of ``gcrm`` is made with: options from dataclasses, errors that are one line."""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from gcrm_fast.common import processes
from gcrm_fast.common.errors import RankError, UserError

T = TypeVar("T")


def parse_options(kind: type[T], argv: list[str], prog: str, default: T | None = None) -> T:
    """``argv`` as an instance of the dataclass ``kind``; ``--help`` prints its fields' docstrings and exits.

    Raises:
        UserError: an option that does not exist, or a value of the wrong type.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            if default is None:
                return tyro.cli(kind, args=argv, prog=prog)
            return tyro.cli(kind, args=argv, prog=prog, default=default)
    except SystemExit as end:
        if end.code != 2:
            raise
        # tyro draws a box over several lines; an error here is one line, like every other.
        words = " ".join(word for word in complaint.getvalue().split() if not set(word) & set("╭╮╰╯│─"))
        raise UserError(words) from None


def exit_code(prog: str, work: Callable[[], None]) -> int:
    """Does the work: 0, or 2 after one line on stderr (of each machine's first process) for what the user can mend."""
    try:
        work()
    except BrokenPipeError:  # who reads our output wants no more: not an error, and nothing more can be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
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
