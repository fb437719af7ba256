"""Programs that bench/gpu.py runs on the GPU: tests that depend on the device, and a training run that resumes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("kernels", "model/test_attention_cuda.py", "training/test_staging.py")  # the files that use a GPU
TESTS_SECONDS = 160

Result = tuple[str, dict[str, Any]]  # what it is, and its values


def kill(child: subprocess.Popen[Any]) -> None:
    """Kills the process and its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def run(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """(exit code, or None after ``seconds``; what it printed); its children are killed with it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(seconds)
        kill(child)
        printed.seek(0)
        return code, printed.read()


def tests() -> Iterator[Result]:
    """pytest on all cores."""
    files = [f"tests/{name}" for name in TESTS]
    spread = ["-n", str(min(12, os.cpu_count() or 1))]
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", "-p", "no:benchmark", *spread]
    code, printed = run([sys.executable, "-m", "pytest", *options, *files], TESTS_SECONDS)
    ends = re.findall(r" (PASSED|FAILED|ERROR|SKIPPED) (tests/.+?)\s*$", printed, re.MULTILINE)
    counts = {end.lower(): sum(end == other for other, _ in ends) for end in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failed = sorted({name for end, name in ends if end in ("FAILED", "ERROR")})
    why = printed[printed.find("= FAILURES =") :][:20_000] if failed else ""
    yield "tests", {"code": code, **counts, "failing": failed, "right": not failed, "trace": why}


def training() -> Iterator[Result]:
    """The default run for 200 steps with four checkpoints, and the same run stopped and resumed: are the bits equal?"""
    often = ["--steps", "200", "--save-every", "50", "--log-every", "10", "--train-pairs", "14000", "--deterministic"]
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, "-u", "gcrm_fast/train.py", *often, "--output"]
        whole, stopped = Path(folder) / "whole", Path(folder) / "stopped"
        began = time.monotonic()
        code, printed = run([*start, str(whole)], 90)
        rows = logged(whole)
        if code != 0 or not rows:
            yield "training run", {"code": code, "right": False, "trace": printed[-4000:]}
            return
        speeds = sorted(row["pairs_per_s"] for row in rows if "pairs_per_s" in row)
        yield (
            "training run",
            {
                "steps": rows[-1]["step"],
                "pairs/s": speeds[len(speeds) // 2],
                "seconds": time.monotonic() - began,
                "AUROC": [row["eval/auroc"] for row in rows if "eval/auroc" in row],
                "checkpoint stalls": [row["checkpoint_stall_s"] for row in rows if "checkpoint_stall_s" in row],
            },
        )
        stopped_code = stop_at(120, [*start, str(stopped)], stopped)
        code, printed = run([*start, str(stopped)], 90)
        losses = [
            [(row["step"], row["loss/ranking"]) for row in logged(output) if "loss/ranking" in row]
            for output in (whole, stopped)
        ]
        about = {"stopped with": stopped_code, "code": code, "rows": len(losses[1])}
        yield "resumed run", about | {"right": losses[0] == losses[1], "trace": printed[-4000:] if code else ""}


def logged(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def stop_at(step: int, command: Sequence[str], output: Path) -> int | None:
    """Sends SIGTERM once the run has logged ``step``; its exit code."""
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=quiet, stderr=quiet)
    deadline = time.monotonic() + 90
    while child.poll() is None and time.monotonic() < deadline:
        if max((row["step"] for row in logged(output)), default=0) >= step:
            child.terminate()
            break
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(30)
    kill(child)
    return child.poll()
