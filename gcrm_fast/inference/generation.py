"""A policy that writes: greedy and sampled text, any number of prompts at a time.

Letters: R rows, V size of the vocabulary, H hidden size.

A row is one sample of one prompt. The rows of a prompt share its keys and values; a row that is finished leaves the
batch at once, and the next one takes its place in the same forward that continues the others. The random numbers of a
row depend only on (seed, prompt, number of the sample, position), not on what else is in the batch.
"""

import copy
import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gcrm_fast.checkpoints.adapters import base_folder, tokenizer_folder
from gcrm_fast.checkpoints.config_json import read_json
from gcrm_fast.checkpoints.locating import MODEL_FILES, locate
from gcrm_fast.checkpoints.saving import hashed
from gcrm_fast.checkpoints.weights import open_language_model
from gcrm_fast.common.devices import compute_dtype, default_device
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.notes import warn_once
from gcrm_fast.data.chat import as_text, end_tokens
from gcrm_fast.data.encoding import encode_completions
from gcrm_fast.data.messages import Messages
from gcrm_fast.data.tokenization import check_vocabulary, load_tokenizer
from gcrm_fast.inference.cached import CACHE_TOKENS, CachedTrunk, Continuation
from gcrm_fast.model.cache import CachedSequence
from gcrm_fast.model.language_model import LlamaLanguageModel
from gcrm_fast.model.reward_model import load

ROWS = 64  # default maximum of rows that are written at a time
SHORTLIST = 256  # tokens that top-p looks at before it sorts the whole vocabulary

Ending = Literal["", "stop", "length", "dropped"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and where texts end.

    temperature: 0 takes the most likely token each time. top_p, top_k: sample only from the most likely tokens that
    have this probability together (1: from all), from this many (0: from all). seed: of the random numbers, which
    depend on it, the prompt, the sample's number and the position alone. stop: texts that end a continuation, as does a
    stop token; the text that completes one is its last token.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, fits, range_ in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
            ("stop", all(self.stop) and not isinstance(self.stop, str), "a list of texts that are not empty"),
        ):
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)!r}: must be {range_}")


@dataclass(eq=False, kw_only=True)
class Row:
    """One sample of a prompt while it is written: ``ids`` and log-probabilities of its own tokens (of the model, at
    temperature 1), their text so far without a stop token, and how it ended ("" while it has not)."""

    group: "Group"
    number: int
    random: np.random.Generator
    sequence: CachedSequence
    decoder: DecodeStream
    held: str  # end of the prompt's text that the decoder gives with the first of the row's own
    ids: list[int] = field(default_factory=list)
    log_p: float = 0.0
    text: str = ""
    ending: Ending = ""


@dataclass(eq=False, kw_only=True)
class Group:
    """A prompt and the numbers of its samples that are still to be started."""

    name: str  # in errors
    prompt_ids: list[int]
    numbers: deque[int]
    sequence: CachedSequence  # the prompt in the cache, while rows may still start from it
    decoder: DecodeStream  # after the prompt
    held: str  # of its text: an end that looks like a part of a character
    rows: list[Row] = field(default_factory=list)
    last_1H: Tensor = field(default_factory=lambda: torch.empty(0))  # state of its last token

    @property
    def key(self) -> int:
        """The same for the same tokens."""
        raw = np.array(self.prompt_ids, dtype=np.int64).tobytes()
        return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


