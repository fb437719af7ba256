"""Rewards inside a trainer's process: ``RewardFunction`` is a callable for TRL's ``reward_funcs``.

from gcrm_fast.rlhf.trl import RewardFunction
GRPOTrainer(..., reward_funcs=RewardFunction("runs/my-run/model"))
GRPOTrainer(..., reward_funcs=RewardFunction(verifiers={"sums": "math"}, otherwise="runs/my-run/model"))
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.chat import as_text
from gcrm_fast.data.encoding import CUT, Completion
from gcrm_fast.data.ends import Choice
from gcrm_fast.data.messages import Messages
from gcrm_fast.data.special_tokens import Reading
from gcrm_fast.inference.ensembles import Combine, load_ensemble
from gcrm_fast.inference.scoring import RewardModel
from gcrm_fast.rlhf.hybrid import Judge, scored
from gcrm_fast.rlhf.latents import LatentReference
from gcrm_fast.rlhf.verifiers import Verifiers


class RewardFunction:
    """``f(prompts, completions, **columns) -> list[float]``, plain or conversational: one reward per completion.

    ``q_weight`` adds that many times the Q-value of the end state, its cosine to the goal state ``goal``: a second
    signal from the same forward. ``ends``: the policy's end tokens; where the trainer passes ``completion_ids`` (TRL
    does), a completion that does not end with one was cut by its length limit and is scored as such. Without ``ends``
    every completion counts as ended. ``end`` and ``special_tokens``, of a model that is loaded: see
    ``RewardModel.from_pretrained``. ``name`` is its name in logs. Several models are an ensemble, the rewards of which
    are combined by ``combine`` (see ensembles.py).

    ``distance_weight`` subtracts that many times the Mahalanobis distance of a completion's latent to those of a
    reference policy, ``latent_reference`` or its file (IBL, see latents.py). ``class_column`` names the column that
    holds the class of each prompt, where there are several references.

    With ``verifiers``, the verifier of each task (see verifiers.py), or a ``judge``, the reward is the hybrid one of
    hybrid.py, the reward model is named by ``otherwise``, and the columns that ``hybrid.scored`` names are read.
    ``parts`` holds the means of the parts of the last call, which go to TRL's log as NAME/PART.
    """

    def __init__(
        self,
        model: RewardModel | str | Path | Sequence[RewardModel | str | Path] | None = None,
        *,
        combine: Combine = "mean",
        verifiers: Mapping[str, str] | None = None,
        judge: Judge | None = None,
        otherwise: RewardModel | str | Path | None = None,
        q_weight: float = 0.0,
        goal: str | None = None,
        distance_weight: float = 0.0,
        latent_reference: LatentReference | str | Path | None = None,
        class_column: str = "",
        ends: Collection[int] = (),
        end: Choice = "auto",
        special_tokens: Literal["auto"] | Reading = "auto",
        name: str = "gcrm",
    ) -> None:
        self.hybrid = verifiers is not None or judge is not None
        if (model is not None and self.hybrid) or (otherwise is not None and not self.hybrid):
            raise TypeError("the reward model is otherwise= with verifiers or a judge, and the first argument without")
        named = otherwise if self.hybrid else model
        if named is None and not self.hybrid:
            raise TypeError("name a reward model, verifiers or a judge")
        self.verifiers, self.judge = Verifiers(verifiers or {}), judge
        self.parts: dict[str, float] = {}
        opened = None
        if named is not None:
            opened = load_ensemble(named, combine, end=end, special_tokens=special_tokens)
        self.model = opened
        self.q_weight = q_weight
        self.goals_GD = opened.goal(goal)[None] if opened is not None and q_weight else None
        if bool(distance_weight) != (latent_reference is not None) or (distance_weight and self.hybrid):
            raise TypeError("distance_weight goes with a latent_reference and a reward model alone")
        if latent_reference is not None and not isinstance(latent_reference, LatentReference):
            latent_reference = LatentReference.load(latent_reference)
        if latent_reference is not None and opened is not None:
            latent_reference.check(opened)
        self.reference, self.distance_weight, self.class_column = latent_reference, distance_weight, class_column
        self.ends = frozenset(ends)
        self.__name__ = name

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards in the order of ``completions``. Of ``columns``, the data set's others, ``tools`` and ``system`` are
        read, one per prompt, and those of a hybrid reward; the rest changes nothing."""
        cuts = self.cuts(completions, completion_ids)
        if not self.hybrid:
            return self._rewards(prompts, completions, cuts, columns)

        def rewards(own: Sequence[int], texts: Sequence[str | Messages]) -> list[float]:
            """A text that is a completion itself has its cut; references are whole."""
            context = {name: [columns[name][i] for i in own] for name in ("tools", "system") if columns.get(name)}
            own_cuts = [cuts[i] and text is completions[i] for i, text in zip(own, texts, strict=True)]
            return self._rewards([prompts[i] for i in own], texts, own_cuts, context)

        result = scored(
            prompts,
            completions,
            columns,
            verifiers=self.verifiers,
            judge=self.judge,
            rewards=rewards if self.model is not None else None,
        )
        self.parts = result.means()
        if log_metric is not None:
            for name, value in self.parts.items():
                log_metric(f"{self.__name__}/{name}", value)
        return result.scores

    def cuts(self, completions: Sequence[str | Messages], completion_ids: Sequence[Sequence[int]] | None) -> list[bool]:
        """Which completions a length limit cut."""
        if not self.ends or completion_ids is None:
            return [False] * len(completions)
        return [bool(ids) and ids[-1] not in self.ends for ids in completion_ids]

    def _rewards(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        cuts: Sequence[bool],
        columns: Mapping[str, Any],
    ) -> list[float]:
        """The reward model's."""
        assert self.model is not None
        encoded = self.encode(prompts, completions, cuts, columns)
        judged = self.model.judge(encoded, goals_GD=self.goals_GD, latents=self.reference is not None)
        rewards = [j.reward + (self.q_weight * float(j.q_Gn[0, -1]) if j.q_Gn is not None else 0.0) for j in judged]
        if self.reference is None or not judged:
            return rewards
        classes = None
        if self.class_column:
            classes = columns.get(self.class_column)
            if classes is None:
                what = f"class_column {self.class_column!r}: the trainer passes no such column"
                raise UserError(f"{what}: add it to the data, with the class of each prompt")
        latents_ND = np.stack([j.latent_D for j in judged if j.latent_D is not None])
        distance_N = self.reference.distances(latents_ND, classes)
        return [
            reward - self.distance_weight * float(distance)
            for reward, distance in zip(rewards, distance_N, strict=True)
        ]

    def encode(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        cuts: Sequence[bool],
        columns: Mapping[str, Any],
    ) -> list[Completion]:
        """Tokens for the reward model; a cut completion that has none (a policy may write only special tokens) counts
        as ended. Of ``columns``, ``tools`` and ``system`` are read."""
        assert self.model is not None
        context = [columns.get(name) or [None] * len(prompts) for name in ("tools", "system")]
        texts = [
            as_text(self.model.tokenizer, prompt, completion, tools=tools, system=system)
            for prompt, completion, tools, system in zip(prompts, completions, *context, strict=True)
        ]
        questions, answers = [prompt for prompt, _ in texts], [completion for _, completion in texts]
        encoded = self.model.encode(questions, answers, cuts)
        empty = [c.ending == CUT and c.start == len(c.ids) for c in encoded]
        if any(empty):
            encoded = self.model.encode(questions, answers, [cut and not e for cut, e in zip(cuts, empty, strict=True)])
        return encoded
