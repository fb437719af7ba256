"""The hybrid reward: verifiers where a task has one, the reward model against a reference elsewhere."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from gcrm_fast import RewardModel
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.notes import warn_once
from gcrm_fast.rlhf.hybrid import proxy
from gcrm_fast.rlhf.trl import RewardFunction
from support.chat import CHATML
from support.models import save
from support.policies import BRIEF_GRPO
from support.policies import save as save_policy

PROMPTS = ["one?", "two?", "two?", "three?"]
COMPLETIONS = [" so #### 4", " five, six", " seven", " #### 5"]
COLUMNS: dict[str, list[Any]] = {
    "task": ["sums", None, "talk", "sums"],
    "reference": ["4", " four", " four", "4"],
}
VERIFIERS = {"sums": r"regex:#### (\d+)"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    folder = tmp_path_factory.mktemp("rewards") / "model"
    save(folder)
    return RewardModel.from_pretrained(folder)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_each_prompt_gets_the_score_of_its_task(model: RewardModel) -> None:
    reward = RewardFunction(verifiers=VERIFIERS, otherwise=model)
    logged: dict[str, float] = {}
    found = reward(PROMPTS, COMPLETIONS, log_metric=logged.__setitem__, **COLUMNS)
    own, reference = model.score("two?", COMPLETIONS[1:3]), model.score("two?", " four")
    expected = [1.0, sigmoid(own[0] - reference), sigmoid(own[1] - reference), 0.0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert logged == {f"gcrm/{name}": pytest.approx(value, rel=1e-5) for name, value in reward.parts.items()}
    assert reward.parts == {
        "verifier_sums": 0.5,
        "unreadable": 0.0,
        "failed": 0.0,
        "reward": pytest.approx(own.mean(), rel=1e-5),
        "reference_reward": pytest.approx(reference, rel=1e-5),
        "proxy": pytest.approx(np.mean(expected[1:3]), rel=1e-5),
    }


def test_the_best_of_several_responses_is_the_reference(model: RewardModel) -> None:
    choices = [" four", " six", " one, two"]
    reward = RewardFunction(verifiers={}, otherwise=model)
    [found] = reward(["two?"], [" seven"], reference=[None], reference_completions=[choices])
    best = max(model.score("two?", choices))
    assert found == pytest.approx(sigmoid(model.score("two?", " seven") - best), rel=1e-5)


@pytest.mark.parametrize(
    "others", [{"reference": ["seven"] * 2}, {"reference_completions": [["seven", "one two", "three four"]] * 2}]
)
def test_one_question_with_two_system_messages_is_two(
    others: dict[str, Any], model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", CHATML)
    reward = RewardFunction(verifiers={}, otherwise=model)
    asked, answers = [[{"role": "user", "content": "one?"}]] * 2, [[{"role": "assistant", "content": "three"}]] * 2
    columns = others | {"system": ["one one one", "five, six; seven"]}
    alone = [
        reward(asked[:1], answers[:1], **{name: values[i : i + 1] for name, values in columns.items()})[0]
        for i in range(2)
    ]
    assert reward(asked, answers, **columns) == pytest.approx(alone, rel=1e-5)
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)


def test_a_cut_completion_is_scored_as_such_and_its_reference_is_not(model: RewardModel) -> None:
    reward = RewardFunction(verifiers={}, otherwise=model, ends=[1])
    text = " seven"
    [found] = reward(["two?"], [text], completion_ids=[[9]], reference=[" four"])
    [cut] = model.judge(model.encode(["two?"], [text], [True]))
    assert found == pytest.approx(sigmoid(cut.reward - model.score("two?", " four")), rel=1e-5)
    assert found != pytest.approx(sigmoid(model.score("two?", text) - model.score("two?", " four")), rel=1e-3)


def test_a_task_without_reward_model(model: RewardModel) -> None:
    reward = RewardFunction(verifiers=VERIFIERS)
    assert reward(PROMPTS[:1], COMPLETIONS[:1], task=["sums"], reference=["4"]) == [1.0]
    with pytest.raises(UserError, match="the task 'talk' has no verifier: pass one, or a reward model as otherwise="):
        reward(["x"], ["y"], task=["talk"], reference=["z"])
    with pytest.raises(UserError, match="pass one as otherwise="):
        reward(["x"], ["y"], reference_completions=[["z", "w"]])
    with pytest.raises(UserError, match=r"the prompt 'x' has no verifier of its task 'talk' and no reference"):
        RewardFunction(verifiers=VERIFIERS, otherwise=model)(["x"], ["y"], task=["talk"])
    with pytest.raises(UserError, match=r"the prompt 'x' has no verifier of its task and no reference"):
        RewardFunction(verifiers=VERIFIERS, otherwise=model)(["x"], ["y"])


def test_a_task_without_verifier_is_named_once(model: RewardModel, capsys: pytest.CaptureFixture[str]) -> None:
    warn_once.cache_clear()
    reward = RewardFunction(verifiers=VERIFIERS | {"more": "arithmetic"}, otherwise=model)
    for _ in range(2):
        reward(PROMPTS, COMPLETIONS, task=["sums", None, "sum", "sum"], reference=["4"] * 4)
    line = (
        "gcrm: warning: the task 'sum' has no verifier, unlike sums, more: its responses are compared with references: "
    )
    assert capsys.readouterr().err == line + "check the name\n"
    RewardFunction(verifiers={}, otherwise=model)(PROMPTS[:1], COMPLETIONS[:1], task=["other"], reference=["4"])
    assert capsys.readouterr().err == ""


def test_the_reward_model_is_named_once(model: RewardModel) -> None:
    for wrong in ({"model": model, "verifiers": VERIFIERS}, {"otherwise": model}, {}):
        with pytest.raises(TypeError, match="reward model"):
            RewardFunction(**wrong)


def test_the_proxy_does_not_overflow() -> None:
    assert [proxy(1e6, 0.0), proxy(0.0, 1e6), proxy(3.0, 3.0)] == [1.0, 0.0, 0.5]
    assert proxy(2.0, 3.5) + proxy(3.5, 2.0) == pytest.approx(1.0, abs=1e-15)


class Fixed:
    """A judge that is asked for what it should be."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    def scores(self, prompts: Sequence[Any], completions: Sequence[Any], references: Sequence[Any]) -> list[float]:
        self.asked += zip(prompts, completions, references, strict=True)
        return [0.75] * len(prompts)


