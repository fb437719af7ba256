"""The distance to a reference policy as a penalty on the reward."""

from pathlib import Path

import numpy as np
import pytest

from gcrm_fast import RewardModel
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.notes import warn_once
from gcrm_fast.rlhf.latents import LatentReference
from gcrm_fast.rlhf.trl import RewardFunction
from support import models

SIZE = 3
PROMPTS, COMPLETIONS = models.texts(80, 8)
CLASSES = ["sums" if i % 2 else "words" for i in range(80)]
ASKED, ANSWERS = PROMPTS[:4], [" one", " two three", " seven seven", " 1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    folder = tmp_path_factory.mktemp("latents") / "m"
    models.save(folder, head="bottleneck", bottleneck_size=SIZE)
    return RewardModel.from_pretrained(folder, device="cpu")


def distances(model: RewardModel, chosen: list[int]) -> np.ndarray:
    """Of ANSWERS to the completions of these numbers, with NumPy's inverse."""

    def latents(prompts: list[str], completions: list[str]) -> np.ndarray:
        return model.latents(model.encode(prompts, completions)).astype(np.float64)

    own = latents([PROMPTS[i] for i in chosen], [COMPLETIONS[i] for i in chosen])
    inverse = np.linalg.inv(np.cov(own.T) + 1e-6 * np.eye(SIZE))
    away = latents(ASKED, ANSWERS) - own.mean(0)
    return np.sqrt(np.einsum("nd,de,ne->n", away, inverse, away))


def test_the_penalty_is_the_weighted_distance_of_the_latent(model: RewardModel, tmp_path: Path) -> None:
    reference = LatentReference.of(model, PROMPTS, COMPLETIONS)
    reference.save(tmp_path / "reference.safetensors")
    for given in (reference, tmp_path / "reference.safetensors"):
        penalized = RewardFunction(model, distance_weight=0.5, latent_reference=given)(ASKED, ANSWERS)
        expected = model.score(ASKED, ANSWERS) - 0.5 * distances(model, list(range(80)))
        np.testing.assert_allclose(penalized, expected, rtol=1e-4)


def test_each_class_of_prompts_has_its_reference(model: RewardModel) -> None:
    reference = LatentReference.of(model, PROMPTS, COMPLETIONS, CLASSES)
    function = RewardFunction(model, distance_weight=1.0, latent_reference=reference, class_column="task")
    tasks = ["sums", "words", "words", "sums"]
    of_class = {name: distances(model, [i for i in range(80) if CLASSES[i] == name]) for name in ("sums", "words")}
    expected = model.score(ASKED, ANSWERS) - [of_class[task][i] for i, task in enumerate(tasks)]
    np.testing.assert_allclose(function(ASKED, ANSWERS, task=tasks), expected, rtol=1e-4)
    with pytest.raises(UserError, match="class 'code' has no latent reference: there is one for sums, words"):
        function(ASKED, ANSWERS, task=["code"] * 4)
    for columns in ({}, {"task": None}):
        with pytest.raises(
            UserError, match="class_column 'task': the trainer passes no such column: add it to the data"
        ):
            function(ASKED, ANSWERS, **columns)


def test_classes_that_are_numbers_are_texts(model: RewardModel, tmp_path: Path) -> None:
    numbers = [i % 2 for i in range(80)]
    LatentReference.of(model, PROMPTS, COMPLETIONS, numbers).save(tmp_path / "r.safetensors")
    latents_ND = model.latents(model.encode(ASKED, ANSWERS)).astype(np.float64)
    for reference in (
        LatentReference.of(model, PROMPTS, COMPLETIONS, numbers),
        LatentReference.load(tmp_path / "r.safetensors"),
    ):
        assert list(reference.classes) == ["0", "1"]
        same = [reference.distances(latents_ND, [1, 0, 1, 0]), reference.distances(latents_ND, ["1", "0", "1", "0"])]
        np.testing.assert_array_equal(*same)
        with pytest.raises(UserError, match="class '2' has no latent reference: there is one for 0, 1"):
            reference.distances(latents_ND, [0, 1, 2, 0])


def test_few_completions_are_refused_or_said(model: RewardModel, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"5 reference completions of class 'all' .* width 3: give at least 6"):
        LatentReference.of(model, PROMPTS[:5], COMPLETIONS[:5])
    warn_once.cache_clear()
    LatentReference.of(model, PROMPTS[:40], COMPLETIONS[:40])
    assert "40 reference completions of class 'all' are few for latents of width 3: 60" in capsys.readouterr().err


def test_latents_of_other_weights_and_other_files_are_refused(model: RewardModel, tmp_path: Path) -> None:
    models.save(tmp_path / "other", head="bottleneck", bottleneck_size=SIZE + 1)
    other = RewardModel.from_pretrained(tmp_path / "other", device="cpu")
    reference = LatentReference.of(model, PROMPTS, COMPLETIONS)
    with pytest.raises(UserError, match="latent reference is of another model's weights"):
        RewardFunction(other, distance_weight=0.1, latent_reference=reference)
    (tmp_path / "x").write_text("x")
    with pytest.raises(UserError, match=r"x: not a file that LatentReference\.save wrote"):
        RewardFunction(model, distance_weight=0.1, latent_reference=tmp_path / "x")
    with pytest.raises(UserError, match=r"model\.safetensors: not a file that LatentReference\.save wrote"):
        LatentReference.load(tmp_path / "other" / "model.safetensors")
    for options in ({"distance_weight": 0.1}, {"latent_reference": reference}):
        with pytest.raises(TypeError, match="goes with a latent_reference"):
            RewardFunction(model, **options)
