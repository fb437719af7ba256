"""The laboratory of over-optimization: proxies, comparison, resuming; training from a policy (slow)."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gcrm_fast import RewardModel
from gcrm_fast.data.arithmetic import generate, samples
from gcrm_fast.rlhf.latents import LatentReference
from support.models import save
from support.policies import save as save_policy

WRITTEN = 400  # of the policy, for the detectors


@pytest.fixture
def lab(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("overoptimization")


@pytest.fixture
def trained(lab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Models are random instead of trained; the names of those that were asked for."""
    asked = []

    def train(options: Any, arm: str, flipped: int, seed: int) -> Path:
        asked.append((arm, flipped, seed))
        folder = tmp_path / f"{arm}-{seed}"
        if not folder.exists():
            save(folder, **({"head": "bottleneck", "bottleneck_size": 4} if arm == lab.INFORM else {}))
        return folder

    monkeypatch.setattr(lab, "train", train)
    return asked


def written(count: int) -> tuple[list[str], list[str]]:
    """Prompts and solutions, most of them wrong."""
    problems = [pair.prompt for pair in generate(0, count, 1, 3)[1]]
    rows = list(samples(problems, 1, right=0.25, seed=1))
    return [row["prompt"] for row in rows], [row["completion"] for row in rows]


def test_the_reward_of_an_ensemble_and_of_a_penalty(lab: ModuleType, trained: list[Any], tmp_path: Path) -> None:
    prompts, texts = written(WRITTEN)
    options = lab.Options(runs=tmp_path)
    mean = lab.proxy_of(options, lab.ENSEMBLE, 5, 1, (prompts, texts)).reward(prompts[:9], texts[:9])
    seeds = (4, 5, 6, 7)  # seed 0 has 0 to 3
    assert trained == [("plain", 5, seed) for seed in seeds]
    alone = [RewardModel.from_pretrained(tmp_path / f"plain-{k}").score(prompts[:9], texts[:9]) for k in seeds]
    assert mean == pytest.approx(np.mean(alone, axis=0), abs=1e-5)
    less = lab.proxy_of(options, lab.PENALTY, 5, 2, (prompts, texts)).reward(prompts[:9], texts[:9])
    model = RewardModel.from_pretrained(tmp_path / "InfoRM-2")
    latents = model.latents(model.encode(prompts[:9], texts[:9])).astype(np.float64)
    distances = LatentReference.of(model, prompts, texts).distances(latents)
    assert less == pytest.approx(model.score(prompts[:9], texts[:9]) - 0.3 * distances, abs=1e-4)


def row(arm: str, seed: int, gold: list[list[float]]) -> dict[str, Any]:
    return {"arm": arm, "flipped": 0, "seed": seed, "plain gold": 0.5, "gold": gold, "in order": [1.0, 0.0]}


def test_arms_are_compared_by_seed_and_problem(lab: ModuleType) -> None:
    """Of two problems and three sizes. The plain reward loses 0.3 after the second size, GRM nothing."""
    plain, other = [[0.0, 0.1, -0.2], [0.0, 0.3, 0.0]], [[0.0, 0.1, 0.2], [0.0, 0.3, 0.4]]
    text = lab.compared([row("GRM", 1, other), row("plain", 0, plain), row("plain", 1, plain), row("GRM", 0, other)])
    plain_line, other_line = text.splitlines()[2:]
    assert plain_line.startswith("| plain, 0% flipped | 2 | 0.500 ± 0.000 | 0.700 ± 0.000 | 0.400 ± 0.000 | -0.300")
    assert "| 0.800 ± 0.000 (+0.400 ± 0.000 *) | 0.000 ± 0.000 (+0.300 ± " in other_line
    assert "(+0.000 ± 0.000)" in other_line.split("|")[3]


def test_arms_of_another_width_are_compared_at_that_width(lab: ModuleType) -> None:
    gold = {"plain": 0.1, "plain, width 32": 0.0, "InfoRM, width 32": 0.3}
    rows = [row(arm, seed, [[value, value]] * 2) for arm, value in gold.items() for seed in (0, 1)]
    _, narrow, inform = lab.compared(rows).splitlines()[2:]
    assert narrow.startswith(
        "| plain, width 32, 0% flipped | 2 | 0.500 ± 0.000 (+0.000 ± 0.000) | 0.500 ± 0.000 (-0.100"
    )
    assert "| 0.800 ± 0.000 (+0.300 ± 0.000 *) |" in inform
    for one in rows:  # the detector sees both points, of which the second is past the peak
        one |= {"points": [[1, 0.0], [2, 0.0]], "fall": [1, 2, -0.1, -0.2, -0.05], "detectors": [[1.0] * 4, [2.0] * 4]}
    said = lab.claims(rows, lab.values_of, lab.CLAIMS)
    assert "- InfoRM, width 32, 0% flipped, ends better than plain: shown, gold at the largest n +0.300" in said
    assert "- InfoRM, 0% flipped, ends better than plain: no claim from fewer than two seeds." in said
    assert said.endswith("CSI is higher past the peak than before: shown, AUROC 1.00 ± 0.00.")


