"""Detectors of over-optimization on latents of known distributions, and ``gcrm monitor``."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gcrm_fast import RewardModel
from gcrm_fast.common.errors import UserError
from gcrm_fast.evaluation.detectors import Reference, clusters, early_stop, neighbor_distance, parts_of
from support import models
from support.judged import write
from support.training_runs import Gcrm


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def reference(rng: np.random.Generator, n: int = 2000, width: int = 8) -> Reference:
    latents_ND = rng.normal(size=(n, width)) @ np.diag(np.linspace(0.5, 2, width))
    return Reference.of(latents_ND, np.arange(n) % 4, "sft.jsonl")


def test_the_null_is_quiet_and_a_shift_is_seen(rng: np.random.Generator) -> None:
    found = reference(rng)
    assert found.null.outliers < 0.04
    assert not found.warning
    scale = np.linspace(0.5, 2, 8)
    same = found.find(rng.normal(size=(400, 8)) * scale)
    shifted = found.find((rng.normal(size=(400, 8)) * 0.2 + 4) * scale)
    assert same.outliers < 0.04
    assert shifted.outliers > 0.95
    assert shifted.distance > 2 * same.distance
    assert shifted.clusters.csi > 3 * same.clusters.csi
    assert same.distance == pytest.approx(np.sqrt(8), rel=0.1), "the distance, not its square"


def test_prompts_that_differ_in_a_number_fill_every_part() -> None:
    assert min(np.bincount(parts_of([f"one {i} two" for i in range(80)]), minlength=4)) >= 12


def test_csi_of_clusters_known_by_hand() -> None:
    near, far = np.zeros((6, 2)), np.full((10, 2), [3.0, 4.0])
    alone = np.array([[0.0, 12.0]])
    found = clusters(np.concatenate([near, far, alone]), np.zeros((3, 2)), 0.5)
    assert found.csi == pytest.approx((6 * 0 + 10 * 5 + 1 * 12) / 17)
    assert found.noise == pytest.approx(1 / 17)


def test_eps_is_the_distance_of_the_fifth_other_latent() -> None:
    assert neighbor_distance(np.arange(100.0)[:, None]) == 3  # in a row: two on one side, three on the other


def test_early_stop_compares_a_jump_with_those_before() -> None:
    assert early_stop([1.0]) == pytest.approx([np.nan], nan_ok=True)
    assert early_stop([1.0, 1.1, 1.0, 3.0]) == pytest.approx([np.nan, np.nan, 1.0, 20.0], nan_ok=True)
    assert np.isnan(early_stop([1.0, 1.0, 2.0])[2])


def test_few_reference_samples_are_refused_or_said(rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match="100 completions for latents of width 64: give at least 128"):
        Reference.of(rng.normal(size=(100, 64)), np.arange(100) % 4, "sft.jsonl")
    with pytest.raises(UserError, match="of different prompts"):
        Reference.of(rng.normal(size=(100, 8)), np.zeros(100, dtype=int), "sft.jsonl")
    two = np.tile([[0.0, 1, 2], [1, 1, 0]], (200, 1))  # their covariance, even shrunk, has no Cholesky factor
    with pytest.raises(UserError, match="the same latents, or one of few"):
        Reference.of(two, np.arange(400) // 2 % 4, "sft.jsonl")
    with pytest.raises(UserError, match=r"sft\.jsonl: all completions have the same latents"):
        Reference.of(np.ones((100, 8)), np.arange(100) % 4, "sft.jsonl")
    assert "320 reference completions are few for latents of width 64" in reference(rng, 320, 64).warning


# ------------------------------------------------------------------------------------------------------- the command

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "linear"
    models.save(path)
    return path


def samples(rng: np.random.Generator, count: int, words: list[str]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{' '.join(rng.choice(WORDS, 3))} {i}", "completion": " " + " ".join(rng.choice(words, 4))}
        for i in range(count)
    ]


def test_the_command_sees_a_policy_that_repeats_itself(
    gcrm: Gcrm, folder: Path, rng: np.random.Generator, tmp_path: Path
) -> None:
    sft = write(tmp_path / "sft.jsonl", samples(rng, 200, WORDS))
    steps = [
        write(tmp_path / f"step_{i}.jsonl", samples(rng, 60, words)) for i, words in enumerate([WORDS, WORDS, ["two"]])
    ]
    run = functools.partial(gcrm, "monitor", folder, *steps, "-o", tmp_path / "out")
    result = run("--reference", sft)
    assert result.returncode == 0, result.stderr
    assert "200 reference completions are few for latents of width 32" in result.stderr
    found = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    csi = {row["source"]: row["value"] for row in found if row["measure"] == "csi_per_sample"}
    assert list(csi) == ["reference", *map(str, steps)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        "results.csv",
        "monitor.png",
        "map.png",
    }
    distance = [row["value"] for row in found if row["measure"] == "mahalanobis"]
    assert distance[3] != pytest.approx(distance[1], rel=0.02)
    assert "--reference is missing" in run("--overwrite").stderr
    for count, said in ((5, "5 completions"), (1, "1 completion")):
        few = write(tmp_path / "few.jsonl", samples(rng, count, WORDS))
        result = gcrm("monitor", folder, few, "--reference", sft, "-o", tmp_path / "out2")
        assert f"few.jsonl: {said}: give 6 or more" in result.stderr
    assert not (tmp_path / "out2").exists()


def test_a_bottleneck_is_seen_by_its_latents(gcrm: Gcrm, rng: np.random.Generator, tmp_path: Path) -> None:
    """Six numbers instead of 32 states, for which 200 references are enough."""
    network = models.save(tmp_path / "m", head="bottleneck", bottleneck_size=6)
    model = RewardModel.from_pretrained(tmp_path / "m", device="cpu")
    encoded = model.encode(["one", "two"], [" three", " four five"])
    hidden_NH = torch.from_numpy(
        np.stack([h[-1] for h in model.representations(["one", "two"], [" three", " four five"])])
    )
    np.testing.assert_allclose(model.latents(encoded), network.score.latents(hidden_NH).detach(), rtol=1e-4, atol=1e-5)
    sft, step = (write(tmp_path / f"{name}.jsonl", samples(rng, 200, WORDS)) for name in ("sft", "step"))
    result = gcrm("monitor", tmp_path / "m", step, "--reference", sft, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "few for latents" not in result.stderr


def test_a_file_that_is_named_twice_is_two_steps(
    gcrm: Gcrm, folder: Path, rng: np.random.Generator, tmp_path: Path
) -> None:
    sft = write(tmp_path / "sft.jsonl", samples(rng, 100, WORDS))
    a, b = (write(tmp_path / f"{name}.jsonl", samples(rng, 20, WORDS)) for name in "ab")
    result = gcrm("monitor", folder, a, b, a, "--reference", sft, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [row["source"] for row in rows if row["measure"] == "early_stop"] == [str(a), str(b), str(a)]
    csi = [row["value"] for row in rows if row["measure"] == "csi_per_sample"]
    assert csi[1] == csi[3] != csi[2]
    assert [row["value"] for row in rows if row["measure"] == "early_stop"][2] == pytest.approx(1.0), "back again"


def test_latents_of_width_1_have_no_map(gcrm: Gcrm, rng: np.random.Generator, tmp_path: Path) -> None:
    models.save(tmp_path / "m", head="bottleneck", bottleneck_size=1)
    sft, step = (write(tmp_path / f"{name}.jsonl", samples(rng, 100, WORDS)) for name in ("sft", "step"))
    result = gcrm("monitor", tmp_path / "m", step, "--reference", sft, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "latents of width 1 have no second component: map.png is not written" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "results.csv", "monitor.png"}
