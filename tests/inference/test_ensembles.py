"""Several reward models as one: in Python, gcrm score, gcrm serve and TRL's reward function."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcrm_fast import RewardModel
from gcrm_fast.commands.options import ServeOptions
from gcrm_fast.commands.output import Output
from gcrm_fast.commands.shared import load
from gcrm_fast.common.errors import UserError
from gcrm_fast.inference.ensembles import Ensemble, combined, load_ensemble
from gcrm_fast.inference.scoring import RewardModel as Scorer
from gcrm_fast.rlhf.trl import RewardFunction
from support import models
from support.judged import write
from support.serving import running, write_served_model
from support.training_runs import Gcrm

PROMPTS, COMPLETIONS = ["one two", "three"], [" four", " five six"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("ensemble")
    for name, changes in {"a": {}, "b": {"head": "mlp"}, "c": {"hidden_size": 16, "head_dim": 4}}.items():
        models.save(folder / name, **changes)
    return [folder / name for name in "abc"]


def expected(folders: list[Path], combine: str) -> np.ndarray:
    rewards = np.stack([RewardModel.from_pretrained(f, device="cpu").score(PROMPTS, COMPLETIONS) for f in folders])
    spread = np.sqrt(((rewards - rewards.mean(0)) ** 2).mean(0))
    return {"mean": rewards.mean(0), "min": rewards.min(0), "mean-std": rewards.mean(0) - spread}[combine]


@pytest.mark.parametrize("combine", ["mean", "min", "mean-std"])
def test_rewards_of_models_of_other_shapes_are_combined(folders: list[Path], combine: Any) -> None:
    model = load_ensemble(folders, combine, device="cpu")
    np.testing.assert_allclose(model.score(PROMPTS, COMPLETIONS), expected(folders, combine), rtol=1e-5)
    judged = model.judge(model.encode(PROMPTS, COMPLETIONS), goals_GD=model.goal()[None], per_token=True)
    own = RewardModel.from_pretrained(folders[0], device="cpu")
    for one, q in zip(judged, own.q_values(PROMPTS, COMPLETIONS), strict=True):
        assert one.rewards_n is not None
        assert one.rewards_n[-1] == pytest.approx(one.reward, rel=1e-5)
        assert one.q_Gn is not None
        np.testing.assert_allclose(one.q_Gn[0], q, rtol=1e-5)


def test_what_is_known_of_the_q_values_stays_known(folders: list[Path], tmp_path: Path) -> None:
    models.save(tmp_path / "first", verdict=models.VERDICT)
    model = load_ensemble([tmp_path / "first", folders[1]], device="cpu")
    assert model.q_notes == [f"Found by the model's training run: {models.VERDICT}"]


def test_the_spread_counts_against_a_reward() -> None:
    rewards = np.array([[1.0, 2.0], [3.0, 2.0]])
    assert combined(rewards, "mean-std").tolist() == [1.0, 2.0]
    assert combined(rewards, "min").tolist() == [1.0, 2.0]
    assert combined(rewards, "mean").tolist() == [2.0, 2.0]


def test_texts_become_tokens_once(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls, encode = [], Scorer.encode
    monkeypatch.setattr(Scorer, "encode", lambda self, *given: calls.append(self) or encode(self, *given))
    model = load_ensemble(folders, "mean", device="cpu")
    model.score(PROMPTS, COMPLETIONS)
    assert calls == [model]


def test_another_tokenizer_or_end_is_refused(folders: list[Path], tmp_path: Path) -> None:
    other = write_served_model(tmp_path / "other")
    with pytest.raises(UserError, match=r"other: the tokenizer differs from that of .*a: models of an ensemble"):
        load_ensemble([folders[0], other], device="cpu")
    ends = [RewardModel.from_pretrained(folders[0], device="cpu", end=end) for end in ("eos", "as-is")]
    with pytest.raises(UserError, match=r"model 1: the end at which rewards are read \(--end\) differs"):
        load_ensemble(ends)
    with pytest.raises(ValueError, match="needs a reward model"):
        load_ensemble([])


def test_gcrm_score_and_its_resumed_output(
    folders: list[Path], tmp_path: Path, gcrm: Gcrm, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    data = write(tmp_path / "data.jsonl", records)
    a, *others = folders
    command = [a, data, "-o", tmp_path / "out.jsonl", "--ensemble", *others, "--combine", "min"]
    with monkeypatch.context() as patch:
        patch.setattr(Output, "finish", lambda self: None)  # the partial output of another ensemble of as many stays
        assert gcrm("score", *command[:5], *others[:1] * len(others), "--combine", "min").returncode == 0
    result = gcrm("score", *command)
    assert result.returncode == 0
    assert "was made with another --ensemble: starting over" in result.stderr
    found = [json.loads(line)["reward"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(found, expected(folders, "min"), rtol=1e-5)
    result = gcrm("score", a, data, "-o", tmp_path / "x.jsonl", "--combine", "min")
    assert "--combine min: needs --ensemble" in result.stderr


def test_an_ensemble_is_served(folders: list[Path]) -> None:
    a, *others = map(str, folders)
    scorer = load(ServeOptions(model=a, ensemble=tuple(others), combine="mean-std"))
    assert isinstance(scorer, Ensemble)
    with running(scorer) as server:
        answer = server.ask("/score", {"prompts": PROMPTS, "completions": COMPLETIONS}).body
    np.testing.assert_allclose(answer["rewards"], expected(folders, "mean-std"), rtol=1e-5)


def test_an_ensemble_as_a_reward_function(folders: list[Path]) -> None:
    found = RewardFunction(folders, combine="min")(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(found, expected(folders, "min"), rtol=1e-5)


def test_a_completion_that_one_model_cannot_read_is_unfit(folders: list[Path], tmp_path: Path) -> None:
    models.save(tmp_path / "short", model_type="mistral", sliding_window=4)
    model = load_ensemble([folders[0], tmp_path / "short"], device="cpu")
    (encoded,) = model.encode(["one two three four"], [" five six seven"])
    assert "sliding window of 4" in model.unfit(encoded)
