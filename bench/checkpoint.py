"""What saving costs a training run: how long each checkpoint blocks it, and how much slower it is overall.

    python bench/checkpoint.py [--steps 60] [--every 5] [--hidden-size 256] [--layers 6]

Trains a model on generated problems in this process, alternating runs without checkpoints and with one every few steps.
Prints and records the seconds that a save blocked the loop (staging, and waiting for the previous save), the seconds
until it was on disk, its bytes, and the pairs per second of both kinds of run.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch

import measure
from gcrm_fast import train
from gcrm_fast.training import snapshots

ROUNDS = 3


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    return parser.parse_args()


class Watched(snapshots.Checkpoints):
    """Records when each checkpoint was requested, when it was on disk, and its size."""

    written: ClassVar[list[tuple[float, int]]] = []

    def _write(self, name: str, state: dict[str, Any], facts: dict[str, Any]) -> None:
        start = time.perf_counter()
        super()._write(name, state, facts)
        size = sum(file.stat().st_size for file in (self.folder / name).iterdir())
        self.written.append((time.perf_counter() - start, size))


def run(given: argparse.Namespace, keep: int) -> list[dict[str, float]]:
    """The log of a run that keeps this many checkpoints."""
    with tempfile.TemporaryDirectory(dir=os.getcwd(), prefix=".checkpoint-bench-") as folder:
        arguments = [
            "--output",
            folder,
            "--steps",
            str(given.steps),
            "--save-every",
            str(given.every),
            "--keep",
            str(keep),
            "--hidden-size",
            str(given.hidden_size),
            "--layers",
            str(given.layers),
            "--intermediate-size",
            str(3 * given.hidden_size),
            "--train-pairs",
            "4000",
            "--eval-pairs",
            "10",
            "--eval-every",
            str(10 * given.steps),
            "--goal-pairs",
            "16",
            "--log-every",
            "10",
        ]
        quiet = io.StringIO()
        with (
            mock.patch("gcrm_fast.training.run.Checkpoints", Watched),
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
        ):
            if train.main(arguments):
                sys.exit("the training run failed: run gcrm train with the same options to see why")
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    given = options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates: dict[int, list[float]] = {0: [], 2: []}
    stalls: list[float] = []
    for _ in range(ROUNDS):
        for keep, found in rates.items():
            log = run(given, keep)
            found += [row["pairs_per_s"] for row in log if "pairs_per_s" in row][1:]  # the first is the warm-up
            stalls += [row["checkpoint_stall_s"] for row in log if "checkpoint_stall_s" in row]
    seconds, sizes = zip(*Watched.written, strict=True)
    without, with_saving = (statistics.median(found) for found in rates.values())
    row = {
        "hidden_size": given.hidden_size,
        "layers": given.layers,
        "save_every": given.every,
        "megabytes": statistics.median(sizes) / 1e6,
        "stall_ms": 1000 * statistics.median(stalls),
        "stall_ms_most": 1000 * max(stalls),
        "on_disk_ms": 1000 * statistics.median(seconds),
        "pairs_per_s": without,
        "pairs_per_s_saving": with_saving,
        "slower_percent": 100 * (1 - with_saving / without),
    }
    print(measure.table([row], list(row)))
    print(f"recorded {measure.record('checkpoint', [row], measure.environment(device))}.*")


if __name__ == "__main__":
    main()
