"""What the commands of ``gcrm`` share: options from dataclasses, errors that are one line, outputs that are whole."""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro
from tyro.conf import Positional

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


def output_file(output: str, inputs: Sequence[str]) -> Path:
    """The path of a file to be written. Raises UserError where it cannot be, or is one of the inputs."""
    path = Path(output)
    if path.is_dir():
        raise UserError(f"--output {output}: is a folder: name a file")
    if not path.parent.is_dir():
        raise UserError(f"--output {output}: no folder {path.parent}: make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {output}: the folder {path.parent} cannot be written to")
    if path.exists() and any(os.path.exists(name) and path.samefile(name) for name in inputs):
        raise UserError(f"--output {output}: is also an input: name another file")
    return path


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A free name beside ``path`` for a file or a folder, which takes its place if all goes well and goes if not."""
    path = path.resolve()  # what a symbolic link names is replaced, not the link
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    _remove(partial)
    try:
        yield partial
        if path.is_dir():
            _remove(old)
            path.rename(old)
        partial.replace(path)
        _remove(old)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


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
            message = f"rank {os.environ.get('RANK', '0')}: {error}"
        if isinstance(error, RankError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{prog}: {message}", file=sys.stderr, flush=True)
        return 2
    return 0
