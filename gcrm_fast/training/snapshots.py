"""Checkpoints of a run: what it takes to go on, sharded, written in the background, complete or not there.

    <output>/checkpoints/step-00000100/
      __<rank>_<n>.distcp, .metadata    torch.distributed.checkpoint
      manifest.json                     step, configuration, metrics, size and SHA-256 of every file, and its own

A checkpoint is written to ``step-00000100.partial`` and renamed when every file is on the disk.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.training.staging import Staging

FOLDER, MANIFEST, PARTIAL, ASIDE = "checkpoints", "manifest.json", ".partial", ".set-aside"
NAME = re.compile(r"step-(\d{8})")


class Found(NamedTuple):
    """A complete checkpoint and its manifest's facts."""

    path: Path
    facts: dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- manifest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises UserError where it is missing or damaged."""
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing: the checkpoint is not complete") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)})") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != _own_digest(manifest):
        raise UserError(f"{path}: damaged: its content is not what was written")
    return manifest


def damage(checkpoint: Path, manifest: Mapping[str, Any], part: int, parts: int) -> str:
    """The first thing wrong with the ``part``-th of ``parts`` shares of the checkpoint's files; empty for nothing."""
    for name in sorted(manifest["files"])[part::parts]:
        path, expected = checkpoint / name, manifest["files"][name]
        try:
            if path.stat().st_size != expected["bytes"]:
                return f"{path}: has {path.stat().st_size} bytes, not {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"{path}: its content is not what was written"
        except OSError as error:
            return f"{path}: {error.strerror}"
    return ""


# ----------------------------------------------------------------------------------------------------------- finding


def checkpoints(output: Path) -> list[Path]:
    """Folders with the name of a checkpoint, oldest first."""
    folder = output / FOLDER
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name)) if folder.is_dir() else []


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def first_whole(paths: list[Path], group: dist.ProcessGroup) -> tuple[Found | None, list[str]]:
    """The first complete and undamaged one of rank 0's ``paths``, and a line about each before it. Every rank reads a
    share of the files; every rank returns the same."""
    named = [paths]
    dist.broadcast_object_list(named, src=0, group=group)
    notes: list[str] = []
    for path in named[0]:
        try:
            manifest = read_manifest(path)
            wrong = damage(path, manifest, dist.get_rank(), dist.get_world_size())
        except UserError as error:
            manifest, wrong = {}, str(error)
        wrongs: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(wrongs, wrong, group=group)
        if not any(wrongs):
            return Found(path, manifest["facts"]), notes
        notes.append(f"{next(filter(None, wrongs))}: checkpoint skipped")
    return None, notes


# ------------------------------------------------------------------------------------------------- writing and reading


class Checkpoints:
    """Writes the checkpoints of a run, one at a time, in a thread; keeps the newest and the best."""

    def __init__(self, output: Path, keep: int, metric: str, group: dist.ProcessGroup) -> None:
        """``keep``: how many of the newest stay; ``metric``: of whose facts the greatest also stays, or empty.
        ``group``: of CPU tensors (gloo), used for nothing else at the same time."""
        self.folder = output / FOLDER
        self.keep, self.metric, self.group = keep, metric, group
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._last = -1

    def start(self, after: int, remove: bool) -> None:
        """Makes the folder ready for a run that goes on after step ``after``: partial checkpoints are removed, and
        later ones, damaged or given up, are set aside (all of them removed with ``remove``)."""
        if dist.get_rank() == 0:
            if remove:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
            for leftover in self.folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(leftover)
            for path in checkpoints(self.folder.parent):
                if step_of(path) > after:
                    aside = path.with_name(path.name + ASIDE)
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
        self._last = after
        dist.barrier(self.group)

    def save(self, step: int, state: dict[str, Any], facts: Mapping[str, Any]) -> float:
        """Starts writing the state of ``step``; returns the seconds for which the caller was held up.

        The caller may change the state once it has returned. A checkpoint still being written is waited for.
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
        if self._writing is None:
            return
        try:
            self._writing.result()
        finally:
            self._writing = None

    def close(self) -> None:
        """Waits for the thread, whatever became of its work."""
        self._thread.shutdown()

    def _write(self, name: str, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Every rank's share of writing a checkpoint. Raises UserError on every rank where one of them fails."""
        partial, path = self.folder / (name + PARTIAL), self.folder / name
        self._everywhere(path, lambda: partial.mkdir() if dist.get_rank() == 0 else None)
        # Nothing to copy ahead: all is on the CPU, and the writer's copying would wait for the GPU's stream.
        writer = dcp.FileSystemWriter(partial, per_thread_copy_ahead=0)
        self._everywhere(path, lambda: dcp.save(state, storage_writer=writer, process_group=self.group))
        files = self._everywhere(path, lambda: self._described(partial))
        self._everywhere(path, lambda: self._finish(partial, path, files, facts) if dist.get_rank() == 0 else None)

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
                    f"{path}: cannot be written ({failure}, rank {rank}): the earlier checkpoints are whole"
                )
        return [value for _, value in outcomes]

    def _described(self, partial: Path) -> dict[str, dict[str, Any]]:
        """Size and checksum of the files that this rank wrote; rank 0 has the metadata too."""
        patterns = [f"__{dist.get_rank()}_*", *([".metadata"] if dist.get_rank() == 0 else [])]
        paths = [path for pattern in patterns for path in partial.glob(pattern)]
        return {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in paths}

    def _finish(self, partial: Path, path: Path, files: list[dict[str, Any]], facts: dict[str, Any]) -> None:
        """Manifest, rename, and the removal of what is not kept."""
        manifest: dict[str, Any] = {"facts": facts, "files": {name: f for part in files for name, f in part.items()}}
        manifest["sha256"] = _own_digest(manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync(partial / MANIFEST)
        _sync(partial)
        if path.exists():  # damaged, or of a run that was started anew
            _remove(path)
        partial.rename(path)
        _sync(self.folder)
        self._prune()

    def _prune(self) -> None:
        present = checkpoints(self.folder.parent)
        keep = set(present[-self.keep :])
        if self.metric:
            keep.update(self.ranked()[:1])
        for path in set(present) - keep:
            _remove(path)

    def ranked(self, least: float = -math.inf) -> list[Path]:
        """The complete checkpoints whose metric is at least ``least``, best first, of equal ones the oldest first."""
        values: dict[Path, float] = {}
        for path in checkpoints(self.folder.parent):
            with contextlib.suppress(UserError):
                values[path] = read_manifest(path)["facts"]["metrics"].get(self.metric, -math.inf)
        return sorted(
            (path for path, value in values.items() if value > -math.inf and value >= least),
            key=lambda path: -values[path],
        )

    def remove_all(self) -> None:
        """On rank 0, once the run needs none of them."""
        shutil.rmtree(self.folder)


def _remove(path: Path) -> None:
    """Removes a checkpoint; a removal cut short leaves no damaged one behind, only a partial one."""
    doomed = path.with_name(path.name + ".removed" + PARTIAL)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _reason(error: BaseException) -> str:
    """The root of a failure; torch wraps what happened on each rank."""
    failures = getattr(error, "failures", None)  # CheckpointException: rank -> (exception, traceback)
    if failures:
        return _reason(next(iter(failures.values()))[0])
    if "unexpected pos" in str(error):  # all that torch.save says of a write that was cut short
        return "no room for a whole file"
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)


def load(found: Found, state: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Fills ``state`` (tensors in place) from a checkpoint, whatever number of ranks wrote it."""
    dcp.load(state, checkpoint_id=found.path, process_group=group)
