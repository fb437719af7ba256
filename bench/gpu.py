"""Everything that a machine with a GPU can tell, in at most ten minutes: ``make gpu``.

    python bench/gpu.py [--wheels FOLDER]     runs all stages, writes bench/results/, prints one table
    python bench/gpu.py --readme              writes the table of README.md anew from bench/results/

It runs in the Python that starts it, whose torch must satisfy pyproject.toml; nothing is downloaded. Packages that are
missing are named, or taken from the wheels in FOLDER. Without CUDA it says so in one line and exits with 2. Each stage
is a process of its own with a limit; one that fails is a line of the table, and the exit code is then 1.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
TOOLS = ("pytest", "hypothesis")
SECONDS = 600  # for everything
TESTS = ("kernels", "elementwise", "invariants", "objectives", "parity", "step", "bench")
BEGIN, END = "<!-- gpu:begin (written by python bench/gpu.py --readme) -->", "<!-- gpu:end -->"
NOT_MEASURED = (
    "Not yet measured on a GPU: the CUDA paths (nccl, bfloat16, Triton kernels, flash-attn and torch's varlen\n"
    "attention) are written but not run."
)

# ---------------------------------------------------------------------------------------------------- what is installed


def unsatisfied(requirements: Sequence[str]) -> list[str]:
    """Those of ``requirements`` that this Python does not satisfy, with what it has instead."""
    missing = []
    for text in requirements:
        requirement = Requirement(text)
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{text} (not installed)")
            continue
        if not requirement.specifier.contains(found, prereleases=True):  # also torch 2.13.0+cu130, 2.14.0a0
            missing.append(f"{text} (found {found})")
    return missing


def install_wheels(folder: Path, target: Path) -> list[str]:
    """Unpacks into ``target`` the wheels of ``folder`` whose package is not installed; returns their names."""
    wheels = [path for path in sorted(folder.glob("*.whl")) if unsatisfied([parse_wheel_filename(path.name)[0]])]
    if wheels:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target),
             *map(str, wheels)], check=True,
        )  # fmt: skip
    return [canonicalize_name(parse_wheel_filename(path.name)[0]) for path in wheels]


# ---------------------------------------------------------------------------------------------------------- the stages


def stages(python: str, scratch: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, limit in seconds) in order of importance: the last ones are cut where time runs out."""
    tests = [f"tests/test_{name}.py" for name in TESTS]
    return [
        ("tests", [python, "-m", "pytest", "-q", f"--junit-xml={scratch / 'tests.xml'}", *tests], 180),
        ("train_step", [python, "bench/train_step.py", "--quick"], 240),
        ("train_step-profile", [python, "bench/train_step.py", "--profile"], 60),
        ("training", [python, "gcrm_fast/train.py", "--steps", "200", "--output", str(scratch / "run")], 90),
        ("train_step-scaling", [python, "bench/train_step.py", "--scaling", "--quick"], 90),
        ("contrastive_loss", [python, "bench/contrastive_loss.py", "--quick"], 120),
    ]


def run_stage(command: list[str], seconds: float, environment: dict[str, str], log: Path) -> str:
    """'ok', or why not; everything printed goes to ``log``."""
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                  timeout=seconds, check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
    if done.returncode == 0:
        return "ok"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    return f"exit code {done.returncode}: {lines[-1][:120]}"


def tests_row(xml: Path) -> dict[str, Any]:
    """Counts of pytest's JUnit file."""
    head = re.search(r"<testsuite [^>]*>", xml.read_text(encoding="utf-8"))
    counts = {name: int(number) for name, number in re.findall(r'(\w+)="(\d+)"', head[0] if head else "")}
    failed = counts["errors"] + counts["failures"]
    return {"passed": counts["tests"] - failed - counts["skipped"], "failed": failed, "skipped": counts["skipped"]}


def training_row(run: Path) -> dict[str, Any]:
    """Median speed and held-out AUROC of a run, from its metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = sorted(row["pairs_per_s"] for row in rows if "pairs_per_s" in row)
    quality = [row["eval/auroc"] for row in rows if "eval/auroc" in row]
    return {"steps": rows[-1]["step"], "pairs/s": speeds[len(speeds) // 2], "AUROC before": quality[0],
            "AUROC": quality[-1]}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- README's table


def newest(results: Path) -> dict[tuple[str, str], Path]:
    """The latest file of each (device, benchmark) that ran on a GPU."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(results.glob("*.json"), key=lambda p: (p.stem[-10:], p.stem)):  # names end in the date
        rows = json.loads(path.read_text(encoding="utf-8"))
        if rows and "threads" not in rows[0]["device"]:
            kind = rows[0]["device"].replace(" ", "-").lower()
            found[rows[0]["device"], path.stem[: -len(f"-{kind}-0000-00-00")]] = path
    return found


