"""Q-values of completions while they are being written.

The prompt is computed once for all its rows, a new token once per row. Q-values and rewards equal those of one forward
of the whole text, however it is cut into pushes.

Letters: G goals, D width of the compared states, H hidden size, m new tokens of a row.
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.notes import warn_once
from gcrm_fast.data.chat import end_tokens
from gcrm_fast.inference.cached import CACHE_TOKENS, CachedTrunk, Continuation
from gcrm_fast.model.cache import CachedSequence
from gcrm_kernels import q_values

if TYPE_CHECKING:
    from gcrm_fast.inference.scoring import RewardModel


class LiveRow:
    """A completion that grows: ``ids`` of prompt and completion, and the state where its reward would be read now.

    ``ending``: the tokens that end it where it has none of its own. ``reward`` is None until the row is closed.
    """

    def __init__(
        self, sequence: CachedSequence, ids: Iterable[int], read_H: Tensor | None, ending: Sequence[int]
    ) -> None:
        self.sequence, self.ids, self.read_H, self.ending = sequence, list(ids), read_H, ending
        self.start = len(self.ids)
        self.ended = False  # by an end token, and perhaps white space after it
        self.reward: float | None = None

    def copy(self) -> "LiveRow":
        """Another row with the same tokens, with nothing to recompute."""
        twin = LiveRow(self.sequence.copy(), self.ids, self.read_H, self.ending)
        twin.start, twin.ended, twin.reward = self.start, self.ended, self.reward
        return twin

    def rewind(self, length: int) -> None:
        """Forgets the tokens from ``length`` on. The next push must have one at least."""
        self.sequence.truncate(length)
        del self.ids[length:]
        self.ended = False


def reencode(model: "RewardModel", row: LiveRow, prompt: str, text: str) -> tuple[list[int], int]:
    """Rewinds the row to the tokens that it shares with prompt + text. Returns the tokens to push, and the place of the
    first among those of the completion: negative where it is one of the prompt's."""
    [whole] = model.encode([prompt], [text], [True])
    ids = whole.ids.tolist()
    shared = next(
        (i for i, (a, b) in enumerate(zip(ids, row.ids, strict=False)) if a != b), min(len(ids), len(row.ids))
    )
    if shared < len(row.ids):
        shared = min(shared, len(ids) - 1)  # the state of the last token is needed again
        row.rewind(shared)
        row.start = whole.start  # a token may join the end of the prompt and the start of the text, or no longer
    return ids[shared:], shared - row.start


def ending_of(model: "RewardModel", prompt: str, answer: str) -> list[int]:
    """The tokens that end an answer to the prompt: with an empty ``answer`` of the chat template those that it writes
    there, else eos."""
    ends, eos = end_tokens(model.tokenizer), model.tokenizer.eos_token_id
    if not answer or model.end.kind != "eos":
        return [eos]
    [whole] = model.encode([prompt], [answer])
    own = list(takewhile(ends.__contains__, reversed(whole.ids[whole.start :].tolist())))
    return own[::-1]


def rewards_of_texts(
    model: "RewardModel", texts: Sequence[tuple[str, str]], cuts: Sequence[bool] | None = None
) -> list[float]:
    """Of (prompt, completion), in a forward of their own: where another project's trainer read the reward, only the
    text says."""
    encoded = model.encode([prompt for prompt, _ in texts], [completion for _, completion in texts], cuts)
    return [one.reward for one in model.judge(encoded)]


