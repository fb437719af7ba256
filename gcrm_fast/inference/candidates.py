"""Completions of records through a reward model: tokens, why some cannot be scored, rewards and Q-values."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.records import Candidate
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.inference.scoring import RewardModel


class Judgement(NamedTuple):
    """A completion's tokens, and the rewards and Q-values [n] float32 at each of those after the prompt."""

    tokens: Completion
    reward_n: np.ndarray
    q_n: np.ndarray


def fit(found: Iterator[list[Candidate]], model: RewardModel, bad: BadRecords) -> Iterator[list[Candidate]]:
    """The records. Where bad ones are skipped, so is a record with a completion that the model cannot score; elsewhere
    scoring raises the error, before it starts."""
    for record in found:
        if bad.skip and (wrong := unfit(record, encoded(record, model), model)):
            bad.add(UserError(wrong))
        else:
            yield record


def encoded(found: Sequence[Candidate], model: RewardModel) -> list[Completion]:
    """Their tokens."""
    return model.encode([c.prompt for c in found], [c.completion for c in found], [c.cut for c in found])


def unfit(record: Sequence[Candidate], tokens: Sequence[Completion], model: RewardModel) -> str:
    """Why the first completion that cannot be scored cannot; "" where all can."""
    wrong = (f"{c.label} {why}" for c, t in zip(record, tokens, strict=True) if (why := model.unfit(t)))
    return next(wrong, "")


def judge(model: RewardModel, candidates: Sequence[Candidate], goal_D: Tensor) -> list[Judgement]:
    """Rewards and Q-values at every token of every completion."""
    completions = encoded(candidates, model)
    names = [c.label for c in candidates]
    judged = model.judge(completions, goals_GD=goal_D[None], per_token=True, names=names, progress=True)
    return [
        Judgement(tokens, scores.rewards_n, scores.q_Gn[0])
        for tokens, scores in zip(completions, judged, strict=True)
        if scores.rewards_n is not None and scores.q_Gn is not None  # both were asked for
    ]
