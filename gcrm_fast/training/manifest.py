"""Finding a run's checkpoints, and telling intact ones from damaged ones by their manifests.

<output>/checkpoints/step-00000100/
  __<rank>_<n>.distcp, .metadata    torch.distributed.checkpoint
  manifest.json                     step, configuration, metrics, size and SHA-256 of every file, and its own
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from gcrm_fast.common.errors import UserError, one_line

FOLDER, MANIFEST = "checkpoints", "manifest.json"
NAME = re.compile(r"step-\d{8}")


class Checkpoint(NamedTuple):
    """A complete checkpoint and its manifest's facts."""

    path: Path
    facts: dict[str, Any]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(checkpoint: Path, facts: Mapping[str, Any], files: Mapping[str, Any]) -> Path:
    """Writes the manifest; ``files``: name -> {"bytes": size, "sha256": hash} of each. Returns its path."""
    manifest = {"facts": dict(facts), "files": dict(files)}
    path = checkpoint / MANIFEST
    path.write_text(json.dumps({**manifest, "sha256": _own_digest(manifest)}, indent=1) + "\n", encoding="utf-8")
    return path


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
            if digest(path) != expected["sha256"]:
                return f"{path}: its content is not what was written"
        except OSError as error:
            return f"{path}: {error.strerror}"
    return ""


def checkpoints(output: Path) -> list[Path]:
    """Folders with the name of a checkpoint, oldest first."""
    return sorted(path for path in (output / FOLDER).glob("step-*") if NAME.fullmatch(path.name))


def first_intact(paths: list[Path], group: dist.ProcessGroup) -> tuple[Checkpoint | None, list[str]]:
    """The first complete and undamaged one of rank 0's ``paths``, and a line about each before it. Every rank reads a
    share of the files; every rank returns the same."""
    candidates = [paths]
    dist.broadcast_object_list(candidates, src=0, group=group)
    notes: list[str] = []
    for path in candidates[0]:
        try:
            manifest = read_manifest(path)
            wrong = damage(path, manifest, dist.get_rank(), dist.get_world_size())
        except UserError as error:
            manifest, wrong = {}, str(error)
        wrongs: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(wrongs, wrong, group=group)
        if not any(wrongs):
            return Checkpoint(path, manifest["facts"]), notes
        notes.append(f"{next(filter(None, wrongs))}: checkpoint skipped")
    return None, notes
