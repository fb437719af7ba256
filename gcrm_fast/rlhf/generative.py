"""A generative reward model (GenRM): a language model says which of two responses is better.

    s(a, b) = 1/2 [P(A | a first, b second) + P(B | b first, a second)],    P(A) + P(B) = 1

where P are the probabilities of the two verdict tokens after a verdict prompt. The mean over both orders cancels a
preference for the first place, so s(a, b) + s(b, a) = 1 and s(a, a) = 1/2. After arXiv 2503.22230, which scores a
response against a reference: 1/2 is parity.
"""

import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.common.notes import warn_once
from gcrm_fast.inference.cached import CachedTrunk, Continuation
from gcrm_fast.inference.generation import Policy
from gcrm_fast.rlhf.hybrid import Text
from gcrm_fast.rlhf.verifiers import plain

TEMPLATE = """Which response to the prompt is better?

Prompt:
{prompt}

Response A:
{first}

Response B:
{second}

Answer with A or B. The better response is """
VERDICTS = ("A", "B")
PLACE = re.compile(r"\{(prompt|first|second)\}")
UNFIT = re.compile(r"[\x00-\x20\x7f]")  # in an address
AT_ONCE = 8  # requests to an endpoint
ATTEMPTS = 3  # of a request that the server could not answer
PAUSE = 0.5  # seconds, doubled with every attempt
LISTED = 20  # most likely tokens that an endpoint is asked for


class GenerativeJudge:
    """Scores responses against references by the verdicts of a language model: a ``Policy``, a folder or hub name of
    one, or the address of an OpenAI-compatible endpoint such as ``http://localhost:8000/v1``.

    ``template`` has the places {prompt}, {first} and {second}; the model's next token after it is one of ``verdicts``,
    the first of which says that the first response is better. A chat template, if the model has one, makes it a turn of
    the user. ``model`` and ``api_key`` are an endpoint's; ``seconds`` is the maximum of one of its answers.

    Raises:
        UserError: no such policy; no address; a template without one of its places; a verdict that is not one token.
    """

    def __init__(
        self,
        source: Policy | str | Path,
        *,
        template: str = TEMPLATE,
        verdicts: tuple[str, str] = VERDICTS,
        model: str = "",
        api_key: str = "",
        seconds: float = 60.0,
    ) -> None:
        if missing := {"prompt", "first", "second"} - set(PLACE.findall(template)):
            raise UserError(f"the template of verdicts has no place {{{min(missing)}}}")
        self.template, self.verdicts = template, verdicts
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            self.preferences = _Endpoint(source, verdicts, model, api_key, seconds).preferences
        else:
            policy = source if isinstance(source, Policy) else Policy.from_pretrained(source)
            self.preferences = _LocalModel(policy, verdicts).preferences

    def scores(self, prompts: Sequence[Text], completions: Sequence[Text], references: Sequence[Text]) -> list[float]:
        """s(completion, reference) for each, from 0 to 1."""
        pairs = list(zip(map(_dialogue, prompts), map(plain, completions), map(plain, references), strict=True))
        questions = [self._question(*pair) for pair in pairs]
        questions += [self._question(prompt, reference, own) for prompt, own, reference in pairs]
        first = self.preferences(questions)
        return [0.5 * (a + 1 - b) for a, b in zip(first[: len(pairs)], first[len(pairs) :], strict=True)]

    def _question(self, prompt: str, first: str, second: str) -> str:
        """In a single pass, since responses may contain the name of a place."""
        texts = {"prompt": prompt, "first": first, "second": second}
        return PLACE.sub(lambda place: texts[place[1]], self.template)


