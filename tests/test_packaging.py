"""What the layout of the repository must never break: other packages' imports, and the two packages' boundary."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gcrm_fast
from gcrm_fast import rewards
from gcrm_fast.rlhf import trl

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"

# An editable install may itself put our folders on sys.path, so they are removed first and the wanted ones put back.
PROBE = """
import json, os, sys
ours, wanted = json.loads(sys.argv[1])
sys.path[:] = wanted + [p for p in sys.path if os.path.realpath(p or os.getcwd()) not in ours]
from transformers.utils import is_kernels_available
from transformers import LlamaForCausalLM
print(json.dumps([bool(is_kernels_available()), LlamaForCausalLM.__name__]))
"""


def probe(wanted: list[Path], directory: Path) -> tuple[bool, str]:
    """What transformers sees of the package named ``kernels`` with ``wanted`` first on sys.path."""
    folders = json.dumps([[str(ROOT), str(KERNELS)], [str(path) for path in wanted]])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, folders], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    available, name = json.loads(done.stdout.splitlines()[-1])
    return available, name


def imported_roots(source: str) -> set[str]:
    """Top-level names that a module imports anywhere in its text, also by import_module("...")."""
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in {"import_module", "__import__"} and node.args and isinstance(node.args[0], ast.Constant):
                roots.add(str(node.args[0].value).split(".")[0])
    return roots


@pytest.mark.slow
def test_transformers_sees_the_same_kernels_package_from_the_repository_root(tmp_path: Path) -> None:
    without = probe([], tmp_path)
    assert without[1] == "LlamaForCausalLM"
    assert probe([ROOT, KERNELS], ROOT) == without


def test_a_wheel_contains_the_files_that_are_not_python(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("gcrm_fast", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    program = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = {str(path.relative_to(source)) for path in (source / "gcrm_fast").rglob("*") if path.is_file()}
    assert "gcrm_fast/evaluation/page.html.jinja" in files
    assert packed >= files


def test_kernels_folder_is_not_a_package() -> None:
    assert (KERNELS / "gcrm_kernels" / "__init__.py").is_file()
    assert not (KERNELS / "__init__.py").exists()


# Tells, at the first import of torch, where a package named like one of our folders would come from.
WITNESS = """
import importlib.util, sys

class Witness:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and self in sys.meta_path:
            sys.meta_path.remove(self)
            print("seen", importlib.util.find_spec("evaluation").origin, flush=True)

sys.meta_path.insert(0, Witness())
"""


@pytest.mark.slow
def test_the_folder_of_train_py_hides_no_package(tmp_path: Path) -> None:
    # torchrun gcrm_fast/train.py puts gcrm_fast/ first on sys.path.
    assert (ROOT / "gcrm_fast" / "evaluation").is_dir()
    (tmp_path / "evaluation.py").touch()
    (tmp_path / "sitecustomize.py").write_text(WITNESS)
    done = subprocess.run(
        [sys.executable, str(ROOT / "gcrm_fast" / "train.py"), "--help"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT, KERNELS)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"seen {tmp_path / 'evaluation.py'}" in done.stdout.splitlines()


def test_the_package_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gcrm_fast", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"gcrm {gcrm_fast.__version__}\n")


def test_the_former_name_of_the_reward_function_still_works() -> None:
    assert rewards.RewardFunction is trl.RewardFunction


def test_gcrm_kernels_never_imports_gcrm_fast() -> None:
    sources = sorted((KERNELS / "gcrm_kernels").rglob("*.py"))
    assert sources
    for path in sources:
        assert "gcrm_fast" not in imported_roots(path.read_text(encoding="utf-8")), path


def test_constraints_pin_exact_versions_and_nothing_of_cuda() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line.strip() and not line.startswith("#")]
    assert pins
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin), f"not an exact public version: {pin}"
        assert not re.search(r"nvidia|cuda", pin, re.IGNORECASE), pin


def test_without_triton_the_ops_run_in_pytorch() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from gcrm_kernels import goal_contrastive_loss, launch
h = torch.randn(4, 3, requires_grad=True)
rows = torch.tensor([[[0]], [[1]], [[2]], [[3]]])
goal_contrastive_loss(h, *rows, has_positive_N=torch.tensor([True]))[0].sum().backward()
print(launch.HAS_TRITON, h.grad.isfinite().all().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(KERNELS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """Trains, scores and prints help from an installed wheel, whose files are all that it finds of this project."""
    source, site, runs = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    for name in ("gcrm_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    runs.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command: object) -> str:
        done = subprocess.run(
            [*map(str, command)], cwd=runs, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source)
    [wheel] = tmp_path.glob("gcrm_fast-*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel)
    gcrm = site / "bin" / "gcrm"
    assert run(gcrm, "--version") == f"gcrm {gcrm_fast.__version__}\n"
    where = "import gcrm_fast, gcrm_kernels; print(gcrm_fast.__file__, gcrm_kernels.__file__)"
    assert all(path.startswith(str(site)) for path in run(sys.executable, "-c", where).split())
    few = ("--train-pairs", 40, "--eval-pairs", 20, "--steps", 2, "--global-batch-pairs", 8)
    run(gcrm, "train", "--output", "run", "--cache", "none", *few)
    run(gcrm, "samples", "-o", "s.jsonl", "--problems", 2, "--samples", 2)
    run(gcrm, "score", "run/model", "s.jsonl", "-o", "scored.jsonl")
    assert all("reward" in json.loads(line) for line in (runs / "scored.jsonl").read_text().splitlines())
    run(gcrm, "inspect", "run/model", "s.jsonl", "-o", "page.html")  # its template is in the wheel
    assert "--ready-file" in run(gcrm, "serve", "--help")
