"""Writing a run's checkpoints: sharded, in the background, complete or absent.

A checkpoint is written to ``step-00000100.partial`` and renamed when every file is on the disk.
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.common.files import written_aside
from gcrm_fast.training.manifest import FOLDER, checkpoints, digest, read_manifest, write_manifest
from gcrm_fast.training.staging import Staging

REMOVED, ASIDE = ".removed", ".set-aside"


class Checkpoints:
    """Writes the checkpoints of a run, one at a time, in a thread; keeps the newest and the best."""

    def __init__(self, output: Path, keep: int, metric: str, group: dist.ProcessGroup) -> None:
        """``keep``: how many of the newest stay; ``metric``: the checkpoint with its greatest value also stays (empty:
        none). ``group``: of CPU tensors (gloo), used for nothing else at the same time."""
        self.output, self.folder = output, output / FOLDER
        self.keep, self.metric, self.group = keep, metric, group
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._last = -1

    def start(self, after: int, remove: bool) -> None:
        """Makes the folder ready for a run that continues after step ``after``: partial checkpoints are removed, and
        later ones, damaged or abandoned, are set aside (all of them removed with ``remove``)."""
        if dist.get_rank() == 0:
            if remove:
                self.remove_all()
            self.folder.mkdir(exist_ok=True)
            for pattern in ("*.partial", "*.old", f"*{REMOVED}"):
                for leftover in self.folder.glob(pattern):
                    shutil.rmtree(leftover)
            for path in checkpoints(self.output):
                if int(path.name.removeprefix("step-")) > after:
                    aside = path.with_name(path.name + ASIDE)
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
        self._last = after
        dist.barrier(self.group)

    def save(self, step: int, state: dict[str, Any], facts: Mapping[str, Any]) -> float:
        """Starts writing the state of ``step``; returns the seconds for which the caller was held up.

        The caller may change the state once it has returned. Waits for a checkpoint that is still being written.
        """
        if step == self._last:
            return 0.0
        start = time.perf_counter()
        self.wait()
        staged = self._staging.copy(state)
        self._last = step
        self._writing = self._thread.submit(self._write, f"step-{step:08d}", staged, dict(facts))
        return time.perf_counter() - start

    def failed(self) -> bool:
        """Whether the last checkpoint is known to have failed here; ``wait`` raises why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Returns when the last checkpoint is complete. Raises UserError where it could not be written."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """Waits for the thread, even if writing failed."""
        self._thread.shutdown()

    def _write(self, name: str, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Every rank's share of writing a checkpoint. Raises UserError on every rank where one of them fails."""
        path, first = self.folder / name, dist.get_rank() == 0
        with contextlib.ExitStack() as renaming:

            def begin() -> Path:
                partial = renaming.enter_context(written_aside(path))
                partial.mkdir()
                return partial

            def end() -> None:
                _sync(write_manifest(partial, facts, {name: file for part in files for name, file in part.items()}))
                _sync(partial)
                renaming.close()
                _sync(self.folder)
                self._prune()

            partial = self._everywhere(path, lambda: begin() if first else None)[0]
            # Nothing to copy ahead: all is on the CPU, and the writer's copying would wait for the GPU's stream.
            writer = dcp.FileSystemWriter(partial, per_thread_copy_ahead=0)
            self._everywhere(path, lambda: dcp.save(state, storage_writer=writer, process_group=self.group))
            files = self._everywhere(path, lambda: _described(partial))
            self._everywhere(path, lambda: end() if first else None)

    def _everywhere(self, path: Path, work: Callable[[], Any]) -> list[Any]:
        """What ``work`` returned on every rank; raises on all of them where it failed on one."""
        try:
            outcome: tuple[str, Any] = "", work()
        except (Exception, CheckpointException) as error:  # of the disk, of torch's checkpointing, of another rank
            outcome = _reason(error), None
        outcomes: list[tuple[str, Any]] = [outcome] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=self.group)
        for rank, (failure, _) in enumerate(outcomes):
            if failure:
                raise UserError(
                    f"{path}: cannot be written ({failure}, rank {rank}): the earlier checkpoints are intact"
                )
        return [value for _, value in outcomes]

    def _prune(self) -> None:
        """Removes what is not kept; an interrupted removal leaves a name that is no checkpoint's."""
        present = checkpoints(self.output)
        best = self.ranked()[:1] if self.metric else []
        for path in {*present} - {*present[-self.keep :], *best}:
            shutil.rmtree(path.rename(path.with_name(path.name + REMOVED)))

    def ranked(self, minimum: float = -math.inf) -> list[Path]:
        """The complete checkpoints whose metric is at least ``minimum``, best first, ties in order of age."""
        values: dict[Path, float] = {}
        for path in checkpoints(self.output):
            with contextlib.suppress(UserError):
                values[path] = read_manifest(path)["facts"]["metrics"].get(self.metric, -math.inf)
        good = [path for path, value in values.items() if value > -math.inf and value >= minimum]
        return sorted(good, key=lambda path: -values[path])

    def remove_all(self) -> None:
        """On rank 0, once the run needs none of them. A link to a folder elsewhere stays, and that folder too."""
        if self.folder.is_symlink():
            for path in self.folder.glob("step-*"):
                shutil.rmtree(path)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _described(partial: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of the files that this rank wrote; rank 0 has the metadata too."""
    patterns = [f"__{dist.get_rank()}_*", *([".metadata"] if dist.get_rank() == 0 else [])]
    paths = [path for pattern in patterns for path in partial.glob(pattern)]
    return {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in paths}


def _reason(error: BaseException) -> str:
    """The root of a failure; torch wraps what happened on each rank."""
    failures = getattr(error, "failures", None)  # CheckpointException: rank -> (exception, traceback)
    if failures:
        return _reason(next(iter(failures.values()))[0])
    if "unexpected pos" in str(error):  # all that torch.save says of a write that was cut short
        return "no room for a whole file"
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
