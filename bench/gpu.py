"""All measurements that need a GPU, the most valuable first: ``make gpu``.

    python bench/gpu.py [--out FOLDER] [--seconds 350] [--parts NAME ...] [--wheels FOLDER]
    python bench/gpu.py --docs      writes the tables of README.md and docs/performance.md from bench/results/

Each result is a line of FOLDER/gpu-DEVICE-DATE.jsonl and on disk before the next is measured; a file of the same day is
appended to. The parts of bench/gpu_parts.py run in a separate process: parts that no longer fit in the time are skipped
by name, and after one that hangs or breaks the GPU's context a new process runs the rest. Everything runs in the Python
that starts it; that Python's torch must satisfy pyproject.toml, and nothing is downloaded. Packages that cannot be
imported are listed, or taken from a folder of wheels. Exit code 2 if CUDA is missing, 1 if a part failed.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# Seconds: until a process must begin its first part; that a part may take beyond twice its time; between checks; the
# minimum left for which a process is started.
START, GRACE, LOOK, LEAST = 120.0, 30.0, 0.5, 10.0
MARK = "GCRM_GPU_PROCESS"  # in the environment of the measuring process and its children
# Names of packages' modules where they differ.
MODULES = {"scikit-learn": "sklearn", "protobuf": "google.protobuf", "pytest-xdist": "xdist"}
TOOLS = ("pytest", "hypothesis", "pytest-xdist")

# ---------------------------------------------------------------------------------------------------- what is installed


def not_importable(packages: Sequence[str]) -> list[str]:
    """The packages that cannot be imported here, each with the reason: its own imports must work too."""
    missing = []
    for package in packages:
        try:
            importlib.import_module(MODULES.get(package, package.replace("-", "_")))
        except Exception as error:  # anything: a broken installation
            missing.append(f"{package} ({error})")
    return missing


def install_wheels(folder: Path, target: Path) -> None:
    """Unpacks the wheels of ``folder`` into ``target``."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)


def not_ready(wheels: Path | None, target: Path) -> str:
    """Why this machine cannot run the parts, or an empty string. Packages come from ``wheels`` too."""
    if wheels:
        install_wheels(wheels, target)
        sys.path.insert(0, str(target))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    torch = next(requirement for requirement in requirements if requirement.name == "torch")
    try:
        found = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return f"make gpu uses this Python's own torch, but none is installed: install {torch}"
    if not torch.specifier.contains(found, prereleases=True):  # also 2.13.0+cu130
        return f"make gpu uses this Python's own torch, which must satisfy pyproject.toml: {torch}, found {found}"
    from torch import cuda

    if not cuda.is_available():
        return "make gpu needs a CUDA device, but torch finds none: use `make test` and `make bench` on a CPU"
    if missing := not_importable([*(requirement.name for requirement in requirements), *TOOLS]):
        return (
            f"cannot be imported: {', '.join(missing)}: install them, or name a folder of their wheels: "
            "make gpu WHEELS=FOLDER"
        )
    return ""


# --------------------------------------------------------------------------------------------------------- the parts


def lines(path: Path) -> list[dict[str, Any]]:
    """The results so far, without a last line that is still being written."""
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


def environment(packages: Path) -> dict[str, str]:
    """Environment of the measuring process: one GPU, no network, expandable memory segments, unbuffered output."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench"), str(packages), os.environ.get("PYTHONPATH", "")]
    defaults = {
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    always = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    return {**defaults, **os.environ, **always}


def note(path: Path, part: str, what: str, **about: Any) -> None:
    """Appends a line about the measuring itself, while no process writes."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"part": part, "what": what, **about}) + "\n")


