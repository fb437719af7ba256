"""Output files: checked before the work starts, complete or absent after it."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from gcrm_fast.common.errors import UserError


def output_file(output: str, inputs: Sequence[str]) -> Path:
    """The path of a file to write. Raises UserError if it cannot be written, or is one of the inputs."""
    path = Path(output)
    if path.is_dir():
        raise UserError(f"--output {output}: is a folder: name a file")
    if not path.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {path.parent}: create it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {output}: the folder {path.parent} is not writable")
    if path.exists() and any(os.path.exists(name) and path.samefile(name) for name in inputs):
        raise UserError(f"--output {output}: is also an input: name another file")
    return path


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
