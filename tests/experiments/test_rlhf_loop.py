"""The loop of policies and rewards: its report and resuming; end to end on little data (slow)."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def loop(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("rlhf_loop")


def row(arm: str, seed: int, gold: float) -> dict[str, Any]:
    own = {"seed": seed, "arm": arm, "gold_before": 0.25, "gold": gold, "distinct": 5.0, "entropy_bits": 2.0}
    trajectory = [{"step": 10 * i, "gold": gold, "reward": 0.1 * i} for i in range(11)]
    accuracy = {"pairs": {"share": 0.75}}
    spg = {"coverage": 0.5, "accuracy": accuracy, "auroc_before": 0.7, "auroc_after": float("nan")}
    auroc = float("nan") if arm == "rlp-spg" else 0.7  # all samples are wrong
    uml = {"auroc_before": 0.71, "auroc_after": 0.81}
    return {**own, "trajectory": trajectory, "auroc_on_own_samples": auroc, "spg": spg, "uml": uml}


def test_finished_rows_are_kept_and_other_settings_refused(
    loop: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str]] = []

    def row_of(world: int, arm: str) -> dict[str, Any]:
        asked.append((world, arm))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return row(arm, world, 0.4 + 0.1 * (arm == "hybrid"))

    monkeypatch.setattr(loop, "prepare", lambda seed, options: seed)
    monkeypatch.setattr(loop, "row_of", row_of)
    options = ["--output", str(tmp_path / "x.json"), "--runs", str(tmp_path)]
    assert loop.main(options) == 130
    assert loop.main(options) == 0
    assert asked == [(0, "plain"), (0, "hybrid"), (0, "hybrid"), (0, "rlp-spg"), (0, "rlp-uml")]
    assert loop.main(options) == 0
    assert len(asked) == 5
    text = (tmp_path / "x.md").read_text()
    assert "| hybrid | 1 | 0.250 | 0.500 | 5.000 | 2.000 | 0.700 |" in text
    assert "coverage 50%, accuracy 0.750" in text
    assert "0.700 before, - after" in text
    assert (
        "multi-view loss. AUROC on samples of the plain arm's policy, of held-out problems: 0.710 before, 0.810" in text
    )
    assert "- hybrid beats plain: no claim from 1 seed (gold +0.100)." in text
    assert loop.main([*options, "--prompts", "20"]) == 2
    assert loop.main([*options, "--full"]) == 0
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 3 * 9


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [([0.1, 0.11, 0.12], "shown"), ([-0.1, -0.11, -0.12], "refuted"), ([-0.1, 0.1, 0.02], "not shown, nor refuted")],
)
def test_a_claim_needs_three_seeds_and_an_interval(loop: ModuleType, gains: list[float], verdict: str) -> None:
    of = {
        "plain": [row("plain", seed, 0.3) for seed in range(3)],
        "hybrid": [row("hybrid", seed, 0.3 + gain) for seed, gain in enumerate(gains)],
    }
    assert f"hybrid beats plain: {verdict} (gold {np.mean(gains):+.3f} ±" in loop.claims(of)


@pytest.mark.slow
def test_end_to_end_on_little_data(loop: ModuleType, tmp_path: Path) -> None:
    few = ["--grpo-steps", "2", "--prompts", "60", "--rm-steps", "3", "--train-pairs", "400", "--right", "25"]
    options = [*few, "--held-out", "20", "--output", str(tmp_path / "x.json"), "--runs", str(tmp_path / "runs")]
    assert loop.main(options) == 0
    rows = {one["arm"]: one for one in json.loads((tmp_path / "x.json").read_text())["rows"]}
    assert rows.keys() == {"plain", "hybrid", "rlp-spg", "rlp-uml"}
    assert {one["gold_before"] for one in rows.values()} == {rows["plain"]["gold_before"]}
    assert rows["rlp-spg"]["spg"]["outcomes"]["pair"] >= 1
    assert 0 <= rows["rlp-uml"]["uml"]["auroc_after"] <= 1
    assert [point["step"] for point in rows["plain"]["trajectory"]] == [0, 1, 2]
