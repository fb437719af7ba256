"""Measuring and recording, shared by the benchmarks: what ran where, time, memory, bandwidth, JSON and CSV."""

import contextlib
import csv
import datetime
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from gcrm_kernels.launch import HAS_TRITON

if HAS_TRITON:
    import triton

RESULTS = Path(__file__).resolve().parent / "results"
KERNELS = RESULTS.parents[1] / "kernels" / "gcrm_kernels"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints no line for every start and stop


def environment(device: torch.device) -> dict[str, str]:
    """Device, versions, commit and a hash of the kernels' sources: part of every recorded row."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else "none",
        "python": platform.python_version(),
        "commit": _commit(),
        "kernels": kernel_hash(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _commit() -> str:
    """The value of GCRM_COMMIT (for copies without a repository), else what git says, or "unknown"."""
    described = os.environ.get("GCRM_COMMIT", "")
    if not described:
        with contextlib.suppress(OSError):  # git is not installed
            described = subprocess.run(
                ["git", "describe", "--always", "--dirty"],
                cwd=RESULTS.parent,
                capture_output=True,
                text=True,
                check=False,
            ).stdout.strip()
    return described or "unknown"


def kernel_hash() -> str:
    """Names and sources of gcrm_kernels, 12 hexadecimal digits: identifies the kernels behind a number."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def now(device: torch.device) -> float:
    """Seconds on a running clock, after all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def times(
    functions: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """[median, 10 %, 90 %] milliseconds of each function.

    CUDA: ``triton.testing.do_bench``, which empties the L2 cache before every call. CPU: the functions take turns, so
    that other load on the machine affects all of them; at least five calls each after a warm-up call.
    """
    if device.type == "cuda":
        return {
            name: triton.testing.do_bench(f, rep=1000 * seconds, quantiles=[0.5, 0.1, 0.9])
            for name, f in functions.items()
        }
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or min(map(len, taken.values())) < 5:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            taken[name].append(1000 * (time.perf_counter() - start))
    return {name: [float(np.percentile(t, q)) for q in (50, 10, 90)] for name, t in taken.items()}


def graph_time(function: Callable[[], object]) -> float:
    """Median milliseconds of a CUDA-graph replay: no launch overhead, caches warm."""
    return triton.testing.do_bench_cudagraph(function, return_mode="median")


@dataclass
class Peak:
    """Peak bytes allocated beyond those allocated at the start."""

    bytes: int = 0


@contextlib.contextmanager
def recorded_peak(device: torch.device) -> Iterator[Peak]:
    """Fills in the peak when its block ends. CPU: tensors only, from the profiler's record of every allocation, since
    the resident size of a process includes what the allocator keeps. CUDA: the caching allocator's peak."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.bytes = torch.cuda.max_memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield peak
    kineto = recorded.profiler
    assert kineto is not None
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    allocated = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak.bytes = max(peak.bytes, allocated)


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Peak bytes allocated during a call, after a warm-up call, beyond those allocated before it."""
    function()
    with recorded_peak(device) as peak:
        function()
    return peak.bytes


def launches(function: Callable[[], object]) -> int:
    """Kernels, copies and fills that a call puts on the GPU."""
    function()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in recorded.events())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a copy too large for any cache."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    milliseconds = times({"copy": lambda: target.copy_(source)}, device, 0.5)["copy"][0]
    return 2 * source.nbytes / (milliseconds / 1000)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    lines = [list(columns)] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def record(name: str, rows: Sequence[Mapping[str, Any]], where: Mapping[str, str]) -> Path:
    """Writes rows as JSON and CSV under bench/results/, the environment in each; returns the path without suffix."""
    RESULTS.mkdir(exist_ok=True)
    kind = "cpu" if "threads" in where["device"] else where["device"].replace(" ", "-").lower()
    stem = RESULTS / f"{name}-{kind}-{where['date']}"
    full = [{**row, **where} for row in rows]
    stem.with_suffix(".json").write_text(json.dumps(full, indent=1) + "\n", encoding="utf-8")
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in full for key in row)))
        writer.writeheader()
        writer.writerows(full)
    return stem
