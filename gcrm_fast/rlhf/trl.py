"""Rewards inside a trainer's process: ``RewardFunction`` is a callable for TRL's ``reward_funcs``.

from gcrm_fast.rlhf.trl import RewardFunction
GRPOTrainer(..., reward_funcs=RewardFunction("runs/my-run/model"))
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from gcrm_fast.data.chat import as_text
from gcrm_fast.data.encoding import CUT, Completion
from gcrm_fast.data.ends import Choice
from gcrm_fast.data.messages import Messages
from gcrm_fast.data.special_tokens import Reading
from gcrm_fast.inference.scoring import RewardModel


class RewardFunction:
    """``f(prompts, completions, **columns) -> list[float]``, plain or conversational: one reward per completion.

    ``q_weight`` adds that many times the Q-value of the end state, its cosine to the goal state ``goal``: a second
    signal from the same forward. ``ends``: the policy's end tokens; where the trainer passes ``completion_ids`` (TRL
    does), a completion that does not end with one was cut by its length limit and is scored as such. Without ``ends``
    every completion counts as ended. ``end`` and ``special_tokens``, of a model that is loaded: see
    ``RewardModel.from_pretrained``. ``name`` is its name in logs.
    """

    def __init__(
        self,
        model: RewardModel | str | Path,
        *,
        q_weight: float = 0.0,
        goal: str | None = None,
        ends: Collection[int] = (),
        end: Choice = "auto",
        special_tokens: Literal["auto"] | Reading = "auto",
        name: str = "gcrm",
    ) -> None:
        if not isinstance(model, RewardModel):
            model = RewardModel.from_pretrained(model, end=end, special_tokens=special_tokens)
        self.model = model
        self.q_weight = q_weight
        self.goals_GD = self.model.goal(goal)[None] if q_weight else None
        self.ends = frozenset(ends)
        self.__name__ = name

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards in the order of ``completions``. Of ``columns``, the data set's others, ``tools`` and ``system`` are
        read, one per prompt; the rest changes nothing."""
        context = [columns.get(name) or [None] * len(prompts) for name in ("tools", "system")]
        texts = [
            as_text(self.model.tokenizer, prompt, completion, tools=tools, system=system)
            for prompt, completion, tools, system in zip(prompts, completions, *context, strict=True)
        ]
        cuts = [False] * len(texts)
        if self.ends and completion_ids is not None:
            cuts = [bool(ids) and ids[-1] not in self.ends for ids in completion_ids]
        judged = self.model.judge(self._encode(texts, cuts), goals_GD=self.goals_GD)
        return [j.reward + (self.q_weight * float(j.q_Gn[0, -1]) if j.q_Gn is not None else 0.0) for j in judged]

    def _encode(self, texts: Sequence[tuple[str, str]], cuts: Sequence[bool]) -> list[Completion]:
        """Tokens; a cut completion that has none (a policy may write only special tokens) counts as ended."""
        prompts, completions = [prompt for prompt, _ in texts], [completion for _, completion in texts]
        encoded = self.model.encode(prompts, completions, cuts)
        empty = [c.ending == CUT and c.start == len(c.ids) for c in encoded]
        if any(empty):
            encoded = self.model.encode(
                prompts, completions, [cut and not e for cut, e in zip(cuts, empty, strict=True)]
            )
        return encoded
