"""Verifier, judge and reward model under best of n: verdicts to learn from, scores, rows; training a judge (slow)."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gcrm_fast.data.arithmetic import generate
from gcrm_fast.rlhf.generative import GenerativeJudge
from support.models import save
from support.policies import save as save_policy

PAIRS = generate(0, 8, 0, 3)[1]


@pytest.fixture
def judges(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("judges")


def write_pairs(path: Path, count: int) -> None:
    pairs = generate(count, 0, 0, 3)[0]
    lines = [json.dumps({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}) + "\n" for p in pairs]
    path.write_text("".join(lines))


def test_verdicts_name_the_place_of_the_right_solution(judges: ModuleType, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 200)
    texts = judges.verdict_texts(tmp_path / "pairs.jsonl", 0)
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for text, pair in zip(texts, lines, strict=True):
        order = ("chosen", "rejected") if text["completion"] == "a" else ("rejected", "chosen")
        assert text["prompt"] == f"{pair['prompt']}{pair[order[0]]}?{pair[order[1]]}?"
    assert 70 < sum(text["completion"] == "a" for text in texts) < 130
    assert judges.verdict_texts(tmp_path / "pairs.jsonl", 1) != texts


def test_samples_are_judged_against_the_reference_of_their_problem(judges: ModuleType, tmp_path: Path) -> None:
    judge = GenerativeJudge(save_policy(tmp_path), template=judges.TEMPLATE, verdicts=judges.VERDICTS)
    prompts, right, wrong = ([getattr(pair, name) for pair in PAIRS] for name in ("prompt", "chosen", "rejected"))
    texts = [[b, a, b, "4+4=4;"] for a, b in zip(right, wrong, strict=True)]
    scores = judges.judged(judge, prompts, texts, right)
    expected = judge.scores(prompts, wrong, right)
    for own, score in zip(scores, expected, strict=True):
        assert own[0] == own[2] == pytest.approx(score)
        assert own[1] == 0.5, "the reference itself"
        assert own[3] != own[0]


def test_gold_of_the_best_of_n(judges: ModuleType) -> None:
    """Of two problems with four samples: one whose right sample has the highest score, one whose has the lowest."""
    gold = [np.array([1.0, 0, 0, 0]), np.array([0.0, 1, 0, 0])]
    proxy = [np.array([0.9, 0.5, 0.4, 0.1]), np.array([0.9, 0.1, 0.4, 0.2])]
    assert judges.picked(proxy, gold)["gold"] == [[0.25, 0.5, 1.0], [0.25, 0.0, 0.0]]


def test_rows_are_kept_and_rewards_compared(
    judges: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sampled(options: Any, prompts: list[str], references: list[str]) -> tuple[list[list[str]], list[str]]:
        own = PAIRS[: len(prompts)]
        return [[p.chosen, p.rejected, "4+4=4;", p.chosen, p.rejected, "", p.rejected, "4"] for p in own], references

    def trained(options: Any, arm: str, flipped: int, seed: int) -> Path:
        assert (arm, flipped) == ("plain", 0)
        if not (tmp_path / "reward").exists():
            save(tmp_path / "reward")
        return tmp_path / "reward"

    def judge_folder(options: Any, width: int, seed: int) -> Path:
        asked.append((width, seed))
        folder = tmp_path / f"judge-{width}"
        return folder if folder.exists() else save_policy(folder)

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(judges.laboratory, "samples_of", sampled)
    monkeypatch.setattr(judges.laboratory, "train", trained)
    monkeypatch.setattr(judges, "judge_folder", judge_folder)
    words = ["--problems", "8", "--samples", "4", "--runs", str(tmp_path), "-o", str(tmp_path / "report")]
    assert judges.main([*words, "--seeds", "1"]) == 0
    assert asked == [(64, 0), (64, 0), (128, 0), (128, 0)]
    assert judges.main([*words, "--seeds", "2"]) == 0
    assert asked[4:] == [(64, 1), (64, 1), (128, 1), (128, 1)], "finished rows are not recomputed"
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    verifier = next(row for row in rows if row["reward"] == "verifier")
    assert np.array(verifier["gold"])[:, [0, -1]].mean(0) == pytest.approx([0.5, 1.0])
    assert all(0 <= row["in order"] <= 1 for row in rows if "judge" in row["reward"])
    report = (tmp_path / "report.md").read_text()
    assert "Every row is finished." in report
    assert report.count("| verifier - judge, truth, width ") == 2
    assert report.count("| judge, truth, width 128 - judge, best of 4, width 128 | ") == 1
    assert judges.main([*words, "--steps", "7"]) == 2
    assert "holds rows of --steps 600, not 7: choose another --report" in capsys.readouterr().err


@pytest.mark.slow
def test_a_judge_learns_from_its_policy(judges: ModuleType, tmp_path: Path) -> None:
    save_policy(tmp_path / "right-50")
    write_pairs(tmp_path / "pairs.jsonl", 100)
    options = judges.JudgeOptions(policy=tmp_path / "right-50", widths=tmp_path, runs=tmp_path, steps=2)
    folder = judges.judge_folder(options, 64, 0)
    judge = GenerativeJudge(folder, template=judges.TEMPLATE, verdicts=judges.VERDICTS)
    question = [PAIRS[0].prompt], [PAIRS[0].chosen], [PAIRS[0].rejected]
    start = GenerativeJudge(tmp_path / "right-50", template=judges.TEMPLATE, verdicts=judges.VERDICTS)
    assert judge.scores(*question) != start.scores(*question)
    with pytest.raises(judges.UserError, match="128/right-50: no such folder: train the policy of width 128"):
        judges.judge_folder(options, 128, 0)