def lines_of(benchmark: str, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(what, result) of one file of results; nothing for files that the table does not show."""
    if benchmark == "gpu_tests":
        return [("tests on the GPU", "{passed} passed, {failed} failed, {skipped} skipped".format(**rows[0]))]
    if benchmark == "gpu_training":
        row = rows[0]
        return [(f"training run of {row['steps']} steps",
                 f"{row['pairs/s']:.0f} pairs/s, AUROC {row['AUROC before']:.3f} -> {row['AUROC']:.3f}")]  # fmt: skip
    if benchmark.startswith("train_step") and "method" in rows[0]:
        return [(f"step, {row['model']}, {row['dtype']}, {row['data']}: {row['method']}", _speed(row)) for row in rows]
    if benchmark == "contrastive_loss":
        timed = [row for row in rows if row.get("method") == "ours" and row.get("GB/s") and row.get("x naive")]
        best = max(timed, key=lambda row: row["compulsory MB"], default=None)
        if best:
            what = f"contrastive loss, N={best['N']} S={best['S']} H={best['H']}, from {best['input']}"
            return [(what, f"{best['forward+backward ms']:.3g} ms, {best['x naive']:.1f} times naive")]
    return []


def _speed(row: dict[str, Any]) -> str:
    if not row.get("pairs/s"):
        return str(row.get("note", "did not run"))
    return f"{row['pairs/s']:.1f} pairs/s, MFU {row['MFU %']:.0f}%, peak {row['peak MB'] / 1000:.1f} GB"


def readme_part(results: Path) -> str:
    """What README.md says about GPUs: a line for each number's file, or that there is none."""
    files = newest(results)
    lines = []
    for (device, benchmark), path in sorted(files.items()):
        rows = json.loads(path.read_text(encoding="utf-8"))
        origin = f"{rows[0]['date']}, {rows[0]['commit']}, kernels {rows[0].get('kernels', 'unknown')}"
        lines += [f"| {device} | {what} | {result} | {origin} | `{path.name}` |"
                  for what, result in lines_of(benchmark, rows)]  # fmt: skip
    if not lines:
        return NOT_MEASURED
    return "\n".join(["| device | what | result | date, commit, kernels | file |", "|---|---|---|---|---|", *lines])


def write_readme(path: Path, results: Path) -> None:
    """Replaces what stands between the two markers of the file at ``path``."""
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.write_text(f"{head}{BEGIN}\n{readme_part(results)}\n{END}{tail}", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- the program


def ready(wheels: Path | None, target: Path) -> str:
    """Why this machine cannot run the stages, or an empty string. Installs from ``wheels`` what is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if wheels:
        sys.path.insert(0, str(target))
        print("from wheels:", ", ".join(install_wheels(wheels, target)) or "nothing was missing", flush=True)
    torch = [text for text in project["dependencies"] if Requirement(text).name == "torch"]
    if missing := unsatisfied(torch):
        return f"make gpu uses this Python's own torch, which must satisfy pyproject.toml: {missing[0]}"
    from torch import cuda  # after it is known to be there

    if not cuda.is_available():
        return "make gpu needs a CUDA device, and torch sees none here: `make test` and `make bench` run on a CPU"
    if missing := unsatisfied([*project["dependencies"], *TOOLS]):
        return f"missing: {', '.join(missing)}: install them, or name a folder of their wheels: make gpu WHEELS=FOLDER"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels for packages that are missing")
    parser.add_argument("--readme", action="store_true", help="only write README.md's table from bench/results/")
    options = parser.parse_args()
    if options.readme:
        write_readme(ROOT / "README.md", RESULTS)
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if reason := ready(options.wheels, scratch / "packages"):
            print(reason, file=sys.stderr)
            return 2
        ok = run_all(scratch, started)
    write_readme(ROOT / "README.md", RESULTS)
    print(readme_part(RESULTS))
    return 0 if ok else 1


def run_all(scratch: Path, started: float) -> bool:
    """Every stage, then the table of how they ended; their records are in bench/results/ whatever happened."""
    import measure  # needs torch
    import torch

    where = measure.environment(torch.device("cuda"))
    paths = [str(ROOT), str(ROOT / "kernels"), str(scratch / "packages"), os.environ.get("PYTHONPATH", "")]
    environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    rows = []
    for name, command, limit in stages(sys.executable, scratch):
        begun = time.monotonic()
        left = SECONDS - (begun - started)
        log = scratch / f"{name}.log"
        ended = run_stage(command, min(limit, left), environment, log) if left > 10 else "no time left"
        rows.append({"stage": name, "result": ended, "seconds": time.monotonic() - begun})
        print(measure.table(rows[-1:], ("stage", "result", "seconds")), flush=True)
        if ended != "ok" and log.exists():
            print(log.read_text(encoding="utf-8", errors="replace")[-3000:])
    if (scratch / "tests.xml").exists():
        measure.record("gpu_tests", [tests_row(scratch / "tests.xml")], where)
    if (scratch / "run" / "model").exists():
        measure.record("gpu_training", [training_row(scratch / "run")], where)
    measure.record("gpu_stages", rows, where)
    print(measure.table(rows, ("stage", "result", "seconds")))
    return all(row["result"] == "ok" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
