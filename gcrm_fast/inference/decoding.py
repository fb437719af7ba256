"""Text that a reward model chooses or steers: best-of-n, live filter, rejection by halves, step beams.

    sample      n samples; with a reward model also their rewards and Q-values
    best-of-n   the sample with the greatest reward
    filter      a sample is dropped once a Q-value falls below the threshold, the first 5 tokens aside; if all fall, the
                one with the best lowest Q continues (GCRM, section 4.2)
    reject      at each checkpoint the half with the lower Q is dropped (Speculative Rejection, arXiv 2410.20290)
    beams       after each step the beams with the best log p / tokens + alpha Q continue (GCRM, section 4.3)

The final choice is by reward among the texts that ended by themselves, as rewards are trained at end tokens alone; of
beams by their score. Letters: n tokens of a text, m new ones.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.messages import Messages
from gcrm_fast.data.records import placed
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.inference.generation import ROWS, Group, Policy, Row, Sampling, Writer
from gcrm_fast.inference.judging import Goals, Judge, Judged, Reading, goals_of
from gcrm_fast.inference.methods import RIVALS, Method, Rivals
from gcrm_fast.inference.scoring import RewardModel


@dataclass(frozen=True, kw_only=True)
class Text:
    """One sample of a prompt. ``ending``: "stop" by itself, "length" by a limit, or "dropped". ``parent``: the number
    of the sample from which a beam forked, and its tokens at that time. ``log_p``: of the policy at temperature 1.
    ``q_n``: the Q-value of each token of ``texts_n``, which are the reward model's. ``reward``: None where none was
    read."""

    number: int
    ids: tuple[int, ...]
    text: str
    ending: str
    parent: tuple[int, int] | None
    log_p: float
    texts_n: tuple[str, ...]
    q_n: tuple[float, ...]
    reward: float | None


@dataclass(frozen=True, kw_only=True)
class Update:
    """News of a sample, for a display: new text, new Q-values, and whether it is dropped. ``policy_tokens``: written so
    far for all samples of the prompt."""

    prompt: int
    number: int
    text: str
    q_m: tuple[float, ...]
    dropped: bool
    policy_tokens: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished prompt: its samples, and which is the answer. Tokens that the policy wrote and that the reward model
    read, prompts included; an estimate of those saved, if the dropped samples had become as long as the others on
    average (0 of beams, which fork into the places of those that they drop); seconds from the prompt's start."""

    prompt: int
    chosen: int
    texts: tuple[Text, ...]
    policy_tokens: int
    reward_tokens: int
    saved_tokens: int
    seconds: float

    @property
    def text(self) -> str:
        return self.texts[self.chosen].text


@dataclass(eq=False, kw_only=True)
class _State:
    """A prompt while it is written."""

    index: int
    reading: Reading | None  # the prompt, as the reward model reads it
    group: Group
    rivals: Rivals
    opened: Judged | None = None  # the same, once it is computed
    started: float = 0.0
    policy_tokens: int = 0
    reward_tokens: int = 0
    shown: dict[int, tuple[int, int, bool]] = field(default_factory=dict)  # characters, Q-values, dropped: by number


