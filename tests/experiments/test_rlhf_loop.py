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


def row(loop: ModuleType, arm: str, seed: int, gold: float) -> dict[str, Any]:
    options = loop.LoopOptions()
    trajectory = [{"step": 10 * i, "gold": gold, "reward": 0.1 * i} for i in range(11)]
    one = {"arm": arm, "seed": seed, **loop.settings(options), "machine": "a machine", "trajectory": trajectory}
    one |= {"distinct": 5.0, "entropy": 2.0, "gold": [gold, gold + 0.002 * seed]}
    one["auroc_on_own_samples"] = float("nan") if arm == "rlp-spg" else 0.7  # all samples are wrong
    if arm in loop.RETRAINED:
        one["retrained"] = {"auroc_before": 0.71, "auroc_after": 0.81 + 0.01 * seed}
    if arm == "rlp-spg":
        accuracy, tokens = {"pairs": {"share": 0.75}}, {"chosen": 12.0, "rejected": 11.5}
        one["spg"] = {"coverage": 0.5, "accuracy": accuracy, "tokens": tokens}
    return one


def test_finished_rows_are_kept_and_other_settings_refused(
    loop: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, str]] = []

    def row_of(world: int, arm: str) -> dict[str, Any]:
        asked.append((world, arm))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return row(loop, arm, world, 0.4 + 0.1 * (arm == "hybrid"))

    monkeypatch.setattr(loop, "prepare", lambda seed, options: seed)
    monkeypatch.setattr(loop, "row_of", row_of)
    options = ["--report", str(tmp_path / "x"), "--runs", str(tmp_path)]
    assert loop.main(options) == 130
    assert loop.main(options) == 0
    assert asked == [(0, "plain"), (0, "hybrid"), (0, "hybrid"), (0, "rlp-spg"), (0, "rlp-uml")]
    assert loop.main(options) == 0
    assert len(asked) == 5
    text = (tmp_path / "x.md").read_text()
    assert "23 rows of three seeds and all arms are missing" in text
    assert "| hybrid | 1 | 0.500 | 0.500 | - | 5.000 | 2.000 | 0.700 |" in text
    assert "| rlp-spg | 0 | 0.710 | 0.810 | 50% | 75% | 12.0, 11.5 |" in text
    assert "| rlp-uml | 0 | 0.710 | 0.810 |  |  |  |" in text
    assert "| plain | 0 | 0.00 / 0.400 | 0.20 / 0.400 | 0.40 / 0.400 |" in text
    assert "gold after hybrid is higher than after plain: no claim from fewer than two seeds." in text
    assert "lowest-10" not in text
    assert loop.main([*options, "--prompts", "20"]) == 2
    assert "holds rows of --prompts 400, not 20: choose another --report" in capsys.readouterr().err
    assert loop.main([*options, "--full"]) == 0
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 3 * 9
    text = (tmp_path / "x.md").read_text()
    assert "are missing" not in text
    assert "gold after hybrid is higher than after plain: shown, +0.100 ± 0.000 *." in text
    assert "gold after lowest-10 is higher than after random-10: neither shown nor refuted, +0.000 ± 0.000." in text
    assert "samples of the new policy better, AUROC: shown, +0.110 ± 0.025 *." in text


@pytest.mark.parametrize(
    ("gains", "told"),
    [
        ([0.1, 0.11, 0.12], "shown, +0.110"),
        ([-0.1, -0.11, -0.12], "refuted, -0.110"),
        ([-0.1, 0.1, 0.03], "neither shown nor refuted, +0.010"),
    ],
)
def test_a_claim_needs_an_interval_without_0(loop: ModuleType, gains: list[float], told: str) -> None:
    rows = [row(loop, "plain", seed, 0.3) for seed in range(3)]
    rows += [row(loop, "hybrid", seed, 0.3 + gain) for seed, gain in enumerate(gains)]
    assert f"Data scaling: gold after hybrid is higher than after plain: {told} ±" in loop.claims(rows)


@pytest.mark.slow
def test_end_to_end_on_little_data(loop: ModuleType, tmp_path: Path) -> None:
    few = ["--grpo-steps", "2", "--prompts", "60", "--rm-steps", "3", "--train-pairs", "400", "--right", "25"]
    options = [*few, "--held-out", "20", "--report", str(tmp_path / "x"), "--runs", str(tmp_path / "runs")]
    assert loop.main(options) == 0
    rows = {one["arm"]: one for one in json.loads((tmp_path / "x.json").read_text())["rows"]}
    assert rows.keys() == {"plain", "hybrid", "rlp-spg", "rlp-uml"}
    before = {one["trajectory"][0]["gold"] for one in rows.values()}
    assert len(before) == 1
    for one in rows.values():  # the saved policy is the one that was measured last
        assert np.mean(one["gold"]) == pytest.approx(one["trajectory"][-1]["gold"], abs=1e-3)
    assert rows["rlp-spg"]["spg"]["outcomes"]["pair"] >= 1
    assert 0 <= rows["rlp-uml"]["retrained"]["auroc_after"] <= 1
    assert [point["step"] for point in rows["plain"]["trajectory"]] == [0, 1, 2]
