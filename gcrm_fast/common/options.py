"""What the commands of ``gcrm`` share: options from dataclasses, errors that are one line, outputs that are whole."""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import tyro
from tyro.conf import Positional

from gcrm_fast.common import processes
from gcrm_fast.common.errors import RankError, UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Of the commands that run a model over records."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Reward model: a folder or a hub name."""
    data: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE...")]
    """Records: files of JSON lines (plain or gzipped, - for stdin) or Parquet, folders that datasets saved, datasets of
    the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the trunk computes in; auto: bfloat16 on a GPU, else float32."""
    tokens_per_batch: int = 16384
    """Tokens that are computed at a time: memory grows with it."""
    columns: str = ""
    """Names that the records use for this project's fields: prompt=instruction,completion=answer. No other fields are
    read then."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A record that cannot be used ends the run, or is left out and counted."""

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("no records are named: MODEL FILE... are expected")
        if self.tokens_per_batch < 1:
            raise UserError(f"--tokens-per-batch {self.tokens_per_batch}: must be at least 1")


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