def decode(
    policy: Policy,
    prompts: Iterable[str | Messages],
    *,
    reward: RewardModel | None = None,
    method: Method | None = None,
    sampling: Sampling | None = None,
    goals: Goals | None = None,
    rows: int = ROWS,
    names: Sequence[str] | None = None,
    bad: BadRecords | None = None,
) -> Iterator[Update | Result]:
    """Writes a text for each prompt: Updates as tokens come, and the Result of a prompt as soon as it is finished.

    Args:
        method: best-of-n of 16 by default.
        sampling: by default at temperature 1, up to 128 tokens.
        goals: by default the reward model's first.
        rows: maximum number of samples written at a time. With reject, beams, or ``every`` 0, those of a prompt are
            written together, even if more.
        names: what errors call the prompts; by default prompt 0, prompt 1, ...
        bad: what becomes of a prompt that policy or reward model cannot read: an error by default; if it is skipped, it
            has no Result.

    Raises:
        TypeError: a text instead of a list of texts.
        ValueError: another number of names than of prompts.
        UserError: a method without the reward model that it needs, a prompt that policy or reward model cannot read, or
            values that are not finite.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list: put a single prompt into a list")
    listed = list(prompts)
    named = [f"prompt {i}" for i in range(len(listed))] if names is None else list(names)
    if len(named) != len(listed):
        raise ValueError(f"{len(named)} names for {len(listed)} prompts: must be equally many")
    decoder = _Decoder(policy, reward, method or Method(), sampling or Sampling(temperature=1.0), goals, rows)
    return decoder.run(listed, named, bad or BadRecords())


class _Decoder:
    def __init__(
        self,
        policy: Policy,
        reward: RewardModel | None,
        method: Method,
        sampling: Sampling,
        goals: Goals | None,
        rows: int,
    ) -> None:
        if reward is None and method.kind != "sample":
            raise UserError(f"the method {method.kind} needs a reward model")
        sampling = replace(sampling, max_new_tokens=method.longest(sampling.max_new_tokens))
        self.policy, self.method = policy, method
        self.room = 0 if method.kind == "beams" else sampling.max_new_tokens + 1  # forks share what is written
        together = RIVALS[method.kind].in_step or not method.every
        every = method.every if reward is not None and not together else 1
        self.writer = Writer(
            policy, sampling, rows=rows, together=together, every=every, with_text=True, with_log_p=True
        )
        self.judge: Judge | None = None
        if reward is not None:
            self.judge = Judge(reward, goals or goals_of(reward, {}), policy, limit=policy.cache_tokens)
        self.states: dict[int, _State] = {}  # by id() of the group

    def run(
        self, prompts: Sequence[str | Messages], names: Sequence[str], bad: BadRecords
    ) -> Iterator[Update | Result]:
        for i, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
            try:
                self._add(i, prompt, name)
            except UserError as error:
                bad.add(error)
        while written := self.writer.step():
            for row in written:
                state = self.states[id(row.group)]
                state.policy_tokens += 1
                state.started = state.started or time.monotonic()
            started = itertools.takewhile(lambda state: state.group.rows, self.states.values())  # they start in order
            due = [state for state in started if state.rivals.due()]
            self._look(due)
            for state in due:
                if self.judge is not None:
                    state.rivals.decide()
                    if not self.writer.together:
                        self._settle(state)
                yield from self._updates(state)
                if state.rivals.finished:
                    yield self._result(state)

    def _add(self, index: int, prompt: str | Messages, name: str) -> None:
        """Raises UserError for a prompt that the policy or the reward model cannot read."""
        rivals_of = RIVALS[self.method.kind]
        try:
            [ids] = self.policy.encode([prompt])
            new = self.writer.sampling.max_new_tokens
            reading = self.judge.read(prompt, new=new) if self.judge is not None else None
        except UserError as error:
            raise placed(error, name, {}) from None
        group = self.writer.add(ids, self.method.rows, name, at_once=rivals_of.at_once)
        rivals = rivals_of(self.method, group, self.writer, self.judge)
        self.states[id(group)] = _State(index=index, reading=reading, group=group, rivals=rivals)

    def _look(self, states: Sequence[_State]) -> None:
        """Brings the Q-values of the prompts up to date, all in one forward."""
        if self.judge is None:
            return
        for state in states:
            if state.opened is None:
                assert state.reading is not None
                state.opened = self.judge.open(state.reading)
                state.reward_tokens += len(state.opened.live.ids)
            self.judge.add(state.group.rows, state.opened, room=self.room)
            if not state.group.numbers:
                self.judge.scorer.drop([state.opened.live])  # its rows hold what they need of it
        rows = [row for state in states for row in state.rivals.kept if not self.judge.closed(row)]
        for row, read in zip(rows, self.judge.look(rows), strict=True):
            self.states[id(row.group)].reward_tokens += read

    def _settle(self, state: _State) -> None:
        """Makes room for the rows that start next."""
        assert self.judge is not None
        before = self.judge.tokens
        self.judge.settle(state.rivals.certain)
        state.reward_tokens += self.judge.tokens - before

    def _updates(self, state: _State) -> Iterator[Update]:
        for row in state.group.rows:
            q_n = self.judge.q_n(row) if self.judge is not None else ()
            dropped = row.ending == "dropped"
            now = len(row.text), len(q_n), dropped
            characters, values, _ = before = state.shown.get(row.number, (0, 0, False))
            if now != before:
                state.shown[row.number] = now
                yield Update(
                    prompt=state.index,
                    number=row.number,
                    text=row.text[characters:],
                    q_m=tuple(map(float, q_n[values:])),
                    dropped=dropped,
                    policy_tokens=state.policy_tokens,
                )

    def _result(self, state: _State) -> Result:
        rivals, rewards = state.rivals, {}
        if self.judge is not None:
            before = self.judge.tokens
            kept = rivals.kept
            rewards = {row.number: reward for row, reward in zip(kept, self.judge.rewards(kept), strict=True)}
            state.reward_tokens += self.judge.tokens - before
        chosen = rivals.choose(rewards)
        ordered = sorted(state.group.rows, key=lambda row: row.number)
        usual = sum(len(row.ids) for row in rivals.kept) / len(rivals.kept)
        dropped = [row for row in ordered if row.ending == "dropped"]
        result = Result(
            prompt=state.index,
            chosen=ordered.index(chosen),
            texts=tuple(self._text(row, rivals, rewards) for row in ordered),
            policy_tokens=state.policy_tokens,
            reward_tokens=state.reward_tokens,
            saved_tokens=0 if rivals.parents else round(sum(max(0.0, usual - len(row.ids)) for row in dropped)),
            seconds=time.monotonic() - state.started,
        )
        if self.judge is not None:
            self.judge.forget(ordered)
        del self.states[id(state.group)]
        return result

    def _text(self, row: Row, rivals: Rivals, rewards: dict[int, float]) -> Text:
        return Text(
            number=row.number,
            ids=tuple(row.ids),
            text=row.text,
            ending=row.ending,
            parent=rivals.parents.get(row.number),
            log_p=row.log_p,
            texts_n=tuple(self.judge.token_texts(row)) if self.judge is not None else (),
            q_n=tuple(map(float, self.judge.q_n(row))) if self.judge is not None else (),
            reward=rewards.get(row.number),
        )
