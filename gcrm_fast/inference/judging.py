"""The reward model's side of generation: Q-values and rewards of a policy's rows, in tokens of one tokenizer or of two.

With one tokenizer, ids pass from policy to reward model as they are. With two, the text so far is encoded again at each
look; the cache goes back to the tokens that both encodings share. Letters: G goals, n tokens of a completion.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.chat import as_text
from gcrm_fast.data.encoding import CUT, Completion
from gcrm_fast.data.messages import Messages
from gcrm_fast.inference.generation import Policy, Row
from gcrm_fast.inference.scoring import RewardModel
from gcrm_fast.inference.streaming import LiveRow, LiveScorer, ending_of, reencode, rewards_of_texts


@dataclass(frozen=True, kw_only=True)
class Goals:
    """Goal states [G, D] and their weights [G], whose absolute values sum to 1: a Q-value is the weighted sum of the
    cosines to each."""

    states_GD: Tensor
    weights_G: np.ndarray

    @classmethod
    def of(cls, weighted: Sequence[tuple[Tensor, float]]) -> "Goals":
        """Raises UserError where all weights are 0."""
        weights_G = np.array([weight for _, weight in weighted], dtype=np.float64)
        if not np.abs(weights_G).sum():
            raise UserError("the weights of the goals are 0: give one of them another weight")
        return cls(
            states_GD=torch.stack([state.float() for state, _ in weighted]),
            weights_G=weights_G / np.abs(weights_G).sum(),
        )

    @property
    def fingerprint(self) -> str:
        """Of states and weights."""
        digest = hashlib.sha256(np.ascontiguousarray(self.states_GD.cpu().numpy()).tobytes())
        digest.update(self.weights_G.tobytes())
        return digest.hexdigest()

    def shuffled(self, seed: int) -> "Goals":
        """A control: the coordinates of the states in another order. Norms, and angles between goals, stay."""
        order = np.random.default_rng(seed).permutation(self.states_GD.shape[1])
        return Goals(states_GD=self.states_GD[:, torch.from_numpy(order)], weights_G=self.weights_G)

    def opposite(self) -> "Goals":
        """A control: the Q-values with the other sign."""
        return Goals(states_GD=self.states_GD, weights_G=-self.weights_G)


class Reading(NamedTuple):
    """A prompt as it was given, and as the reward model reads it; the tokens that end an answer to it."""

    given: str | Messages
    text: str
    ids: list[int]
    ending: list[int]


@dataclass(eq=False, kw_only=True)
class Judged:
    """What the reward model knows of a row: ``seen`` tokens of the policy, and the Q-values of its own tokens."""

    live: LiveRow
    prompt: Reading
    seen: int = 0
    q_n: list[float] = field(default_factory=list)


class Judge:
    """Rows of a policy through a reward model."""

    def __init__(self, model: RewardModel, goals: Goals, policy: Policy, *, limit: int) -> None:
        self.model, self.weights_G = model, goals.weights_G
        self.scorer = LiveScorer(model, goals.states_GD, limit=limit)
        self.ends, self.unread = policy.stop_ids & self.scorer.ends, policy.stop_ids - self.scorer.ends
        self.one_tokenizer = policy.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        self.judged: dict[int, Judged] = {}  # by id() of the row

    @property
    def tokens(self) -> int:
        """How many tokens the reward model has computed."""
        return self.scorer.trunk.computed

    def read(self, prompt: str | Messages, *, new: int = 0) -> Reading:
        """Raises UserError where the model cannot read the prompt and, with one tokenizer, ``new`` tokens after it."""
        text, answer = as_text(self.model.tokenizer, prompt, "")
        ids = self.model.encode([text], [""], [True])[0].ids.tolist() if text else []
        unknown = self.model.tokenizer.unk_token_id
        if not self.one_tokenizer and text.strip() and set(ids) <= {unknown, self.model.tokenizer.bos_token_id}:
            raise UserError("the tokenizer of the reward model knows none of its text: use another model")
        self.scorer.check(ids, len(ids), "the prompt")
        window, limit = self.model.config.sliding_window, self.scorer.trunk.cache.limit
        what = f"has {len(ids)} tokens to the reward model"
        if self.one_tokenizer and window and len(ids) + new > window:
            raise UserError(f"{what}: with {new} new ones more than its sliding window of {window}")
        if not self.one_tokenizer and len(ids) >= limit:
            raise UserError(f"{what}, whose cache has {limit}: shorten it, or raise the limit of the cache")
        return Reading(prompt, text, ids, ending_of(self.model, text, answer))

    def open(self, reading: Reading) -> Judged:
        """Computes a prompt, of which ``add`` copies what its rows share."""
        [[live]] = self.scorer.open([reading.ids], [1], [reading.ending])
        return Judged(live=live, prompt=reading)

    def add(self, rows: Iterable[Row], opened: Judged, *, room: int) -> None:
        """Follows the rows of a prompt, those that are new. ``room``: tokens of a row to keep together, which is
        faster."""
        for row in rows:
            if id(row) not in self.judged:
                live = opened.live.copy()
                live.sequence.reserve(room)
                self.judged[id(row)] = Judged(live=live, prompt=opened.prompt)

    def closed(self, row: Row) -> bool:
        """Whether a row that is finished has been judged to its end."""
        return bool(row.ending) and self.judged[id(row)].seen == len(row.ids)

    def look(self, rows: Sequence[Row]) -> list[int]:
        """Adds the Q-values of what the rows have written since the last look. Returns the tokens read of each."""
        judged = [self.judged[id(row)] for row in rows]
        new = [self._new_ids(row, own) for row, own in zip(rows, judged, strict=True)]
        q = self.scorer.push([own.live for own in judged], [ids for ids, _ in new])
        for row, own, (_, place), q_Gm in zip(rows, judged, new, q, strict=True):
            own.q_n[max(0, place) :] = (self.weights_G @ q_Gm)[max(0, -place) :].tolist()
            own.seen = len(row.ids)
        return [len(ids) for ids, _ in new]

    def _new_ids(self, row: Row, own: Judged) -> tuple[list[int], int]:
        """New tokens of a row, and the place of the first among those of its completion. A stop token of the policy
        that ends nothing for the reward model is no part of the text."""
        if self.one_tokenizer:
            return [token for token in row.ids[own.seen :] if token not in self.unread], len(own.q_n)
        return reencode(self.model, own.live, own.prompt.text, row.text)

    def q_n(self, row: Row) -> np.ndarray:
        """The Q-values of the row's tokens so far, in tokens of the reward model."""
        return np.array(self.judged[id(row)].q_n)

    def content(self, row: Row) -> np.ndarray:
        """The same without an end token, where Q is high for all."""
        own = self.judged[id(row)]
        ended = self.one_tokenizer and row.ending == "stop" and row.ids[-1] in self.ends
        return np.array(own.q_n[:-1] if ended else own.q_n)

    def token_texts(self, row: Row) -> list[str]:
        """The text of each token that has a Q-value."""
        own = self.judged[id(row)]
        ids = np.array(own.live.ids[: own.live.start + len(own.q_n)], dtype=np.int32)
        return self.model.texts(Completion(ids, own.live.start, CUT))

    def rewards(self, rows: Sequence[Row]) -> list[float]:
        """Rewards of finished rows, as of completions of that text. Those that a limit ended are cut, unless there is
        no text yet."""
        judged = [self.judged[id(row)] for row in rows]
        if self.model.end.kind != "eos":
            pairs = zip(judged, rows, strict=True)
            texts = [as_text(self.model.tokenizer, own.prompt.given, row.text) for own, row in pairs]
            cuts = [row.ending == "length" and bool(row.text) for row in rows]
            return rewards_of_texts(self.model, texts, cuts)
        cuts = [
            row.ending == "length" and len(own.live.ids) > own.live.start for row, own in zip(rows, judged, strict=True)
        ]
        return self.scorer.close([own.live for own in judged], cuts)

    def settle(self, rows: Sequence[Row]) -> None:
        """Frees the places of finished rows in the cache, after their rewards where those are read there."""
        if self.model.end.kind == "eos":
            self.rewards(rows)
        self.drop(rows)

    def fork(self, row: Row, twin: Row) -> None:
        """Opens ``twin`` as a copy of ``row``."""
        own = self.judged[id(row)]
        self.judged[id(twin)] = Judged(live=own.live.copy(), prompt=own.prompt, seen=own.seen, q_n=list(own.q_n))

    def drop(self, rows: Iterable[Row]) -> None:
        """Frees the places of rows in the cache; their Q-values stay."""
        self.scorer.drop(self.judged[id(row)].live for row in rows)

    def forget(self, rows: Sequence[Row]) -> None:
        """Drops the rows, and their Q-values too."""
        self.drop(rows)
        for row in rows:
            del self.judged[id(row)]


def goals_of(model: RewardModel, named: Mapping[str, float]) -> Goals:
    """The model's goal states of those names with their weights; without names its first one. Raises UserError."""
    return Goals.of([(model.goal(name), weight) for name, weight in named.items()] or [(model.goal(), 1.0)])
