"""The detectors of ``gcrm monitor`` while TRL trains: a reward function that is also a callback of the trainer.

reward = MonitoredReward(RewardFunction("runs/my-run/model"), (prompts, completions), every=20, stop=True)
GRPOTrainer(..., reward_funcs=reward, callbacks=[reward])
"""

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.notes import warn_once
from gcrm_fast.data.encoding import CUT, Completion
from gcrm_fast.data.messages import Messages
from gcrm_fast.evaluation.detectors import NEIGHBORS, STOP, Reference, early_stop, parts_of
from gcrm_fast.rlhf.trl import RewardFunction

STATE_FILE = "gcrm_monitor.json"  # in the trainer's checkpoints

Texts = Sequence[str | Messages]


class MonitoredReward(TrainerCallback):
    """``reward``, which also logs how far the policy's samples are from those of a reference policy (InfoRM, arXiv
    2402.09345 and 2510.13694): CSI per sample, the share in no cluster, the share of outliers (MOP), the mean
    Mahalanobis distance, and the early-stop indicator.

    They are measured every ``every`` steps on the last ``samples`` completions per process that no length limit cut, of
    all processes together, and go to TRL's log as NAME/csi_per_sample, ... With ``stop`` training ends where the
    early-stop indicator exceeds STOP. Samples of evaluations do not count.

    Attributes:
        null: what the detectors say of one part of the reference against another, by name.
        history: the measurements so far, with their ``step``; a trainer that resumes continues it.
    """

    def __init__(
        self,
        reward: RewardFunction,
        reference: tuple[Texts, Texts],
        *,
        every: int = 20,
        samples: int = 256,
        stop: bool = False,
    ) -> None:
        """``reference``: prompts and completions of the policy before training, of different prompts.

        Raises:
            TypeError: a reward without a reward model.
            UserError: not one completion per prompt, or too few, see detectors.Reference.
        """
        if reward.model is None:
            raise TypeError("the detectors need a reward model: pass otherwise= to the RewardFunction")
        self.reward, self.model, self.every, self.stop = reward, reward.model, every, stop
        prompts, completions = reference
        if len(prompts) != len(completions):
            given = f"prompts: {len(prompts)}, completions: {len(completions)}"
            raise UserError(f"reference: {given}: give one completion per prompt")
        encoded = reward.encode(prompts, completions, [False] * len(prompts), {})
        parts_N = parts_of([str(prompt) for prompt in prompts])
        self.reference = Reference.of(self.model.latents(encoded).astype(np.float64), parts_N, "reference")
        if self.reference.warning:
            warn_once(self.reference.warning)
        self.null = self.reference.null.measures()
        self.history: list[dict[str, float]] = []
        self.recent: deque[Completion] = deque(maxlen=samples)
        self.step, self.attached, self.called, self.training = 0, False, False, False
        self.__name__ = reward.__name__

    def __call__(
        self,
        prompts: Texts,
        completions: Texts,
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """The rewards, see RewardFunction. Raises TypeError where the trainer does not have this as a callback."""
        if not self.attached:
            raise TypeError("pass the MonitoredReward to the trainer's callbacks= too")
        self.called = True
        if self.training:
            cuts = self.reward.cuts(completions, completion_ids)
            encoded = self.reward.encode(prompts, completions, cuts, columns)
            self.recent.extend(one for one in encoded if one.ending != CUT and not self.model.unfit(one))
            last = int(self.history[-1]["step"]) if self.history else 0
            if self.step - last >= self.every:
                self._measure(log_metric)
        return self.reward(prompts, completions, completion_ids, log_metric, **columns)

    def _measure(self, log_metric: Callable[[str, float], None] | None) -> None:
        """Adds to the history; nothing with too few samples. Every process must call it."""
        width = self.reference.fitted_ND.shape[1]
        own_ND = self.model.latents(list(self.recent)).astype(np.float64) if self.recent else np.empty((0, width))
        parts = [own_ND]
        if dist.is_initialized():
            parts = [own_ND] * dist.get_world_size()
            dist.all_gather_object(parts, own_ND)
        latents_ND = np.concatenate(parts)
        if len(latents_ND) <= NEIGHBORS:
            return
        finding = self.reference.find(latents_ND)
        csi = [*(row["csi_per_sample"] for row in self.history), finding.clusters.csi]
        values = finding.measures() | {"early_stop": early_stop(csi)[-1]}
        self.history.append({"step": self.step, **values})
        if log_metric is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    log_metric(f"{self.__name__}/{name}", value)

    # --------------------------------------------------------------------------------------------------- the callback

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.attached = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = _state_file(args, state)
        if state.global_step and path.exists():
            self.history = json.loads(path.read_text())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step, self.training = state.global_step, True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises UserError where the trainer does not have this as its reward function."""
        self.training = False
        if not self.called:
            raise UserError("the MonitoredReward has seen no samples: pass it to the trainer's reward_funcs= too")
        if self.stop and self.history and self.history[-1]["early_stop"] > STOP:
            control.should_training_stop = True
            if state.is_world_process_zero:
                step, indicator = self.history[-1]["step"], self.history[-1]["early_stop"]
                warn_once(f"CSI jumps at step {step} (early-stop indicator {indicator:.3g}, above {STOP:g}): stopped")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _state_file(args, state).write_text(json.dumps(self.history))


def _state_file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / STATE_FILE
