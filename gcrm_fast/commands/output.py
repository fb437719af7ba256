"""Outputs of commands: a file that grows by windows and resumes, stdout, and files next to an output."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from gcrm_fast.common import processes
from gcrm_fast.common.errors import UserError, kept_if_interrupted, printable
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.json_lines import compressed


class Progress(NamedTuple):
    """What a partial output holds: the options that made it, windows, bytes, and a hash of the records."""

    made_by: dict[str, Any]
    windows: int = 0
    bytes: int = 0
    records: str = ""


class Output:
    """A file of JSON lines that grows by whole windows as ``NAME.partial``; its Progress is in ``NAME.partial.json``,
    replaced after each window. ``command`` is the one that says so on stderr."""

    def __init__(self, path: Path, command: str = "score") -> None:
        self.path, self.command = path, command
        self.partial = path.with_name(path.name + ".partial")
        self.state = path.with_name(path.name + ".partial.json")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Locks the partial output."""
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            with FileLock(lock, timeout=0):
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
        except Timeout:
            raise UserError(f"{self.path}: another process is writing it: wait for it, or name another file") from None

    def progress(self, made_by: dict[str, Any]) -> Progress:
        """The progress of a partial output that the same options made; otherwise none, and a line says why."""
        try:
            done = Progress(**json.loads(self.state.read_text()))
            if self.partial.stat().st_size < done.bytes:
                raise ValueError
        except FileNotFoundError:
            return Progress(made_by)
        except (OSError, ValueError, TypeError):
            say(f"{self.partial}: cannot be resumed: starting over", self.command)
            return Progress(made_by)
        other = [name for name in made_by if done.made_by.get(name) != made_by[name]]
        if other:
            say(f"{self.partial}: was made with another {', '.join(other)}: starting over", self.command)
            return Progress(made_by)
        return done

    def append(self, lines: bytes, done: Progress) -> Progress:
        """Writes the lines of one window after what ``done`` counts. Returns the new progress."""
        lines = compressed(self.path, lines)
        try:
            with self.partial.open("r+b" if done.bytes else "wb") as file:
                file.seek(done.bytes)
                file.truncate()  # what a killed run wrote after its last whole window
                file.write(lines)
            done = done._replace(bytes=done.bytes + len(lines))
            with written_aside(self.state) as aside:
                aside.write_text(json.dumps(done._asdict()))
        except OSError as error:
            raise UserError(f"{self.partial}: cannot be written ({error.strerror})") from None
        return done

    def kept(self) -> contextlib.AbstractContextManager[None]:
        """An interrupt inside says that whole windows are kept."""
        return kept_if_interrupted(lambda: f"what is finished is kept in {self.partial}: the same command resumes")

    def finish(self) -> None:
        os.replace(self.partial, self.path)
        self.state.unlink()
        say(f"wrote {self.path}", self.command)


class Stdout:
    """Stands in for Output: nothing to resume, nothing to rename."""

    def held(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    kept = held

    def progress(self, made_by: dict[str, Any]) -> Progress:
        return Progress(made_by)

    def append(self, lines: bytes, done: Progress) -> Progress:
        sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()
        return done

    def finish(self) -> None: ...


def say(message: str, command: str = "score") -> None:
    """Prints a line on stderr, since stdout may be the output; the first process only."""
    if processes.rank() == 0:
        print(f"gcrm {command}: {printable(message)}", file=sys.stderr, flush=True)


def companion(output: Path, suffix: str) -> Path:
    """A file next to the output, with its name and a suffix."""
    return output.with_name(output.name + suffix)
