"""The benchmarks as modules: scripts of bench/, imported as they import each other."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from support.training_runs import ROOT

MODULES = [path.stem for path in (ROOT / "bench").glob("*.py")]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """bench/contrastive_loss.py."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module("contrastive_loss")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def step(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/train_step.py on built-in lengths."""
    monkeypatch.delenv("GCRM_DATA", raising=False)
    return importlib.import_module("train_step")


@pytest.fixture
def our_step(step: ModuleType) -> ModuleType:
    return importlib.import_module("our_step")


@pytest.fixture
def contestants(step: ModuleType) -> ModuleType:
    return importlib.import_module("contestants")


@pytest.fixture
def step_model(bench: ModuleType) -> ModuleType:
    return importlib.import_module("step_model")


@pytest.fixture
def gpu(bench: ModuleType) -> ModuleType:
    return importlib.import_module("gpu")


@pytest.fixture
def gpu_report(bench: ModuleType) -> ModuleType:
    return importlib.import_module("gpu_report")
