"""Rewards inside a trainer's process: ``RewardFunction`` is what TRL's ``reward_funcs`` take.

from gcrm_fast.rlhf.trl import RewardFunction
GRPOTrainer(..., reward_funcs=RewardFunction("runs/my-run/model"))
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.data.encoding import CUT, Completion
from gcrm_fast.inference.scoring import RewardModel

Messages = Sequence[dict[str, Any]]


def as_text(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, completion: str | Messages) -> tuple[str, str]:
    """(prompt, completion) as text: strings as they stand, messages through the chat template.

    Unlike a record's, a sampled answer may be empty, or go on over several messages.

    Raises:
        UserError: a string with messages, no chat template, messages that do not suit it, or half a surrogate pair.
    """
    texts = _rendered(tokenizer, prompt, completion)
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise UserError("the text holds half of a surrogate pair: write the character whole") from None
    return texts


def _rendered(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, completion: str | Messages
) -> tuple[str, str]:
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    if isinstance(prompt, str) or isinstance(completion, str):
        raise UserError("prompt and completion must both be text, or both be lists of messages")
    if not tokenizer.chat_template:
        raise UserError("messages need a model whose tokenizer has a chat template: give text")
    try:
        before = str(tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
    except Exception as error:  # a template is a program, and may fail in any way
        raise UserError(f"messages do not suit the chat template ({one_line(error)})") from None
    if not whole.startswith(before):
        raise UserError("the answer changes how the chat template writes the prompt: it has no start")
    return before, whole[len(before) :]


class RewardFunction:
    """``f(prompts, completions, **columns) -> list[float]``, plain or conversational: a reward a completion.

    ``q_weight`` adds that many times the Q-value of the end state, its cosine to the goal state ``goal``: a second
    signal from the same forward. ``ends``: the policy's end tokens; of a trainer that hands over ``completion_ids``
    (TRL does) a completion that does not end with one was cut by its length limit and is scored as such. Without
    ``ends`` every completion counts as ended. ``name`` is what logs call it.
    """

    def __init__(
        self, model: RewardModel | str | Path, *, q_weight: float = 0.0, goal: str | None = None,
        ends: Collection[int] = (), name: str = "gcrm",
    ) -> None:  # fmt: skip
        self.model = model if isinstance(model, RewardModel) else RewardModel.from_pretrained(model)
        self.q_weight = q_weight
        self.goals_GD = self.model.goal(goal)[None] if q_weight else None
        self.ends = frozenset(ends)
        self.__name__ = name

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages],
        completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any,
    ) -> list[float]:  # fmt: skip
        """Rewards in the order of ``completions``; ``columns``, the data set's others, change nothing."""
        texts = [as_text(self.model.tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
        cuts = [False] * len(texts)
        if self.ends and completion_ids is not None:
            cuts = [bool(ids) and ids[-1] not in self.ends for ids in completion_ids]
        judged = self.model.judge(self._encode(texts, cuts), goals_GD=self.goals_GD)
        return [j.reward + (self.q_weight * float(j.q_Gn[0, -1]) if j.q_Gn is not None else 0.0) for j in judged]

    def _encode(self, texts: Sequence[tuple[str, str]], cuts: Sequence[bool]) -> list[Completion]:
        """Tokens; a cut completion that has none (a policy may write special tokens alone) is taken for ended."""
        prompts, completions = [prompt for prompt, _ in texts], [completion for _, completion in texts]
        encoded = self.model.encode(prompts, completions, cuts)
        empty = [c.ending == CUT and c.start == len(c.ids) for c in encoded]
        if any(empty):
            encoded = self.model.encode(
                prompts, completions, [cut and not e for cut, e in zip(cuts, empty, strict=True)]
            )
        return encoded
