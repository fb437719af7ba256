"""The hybrid reward: a task's verifier where it has one, elsewhere a score against a reference; all in [0, 1].

After "Exploring Data Scaling Trends and Effects in RLHF" (arXiv 2503.22230): the verifier of the prompt's task, where
it has one; elsewhere a judge (GenRM) compares the response with a reference, or the reward model stands in for it with
sigmoid(r(response) - r(reference)), which its logs call a proxy. Rewards of different prompts are not comparable, but
these are: 0.5 is parity with the reference.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from gcrm_fast.common.errors import UserError, printable
from gcrm_fast.common.notes import warn_once
from gcrm_fast.data.messages import Messages
from gcrm_fast.rlhf.verifiers import QUOTED, Verifiers, plain

Text = str | Messages
CONTEXT = ("tools", "system")  # columns that a reward depends on too


class Judge(Protocol):
    """Compares responses with references."""

    def scores(self, prompts: Sequence[Text], completions: Sequence[Text], references: Sequence[Text]) -> list[float]:
        """For each completion from 0 to 1; 0.5 is as good as the reference."""
        ...


class Scored(NamedTuple):
    """Scores in [0, 1], and for each completion the values that its score was made of, by their names."""

    scores: list[float]
    parts: list[dict[str, float]]

    def means(self) -> dict[str, float]:
        """The mean of each part over the completions that have it."""
        names = dict.fromkeys(name for part in self.parts for name in part)
        values = {name: [part[name] for part in self.parts if name in part] for name in names}
        return {name: sum(own) / len(own) for name, own in values.items()}


Rewards = Callable[[Sequence[int], Sequence[Text]], list[float]]  # of texts that answer the prompts of these numbers


def proxy(reward: float, reference: float) -> float:
    """sigmoid(reward - reference): the chance, to a Bradley-Terry model, that a response is better than a reference."""
    difference = reward - reference
    # The exponent is never positive, so it cannot overflow.
    return 1 / (1 + math.exp(-difference)) if difference >= 0 else 1 - 1 / (1 + math.exp(difference))


def scored(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Any],
    *,
    verifiers: Verifiers,
    judge: Judge | None,
    rewards: Rewards | None,
) -> Scored:
    """The hybrid reward of completions, one per prompt.

    Of ``columns``, which have an entry per prompt, are read: ``task``; ``reference``, the right answer of a task with a
    verifier, elsewhere a response to compare with; ``reference_completions``, responses of which the one with the
    greatest reward is the reference, where ``reference`` is null. ``rewards``: the reward model's. A warning names each
    task without verifier, which may be a mistyped one, where there are verifiers.

    Raises:
        UserError: a prompt without verifier and reference; no reward model or judge where one is needed.
    """
    tasks, references, choices = (
        columns.get(name) or [None] * len(prompts) for name in ("task", "reference", "reference_completions")
    )
    scores: list[float] = [0.0] * len(prompts)
    parts: list[dict[str, float]] = [{} for _ in prompts]
    others: list[int] = []
    for i, (prompt, task, reference) in enumerate(zip(prompts, tasks, references, strict=True)):
        if task in verifiers:
            verdict = verifiers.check(task, prompt, completions[i], reference)
            scores[i] = verdict.score
            flags = {kind: float(verdict.kind == kind) for kind in ("unreadable", "failed")}
            parts[i] = {f"verifier_{task}": verdict.score, **flags}
        else:
            others.append(i)
    if not others:
        return Scored(scores, parts)
    for task in dict.fromkeys(task for i in others if (task := tasks[i]) and isinstance(task, str)):
        if known := ", ".join(filter(None, verifiers.by_task)):
            what = "its responses are compared with references"
            warn_once(printable(f"the task {task!r} has no verifier, unlike {known}: {what}: check the name"))
    # A reference's reward depends on the whole question, so equal ones count once only where all of it is equal.
    context = [columns.get(name) or [None] * len(prompts) for name in CONTEXT]
    asked = [repr(one) for one in zip(prompts, *context, strict=True)]
    found = _references(others, prompts, asked, tasks, references, choices, rewards)
    if judge is not None:
        own = judge.scores([prompts[i] for i in others], [completions[i] for i in others], [found[i] for i in others])
        of_others = [{"judge": score} for score in own]
    elif rewards is not None:
        distinct = {(asked[i], repr(found[i])): i for i in others}
        texts = [completions[i] for i in others] + [found[i] for i in distinct.values()]
        both = rewards([*others, *distinct.values()], texts)
        of_reference = dict(zip(distinct, both[len(others) :], strict=True))
        pairs = [(reward, of_reference[asked[i], repr(found[i])]) for i, reward in zip(others, both, strict=False)]
        own = [proxy(*pair) for pair in pairs]
        of_others = [
            {"proxy": score, "reward": reward, "reference_reward": reference}
            for score, (reward, reference) in zip(own, pairs, strict=True)
        ]
    else:
        named = f"the task {tasks[others[0]]!r}" if tasks[others[0]] else "a prompt without a task"
        raise UserError(f"{named} has no verifier: pass one, or a reward model as otherwise=, or a judge")
    for i, score, part in zip(others, own, of_others, strict=True):
        scores[i], parts[i] = score, part
    return Scored(scores, parts)


def _references(
    others: Sequence[int],
    prompts: Sequence[Text],
    asked: Sequence[str],
    tasks: Sequence[Any],
    references: Sequence[Text | None],
    choices: Sequence[Sequence[Text] | None],
    rewards: Rewards | None,
) -> dict[int, Text]:
    """The response that each of ``others`` is compared with; ``asked``: the prompts with their context."""
    found: dict[int, Text] = {i: reference for i in others if (reference := references[i]) is not None}
    groups: dict[tuple[str, str], list[int]] = {}
    for i in others:
        if i in found:
            continue
        if not choices[i]:
            start = plain(prompts[i])[:QUOTED]
            of = f"its task {tasks[i]!r}" if tasks[i] else "its task"
            raise UserError(f"the prompt {start!r} has no verifier of {of} and no reference: add one to its record")
        groups.setdefault((asked[i], repr(choices[i])), []).append(i)
    if groups and rewards is None:
        raise UserError("the best of reference_completions is not known without a reward model: pass one as otherwise=")
    for same in groups.values():
        own = list(choices[same[0]] or ())
        assert rewards is not None
        best = max(zip(rewards([same[0]] * len(own), own), range(len(own)), strict=True), key=lambda pair: pair[0])[1]
        found |= dict.fromkeys(same, own[best])
    return found
