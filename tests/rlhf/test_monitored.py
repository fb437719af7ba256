"""The detectors while a policy is trained: as a callback of transformers, and with TRL itself."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch.distributed as dist
from transformers import LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments

from gcrm_fast import RewardModel
from gcrm_fast.common.errors import UserError
from gcrm_fast.evaluation.detectors import Reference, parts_of
from gcrm_fast.rlhf import monitored
from gcrm_fast.rlhf.monitored import MonitoredReward
from gcrm_fast.rlhf.trl import RewardFunction
from support import models, policies

SIZE, EOS = 3, 1
PROMPTS = [f"{text} {i}" for i, text in enumerate(models.texts(80, 8, seed=1)[1])]
COMPLETIONS = models.texts(80, 8)[1]
ASKED = ["one", "two", "three"] * 3
ANSWERS = [" one", " two three", " seven seven", " 1", " four", " six; two", " two", " 2", " three"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    folder = tmp_path_factory.mktemp("monitored") / "m"
    models.save(folder, head="bottleneck", bottleneck_size=SIZE)
    return RewardModel.from_pretrained(folder, device="cpu")


class Training:
    """What a trainer calls, without one."""

    def __init__(self, reward: MonitoredReward, folder: Path, step: int = 0) -> None:
        self.reward, self.logged = reward, list[tuple[str, float]]()
        self.args, self.control = TrainingArguments(output_dir=str(folder), use_cpu=True), TrainerControl()
        self.state = TrainerState(global_step=step)
        for event in ("on_init_end", "on_train_begin"):
            self.call(event)

    def call(self, event: str) -> None:
        getattr(self.reward, event)(self.args, self.state, self.control)

    def ask(self, answers: list[str], cut: bool = False) -> list[float]:
        ids = [[5] if cut else [5, EOS]] * len(answers)
        return self.reward(
            prompts=ASKED,
            completions=answers,
            completion_ids=ids,
            trainer_state=self.state,
            log_metric=lambda name, value: self.logged.append((name, value)),
        )

    def one_step(self, answers: list[str], cut: bool = False) -> None:
        self.call("on_step_begin")
        self.ask(answers, cut)
        self.state.global_step += 1
        self.call("on_step_end")


def monitored_reward(model: RewardModel, **options: Any) -> MonitoredReward:
    return MonitoredReward(RewardFunction(model, ends=[EOS]), (PROMPTS, COMPLETIONS), **{"every": 2, **options})


def expected(model: RewardModel, answers: list[str]) -> dict[str, float]:
    def latents(prompts: list[str], completions: list[str]) -> np.ndarray:
        return model.latents(model.encode(prompts, completions)).astype(np.float64)

    reference = Reference.of(latents(PROMPTS, COMPLETIONS), parts_of(PROMPTS), "reference")
    return reference.find(latents(ASKED, answers)).measures()


def test_the_protocol_of_a_callback(model: RewardModel, tmp_path: Path) -> None:
    """Measured before steps 2 and 4 on the last samples; neither evaluations nor cut completions count."""
    reward = monitored_reward(model, samples=len(ANSWERS))
    run = Training(reward, tmp_path)
    np.testing.assert_allclose(run.ask([" seven"] * 9), model.score(ASKED, [" seven"] * 9), rtol=1e-5)
    for _ in range(2):
        run.one_step(ANSWERS)
    run.ask([" seven"] * 9)  # an evaluation
    assert not reward.history
    run.one_step([" seven"] * 9, cut=True)
    run.one_step(ANSWERS[::-1])
    run.one_step(ANSWERS[::-1])
    assert [row["step"] for row in reward.history] == [2, 4]
    for row, answers in zip(reward.history, (ANSWERS, ANSWERS[::-1]), strict=True):
        found = {name: row[name] for name in expected(model, answers)}
        assert found == pytest.approx(expected(model, answers), rel=1e-5)
    names = ("csi_per_sample", "noise", "outliers", "mahalanobis")
    assert [name for name, _ in run.logged] == [f"gcrm/{name}" for name in names] * 2
    assert reward.null.keys() == set(names)


def test_it_stops_where_csi_jumps(model: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitored, "early_stop", lambda csi: [9.0, 9.0, 11.0][: len(csi)])
    for stop in (True, False):
        run = Training(monitored_reward(model, every=1, stop=stop), tmp_path)
        stopped = []
        for _ in range(4):
            run.one_step(ANSWERS)
            stopped.append(run.control.should_training_stop)
        assert stopped == [False, False, False, stop]
        assert ("gcrm/early_stop", 11.0) in run.logged


def test_earlier_csi_counts_in_a_resumed_run(model: RewardModel, tmp_path: Path) -> None:
    first = Training(monitored_reward(model), tmp_path)
    for _ in range(3):
        first.one_step(ANSWERS)
    (tmp_path / "checkpoint-3").mkdir()
    first.call("on_save")
    resumed = Training(monitored_reward(model), tmp_path, step=3)
    resumed.one_step(ANSWERS)
    resumed.one_step([" seven"] * 9)
    assert [row["step"] for row in resumed.reward.history] == [2, 4]
    assert resumed.reward.history[0] == pytest.approx(first.reward.history[0], nan_ok=True)


def test_samples_of_all_processes_count(model: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training(monitored_reward(model, samples=len(ANSWERS)), tmp_path)
    elsewhere = model.latents(model.encode(ASKED, [" seven"] * 9)).astype(np.float64)

    def gathered(parts: list[np.ndarray], own: np.ndarray) -> None:
        parts[:] = [own, elsewhere]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    for _ in range(3):
        run.one_step(ANSWERS)
    here = model.latents(model.encode(ASKED, ANSWERS)).astype(np.float64)
    finding = run.reward.reference.find(np.concatenate([here, elsewhere])).measures()
    assert run.reward.history[0] == pytest.approx({"step": 2, "early_stop": np.nan, **finding}, rel=1e-5, nan_ok=True)


def test_half_a_setup_is_said(model: RewardModel, tmp_path: Path) -> None:
    reward = monitored_reward(model)
    with pytest.raises(TypeError, match="callbacks= too"):
        reward(ASKED, ANSWERS)
    run = Training(reward, tmp_path)
    run.call("on_step_begin")
    with pytest.raises(UserError, match="reward_funcs= too"):
        run.call("on_step_end")
    with pytest.raises(TypeError, match="need a reward model"):
        MonitoredReward(RewardFunction(verifiers={"": "arithmetic"}), (PROMPTS, COMPLETIONS))
    with pytest.raises(UserError, match="reference: 4 completions for latents of width 3"):
        MonitoredReward(RewardFunction(model), (PROMPTS[:4], COMPLETIONS[:4]))
    with pytest.raises(UserError, match="reference: prompts: 80, completions: 5: give one completion per prompt"):
        MonitoredReward(RewardFunction(model), (PROMPTS, COMPLETIONS[:5]))


def test_trl_logs_the_detectors_and_stops(model: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl", reason="pip install 'gcrm-fast[trl]'")
    monkeypatch.setattr(monitored, "early_stop", lambda csi: [9.0, 11.0][: len(csi)])
    reward: Any = MonitoredReward(RewardFunction(model), (PROMPTS, COMPLETIONS), every=1, stop=True)
    policy = LlamaForCausalLM.from_pretrained(policies.save(tmp_path / "policy", num_hidden_layers=1))
    small = {"max_steps": 6, "per_device_train_batch_size": 8, "num_generations": 4}
    options = trl.GRPOConfig(output_dir=str(tmp_path / "out"), **small, **policies.BRIEF_GRPO)
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=reward,
        args=options,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["one", "two"]}),
        processing_class=model.tokenizer,
        callbacks=[reward],
    )
    trainer.train()
    assert trainer.state.global_step == 3
    logged = [row["gcrm/csi_per_sample"] for row in trainer.state.log_history if "gcrm/csi_per_sample" in row]
    assert logged == pytest.approx([row["csi_per_sample"] for row in reward.history], rel=1e-5)
    assert len(logged) == 2
