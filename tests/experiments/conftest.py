"""The scripts of experiments/, which is not a package."""

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from gcrm_fast import train
from support.training_runs import ROOT

FOLDER = ROOT / "experiments"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script by name. After the test none of them stays imported."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments of every training run that a script starts."""
    started: list[list[str]] = []
    real = train.main

    def main(arguments: list[str]) -> int:
        started.append(arguments)
        return real(arguments)

    monkeypatch.setattr(train, "main", main)
    return started
