"""Several reward models of one tokenizer as one: texts become tokens once, and the rewards of all are combined.

Letters: M models, n tokens of a completion.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.encoding import Completion
from gcrm_fast.inference.scoring import Judged, RewardModel

Combine = Literal["mean", "min", "mean-std"]


def combined(rewards_M: np.ndarray, how: Combine) -> np.ndarray:
    """Of rewards [M, ...] their mean, the lowest, or the mean less the standard deviation over models (Coste et al.,
    arXiv 2310.02743, section 3, which subtracts a multiple of the variance)."""
    rewards_M = rewards_M.astype(np.float64)
    if how == "min":
        return rewards_M.min(0)
    return rewards_M.mean(0) - (rewards_M.std(0) if how == "mean-std" else 0.0)


class Ensemble(RewardModel):
    """A reward model with ``others``: rewards are those of all, combined; Q-values, goals, states and latents
    are its own."""

    others: Sequence[RewardModel] = ()
    combine: Combine = "mean"

    def unfit(self, completion: Completion) -> str:
        return super().unfit(completion) or next(filter(None, (other.unfit(completion) for other in self.others)), "")

    def judge(
        self,
        encoded: Sequence[Completion],
        *,
        goals_GD: Tensor | None = None,
        latents: bool = False,
        **options: Any,
    ) -> list[Judged]:
        judged = [super().judge(encoded, goals_GD=goals_GD, latents=latents, **options)]
        judged += [other.judge(encoded, **options) for other in self.others]
        result = []
        for own in zip(*judged, strict=True):
            reward = float(combined(np.array([one.reward for one in own]), self.combine))
            per_token_Mn = [one.rewards_n for one in own if one.rewards_n is not None]
            rewards_n = combined(np.stack(per_token_Mn), self.combine).astype(np.float32) if per_token_Mn else None
            result.append(Judged(reward, rewards_n, own[0].q_Gn, own[0].latent_D))
        return result


def joined(models: Sequence[RewardModel], names: Sequence[str], combine: Combine) -> RewardModel:
    """The models as one; a single one unchanged. ``names`` are for error messages.

    Raises:
        UserError: another tokenizer than the first model's, or another place where rewards are read.
    """
    first, *others = models
    if not others:
        return first
    facts = _reading(first)
    for name, other in zip(names[1:], others, strict=True):
        for what, value in _reading(other).items():
            if value != facts[what]:
                raise UserError(f"{name}: {what} differs from that of {names[0]}: models of an ensemble must share it")
    ensemble = Ensemble(
        first.network,
        first.tokenizer,
        first.device,
        first.fingerprint,
        first.goals,
        first.budget.tokens,
        first.end,
        first.q_verdict,
    )
    ensemble.others, ensemble.combine = others, combine
    return ensemble


def _reading(model: RewardModel) -> dict[str, Any]:
    """What decides which tokens are scored, and where."""
    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "the tokenizer": backend.to_str() if backend is not None else tokenizer.get_vocab(),
        "the chat template": tokenizer.chat_template,
        "the end at which rewards are read (--end)": model.end,
        "how special tokens are read (--special-tokens)": tokenizer.split_special_tokens,
    }


def load_ensemble(
    models: RewardModel | str | Path | Sequence[RewardModel | str | Path], combine: Combine = "mean", **options: Any
) -> RewardModel:
    """One reward model, or several as one. ``options``: of ``RewardModel.from_pretrained``, for those that are loaded.

    Raises:
        UserError: see ``RewardModel.from_pretrained`` and ``joined``.
        ValueError: no model.
    """
    members = [models] if isinstance(models, (RewardModel, str, Path)) else list(models)
    if not members:
        raise ValueError("an ensemble needs a reward model")
    opened = [m if isinstance(m, RewardModel) else RewardModel.from_pretrained(m, **options) for m in members]
    names = [f"model {i}" if isinstance(m, RewardModel) else str(m) for i, m in enumerate(members)]
    return joined(opened, names, combine)
