"""Arrays on disk by content: what one run tokenized, the next one reads.

An entry is a safetensors file named after the key of its content. It contains that key and a checksum: a damaged file,
or another program's, is reported in one line and rebuilt. Files may be deleted at any time.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = "gcrm_fast tokens 1"


def cache_folder(option: str) -> Path | None:
    """The folder for ``--cache``: 'auto' ($XDG_CACHE_HOME/gcrm_fast), 'none', or a folder's name."""
    if option == "none":
        return None
    if option != "auto":
        return Path(option)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gcrm_fast"


class TokenCache:
    """``get`` reads an entry or builds it; what was built is written when the ``with`` block ends without an error.

    When several processes miss an entry, one builds it while the others wait and then read. Each holds one lock at a
    time, so they cannot wait for each other. Without a folder everything is built, and nothing written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._lock: FileLock | None = None
        self._new: dict[str, dict[str, np.ndarray]] = {}

    @property
    def holds_lock(self) -> bool:
        """Whether other processes wait for what this one builds."""
        return self._lock is not None

    def __enter__(self) -> "TokenCache":
        return self

    def get(self, key: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of ``key``. A folder that cannot be used costs a warning, never the run."""
        if self.folder is None:
            return build()
        found = self._read(key)
        if found is None and self._lock is None:
            self._acquire(self.folder, key)
            found = self._read(key)
            if found is not None:
                self._release()
        if found is None:
            found = self._new[key] = build()
        return found

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self.folder is None:
            return
        try:
            if kind is None:
                for key, arrays in self._new.items():
                    self._write(self.folder, key, arrays)
        finally:
            self._release()

    def _acquire(self, folder: Path, key: str) -> None:
        lock = FileLock(folder / f"{key}.lock")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            self._warn(folder, f"the token cache cannot be used ({error.strerror}): continuing without it")
            self.folder = None
        else:
            self._lock = lock

    def _release(self) -> None:
        if self.folder is None or self._lock is None:
            return
        # A process that waits on the removed file continues, at worst with another: both write the same content.
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None
        with suppress(OSError):  # an input that failed leaves no empty folder behind
            self.folder.rmdir()

    def _read(self, key: str) -> dict[str, np.ndarray] | None:
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, TypeError, AttributeError):  # the last: a dtype NumPy lacks
            metadata, arrays = {}, {}
        if metadata != _metadata(key, arrays):
            if self.holds_lock:  # without the lock, the entry is read again
                self._warn(path, "is damaged or not a token cache of this program: tokenizing again")
            return None
        return arrays

    def _write(self, folder: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
        partial = folder / f"{key}.{os.getpid()}.partial"
        try:
            save_file(arrays, partial, metadata=_metadata(key, arrays))
            partial.replace(folder / f"{key}.safetensors")
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            self._warn(folder, f"the token cache cannot be written ({error}): continuing without it")

    @staticmethod
    def _warn(path: Path, what: str) -> None:
        print(f"gcrm train: warning: {path}: {what}", file=sys.stderr, flush=True)


def _metadata(key: str, arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Metadata of an entry."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return {"format": FORMAT, "key": key, "sha256": digest.hexdigest()}
