"""bench/generate.py: contestants write the same tokens before any is timed."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.small import small_config


@pytest.fixture
def generate(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """bench/generate.py on a small model."""
    module = importlib.import_module("generate")
    monkeypatch.setattr(module, "MODELS", {"tiny": small_config(vocab_size=300, num_hidden_layers=1)})
    monkeypatch.setattr(module, "BATCHES", (16, 4))
    monkeypatch.setattr(module.measure, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate", "--quick"])
    return module


def test_generation_is_raced_and_recorded(generate: ModuleType, tmp_path: Path) -> None:
    generate.main()
    [path] = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())
    raced, live = rows[:4], rows[4:]
    assert [(row["case"], row["method"]) for row in raced] == [
        (case, method) for case in ("16 samples", "16 prompts") for method in (generate.THEIRS, generate.OURS)
    ]
    assert raced[0]["new tokens"] == raced[1]["new tokens"] == 16 * 16
    assert all(0 < row["p10"] <= row["tokens/s"] <= row["p90"] and row["prefill s"] > 0 for row in raced)
    assert [row["reward tokens"] > 0 for row in live] == [False, True, True, True, True, True]
    for unfiltered, filtered in (live[2:4], live[4:]):
        assert filtered["policy tokens"] <= unfiltered["policy tokens"]
    most = generate.WAITING * 16 * 8  # some end by themselves
    assert 0.9 * most < live[4]["policy tokens"] <= most


def test_tokens_that_differ_are_not_timed(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = generate.our_ids
    monkeypatch.setattr(generate, "our_ids", lambda *inputs: [[*ids[::-1], 0] for ids in right(*inputs)])
    with pytest.raises(SystemExit) as end:
        generate.main()
    assert end.value.code == 1
    assert "the tokens differ, so nothing is timed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