def _dialogue(prompt: Text) -> str:
    """Messages of several turns with their roles."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return plain(prompt)
    return "\n\n".join(f"{message['role']}: {plain([message])}" for message in prompt)


class _LocalModel:
    """Verdicts from the logits of a policy."""

    def __init__(self, policy: Policy, verdicts: tuple[str, str]) -> None:
        self.policy, self.verdicts = policy, verdicts

    def _encoded(self, question: str) -> tuple[list[int], list[int]]:
        """The tokens before the verdict, and the two verdicts' tokens. Tokenized together, since a verdict may join the
        space before it."""
        asked: Text = [{"role": "user", "content": question}] if self.policy.tokenizer.chat_template else question
        if isinstance(asked, str):
            before, *whole = self.policy.encode([question.rstrip(" "), *(question + one for one in self.verdicts)])
        else:
            [before] = self.policy.encode([asked])
            own = [self.policy.tokenizer(one, add_special_tokens=False)["input_ids"] for one in self.verdicts]
            whole = [before + ids for ids in own]
        same = [ids[: len(before)] == before and len(ids) == len(before) + 1 for ids in whole]
        if not all(same) or whole[0] == whole[1]:
            raise UserError(
                f"the verdicts {' and '.join(self.verdicts)} are not one token each to the judge: name others"
            )
        return before, [ids[-1] for ids in whole]

    @torch.inference_mode()
    def preferences(self, questions: Sequence[str]) -> list[float]:
        """P of the first verdict among the two, for each question."""
        policy, network = self.policy, self.policy.network
        found: list[float] = []
        encoded = [self._encoded(question) for question in questions]
        longest, window = max((len(ids) for ids, _ in encoded), default=0), policy.config.sliding_window
        if window and longest > window:
            raise UserError(f"a question to the judge has {longest} tokens, more than its sliding window of {window}")
        start = 0
        while start < len(encoded):
            end, tokens = start, 0
            while end < len(encoded) and (end == start or tokens + len(encoded[end][0]) <= policy.tokens_per_batch):
                tokens += len(encoded[end][0])
                end += 1
            trunk = CachedTrunk(
                network.model, network.attention_backend, tokens=policy.tokens_per_batch, limit=policy.cache_tokens
            )
            part = encoded[start:end]
            states = trunk.extend([Continuation(trunk.open(), ids, False) for ids, _ in part])
            for hidden_1H, (_, verdicts) in zip(states, part, strict=True):
                both = network.logits(hidden_1H)[0, verdicts]
                if not both.max().isfinite():  # NaN if either is
                    raise UserError("the judge's logits are not finite: fix its weights, or use float32")
                found.append(float(both.softmax(0)[0]))
            start = end
        return found


class _Endpoint:
    """Verdicts from the log-probabilities that an OpenAI-compatible server answers."""

    def __init__(self, url: str, verdicts: tuple[str, str], model: str, api_key: str, seconds: float) -> None:
        try:
            address = urllib.parse.urlsplit(url)
            fits = bool(address.hostname) and address.port != 0  # port raises if it is no number
        except ValueError:
            fits = False
        if not fits or UNFIT.search(url):
            raise UserError(f"{url!r} is not the address of a judge: it must be like http://localhost:8000/v1")
        self.url, self.verdicts, self.model = url.rstrip("/") + "/chat/completions", verdicts, model
        self.api_key, self.seconds = api_key, seconds

    def preferences(self, questions: Sequence[str]) -> list[float]:
        """P of the first verdict among the two, for each question; 1/2 where the answer begins with neither."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._preference, questions))

    def _preference(self, question: str) -> float:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": LISTED,
        }
        answer = self._post(body)
        try:
            listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            probabilities = [
                sum(math.exp(one["logprob"]) for one in listed if one["token"].strip() == verdict)
                for verdict in self.verdicts
            ]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.url}: the answer has no log-probabilities: serve the judge with logprobs") from None
        if not sum(probabilities):
            warn_once(f"{self.url}: an answer begins with neither {' nor '.join(self.verdicts)}: it counts as parity")
            return 0.5
        return probabilities[0] / sum(probabilities)

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        attempt = 1
        while True:
            try:
                with urllib.request.urlopen(request, timeout=self.seconds) as response:
                    return json.load(response)
            except (OSError, ValueError, HTTPException) as error:
                code = error.code if isinstance(error, urllib.error.HTTPError) else 500
                if attempt == ATTEMPTS or (code < 500 and code != 429):
                    broken = "broken HTTP: " if isinstance(error, HTTPException) else ""
                    raise UserError(f"{self.url}: the judge does not answer ({broken}{one_line(error)})") from None
            time.sleep(PAUSE * 2**attempt)
            attempt += 1