def repair(path: Path) -> None:
    """Ends a last line that its process did not finish; an incomplete one is kept as text."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole, end, rest = text.rpartition("\n")
    if rest:
        path.write_text(whole + end, encoding="utf-8")
        try:
            note(path, **json.loads(rest))
        except json.JSONDecodeError:
            note(path, "", "cut off", text=rest)


def measure_parts(
    parts: Sequence[str], path: Path, seconds: float, env: dict[str, str], more: Sequence[str] = ()
) -> None:
    """Runs the parts (all if none are named) in a process, a new one after each failure, until the time is up."""
    end = time.monotonic() + seconds
    waiting = list(parts)
    repair(path)
    while end - time.monotonic() > LEAST:
        before = len(lines(path))
        options = ["--out", str(path), "--deadline", f"{end - time.monotonic():.0f}", *more]
        options += ["--parts", *waiting] if waiting else []
        command = [sys.executable, str(ROOT / "bench" / "gpu_parts.py"), *options]
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        child = subprocess.Popen(command, cwd=ROOT, env={**env, MARK: mark}, start_new_session=True)
        try:
            ended = watch(child, path, before, end)
        finally:
            kill(child, mark)
        repair(path)
        rows = lines(path)[before:]
        settled = {row["part"] for row in rows if row["what"] in ("began", "skipped")}
        part = next((row["part"] for row in reversed(rows) if row["what"] == "began"), "")
        if ended and not any(row["what"] in ("done", "failed") and row["part"] == part for row in rows):
            note(path, part, "failed", why=ended)
        wanted = next((row["parts"] for row in rows if row["what"] == "begin"), waiting)
        waiting = [name for name in wanted if name not in settled]
        if not waiting or not settled:  # a process that never began a part would fail again
            break
    for part in waiting:
        note(path, part, "skipped", why="never begun")


def watch(child: subprocess.Popen[bytes], path: Path, seen: int, end: float) -> str:
    """Waits for the process until ``end``, or until a part takes far too long; returns what went wrong, or an
    empty string. ``seen``: number of lines before it started."""
    since, limit = time.monotonic(), START
    while child.poll() is None:
        if time.monotonic() > min(end, since + limit):
            return "ended: out of time, or it hung"
        time.sleep(LOOK)
        rows = lines(path)
        for row in rows[seen:]:
            if row["what"] == "began":
                since, limit = time.monotonic(), 2 * row["needs"] + GRACE
        seen = len(rows)
    return f"its process ended with {child.returncode}" if child.returncode else ""


def kill(child: subprocess.Popen[bytes], mark: str) -> None:
    """Kills the process and everything it started, in other sessions too: the next process needs the whole GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for _ in range(500):  # they may start others; 5 seconds, as the driver can delay an exit
        marked = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_marked(pid, mark)]
        if not marked:
            break
        for pid in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def is_marked(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's, or gone
        return False


# -------------------------------------------------------------------------------------------------------- the program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results; default: bench/results")
    parser.add_argument("--seconds", type=float, default=350, help="time limit for all parts; default: 350")
    parser.add_argument("--parts", nargs="+", help="run only these parts, in this order; default: all")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for packages that cannot be imported")
    parser.add_argument(
        "--docs", action="store_true", help="only rewrite the tables of README.md and docs/performance.md"
    )
    options = parser.parse_args()
    started = time.monotonic()
    if options.docs:
        import gpu_report

        gpu_report.write(ROOT, RESULTS)
        return 0
    with tempfile.TemporaryDirectory() as packages:
        if reason := not_ready(options.wheels, Path(packages)):
            print(reason, file=sys.stderr)
            return 2
        return measure_all(options, Path(packages), options.seconds - (time.monotonic() - started))


def measure_all(options: argparse.Namespace, packages: Path, seconds: float) -> int:
    import torch

    import gpu_report
    import measure

    where = measure.environment(torch.device("cuda"))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu-{where['device'].replace(' ', '-').lower()}-{where['date']}.jsonl"
    before = len(lines(path))
    measure_parts(options.parts or [], path, seconds, environment(packages))
    rows = lines(path)[before:]
    print(gpu_report.table(rows))
    print(f"written: {path}")
    return 1 if any(row["what"] == "failed" or row.get("right") is False for row in rows) else 0


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    sys.exit(main())
