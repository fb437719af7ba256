"""Ablations: rows that continue, a pretrained model's own arms, signs and those of the paper."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from support.models import save

SMALL = ("--hidden-size", "16", "--intermediate-size", "16", "--layers", "1", "--goal-pairs", "8", "--cache", "none")


@pytest.fixture
def ablations(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("ablations")


def test_ablations_continue_from_their_rows(
    ablations: ModuleType,
    script: Callable[[str], ModuleType],
    trainings: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    little = (*SMALL, "--train-pairs", "300", "--eval-pairs", "20")
    monkeypatch.setattr(ablations, "ARMS", {"random": little, "rs": (*little, "--sampling", "rs")})
    monkeypatch.setattr(ablations, "SWEEPS", {})
    common = ["--runs", str(tmp_path / "runs"), "--steps", "1", "--problems", "6", "-o", str(tmp_path / "report")]
    assert ablations.main([*common, "--seeds", "2", "--arms", "random"]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [(row["seed"], row["arm"]) for row in rows[::3]] == [(0, "random"), (1, "random")]
    assert {row["arm"] for row in rows} == {"random", ablations.RANDOM_GOAL, ablations.SINGLE_GOAL}
    assert all(len(values) == 6 for row in rows for values in row["problems"].values())
    assert rows[0]["scalars"].keys() > {"auroc", "similarity/within", "correlation at 20%"}
    assert rows[0]["problems"]["reward"] == rows[1]["problems"]["reward"]
    assert rows[0]["problems"]["q"] != rows[1]["problems"]["q"]
    assert "2 runs are still missing" in (tmp_path / "report.md").read_text()
    assert not any((tmp_path / "runs").glob("random-*"))
    assert ablations.main([*common, "--seeds", "2"]) == 0
    assert len(trainings) == 4
    text = (tmp_path / "report.md").read_text()
    assert "Every run is finished" in text
    capsys.readouterr()
    for more in (["--problems", "5"], ["--steps", "2"], ["--model", "m"]):
        assert ablations.main([*common, *more, "--seeds", "1"]) == 2
        assert f"holds rows of {more[0]} " in capsys.readouterr().err
    found = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert found[: len(rows)] == rows
    own, base = (
        np.array([row["problems"]["majority"] for row in found if row["arm"] == arm]) for arm in ("rs", "random")
    )
    mean, half = script("summary").two_way_interval(own - base)
    assert f"{mean:+.3f} ± {half:.3f}" in text


def test_ablations_of_a_pretrained_model(
    ablations: ModuleType,
    trainings: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its own options and arms; the option of an arm comes after the common one and replaces it."""
    save(tmp_path / "model")
    little = {"--train-layers": "1", "--train-pairs": "40", "--eval-pairs": "20", "--contrastive-weight": "0.5"}
    monkeypatch.setattr(ablations, "PRETRAINED", little)
    given = ["--model", str(tmp_path / "model"), "--runs", str(tmp_path / "runs"), "-o", str(tmp_path / "report")]
    given += ["--steps", "1", "--problems", "4", "--seeds", "1"]
    assert ablations.main([*given, "--arms", "random", "weight 2.0"]) == 0
    assert [Path(argv[argv.index("--output") + 1]).name for argv in trainings] == ["random-0", "weight-2.0-0"]
    for argv, weight in zip(trainings, ("0.5", "2"), strict=True):
        assert argv.count("--contrastive-weight") == 1
        assert argv[argv.index("--contrastive-weight") + 1] == weight
        assert argv[argv.index("--model") + 1] == str(tmp_path / "model")
        assert "--cache-states" in argv
    text = (tmp_path / "report.md").read_text()
    assert "6 runs are still missing" in text
    assert "late goal" not in text  # no row of an arm that was not trained
    capsys.readouterr()
    assert ablations.main([*given, "--arms", "rs"]) == 2
    assert "--arms rs: must be one of random, ranking, " in capsys.readouterr().err


def test_signs_and_those_of_the_paper(ablations: ModuleType) -> None:
    """Three seeds of three problems; an interval that includes 0 says nothing."""
    values = {"random": 0.5, "rs": 0.3, "avg": 0.7, "ranking": 0.301}
    rows = [
        {"arm": arm, "seed": seed, "problems": {"reward": [value + 0.01 * seed * (arm == "ranking")] * 3}}
        for arm, value in values.items()
        for seed in range(3)
    ]
    assert ablations.verdict(rows, "rs", "random", "reward", -1).endswith("-0.200 ± 0.000 *: same sign")
    assert ablations.verdict(rows, "avg", "random", "reward", -1).endswith("*: other sign")
    assert ablations.verdict(rows, "rs", "ranking", "reward", -1).endswith(": no difference shown")
    assert ablations.verdict(rows, "late goal", "random", "reward", -1) == "-"
