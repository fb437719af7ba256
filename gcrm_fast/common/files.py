"""Output files: checked before the work starts, complete or absent after it."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from gcrm_fast.common.errors import UserError

LARGEST_TEXT = 2**26  # bytes of a configuration


def output_file(output: str, inputs: Sequence[str]) -> Path:
    """The path of a file to write. Raises UserError if it cannot be written, or is one of the inputs."""
    path = Path(output)
    if path.is_dir():
        raise UserError(f"--output {output}: is a folder: name a file")
    if path.exists() and not path.is_file():  # a device or a pipe, which the new file would replace
        raise UserError(f"--output {output}: is not a regular file: name another")
    if not path.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {path.parent}: create it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {output}: the folder {path.parent} is not writable")
    if path.exists() and any(os.path.exists(name) and path.samefile(name) for name in inputs):
        raise UserError(f"--output {output}: is also an input: name another file")
    return path


def read_text(path: Path) -> str:
    """The text of a regular file of up to LARGEST_TEXT bytes. Raises OSError for others: a pipe may never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if path.exists() and path.stat().st_size > LARGEST_TEXT:
        raise OSError(errno.EFBIG, f"more than {LARGEST_TEXT >> 20} MiB", str(path))
    return path.read_text(encoding="utf-8")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path next to ``path`` for a file or a folder, which replaces it on success and is removed on an error."""
    path = path.resolve()  # replaces the target of a symbolic link, not the link
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    _remove(partial)
    try:
        yield partial
        _apply_umask(partial)
        if path.is_dir():
            _remove(old)
            path.rename(old)
        partial.replace(path)
        _remove(old)
    finally:
        _remove(partial)


def _apply_umask(path: Path) -> None:
    """Makes files readable as the umask allows: safetensors lets only their owner read them."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            file.chmod(0o666 & ~umask)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