class Policy:
    """A language model and its tokenizer, on one device, without gradients.

    ``stop_ids``: tokens that end a text: those of the tokenizer, its chat template and generation_config.json.
    ``fingerprint``: of the weights.
    """

    def __init__(
        self,
        network: LlamaLanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Iterable[int],
        tokens_per_batch: int,
        cache_tokens: int,
        fingerprint: str,
    ) -> None:
        self.network, self.config, self.tokenizer = network, network.config, tokenizer
        self.device = network.model.embed_tokens.weight.device
        self.stop_ids = frozenset(stop_ids)
        self.tokens_per_batch, self.cache_tokens, self.fingerprint = tokens_per_batch, cache_tokens, fingerprint

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        tokens_per_batch: int = 16384,
        cache_tokens: int = CACHE_TOKENS,
        attention: str = "auto",
    ) -> Self:
        """Loads a folder or a hub repository of a Llama, Mistral, Qwen2 or Qwen3 with its lm_head.

        Args:
            device: by default this process's GPU, or the CPU where there is none.
            dtype: ``auto`` is bfloat16 on a GPU, else float32.
            tokens_per_batch: maximum tokens per forward; longer prompts take several.
            cache_tokens: maximum tokens, of all prompts and texts at a time, whose keys and values are kept.
            attention: see attention.py.

        Raises:
            UserError: no such model, or one without an lm_head.
        """
        folder = locate(str(path_or_hub), "POLICY", MODEL_FILES)
        config, tied, weights = open_language_model(folder)
        tokenizer = load_tokenizer(tokenizer_folder(folder))
        check_vocabulary(tokenizer, config.vocab_size, str(folder))
        place = default_device() if device is None else torch.device(device)
        with torch.device("meta"):
            network = LlamaLanguageModel(config, tied=tied, attention_backend=attention)
        for parameter in network.parameters():  # RoPE's frequencies stay float32
            parameter.data = parameter.data.to(compute_dtype(dtype, place))
        digest = hashlib.sha256()
        load(network.eval().requires_grad_(False), place, hashed(weights.rows, digest.update))
        stop_ids = end_tokens(tokenizer) | _stated_stops(base_folder(folder))
        return cls(network, tokenizer, stop_ids, tokens_per_batch, cache_tokens, digest.hexdigest())

    def encode(self, prompts: Sequence[str | Messages]) -> list[list[int]]:
        """The tokens of prompts: text, or messages through the chat template up to the start of the answer.

        Raises:
            TypeError: a text instead of a list of texts.
            UserError: a prompt without tokens, or messages without a chat template that suits them.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list: put a single prompt into a list")
        texts = [as_text(self.tokenizer, prompt, "")[0] for prompt in prompts]
        empty = [""] * len(texts)
        encoded = encode_completions(self.tokenizer, texts, empty, [True] * len(texts)) if texts else []
        return [one.ids.tolist() for one in encoded]

    def generate(self, prompts: Sequence[str | Messages], *, rows: int = ROWS, **sampling: Any) -> list[str]:
        """The continuation of each prompt, text or messages, without special tokens. See ``generate_ids``."""
        new_ids = self.generate_ids(self.encode(prompts), rows=rows, **sampling)
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in new_ids]

    def generate_ids(
        self, prompts_ids: Sequence[Sequence[int]], *, rows: int = ROWS, **sampling: Any
    ) -> list[list[int]]:
        """The new tokens of each prompt, the stop token last where one was reached.

        A prompt that occurs n times is computed once, and gets its first n samples.

        Args:
            rows: maximum number of continuations that are written at a time.
            sampling: the fields of Sampling, such as ``max_new_tokens`` and ``temperature``.

        Raises:
            TypeError: an option that Sampling does not have.
            UserError: an option or a token out of range, an empty prompt, one that is too long for the cache or the
                sliding window, or logits that are not finite.
        """
        places: dict[tuple[int, ...], list[int]] = {}
        for i, ids in enumerate(prompts_ids):
            places.setdefault(tuple(int(token) for token in ids), []).append(i)
        writer = Writer(self, Sampling(**sampling), rows=rows)
        groups = [writer.add(list(ids), len(own), f"prompt {own[0]}") for ids, own in places.items()]
        while writer.step():
            pass
        new_ids: dict[int, list[int]] = {}
        for group, own in zip(groups, places.values(), strict=True):
            new_ids.update(zip(own, (row.ids for row in sorted(group.rows, key=lambda row: row.number)), strict=True))
        return [new_ids[i] for i in range(len(prompts_ids))]


def _stated_stops(folder: Path) -> frozenset[int]:
    """Stop tokens of generation_config.json, if there is one."""
    path = folder / "generation_config.json"
    stated = read_json(path, "fix or remove it").get("eos_token_id") if path.is_file() else None
    return frozenset(token for token in (stated if isinstance(stated, list) else [stated]) if isinstance(token, int))


class Writer:
    """Writes rows of prompts, up to ``rows`` at a time, a token each per ``step``.

    ``together``: the rows of a prompt start in the same step. Else they start as soon as there is room, in a step the
    number of which, counted since no row ran, is a multiple of ``every``: unless it was paused, a row then has a
    multiple of ``every`` tokens in the same steps as all others. ``with_text``: rows have their text, as they do with
    stop texts. ``with_log_p``: and their log-probability.
    """

    def __init__(
        self,
        policy: Policy,
        sampling: Sampling,
        *,
        rows: int,
        together: bool = False,
        every: int = 1,
        with_text: bool = False,
        with_log_p: bool = False,
    ) -> None:
        self.policy, self.sampling, self.most_rows = policy, sampling, rows
        self.together, self.every = together, every
        self.with_text, self.with_log_p = with_text or bool(sampling.stop), with_log_p
        network = policy.network
        self.trunk = CachedTrunk(
            network.model, network.attention_backend, tokens=policy.tokens_per_batch, limit=policy.cache_tokens
        )
        self.waiting: deque[Group] = deque()
        self.running: list[Row] = []
        self.steps = 0  # since no row ran
        self.reserved = 0  # tokens of the cache that rows and prompts may still take
        if rows < 1:
            raise UserError(f"rows is {rows}: must be at least 1")

    def add(self, prompt_ids: list[int], samples: int, name: str, *, at_once: int = 1) -> Group:
        """A prompt to be continued. Raises UserError where that is impossible, also where the cache has no room for
        ``at_once`` of its rows."""
        config, new = self.policy.config, self.sampling.max_new_tokens
        if not prompt_ids:
            raise UserError(f"{name} is empty, and the tokenizer adds no start token: there is nothing to continue")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < config.vocab_size:
            raise UserError(f"{name} has a token that is not between 0 and {config.vocab_size - 1}")
        at_once = samples if self.together else min(samples, at_once)
        length, what = len(prompt_ids) + new, f"{name} has {len(prompt_ids)} tokens"
        if len(prompt_ids) + at_once * new > self.policy.cache_tokens:
            texts = f"{at_once} texts" if at_once > 1 else "a text"
            raise UserError(
                f"{what}: with {texts} of {new} tokens more than the cache of {self.policy.cache_tokens} tokens: "
                "shorten it, or raise the limit of the cache"
            )
        if config.sliding_window and length > config.sliding_window:
            raise UserError(f"{what}: with {new} new ones more than the sliding window of {config.sliding_window}")
        if length > config.max_position_embeddings:
            warn_once(
                f"some texts have more tokens than the {config.max_position_embeddings} the policy was trained for"
            )
        sequence = self.trunk.open()
        decoder, held = self._after(prompt_ids)
        group = Group(
            name=name,
            prompt_ids=prompt_ids,
            numbers=deque(range(samples)),
            sequence=sequence,
            decoder=decoder,
            held=held,
        )
        self.waiting.append(group)
        return group

    def step(self) -> list[Row]:
        """Starts rows where there is room, and gives each running row its next token. Returns the rows that got one;
        none if nothing is left to write.

        Raises:
            UserError: logits that are not finite.
        """
        old = self.running
        if not old:
            self.steps = 0
        fresh, prompts = self._start() if self.together or self.steps % self.every == 0 else ([], [])
        self.steps += 1
        work = [Continuation(row.sequence, row.ids[-1:], False) for row in old]
        work += [Continuation(group.sequence, group.prompt_ids, False) for group in prompts]
        states = self.trunk.extend(work)
        for group, state in zip(prompts, states[len(old) :], strict=True):
            group.last_1H = state.clone()
        for row in fresh:
            row.sequence = row.group.sequence.copy()
            row.sequence.reserve(self.sampling.max_new_tokens)
        written = self.running = old + fresh
        if written:
            hidden_RH = torch.cat([*states[: len(old)], *(row.group.last_1H for row in fresh)])
            for row, token, log_p in zip(written, *self._chosen(hidden_RH), strict=True):
                self._append(row, token, log_p)
        for group in {id(row.group): row.group for row in fresh}.values():
            if not group.numbers:  # its rows hold what they need of it
                group.sequence.free()
        return written

    def end(self, row: Row, ending: Ending) -> None:
        """Ends a row, whose place in the cache is free at once."""
        row.ending = ending
        row.sequence.free()
        self.reserved -= self.sampling.max_new_tokens
        if not row.group.numbers and all(one.ending for one in row.group.rows):
            self.reserved -= len(row.group.prompt_ids)
        self.pause(row)

    def pause(self, row: Row) -> None:
        """Lets a row wait, which keeps its place in the cache, until ``resume``."""
        self.running = [one for one in self.running if one is not row]

    def resume(self, rows: Sequence[Row]) -> None:
        self.running = [*self.running, *rows]

    def fork(self, row: Row, number: int) -> Row:
        """Another row with the same tokens, which continues with the random numbers of sample ``number``. It does not
        run yet."""
        twin = self._row(row.group, number)
        twin.sequence, twin.ids, twin.log_p, twin.text = row.sequence.copy(), list(row.ids), row.log_p, row.text
        twin.decoder, twin.held = copy.deepcopy(row.decoder), row.held
        row.group.rows.append(twin)
        self.reserved += self.sampling.max_new_tokens
        return twin

    def _start(self) -> tuple[list[Row], list[Group]]:
        """New rows, and the prompts among theirs that are not computed yet."""
        fresh: list[Row] = []
        prompts: list[Group] = []
        while self.waiting:
            group = self.waiting[0]
            started = len(group.sequence) > 0
            free = self.policy.cache_tokens - self.reserved - (0 if started else len(group.prompt_ids))
            room = min(self.most_rows - len(self.running) - len(fresh), free // self.sampling.max_new_tokens)
            count = min(len(group.numbers), room)
            if self.together and count < len(group.numbers):
                count = 0 if self.running or fresh else len(group.numbers)  # too many rows, rather than none
            if count <= 0:
                break
            if not started:
                group.sequence.reserve(len(group.prompt_ids))
                self.reserved += len(group.prompt_ids)
                prompts.append(group)
            own = [self._row(group, group.numbers.popleft()) for _ in range(count)]
            self.reserved += count * self.sampling.max_new_tokens
            group.rows += own
            fresh += own
            if group.numbers:
                break
            self.waiting.popleft()
        return fresh, prompts

    def _row(self, group: Group, number: int) -> Row:
        key = np.array([self.sampling.seed, group.key], dtype=np.uint64)
        counter = np.array([0, number, 0, 0], dtype=np.uint64)
        return Row(
            group=group,
            number=number,
            random=np.random.Generator(np.random.Philox(key=key, counter=counter)),
            sequence=self.trunk.open(),
            decoder=copy.deepcopy(group.decoder),
            held=group.held,
        )

    def _after(self, prompt_ids: Sequence[int]) -> tuple[DecodeStream, str]:
        """A decoder that has seen the prompt, and what it still holds of its text."""
        decoder, backend = DecodeStream(skip_special_tokens=False), self.policy.tokenizer.backend_tokenizer
        if not self.with_text:
            return decoder, ""
        shown = sum(len(decoder.step(backend, token) or "") for token in prompt_ids)
        return decoder, backend.decode(prompt_ids, skip_special_tokens=False)[shown:]

    @torch.inference_mode()
    def _chosen(self, hidden_RH: Tensor) -> tuple[list[int], list[float]]:
        """The next token of each running row, and its log-probability (0 where nobody asks)."""
        logits_RV = self.policy.network.logits(hidden_RH)
        uniform_R = torch.tensor([row.random.random() for row in self.running], dtype=torch.float64)
        tokens_R, finite_R = next_tokens(logits_RV, self.sampling, uniform_R)
        log_p_R = torch.zeros(len(tokens_R))
        if self.with_log_p:
            log_p_R = logits_RV.gather(1, tokens_R[:, None])[:, 0] - logits_RV.logsumexp(1)
        if not finite_R.all():
            name = self.running[finite_R.tolist().index(False)].group.name
            raise UserError(f"{name}: the policy's logits are not finite: fix its weights, or use float32")
        return tokens_R.tolist(), log_p_R.tolist()

    def _append(self, row: Row, token: int, log_p: float) -> None:
        sampling, before = self.sampling, len(row.text)
        row.ids.append(token)
        row.log_p += log_p
        shown = self.with_text and token not in self.policy.stop_ids
        if shown and (new := row.decoder.step(self.policy.tokenizer.backend_tokenizer, token)):
            row.text += new.removeprefix(row.held)
            row.held = ""
        if token in self.policy.stop_ids or any(
            stop in row.text[max(0, before - len(stop) + 1) :] for stop in sampling.stop
        ):
            self.end(row, "stop")
        elif len(row.ids) == sampling.max_new_tokens:
            self.end(row, "length")


def next_tokens(logits_RV: Tensor, sampling: Sampling, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """(next tokens [R], whether the logits of each row are finite [R]).

    A token is where ``uniform_R``, between 0 and 1, falls in the cumulative probabilities: of the vocabulary in its
    order or, with top-k and top-p, which apply in this order, of the tokens that they keep, the most likely first.
    """
    most_R, best_R = logits_RV.max(1)
    if not sampling.temperature:
        return best_R, most_R.isfinite()
    p_RV = ((logits_RV - most_R[:, None]) / sampling.temperature).softmax(1)
    uniform_R = uniform_R.to(p_RV.device)
    if not sampling.top_k and sampling.top_p == 1:
        return _drawn(p_RV, uniform_R), most_R.isfinite()
    top_RK, tokens_RK = p_RV.topk(min(sampling.top_k or SHORTLIST, p_RV.shape[1]))
    places_R = _drawn(_kept(top_RK, sampling), uniform_R)
    chosen_R = tokens_RK.gather(1, places_R[:, None])[:, 0]
    long_R = top_RK.sum(1) < sampling.top_p
    if not sampling.top_k and long_R.any():  # these rows alone: ties are in another order than after topk
        sorted_RV, tokens_RV = p_RV[long_R].sort(1, descending=True)
        places_R = _drawn(_kept(sorted_RV, sampling), uniform_R[long_R])
        chosen_R[long_R] = tokens_RV.gather(1, places_R[:, None])[:, 0]
    return chosen_R, most_R.isfinite()


def _kept(p_RV: Tensor, sampling: Sampling) -> Tensor:
    """Descending probabilities with 0 for tokens that top-p drops, never for the first."""
    total_R1 = p_RV.sum(1, keepdim=True) if sampling.top_k else 1.0
    dropped_RV = p_RV.cumsum(1) - p_RV >= sampling.top_p * total_R1
    dropped_RV[:, 0] = False
    return p_RV.masked_fill(dropped_RV, 0)


def _drawn(p_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Where the uniform numbers fall in the cumulative probabilities, [R]."""
    cumulative_RV = p_RV.cumsum(1, dtype=torch.float64)
    wanted_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]
    return torch.searchsorted(cumulative_RV, wanted_R1, right=True).clamp_(max=p_RV.shape[1] - 1)[:, 0]
