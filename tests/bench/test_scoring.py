"""bench/scoring.py: contestants score alike before any is timed."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.small import small_config


@pytest.fixture
def scoring(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """bench/scoring.py on a small model and built-in lengths."""
    module = importlib.import_module("scoring")
    monkeypatch.delenv("GCRM_DATA", raising=False)
    monkeypatch.setattr(module, "MODELS", {"tiny": small_config(vocab_size=32_000, num_hidden_layers=1)})
    monkeypatch.setattr(module, "BATCHES", (1, 4))
    monkeypatch.setattr(module, "EACH", (1, 3, 6))
    monkeypatch.setattr(module.measure, "RESULTS", tmp_path)
    arguments = ["scoring", "--model", "tiny", "--dtype", "float32", "--completions", "6", "--quick"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--data", "hh_pairs_train"])
    return module


def test_scoring_is_raced_and_recorded(scoring: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scoring.main()
    [path] = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())
    assert [(r["per prompt"], r["method"]) for r in rows] == [
        (each, method) for each in scoring.EACH for method in (scoring.PADDED, scoring.SORTED, scoring.OURS)
    ]
    assert all(0 < r["p10"] <= r["completions/s"] <= r["p90"] and r["peak MB"] > 0 for r in rows)
    assert [r["completions"] for r in rows] == [6] * 9
    by_method = {r["method"]: r for r in rows[6:]}
    assert by_method[scoring.OURS]["computed/completion"] < by_method[scoring.SORTED]["computed/completion"]
    assert by_method[scoring.OURS]["least work"] > 1.2
    assert path.with_suffix(".png").exists()
    assert "6 per prompt" in capsys.readouterr().out


def test_scoring_that_differs_is_not_timed(
    scoring: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = scoring.our_rewards
    monkeypatch.setattr(scoring, "our_rewards", lambda *inputs: right(*inputs)[::-1])
    with pytest.raises(SystemExit) as end:
        scoring.main()
    assert end.value.code == 1
    assert "nothing is timed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
