"""The laboratory of over-optimization with GRPO: KL, the first step past the peak, warnings, claims, resuming."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from gcrm_fast.data.arithmetic import generate, samples
from model.test_parity import theirs_of
from support.models import save
from support.policies import save as save_policy
from support.small import small_config

WRITTEN = 400  # of the policy, for the detectors
STEPS = [0, 5, 10, 15]


@pytest.fixture
def lab(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("overoptimization_grpo")


def test_kl_is_that_of_each_distribution_at_the_tokens_of_the_samples(script: Callable[[str], ModuleType]) -> None:
    start, policy = (theirs_of(small_config(), LlamaForCausalLM) for _ in range(2))
    asked, new = [[5, 6, 7], [8, 9]], [[1], [2, 3, 4, 1]]
    total = 0.0
    for prompt, own in zip(asked, new, strict=True):
        ids = torch.tensor([prompt + own])
        p, q = (model(ids).logits[0].detach().double().softmax(-1) for model in (policy, start))
        for i in range(len(prompt) - 1, len(prompt) + len(own) - 1):
            total += float((p[i] * (p[i] / q[i]).log()).sum())
    assert total > 0.01
    kl_from = script("grpo").kl_from
    assert kl_from(start, policy, asked, new) == pytest.approx(total / 2, rel=1e-4)
    assert kl_from(policy, policy, asked, new) == 0


@pytest.mark.parametrize(
    ("means", "past"),
    [([0.5, 0.6, 0.55, 0.1], 15), ([0.6, 0.1, 0.7, 0.2], 15), ([0.5, 0.7, 0.2, 0.65], 10), ([0.5] * 4, None)],
)
def test_the_first_step_past_the_peak(lab: ModuleType, means: list[float], past: int | None) -> None:
    """A fall of 0.05 is within its interval over problems, greater ones are not; one before the peak does not count."""
    noise = np.random.default_rng(0).normal(scale=0.2, size=(40, 4))
    found = lab.first_past(np.array(means) + noise - noise.mean(0), STEPS)
    assert found == past if past else np.isnan(found)


def row(arm: str, seed: int, last: float, csi: list[float], past: float = 10.0) -> dict[str, Any]:
    """Gold is highest at step 5, at 0.6, and ends at ``last``."""
    gold = [0.5, 0.6, (0.6 + last) / 2, last]
    return {
        "arm": arm,
        "flipped": 0,
        "seed": seed,
        "machine": "a machine",
        "points": [[s, 0.1 * s, g - 0.5, g - 0.51, g - 0.49, 0.1] for s, g in zip(STEPS, gold, strict=True)],
        "rewards": [1.0, 2.0, 3.0, 4.0],
        "tokens": [12.0, 12.0, 12.0, 9.0],
        "fall": [5, 15, last - 0.6, last - 0.61, last - 0.59],
        "first past": past,
        "detectors": [[value, 0.0, 1.0, float("nan"), 0.1 * s] for s, value in zip(STEPS, csi, strict=True)],
        "reference": [1.0, 0.0, 1.0],
        "alarms": [1.5, 0.5, 2.0, 10.0],
        "gold": [gold, gold],
    }


def test_who_warns_in_time(lab: ModuleType) -> None:
    rows = [
        row("plain", 0, 0.1, [1.0, 1.2, 1.6, 2.0]),
        row("GRM", 0, 0.1, [1.0, 1.2, 1.3, 2.0]),
        row("GCRM", 0, 0.6, [2.0, 1.2, 1.1, 1.0], past=float("nan")),
    ]
    assert [lab.warnings(one)[0] for one in rows] == [10, 15, 0]
    csi, outliers, *_, kl = lab.warned(rows).splitlines()[2:]
    assert csi == "| CSI per sample | 1.00 ± 0.00 (2 rows) | 1 | 1 | 0 | 1 |"
    assert outliers == "| outliers | 0.50 ± 0.00 (2 rows) | 0 | 0 | 2 | 0 |"
    assert kl == "| KL, no detector | 1.00 ± 0.00 (2 rows) | - | - | - | - |"


@pytest.mark.parametrize(
    ("last", "word"),
    [((0.4, 0.41), "shown, last gold +0.3"), ((0.0, 0.01), "refuted"), ((0.0, 0.2), "neither shown nor refuted")],
)
def test_claims_need_an_interval_over_seeds(lab: ModuleType, last: tuple[float, float], word: str) -> None:
    def claims(rows: list[dict[str, Any]]) -> str:
        return str(lab.claims(rows, lab.values_of, lab.CLAIMS))

    flat = [1.0, 1.0, 1.0, 1.0]
    rows = [row("plain", seed, 0.1, flat) for seed in (0, 1)]
    assert "InfoRM, 0% flipped, ends better than plain: no claim from fewer than two seeds." in claims(rows)
    text = claims([*rows, *(row("InfoRM", seed, value, flat) for seed, value in enumerate(last))])
    assert f"- InfoRM, 0% flipped, ends better than plain: {word}" in text
    assert "- InfoRM + IBL, 0% flipped, ends better than plain: no claim" in text
    assert "CSI is higher past the peak than before: neither shown nor refuted, AUROC 0.50" in text


@pytest.fixture
def world(lab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a small call. A random policy and reward models, and right samples of the policy before GRPO."""
    held_out = generate(0, 8 + WRITTEN, 0, 3)[1]
    rows = samples([pair.prompt for pair in held_out[8:]], 1, right=0.25, seed=1)
    written = [one["completion"] for one in rows]
    monkeypatch.setattr(lab, "samples_of", lambda *_: ([[pair.chosen] * 3 for pair in held_out[:8]], written))

    def train(options: Any, arm: str, flipped: int, seed: int) -> Path:
        folder = tmp_path / f"{arm}-{seed}"
        save(folder, head="bottleneck", bottleneck_size=4)
        return folder

    monkeypatch.setattr("overoptimization.train", train)
    policy = save_policy(tmp_path / "policy", ends=0.5)
    sizes = ("--problems", "8", "--references", str(WRITTEN), "--grpo-steps", "2", "--every", "1", "--prompts", "9")
    places = ("--policy", str(policy), "--runs", str(tmp_path), "-o", str(tmp_path / "report"))
    return [*sizes, *places, "--flipped", "0", "--arms", "InfoRM"]