def test_rows_are_kept_and_the_missing_ones_added(
    lab: ModuleType,
    trained: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def sampled(options: Any, prompts: list[str], references: list[str]) -> tuple[list[list[str]], list[str]]:
        assert len(references) == WRITTEN
        right = [pair.chosen for pair in held_out[: len(prompts)]]
        return [[own, "4+4=4;", own[:-2] + "9;", "", own] for own in right], written(WRITTEN)[1]

    held_out = generate(0, 8 + WRITTEN, 0, 3)[1]
    monkeypatch.setattr(lab, "samples_of", sampled)
    sizes = ("--problems", "8", "--samples", "5", "--references", str(WRITTEN), "--flipped", "0")
    words = [*sizes, "--runs", str(tmp_path), "-o", str(tmp_path / "report")]
    assert lab.main([*words, "--arms", "InfoRM", "--seeds", "1"]) == 0
    assert lab.main([*words, "--arms", "InfoRM", lab.PENALTY, lab.ENSEMBLE, "--seeds", "2"]) == 0
    assert trained[:3] == [("InfoRM", 0, 0), ("InfoRM", 0, 0), ("plain", 0, 0)]
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    names = [(arm, seed) for arm in ("InfoRM", lab.PENALTY, lab.ENSEMBLE) for seed in (0, 1)]
    assert [(one["arm"], one["seed"]) for one in rows] == names
    assert all(one["plain gold"] == pytest.approx(0.4) for one in rows), "two of five samples are right"
    assert all(len(one["gold"]) == len(one["in order"]) == 8 for one in rows)
    text = (tmp_path / "report.md").read_text()
    assert "Every row is finished." in text
    assert text.count("| InfoRM, 0% flipped, seed 1 |") == 2, "curve and detectors"
    assert (tmp_path / "report.png").exists()
    assert (tmp_path / "report_detectors.png").exists()
    capsys.readouterr()
    for wrong, error in {
        ("--steps", "9"): "holds rows of --steps 600, not 9: choose another --report",
        ("--arms", "x"): "--arms x: must be one of plain, GCRM",
        ("--flipped", "51"): "--flipped 51: must be a whole number up to 50",
    }.items():
        assert lab.main([*words, *wrong]) == 2
        assert error in capsys.readouterr().err


def one_step_pairs(path: Path, count: int) -> list[dict[str, str]]:
    """In the file of the policy's pairs."""
    pairs = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in generate(count, 0, 0, 3)[0]]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs


def test_flipped_labels(lab: ModuleType, tmp_path: Path) -> None:
    pairs = one_step_pairs(tmp_path / "source.jsonl", 400)
    for flipped, low, high in ((0, 0, 0), (25, 70, 130)):
        lab.write_pairs(tmp_path / "source.jsonl", tmp_path / "pairs.jsonl", flipped)
        lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
        both = list(zip(lines, pairs, strict=True))
        assert low <= sum(line["chosen"] == pair["rejected"] for line, pair in both) <= high
        assert all(line["prompt"] == pair["prompt"] for line, pair in both)
        assert all({line["chosen"], line["rejected"]} == {pair["chosen"], pair["rejected"]} for line, pair in both)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["plain", "GCRM", "InfoRM", "GRM", "InfoRM, width 32"])
def test_every_arm_trains_from_its_policy(lab: ModuleType, tmp_path: Path, arm: str) -> None:
    for start in ("policy", "32/policy"):
        save_policy(tmp_path / start)
    options = lab.Options(policy=tmp_path / "policy", widths=tmp_path, runs=tmp_path / "runs", steps=2)
    options.runs.mkdir()
    one_step_pairs(options.runs / "pairs.jsonl", 300)
    model = RewardModel.from_pretrained(lab.train(options, arm, 0, 0))
    assert np.isfinite(model.score(*written(3))).all()