def test_a_judge_stands_in_for_the_proxy() -> None:
    judge = Fixed()
    reward = RewardFunction(verifiers=VERIFIERS, judge=judge)
    assert reward(PROMPTS, COMPLETIONS, **COLUMNS) == [1.0, 0.75, 0.75, 0.0]
    assert judge.asked == [("two?", " five, six", " four"), ("two?", " seven", " four")]
    assert reward.parts["judge"] == 0.75
    assert "proxy" not in reward.parts


@pytest.mark.slow
def test_trl_passes_the_columns_and_logs_the_parts(model: RewardModel, tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    policy = AutoModelForCausalLM.from_pretrained(save_policy(tmp_path / "policy", num_hidden_layers=1))
    records = [
        {"prompt": "one?", "task": "sums", "reference": "4", "reference_completions": None},
        {"prompt": "two?", "task": None, "reference": None, "reference_completions": [" four", " six"]},
    ]
    small = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2}
    arguments = GRPOConfig(output_dir=str(tmp_path / "out"), **small, **BRIEF_GRPO)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=RewardFunction(verifiers=VERIFIERS, otherwise=model),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=model.tokenizer,
    )
    trainer.train()
    row = trainer.state.log_history[0]
    parts = ("verifier_sums", "unreadable", "failed", "proxy", "reward", "reference_reward")
    assert {f"gcrm/{part}" for part in parts} <= row.keys()
    assert row["rewards/gcrm/mean"] == pytest.approx((row["gcrm/verifier_sums"] + row["gcrm/proxy"]) / 2, rel=1e-4)
