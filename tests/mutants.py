"""Plants known faults, one at a time, in copies of the project; each must turn a named test red (`make mutants`).

The faults are in tests/faults, one file per folder or subject. A fault is (file, text, replacement, test to run: a
file, and after " -k " which of its tests). The text must occur exactly once, so that a fault cannot go stale unnoticed.
ARGS="WORDS" plants only the faults with these words in their name. Exit code 1 if a fault goes unseen, or if a test is
red without one.
"""

import functools
import importlib
import os
import pkgutil
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import faults

PRELOADED = (
    "hypothesis",
    "matplotlib.pyplot",
    "sklearn.linear_model",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
)
ROOT = Path(__file__).resolve().parents[1]
Fault = tuple[str, str, str, str]


def planted() -> dict[str, Fault]:
    """Every fault by its name."""
    found: dict[str, Fault] = {}
    for module in pkgutil.iter_modules(faults.__path__):
        for name, fault in importlib.import_module(f"faults.{module.name}").FAULTS.items():
            assert name not in found, f"two faults are named {name}"
            found[name] = fault
    return found


@functools.cache
def own_copy() -> Path:
    """This process's copy of the project."""
    folder = Path(os.environ["GCRM_COPIES"]) / str(os.getpid())
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "__pycache__"))
    return folder


def preload() -> None:
    """Imports the large libraries once per process that forks: a test would take seconds for them, each time."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, see conftest.py
    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)


def run_tests(folder: Path, test: str) -> NoReturn:
    """In a process of its own, which ends with pytest's exit code."""
    os.chdir(folder)
    paths = [str(folder), str(folder / "kernels")]
    sys.path[:0] = paths
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    file, _, selected = test.partition(" -k ")
    # Without waiting for processes that a fault leaves behind.
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", file, "-k", selected]))


def is_red(test: str) -> bool:
    """Whether a test fails: a file, and after " -k " which of its tests."""
    process = get_context("fork").Process(target=run_tests, args=(own_copy(), test))
    process.start()
    process.join()
    return process.exitcode == 1


def joined(tests: Iterable[str]) -> list[str]:
    """The same tests, those of a file as one."""
    selected: dict[str, set[str]] = {}
    for file, _, words in (test.partition(" -k ") for test in tests):
        selected.setdefault(file, set()).add(f"({words})" if words else "")
    return [file if "" in own else f"{file} -k {' or '.join(sorted(own))}" for file, own in sorted(selected.items())]


def verdict(fault: Fault) -> str:
    """red, UNSEEN, or stale: the text does not occur exactly once."""
    file, text, replacement, test = fault
    path = own_copy() / file
    source = path.read_text(encoding="utf-8")
    if source.count(text) != 1:
        return "stale"
    path.write_text(source.replace(text, replacement), encoding="utf-8")
    try:
        return "red" if is_red(test) else "UNSEEN"
    finally:
        path.write_text(source, encoding="utf-8")


def main() -> int:
    wanted = " ".join(sys.argv[1:])
    chosen = {name: fault for name, fault in planted().items() if wanted in name}
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as copies,
        ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork"), initializer=preload) as pool,
    ):
        os.environ["GCRM_COPIES"] = copies
        os.environ["OMP_NUM_THREADS"] = "1"
        unplanted = joined(test for *_, test in chosen.values())
        already = [test for test, red in zip(unplanted, pool.map(is_red, unplanted), strict=True) if red]
        for test in already:
            print(f"red without any fault: {test}")
        if already:
            return 1
        missed = 0
        for (name, fault), end in zip(chosen.items(), pool.map(verdict, chosen.values()), strict=True):
            print(f"{end:<7} {name} ({fault[0]}; {fault[3]})", flush=True)
            missed += end != "red"
    minutes = (time.monotonic() - started) / 60
    print(f"{len(chosen) - missed} of {len(chosen)} planted faults turn a test red; {minutes:.0f} minutes")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
