"""The order of the wings: each imports only those below it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gcrm_fast"
WINGS = ("common", "model", "data", "checkpoints", "evaluation", "training", "inference", "rlhf", "commands")
FILES = sorted(path for wing in WINGS for path in (PACKAGE / wing).rglob("*.py"))


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of what a module imports anywhere in its text: at the top, inside functions, for types only,
    by import_module("...")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import: name the package"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def wrong_imports(wing: str, source: str) -> list[str]:
    """What a module of the wing imports of this package though it is not below the wing, or in it."""
    allowed = WINGS[: WINGS.index(wing) + 1]
    ours = [(line, name.split(".")) for line, name in imported(source) if name.split(".")[0] == "gcrm_fast"]
    return [f"line {line}: {'.'.join(parts)}" for line, parts in ours if len(parts) < 2 or parts[1] not in allowed]


def test_every_module_lies_in_a_wing_or_at_the_door() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(WINGS)
    doors = {"__init__", "__main__", "cli", "rewards", "train"}
    assert {path.stem for path in PACKAGE.glob("*.py")} == doors


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_wing_imports_only_what_is_below_it(path: Path) -> None:
    wing = path.relative_to(PACKAGE).parts[0]
    assert wrong_imports(wing, path.read_text(encoding="utf-8")) == []


def test_one_module_asks_the_environment_about_ranks() -> None:
    variables = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
    for path in sorted(PACKAGE.rglob("*.py")):
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert (path.name == "processes.py") == bool(words & variables), path


def test_scoring_loads_what_scoring_needs() -> None:
    program = """
import sys
import gcrm_fast.commands.score, gcrm_fast.commands.export, gcrm_fast.rlhf.trl
from gcrm_fast import RewardModel
print(*sorted({name.split(".")[0] for name in sys.modules} & {"matplotlib", "tensorboard", "sklearn", "scipy"}))
print("gcrm_fast.training" in sys.modules or "gcrm_fast.evaluation" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False"], done.stdout + done.stderr


def test_every_way_to_import_is_seen() -> None:
    for source in (
        "import gcrm_fast.training.config",
        "from gcrm_fast import training",
        "from gcrm_fast.training import config",
        "from gcrm_fast.training.config import parse",
        "def late():\n    from gcrm_fast.training.config import parse",
        "import importlib\nimportlib.import_module('gcrm_fast.training.config')",
        "from gcrm_fast import train",
        "import gcrm_fast",
    ):
        assert len(wrong_imports("data", source)) == 1, source
    assert wrong_imports("data", "from gcrm_fast.model.inputs import Pack\nimport torch") == []