def test_rows_are_kept_and_the_missing_ones_added(
    lab: ModuleType,
    world: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def untrained(policy: Any, *_: Any, callbacks: list[Any], **__: Any) -> None:
        for step in (1, 2):
            with torch.no_grad():
                policy.lm_head.weight += 0.1 * torch.randn(policy.lm_head.weight.shape)
            callbacks[0].measure(policy, step)

    monkeypatch.setattr(lab, "grpo", untrained)
    assert lab.main([*world, "--seeds", "1"]) == 0
    first = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert lab.main([*world, "--seeds", "2"]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert rows[0] == first[0]
    assert [one["seed"] for one in rows] == [0, 1]
    for one in rows:
        kl = [point[1] for point in one["points"]]
        assert [point[0] for point in one["points"]] == [0, 1, 2]
        assert kl[0] == 0
        assert kl[1] > 0
        assert [values[4] for values in one["detectors"]] == kl
        assert np.array(one["gold"]).shape == (8, 3)
    text = (tmp_path / "report.md").read_text()
    assert "Every row is finished. Machines: " in text
    assert text.count("| InfoRM, 0% flipped, seed 1 |") == 2, "curve and detectors"
    assert (tmp_path / "report.png").exists()
    assert lab.main([*world, "--every", "2"]) == 2
    assert "holds rows of --every 1, not 2: choose another --report" in capsys.readouterr().err


@pytest.mark.slow
def test_grpo_trains_against_a_proxy(lab: ModuleType, world: list[str], tmp_path: Path) -> None:
    assert lab.main([*world, "--seeds", "1"]) == 0
    [one] = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [point[0] for point in one["points"]] == [0, 1, 2]
    assert one["points"][0][1] == 0 < one["points"][2][1]
