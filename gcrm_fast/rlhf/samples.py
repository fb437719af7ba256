"""Samples of a policy, judged: by the verifiers of their tasks, and by a reward model against references."""

from collections.abc import Mapping, Sequence

import numpy as np

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.samples import Samples, texts_of
from gcrm_fast.inference.scoring import RewardModel
from gcrm_fast.rlhf.hybrid import proxy
from gcrm_fast.rlhf.verifiers import Verdict, Verifiers

# ----------------------------------------------------------------------------------------------------------- verdicts


def task_of(samples: Samples, by_task: Mapping[str, str]) -> str | None:
    """The key of the record's verifier: its task, or "" for the verifier of all; None where it has none."""
    return next((task for task in (samples.task, "") if task in by_task), None)


def verdicts(samples: Samples, verifiers: Verifiers) -> list[Verdict] | None:
    """Of each completion, by the verifier of its task or else by its label; None without both."""
    task = task_of(samples, verifiers.by_task)
    if task is None:
        return [Verdict(float(one), "labeled") for one in samples.correct] if samples.correct is not None else None
    return [verifiers.check(task, samples.prompt, text, samples.reference) for text in samples.completions]


# ------------------------------------------------------------------------------------------------------------ rewards


def encode_samples(samples: Samples, model: RewardModel, *, references: bool = False) -> list[Completion]:
    """The tokens of the completions, and then of the references. Raises UserError with the record's place."""
    others = samples.references if references else []
    names = [f"completions[{i}]" for i in range(len(samples.completions))]
    names += (
        ["reference"] if others == [samples.reference] else [f"reference_completions[{i}]" for i in range(len(others))]
    )
    texts = texts_of(samples, [*samples.completions, *others], model.tokenizer)
    cuts = [*samples.cuts, *(False for _ in others)]
    tokens = model.encode([prompt for prompt, _ in texts], [text for _, text in texts], cuts)
    for name, one in zip(names, tokens, strict=True):
        if unfit := model.unfit(one):
            raise UserError(f"{samples.where}: field '{name}' {unfit}")
    return tokens


def rewards_of(window: Sequence[Samples], model: RewardModel) -> list[tuple[list[float], list[float]]]:
    """For each record the rewards of its completions, and of its references."""
    tokens = [encode_samples(samples, model, references=True) for samples in window]
    judged = iter(model.judge([one for own in tokens for one in own]))
    found = []
    for samples, own in zip(window, tokens, strict=True):
        rewards = [next(judged).reward for _ in own]
        count = len(samples.completions)
        found.append((rewards[:count], rewards[count:]))
    return found


def against(rewards: Sequence[float], references: Sequence[float]) -> tuple[float, float]:
    """Mean over the completions of r(y) - r(reference), and of its sigmoid; of several references the best counts."""
    best = max(references)
    return float(np.mean(rewards)) - best, float(np.mean([proxy(reward, best) for reward in rewards]))
