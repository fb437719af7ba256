"""A trained reward model in use: rewards, Q-values and states of completions, packed like training.

Letters: N completions, n tokens of a completion, R read rows of a pack, G goals, D width of the compared states.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gcrm_fast.checkpoints.adapters import tokenizer_folder
from gcrm_fast.checkpoints.goals import GOAL_FILE, read_goals
from gcrm_fast.checkpoints.locating import MODEL_FILES, locate
from gcrm_fast.checkpoints.reading import q_verdict_of, read_as_trained, where_read
from gcrm_fast.checkpoints.saving import hashed
from gcrm_fast.checkpoints.weights import open_reward_model
from gcrm_fast.common.devices import compute_dtype, default_device
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.notes import warn_once
from gcrm_fast.common.options import AtLeastOne, check_value
from gcrm_fast.common.processes import rank
from gcrm_fast.common.progress import progress_bar
from gcrm_fast.data.batches import Budget, plan_packs
from gcrm_fast.data.chat import TODAY, as_text
from gcrm_fast.data.encoding import CHUNK, Completion, token_texts
from gcrm_fast.data.ends import Choice, End, encode_to
from gcrm_fast.data.messages import Messages, is_messages
from gcrm_fast.data.packing import Item, ScorePack, build_score_pack, group_size
from gcrm_fast.data.special_tokens import Reading
from gcrm_fast.data.tokenization import check_vocabulary, load_tokenizer
from gcrm_fast.inference.cached import CACHE_TOKENS, ReadRows, states_after_prompt
from gcrm_fast.inference.streaming import LiveScorer, Stream
from gcrm_fast.model.attention import Backend
from gcrm_fast.model.reward_model import LlamaRewardModel, goal_state, load
from gcrm_kernels import q_values

NOT_FINITE_REMEDY = "fix the model's weights, or use float32"
if TYPE_CHECKING:
    from gcrm_fast.evaluation.page import Page

PLANNED_GROUPS = 1024  # prompts whose packs are planned together
Text = str | Messages


class Judged(NamedTuple):
    """Of one completion of n tokens: the reward at its end; where requested, rewards [n] and Q-values [G, n] at every
    token, and what ``latents`` gives [D], float32."""

    reward: float
    rewards_n: np.ndarray | None
    q_Gn: np.ndarray | None
    latent_D: np.ndarray | None = None


class RewardModel:
    """A reward model and its tokenizer, on one device, without gradients.

    ``score``, ``q_values``, ``representations`` and ``inspect`` take prompts and completions as lists of equal length,
    or a single prompt with all completions. Each is text, or messages for the chat template; conversations that end
    with the answer need no separate prompt. A single completion gives a single result instead of a list.

    ``config``, ``tokenizer``, ``network``, ``device``; ``fingerprint`` of the weights; ``goals``, the goal states of
    the model's folder by name, [D] float32, "default" first; ``end``, where rewards are read; ``q_verdict``, what its
    training run found of its Q-values, in words, "" where that is not known.
    """

    def __init__(
        self,
        network: LlamaRewardModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        fingerprint: str,
        goals: dict[str, Tensor],
        tokens_per_batch: int,
        end: End,
        q_verdict: str = "",
    ) -> None:
        self.network, self.config, self.tokenizer, self.device = network, network.config, tokenizer, device
        self.fingerprint, self.goals, self.end, self.q_verdict = fingerprint, goals, end, q_verdict
        self.budget = Budget(tokens_per_batch, network.config.hidden_size)

    def __repr__(self) -> str:
        config = self.config
        dtype = str(self.network.model.norm.weight.dtype).removeprefix("torch.")
        parts = [
            f"{config.parameters() / 1e6:.3g}M parameters",
            f"{config.num_hidden_layers} layers, width {config.hidden_size}",
            f"{config.head} head",
            f"{dtype} on {self.device}",
            f"goals: {', '.join(self.goals) or 'none'}",
        ]
        return f"RewardModel({config.family.class_prefix}: {'; '.join(parts)})"

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        tokens_per_batch: int = 16384,
        attention: str = "auto",
        end: Choice = "auto",
        special_tokens: Literal["auto"] | Reading = "auto",
    ) -> Self:
        """Loads a folder or a hub repository, which ``gcrm train`` saved or the README lists, in evaluation mode.

        Args:
            device: by default this process's GPU, or the CPU where there is none.
            dtype: of the trunk; ``auto`` is bfloat16 on a GPU, else float32. The reward head is always float32.
            tokens_per_batch: maximum tokens per forward; memory grows with it.
            attention: see attention.py.
            end: where rewards are read (see data/ends.py); ``auto`` is what gcrm.json says, or else where the model's
                trainer read it. A model of another project says in one line, on the log, where that is.
            special_tokens: whether those that prompts and completions spell out are ``tokens`` or plain ``text``;
                ``auto`` is what the model was trained with.

        Raises:
            UserError: no such model, a language model without a reward head, goals of other weights, or a value that
                its argument does not accept.
        """
        check_value("tokens_per_batch", tokens_per_batch, AtLeastOne)
        check_value("attention", attention, Backend)
        check_value("end", end, Choice)
        check_value("special_tokens", special_tokens, Literal["auto"] | Reading)
        place = default_device() if device is None else torch.device(device)
        computed = compute_dtype(dtype, place)
        folder = locate(str(path_or_hub), "MODEL", MODEL_FILES)
        config, weights = open_reward_model(folder)
        where, line = where_read(folder, end)
        if line and rank() == 0:
            logging.getLogger("gcrm_fast").warning(line)
        tokenizer = load_tokenizer(tokenizer_folder(folder))
        read_as_trained(tokenizer, folder, special_tokens)
        if TODAY.search(str(tokenizer.chat_template)):
            warn_once(f"{folder}: the chat template writes today's date: rewards of messages depend on the day")
        check_vocabulary(tokenizer, config.vocab_size, str(folder))
        with torch.device("meta"):
            network = LlamaRewardModel(config, attention).cast(computed)
        digest = hashlib.sha256()
        load(network.eval().requires_grad_(False), place, hashed(weights.rows, digest.update))
        goal_file, fingerprint = folder / GOAL_FILE, digest.hexdigest()
        goals = read_goals(goal_file, fingerprint, config.state_size)[0] if goal_file.exists() else {}
        return cls(network, tokenizer, place, fingerprint, goals, tokens_per_batch, where, q_verdict_of(folder))

    @property
    def q_notes(self) -> list[str]:
        """``q_verdict`` as a line to show, or none."""
        return [f"Found by the model's training run: {self.q_verdict}"] if self.q_verdict else []

    # ------------------------------------------------------------------------------------------------------- texts

    def encode(
        self, prompts: Sequence[str], completions: Sequence[str], cuts: Sequence[bool] | None = None
    ) -> list[Completion]:
        """The tokens that are scored: as in training, jointly tokenized and up to where the reward is read (ends.py).

        ``cuts`` marks completions that a length limit cut: they have no end, and are scored at their last token. Warns
        once where the model was never trained on as many tokens.

        Raises:
            TypeError: a text instead of a list of texts.
            ValueError: ``prompts``, ``completions`` and ``cuts`` differ in length.
        """
        if isinstance(prompts, str) or isinstance(completions, str):
            raise TypeError("prompts and completions must be lists of texts: put a single text into a list")
        cuts = [False] * len(completions) if cuts is None else cuts
        if not len(prompts) == len(completions) == len(cuts):
            raise ValueError(
                f"{len(prompts)} prompts, {len(completions)} completions, {len(cuts)} cuts: must be equally many"
            )
        encoded: list[Completion] = []
        for a in range(0, len(prompts), CHUNK):
            part = slice(a, a + CHUNK)
            encoded += encode_to(self.end, self.tokenizer, prompts[part], completions[part], cuts[part])
        known = self.config.max_position_embeddings
        if any(len(completion.ids) > known for completion in encoded):
            warn_once(f"some completions have more tokens than the {known} positions that the model was trained for")
        return encoded

    def unfit(self, completion: Completion) -> str:
        """Why the completion cannot be scored; "" where it can."""
        if completion.start == len(completion.ids):
            return "is cut and has no token: omit it"
        if len(completion.ids) > self.budget.tokens:
            limit = f"--tokens-per-batch {self.budget.tokens}"
            return f"needs {len(completion.ids)} tokens, more than {limit}: raise that or omit it"
        window = self.config.sliding_window
        if window and len(completion.ids) > window:
            return f"has {len(completion.ids)} tokens, more than the model's sliding window of {window}: omit it"
        return ""

    def texts(self, completion: Completion) -> list[str]:
        """The text of each completion token (see encoding.token_texts)."""
        return token_texts(self.tokenizer, completion)

    def score(self, prompts: Text | Sequence[Text], completions: Text | Sequence[Text] | None = None) -> Any:
        """Rewards [N] float32, or that of a single completion."""
        questions, answers, single = self._texts(prompts, completions)
        rewards = [j.reward for j in self.judge(self.encode(questions, answers))]
        return rewards[0] if single else np.array(rewards, dtype=np.float32)

    def q_values(
        self,
        prompts: Text | Sequence[Text],
        completions: Text | Sequence[Text] | None = None,
        goal: Tensor | str | None = None,
    ) -> Any:
        """Q-values of every completion token, [n] float32 for each completion: cosines to a goal state [D].

        ``goal``: a state, or the name of one of ``goals``; by default the first.
        """
        questions, answers, single = self._texts(prompts, completions)
        state = goal if isinstance(goal, Tensor) else self.goal(goal)
        judged = self.judge(self.encode(questions, answers), goals_GD=state[None])
        values = [j.q_Gn[0] for j in judged if j.q_Gn is not None]
        return values[0] if single else values

    def _texts(
        self, prompts: Text | Sequence[Text], completions: Text | Sequence[Text] | None
    ) -> tuple[list[str], list[str], bool]:
        """Prompts and completions as equally many texts, and whether a single completion was given.

        Raises:
            TypeError: neither text nor messages, or texts without completions.
            ValueError: not as many prompts as completions.
            UserError: messages that do not fit together or the chat template.
        """
        given, single = _listed("prompts", prompts) if completions is None else _listed("completions", completions)
        questions, one_prompt = (None, True) if completions is None else _listed("prompts", prompts)
        if completions is None and not all(map(is_messages, given)):
            raise TypeError("completions are missing: only conversations, lists of messages, contain their prompt")
        asked: list[Any] = [None] * len(given) if questions is None else questions
        if one_prompt and len(asked) == 1:
            asked = asked * len(given)
        if len(asked) != len(given):
            raise ValueError(f"{len(asked)} prompts, {len(given)} completions: must be equally many, or one prompt")
        texts = [as_text(self.tokenizer, *pair) for pair in zip(asked, given, strict=True)]
        return [prompt for prompt, _ in texts], [completion for _, completion in texts], single

    def inspect(
        self,
        prompts: Text | Sequence[Text],
        completions: Text | Sequence[Text] | None = None,
        goal: Tensor | str | None = None,
    ) -> "Page":
        """A page with Q-value and running reward of every token, which shows itself in a notebook; ``.save(path)``
        writes it. Completions of one prompt are compared.

        ``goal``: as of ``q_values``. Raises ValueError for no completions, and what ``score`` raises.
        """
        from gcrm_fast.evaluation.page import Column, Record, marks_of, page  # here: scoring alone needs none of it

        questions, texts, _ = self._texts(prompts, completions)
        if not texts:
            raise ValueError("completions are empty: there is nothing to show")
        encoded = self.encode(questions, texts)
        state = goal if isinstance(goal, Tensor) else self.goal(goal)
        judged = self.judge(encoded, goals_GD=state[None], per_token=True)
        records: list[Record] = []
        for prompt in dict.fromkeys(questions):
            own = [i for i, question in enumerate(questions) if question == prompt]
            tokens = [self.texts(encoded[i]) for i in own]
            marks = marks_of([encoded[i] for i in own], tokens, [None] * len(own))
            columns = []
            for i, text_n, marks_n in zip(own, tokens, marks, strict=True):
                reward_n, q_Gn = judged[i].rewards_n, judged[i].q_Gn
                assert reward_n is not None
                assert q_Gn is not None
                title = f"completion {i}"
                columns.append(Column(title=title, text_n=text_n, reward_n=reward_n, q_n=q_Gn[0], marks=marks_n))
            records.append(Record(title=f"Prompt {len(records)}", prompt=prompt, columns=columns))
        return page(title=f"{len(texts)} completions, token by token", about=self.q_notes, groups={"": records})

    def stream(
        self,
        prompt_ids: Sequence[int],
        rows: int,
        goal: Tensor | str | None = None,
        *,
        cache_tokens: int = CACHE_TOKENS,
    ) -> Stream:
        """Q-values of ``rows`` completions of one prompt while they are being written (see Stream).

        Args:
            prompt_ids: computed once for all rows.
            goal: as of ``q_values``, or a stack of states [G, D].
            cache_tokens: maximum number of tokens, the prompt's counted once, whose keys and values are kept.

        Raises:
            ValueError: fewer than 1 row.
            UserError: no such goal, or a prompt that is too long or has other tokens than the model.
        """
        if rows < 1:
            raise ValueError(f"rows is {rows}: must be at least 1")
        state = goal if isinstance(goal, Tensor) else self.goal(goal)
        goals_GD = state[None] if state.dim() == 1 else state
        return Stream(LiveScorer(self, goals_GD, limit=cache_tokens), prompt_ids, rows, one_goal=state.dim() == 1)

    def goal(self, name: str | None = None) -> Tensor:
        """The goal state [D] of that name, or the first of ``goals``. Raises UserError where there is none."""
        if not self.goals:
            raise UserError(f"the model has no goal state ({GOAL_FILE}): make one with gcrm goals")
        if name is None:
            return next(iter(self.goals.values()))
        if name not in self.goals:
            raise UserError(f"the model has no goal {name!r}: it has {', '.join(self.goals)}")
        return self.goals[name]

    # ------------------------------------------------------------------------------------------------------ tokens

    @torch.inference_mode()
    def judge(
        self,
        encoded: Sequence[Completion],
        *,
        goals_GD: Tensor | None = None,
        per_token: bool = False,
        latents: bool = False,
        names: Sequence[str] | None = None,
        progress: bool = False,
    ) -> list[Judged]:
        """Rewards of completions, with ``goals_GD`` [G, D] also Q-values, with ``per_token`` rewards at every token,
        with ``latents`` those of the last one.

        Completions of one prompt share the computation of their common start. States stay on the device. ``names`` of
        the completions are for error messages.

        Raises:
            UserError: a completion that is ``unfit``, or whose reward or Q-values are not finite.
        """
        goals = goals_GD.to(self.device) if goals_GD is not None else None
        done: list[tuple[Sequence[int], Sequence[np.ndarray], Tensor, Tensor | None, Tensor | None]] = []
        for read, hidden_RH in self._states(encoded, per_token or goals is not None, names, progress):
            q_RG = q_values(self.network.compared(hidden_RH), goals) if goals is not None else None
            latent_RD = self.network.latents(hidden_RH) if latents else None
            done.append((read.indices, read.rows_of, self.network.rewards(hidden_RH), q_RG, latent_RD))
        judged: dict[int, Judged] = {}
        # Read only now: until all forwards are on their way, nothing waits for the device.
        for indices, rows_of, rewards, q_RG, z_RD in done:
            reward_R, q_GR = rewards.float().cpu().numpy(), q_RG.float().mT.cpu().numpy() if q_RG is not None else None
            latents_RD = z_RD.float().cpu().numpy() if z_RD is not None else None
            for i, rows in zip(indices, rows_of, strict=True):
                judged[i] = Judged(
                    float(reward_R[rows[-1]]),
                    reward_R[rows] if per_token else None,
                    q_GR[:, rows] if q_GR is not None else None,
                    latents_RD[rows[-1]] if latents_RD is not None else None,
                )
        for i, one in sorted(judged.items()):
            if not (np.isfinite(one.reward) and (one.q_Gn is None or np.isfinite(one.q_Gn).all())):
                raise UserError(f"{_name(i, names)} has a reward or Q-value that is not finite: {NOT_FINITE_REMEDY}")
        return [judged[i] for i in range(len(encoded))]

    @torch.inference_mode()
    def representations(self, prompts: Text | Sequence[Text], completions: Text | Sequence[Text] | None = None) -> Any:
        """States z of every completion token, which goals are compared with, [n, D] float32 for each completion."""
        questions, answers, single = self._texts(prompts, completions)
        encoded = self.encode(questions, answers)
        states = self._read(self.network.compared, encoded, True)
        return states[0] if single else states

    @torch.inference_mode()
    def latents(
        self, encoded: Sequence[Completion], *, names: Sequence[str] | None = None, progress: bool = False
    ) -> np.ndarray:
        """What detectors of over-optimization see of each completion, [N, D] float32: the mean latent of a bottleneck
        head at the last token, or else the state z. Raises UserError for one that is ``unfit``, or not finite."""
        latents_ND = np.concatenate(self._read(self.network.latents, encoded, False, names, progress))
        wrong_N = ~np.isfinite(latents_ND).all(1)
        if wrong_N.any():
            name = _name(int(wrong_N.argmax()), names)
            raise UserError(f"{name} has latents that are not finite: {NOT_FINITE_REMEDY}")
        return latents_ND

    def goal_state(
        self, encoded: Sequence[Completion], *, names: Sequence[str] | None = None, progress: bool = False
    ) -> Tensor:
        """Mean of z at the last token, [D] float32 on the CPU: a goal state (GCRM, section 4.2).

        Raises:
            UserError: a completion that is ``unfit``, or a state that is not finite.
        """
        end_states = (
            self.network.compared(hidden_RH)[torch.from_numpy(np.concatenate(read.rows_of)).to(self.device)]
            for read, hidden_RH in self._states(encoded, False, names, progress)
        )
        return goal_state(end_states, len(encoded), remedy=NOT_FINITE_REMEDY).cpu()

    def groups(self, encoded: Sequence[Completion], names: Sequence[str] | None = None) -> list[list[Item]]:
        """Completions by prompt. Raises UserError for one that is ``unfit``."""
        by_prompt: dict[bytes, list[Item]] = {}
        for i, completion in enumerate(encoded):
            if unfit := self.unfit(completion):
                raise UserError(f"{_name(i, names)} {unfit}")
            ids, start, _ = completion
            by_prompt.setdefault(ids[:start].tobytes(), []).append(Item(i, ids, start, _name(i, names)))
        return list(by_prompt.values())

    def packs(self, groups: Sequence[list[Item]], *, per_token: bool) -> Iterator[ScorePack]:
        """Completions by prompt, in packs of ``tokens_per_batch``."""
        for a in range(0, len(groups), PLANNED_GROUPS):
            for part in plan_packs(groups[a : a + PLANNED_GROUPS], self.budget, 1):
                yield build_score_pack(part, per_token=per_token)

    def _read(
        self,
        function: Callable[[Tensor], Tensor],
        encoded: Sequence[Completion],
        per_token: bool,
        names: Sequence[str] | None = None,
        progress: bool = False,
    ) -> list[np.ndarray]:
        """[n, D] float32 for each completion: ``function`` of the states [R, H] of all its tokens or, without
        ``per_token``, of the last one."""
        states: dict[int, np.ndarray] = {}
        for read, hidden_RH in self._states(encoded, per_token, names, progress):
            z_RD = function(hidden_RH).float().cpu().numpy()
            states.update({i: z_RD[rows] for i, rows in zip(read.indices, read.rows_of, strict=True)})
        return [states[i] for i in range(len(encoded))]

    def _states(
        self, encoded: Sequence[Completion], per_token: bool, names: Sequence[str] | None = None, progress: bool = False
    ) -> Iterator[tuple[ReadRows, Tensor]]:
        """Every completion in one of several forwards, with the hidden states [R, H] of its read rows on the device."""
        groups, trunk, backend = self.groups(encoded, names), self.network.model, self.network.attention_backend
        with progress_bar(total=len(encoded), desc="scoring", unit="completion", shown=progress) as bar:
            for pack in self.packs([group for group in groups if not self._cut(group)], per_token=per_token):
                axis = (pack.pin_memory() if self.device.type == "cuda" else pack).to(self.device)
                yield ReadRows(pack.indices, pack.rows_of), trunk(axis, backend)
                bar.update(len(pack.indices))
            for group in filter(self._cut, groups):
                for read, hidden_RH in states_after_prompt(trunk, backend, self.budget, group, per_token=per_token):
                    yield read, hidden_RH
                    bar.update(len(read.indices))

    def _cut(self, group: list[Item]) -> bool:
        """Whether the completions of a prompt need several forwards, each of which would compute the prompt again."""
        if not group[0].start or sum(len(item.ids) for item in group) <= self.budget.tokens:
            return False
        size = group_size(group)
        return size.tokens > self.budget.tokens or size.keys > self.budget.keys


def _listed(name: str, given: Any) -> tuple[list[Any], bool]:
    """Texts or conversations as a list, and whether there was a single one. Raises TypeError, with the argument's
    ``name``, for anything else."""
    if isinstance(given, (str, dict)):
        return [given], True
    texts = list(given) if isinstance(given, Iterable) and not isinstance(given, bytes) else None
    if texts and isinstance(texts[0], dict):
        return [texts], True
    for place, value in [(name, given)] if texts is None else [(f"{name}[{i}]", text) for i, text in enumerate(texts)]:
        if not (isinstance(value, str) or is_messages(value)):
            kind = type(value).__name__
            raise TypeError(f"{place} is {kind}: give a string, a list of messages, or a list of either")
    return texts or [], False


def _name(index: int, names: Sequence[str] | None) -> str:
    return names[index] if names is not None else f"completion {index}"
