"""Runs of a few seconds, for tests: data, processes, and what they leave."""

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from gcrm_fast.train import main
from gcrm_fast.training.optimizer import Updater

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--hidden-size", "32", "--layers", "1", "--intermediate-size", "32", "--dtype", "float32"]
# Metrics that depend on the time measured.
TIMES = {
    "pairs_per_s",
    "tokens_per_s",
    "padded_equivalent_tokens_per_s",
    "mfu",
    "hfu",
    "data_wait",
    "peak_memory_gib",
    "checkpoint_stall_s",
}


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Gcrm = Callable[..., Result]


def write_pairs(path: Path, n: int = 21) -> Path:
    words = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "runs", "far", "away", "from", "here"]
    rng = np.random.default_rng(0)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for i in range(n):
            record = {"prompt": f"Question {i // 2}: " + " ".join(rng.choice(words, 5)), "margin": 0.1 * (i % 3)}
            for side in ("chosen", "rejected"):
                record[side] = " " + " ".join(rng.choice(words, rng.integers(2, 12)))
            file.write(json.dumps(record) + "\n")
    return path


def start(
    *arguments: str,
    processes: int = 1,
    options: Sequence[str] = (),
    script: str = "gcrm_fast/train.py",
    rendezvous: Sequence[str] = ("--standalone",),
) -> subprocess.Popen[str]:
    """torchrun (with further ``options`` of its own) of a script; ``communicate`` reads its output."""
    if "--shutdown-timeout" in options and "--shutdown-timeout" not in get_args_parser().format_help():  # torch 2.11
        i = options.index("--shutdown-timeout")
        options = [*options[:i], *options[i + 2 :]]
    launch = [*rendezvous, "--local-addr", "127.0.0.1", *options, "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch, str(ROOT / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def torchrun(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """``start``, to its end."""
    process = start(*arguments, **more)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def workers(torchrun: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, in the order of their start."""
    children = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True, check=False)
    return sorted(map(int, children.stdout.split()))


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """Returns as soon as the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.002)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def rows(output: Path) -> list[dict[str, float]]:
    """The log's whole lines: a run may be writing the next one."""
    *whole, _ = (output / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line) for line in whole]


def arguments(pair_file: Path, output: Path, *more: str) -> list[str]:
    """Twelve steps over 21 pairs, two checkpoints per epoch, evaluated at steps 0, 6 and 12."""
    return [
        "--data",
        str(pair_file),
        "--eval-data",
        str(pair_file),
        "--allow-overlap",
        "--output",
        str(output),
        *TINY,
        "--vocab-size",
        "300",
        "--global-batch-pairs",
        "8",
        "--steps",
        "12",
        "--log-every",
        "3",
        "--eval-every",
        "6",
        "--save-every",
        "2",
        "--lr",
        "0.01",
        *more,
    ]


def trained(output: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The log without times, and the saved weights and goal."""
    log = [{k: v for k, v in row.items() if k not in TIMES} for row in rows(output)]
    model = output / "model"
    return [row for row in log if row.keys() != {"step"}], {
        **load_file(model / "model.safetensors"),
        "goal": load_file(model / "goal.safetensors")["default"],
    }


def assert_same(a: Path, b: Path) -> None:
    (log_a, weights_a), (log_b, weights_b) = trained(a), trained(b)
    assert log_a == log_b
    assert weights_a.keys() == weights_b.keys()
    for name, weight in weights_a.items():
        assert torch.equal(weight, weights_b[name]), name


class Ended(Exception):
    """Stands in for a kill: nothing of the program runs after it."""


def end_in_step_9(call: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``gcrm train`` with these arguments, as if it were killed in step 9."""
    update = Updater.update

    def ending(self: Updater, step: int, loss: torch.Tensor) -> Any:
        if step == 9:
            raise Ended
        return update(self, step, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "update", ending)
        with pytest.raises(Ended):
            main(call)