class LiveScorer:
    """Rows of any number of prompts through one reward model, with one cache of up to ``limit`` tokens."""

    def __init__(self, model: "RewardModel", goals_GD: Tensor, *, limit: int = CACHE_TOKENS) -> None:
        network = model.network
        self.model, self.goals_GD = model, goals_GD.to(model.device)
        self.trunk = CachedTrunk(network.model, network.attention_backend, tokens=model.budget.tokens, limit=limit)
        self.ends = end_tokens(model.tokenizer)

    def open(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        endings: Sequence[Sequence[int]] | None = None,
    ) -> list[list[LiveRow]]:
        """New rows of each prompt, which is given as ids; ``endings`` of the rows are eos by default.

        Raises:
            UserError: a prompt that is too long for the model, or tokens that it does not have, or a full cache.
        """
        for ids in prompts:
            self.check(ids, len(ids), "the prompt")
        endings = endings or [[self.model.tokenizer.eos_token_id]] * len(prompts)
        sequences = [self.trunk.open() for _ in prompts]
        opened: list[list[LiveRow]] = []
        try:
            for sequence, ids in zip(sequences, prompts, strict=True):
                sequence.reserve(len(ids))  # with more, a row would continue there, free only with its prompt
            states = self.trunk.extend(
                [Continuation(*one, every=False) for one in zip(sequences, prompts, strict=True)]
            )
            for sequence, ids, state, n, ending in zip(sequences, prompts, states, rows, endings, strict=True):
                read_H = state[-1].clone() if len(ids) else None
                opened.append([LiveRow(sequence.copy(), ids, read_H, ending) for _ in range(n)])
        except BaseException:
            self.drop(row for own in opened for row in own)
            raise
        finally:
            for sequence in sequences:
                sequence.free()
        return opened

    def push(self, rows: Sequence[LiveRow], new_ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Q-values [G, m] float32 of the new tokens of each row. If this raises, the rows are as before.

        Raises:
            ValueError: tokens for a row that is closed.
            UserError: a row that is too long for the model, tokens that it does not have, a full cache, or values that
                are not finite.
        """
        for i, (row, ids) in enumerate(zip(rows, new_ids, strict=True)):
            if ids and row.reward is not None:
                raise ValueError(f"row {i} is closed: push no tokens to it")
            self.check(ids, len(row.ids) + len(ids), f"row {i}")
        if not rows:
            return []
        states = self._extended(rows, new_ids)
        with torch.inference_mode():
            hidden_RH = torch.cat(states)
            q_GR = q_values(self.model.network.compared(hidden_RH), self.goals_GD).float().mT.cpu().numpy()
        cuts = np.cumsum([len(ids) for ids in new_ids])[:-1]
        q_Gm = [np.ascontiguousarray(own) for own in np.split(q_GR, cuts, axis=1)]
        for i, own in enumerate(q_Gm):
            if not np.isfinite(own).all():
                for one, ids in zip(rows, new_ids, strict=True):
                    one.sequence.truncate(len(one.sequence) - len(ids))
                raise UserError(f"row {i} has a Q-value that is not finite: fix the model's weights, or use float32")
        for row, ids, own_RH in zip(rows, new_ids, states, strict=True):
            self._note(row, ids, own_RH)
        return q_Gm

    def close(self, rows: Sequence[LiveRow], cuts: Sequence[bool] | None = None) -> list[float]:
        """The reward of each row where the model reads it (data/ends.py), after its ``ending`` where it has no end.

        ``cuts`` marks completions that a length limit cut, whose reward is read at their last token. A closed row keeps
        its reward, but no longer its place in the cache.

        Raises:
            UserError: a cut completion without a token, or a reward that is not finite.
        """
        cuts = cuts or [False] * len(rows)
        wanted = [(row, cut) for row, cut in zip(rows, cuts, strict=True) if row.reward is None]
        for row, cut in wanted:
            if cut and len(row.ids) == row.start:
                raise UserError("a completion that is cut has no token: there is no reward to read")
        open_ended = [row for row, cut in wanted if not (cut or row.ended or self.model.end.kind == "as-is")]
        endings = [row.ending for row in open_ended]
        for row, state in zip(open_ended, self._extended(open_ended, endings), strict=True):
            self._note(row, row.ending, state)
        if wanted:
            with torch.inference_mode():
                states = [row.read_H for row, _ in wanted if row.read_H is not None]
                rewards = self.model.network.rewards(torch.stack(states)).float().cpu().tolist()
            if not np.isfinite(rewards).all():
                raise UserError("a reward is not finite: fix the model's weights, or use float32")
            for (row, _), reward in zip(wanted, rewards, strict=True):
                row.reward = reward
                row.sequence.free()
        return [row.reward for row in rows if row.reward is not None]

    def drop(self, rows: Iterable[LiveRow]) -> None:
        """Frees the places of rows in the cache."""
        for row in rows:
            row.sequence.free()

    def _extended(self, rows: Sequence[LiveRow], new_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """States [m, H] of the new tokens."""
        return self.trunk.extend([Continuation(row.sequence, ids) for row, ids in zip(rows, new_ids, strict=True)])

    def _note(self, row: LiveRow, ids: Sequence[int], states_mH: Tensor) -> None:
        """Notes where the reward is read after the new tokens."""
        end, read = self.model.end, None
        for i, token in enumerate(ids):
            blank = row.ended and token not in self.ends and not str(self.model.tokenizer.decode([token])).strip()
            if (not blank) if end.kind == "eos" else (token != end.pad):
                read = i
            row.ended = token in self.ends or blank
        row.ids += ids
        if read is not None:
            row.read_H = states_mH[read].clone()

    def check(self, ids: Sequence[int], length: int, name: str) -> None:
        """Raises UserError for ids that the model does not have, or in a row that would have too many of them."""
        config = self.model.config
        if ids and not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise UserError(f"{name} has a token that is not between 0 and {config.vocab_size - 1}")
        if config.sliding_window and length > config.sliding_window:
            raise UserError(f"{name} has more tokens than the model's sliding window of {config.sliding_window}")
        if length > config.max_position_embeddings:
            warn_once(f"rows have more tokens than the {config.max_position_embeddings} that the model was trained for")


class Stream:
    """Rows of one prompt: Q-values of their tokens as they come, and rewards at the end.

    Made by ``RewardModel.stream``. Rows are counted from 0, in an order that ``keep`` changes.
    """

    def __init__(self, scorer: LiveScorer, prompt_ids: Sequence[int], rows: int, *, one_goal: bool) -> None:
        self._scorer, self._one_goal = scorer, one_goal
        [self._rows] = scorer.open([_as_list(prompt_ids)], [rows])

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def push(self, new_ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Q-values of the new tokens of each row: [m] float32, or [G, m] for a stack of goals.

        Args:
            new_ids: token ids for each row; lengths may differ, and be 0.

        Raises:
            ValueError: another number of rows, or tokens for a closed one.
            UserError: see LiveScorer.push; the rows are then as before.
        """
        if len(new_ids) != len(self._rows):
            raise ValueError(f"{len(new_ids)} lists of tokens for {len(self._rows)} rows: must be equally many")
        q_Gm = self._scorer.push(self._rows, [_as_list(ids) for ids in new_ids])
        return [own[0] for own in q_Gm] if self._one_goal else q_Gm

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these, which get the numbers 0, 1, ... in this order. A row that is named twice is
        continued twice. Raises IndexError for one that does not exist."""
        self._check(rows)
        kept = [self._rows[i].copy() for i in rows]
        self._scorer.drop(self._rows)
        self._rows = kept

    def close(self, row: int, *, cut: bool = False) -> float:
        """The reward of a row, with an end token where it has none; with ``cut``, where a length limit ended it, at its
        last token. The row keeps its number, but takes no more tokens. Raises IndexError for a row that does not
        exist."""
        self._check([row])
        return self._scorer.close([self._rows[row]], [cut])[0]

    def _check(self, rows: Sequence[int]) -> None:
        if wrong := [i for i in rows if not 0 <= i < len(self._rows)]:
            raise IndexError(f"there is no row {wrong[0]}: the stream has {len(self._rows)}")


def _as_list(ids: Sequence[int]) -> list[int]:
    return [int(token) for token in ids]
