"""The generative judge: probabilities of verdict tokens, in both orders; local and over HTTP."""

import contextlib
import dataclasses
import http.server
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from gcrm_fast.common.errors import UserError
from gcrm_fast.inference.generation import Policy
from gcrm_fast.rlhf import generative
from gcrm_fast.rlhf.generative import GenerativeJudge
from gcrm_fast.rlhf.trl import RewardFunction
from support.chat import CHATML
from support.policies import save

SHORT = "{prompt} one {first} two {second}; three"
PROMPTS, OWN, OTHERS = ["one?", "two?", "two?"], ["four", "five, six", "seven {first}"], ["six", "five, six", "one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("judge") / "policy", num_hidden_layers=2)


@pytest.fixture(scope="module")
def judge(folder: Path) -> GenerativeJudge:
    return GenerativeJudge(folder, template=SHORT)


def test_probabilities_are_those_of_transformers_in_both_orders(folder: Path, judge: GenerativeJudge) -> None:
    theirs = LlamaForCausalLM.from_pretrained(folder)
    reader = Policy.from_pretrained(folder).tokenizer

    def p_first(prompt: str, first: str, second: str) -> float:
        ids = reader(f"{prompt} one {first} two {second}; three", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = theirs(ids).logits[0, -1]
        return float(logits[[reader.convert_tokens_to_ids(token) for token in "AB"]].softmax(0)[0])

    expected = [
        0.5 * (p_first(prompt, own, other) + 1 - p_first(prompt, other, own))
        for prompt, own, other in zip(PROMPTS, OWN, OTHERS, strict=True)
    ]
    assert judge.scores(PROMPTS, OWN, OTHERS) == pytest.approx(expected, rel=1e-4)
    assert abs(p_first("one?", "four", "six") - expected[0]) > 1e-3, "else one order would do"
    assert len({round(score, 3) for score in expected}) == 3


def test_both_orders_add_up_and_equal_responses_are_at_parity(judge: GenerativeJudge) -> None:
    there, back = judge.scores(PROMPTS, OWN, OTHERS), judge.scores(PROMPTS, OTHERS, OWN)
    assert [a + b for a, b in zip(there, back, strict=True)] == pytest.approx([1.0] * 3, abs=1e-6)
    assert judge.scores(PROMPTS, OWN, OWN) == pytest.approx([0.5] * 3, abs=1e-6)


def test_batches_change_nothing(folder: Path, judge: GenerativeJudge) -> None:
    policy = Policy.from_pretrained(folder, tokens_per_batch=40)
    small = GenerativeJudge(policy, template=SHORT)
    assert small.scores(PROMPTS, OWN, OTHERS) == pytest.approx(judge.scores(PROMPTS, OWN, OTHERS), abs=1e-5)


def test_a_chat_template_makes_it_a_turn_of_the_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy.from_pretrained(folder)
    policy.tokenizer.chat_template = CHATML
    judge = GenerativeJudge(policy, template=SHORT)
    asked: list[Any] = []
    encode = policy.encode

    def noted(prompts: list[Any]) -> list[list[int]]:
        asked.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(policy, "encode", noted)
    turns = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "x"},
    ]
    judge.scores([turns], [[{"role": "assistant", "content": "four"}]], ["six"])
    text = "user: one?\n\nassistant: two\n\nuser: x one four two six; three"
    assert asked[0] == [{"role": "user", "content": text}]


def test_rewards_of_a_judge(judge: GenerativeJudge) -> None:
    reward = RewardFunction(verifiers={"sums": "regex:[0-9]+"}, judge=judge)
    found = reward(["1+1?", *PROMPTS[:1]], ["2", *OWN[:1]], task=["sums", None], reference=["2", OTHERS[0]])
    assert found == [1.0, pytest.approx(judge.scores(PROMPTS[:1], OWN[:1], OTHERS[:1])[0], abs=1e-5)]
    assert reward.parts["judge"] == found[1]


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no place \{second\}"):
        GenerativeJudge(folder, template="{prompt} {first}")
    judge = GenerativeJudge(folder, template=SHORT, verdicts=("first", "second"))
    with pytest.raises(UserError, match="first and second are not one token each to the judge"):
        judge.scores(PROMPTS, OWN, OTHERS)
    with pytest.raises(UserError, match="POLICY"):
        GenerativeJudge(folder / "none")


@pytest.mark.parametrize(
    "url", ["http://localhost:port/v1", "http://localhost:8000/v 1", "http:///v1", "http://localhost:99999", "http://["]
)
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(UserError, match=r"is not the address of a judge: it must be like http://localhost:8000/v1"):
        GenerativeJudge(url)


def test_a_question_longer_than_the_sliding_window(folder: Path) -> None:
    policy = Policy.from_pretrained(folder)
    judge = GenerativeJudge(policy, template=SHORT)
    longest = max(len(ids) for ids in policy.encode([judge._question("one?", "four", "six")]))
    for window in (longest, longest - 1):
        policy.config = dataclasses.replace(policy.config, sliding_window=window)
        if window == longest:
            assert len(judge.scores(["one?"], ["four"], ["six"])) == 1
            continue
        with pytest.raises(UserError, match=rf"has {longest} tokens, more than its sliding window of {window}"):
            judge.scores(["one?"], ["four"], ["six"])


def test_logits_that_are_not_finite(folder: Path) -> None:
    policy = Policy.from_pretrained(folder)
    with torch.no_grad():
        policy.network.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the judge's logits are not finite"):
        GenerativeJudge(policy, template=SHORT).scores(["one?"], ["four"], ["six"])


# ---------------------------------------------------------------------------------------------------------- endpoints


@contextlib.contextmanager
def endpoint(answer: Callable[[dict[str, Any], Any], tuple[int, Any]]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/chat/completions"
            status, reply = answer(body, self.headers)
            if isinstance(reply, bytes):  # the whole answer
                self.wfile.write(reply)
                return
            text = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def listed(**probabilities: float) -> dict[str, Any]:
    tokens = [{"token": token.replace("_", " "), "logprob": math.log(p)} for token, p in probabilities.items()]
    return {"choices": [{"logprobs": {"content": [{"top_logprobs": tokens}]}}]}


def test_an_endpoint_in_both_orders() -> None:
    def answer(body: dict[str, Any], headers: Any) -> tuple[int, Any]:
        assert (body["model"], body["max_tokens"], body["logprobs"]) == ("m", 1, True)
        assert headers["authorization"] == "Bearer key"
        first = body["messages"][0]["content"].index("good") < body["messages"][0]["content"].index("bad")
        return 200, listed(A=0.4, _A=0.2, B=0.2, C=0.2) if first else listed(A=0.15, B=0.45)

    with endpoint(answer) as url:
        judge = GenerativeJudge(url, model="m", api_key="key")
        [score, other] = judge.scores(["q", "q"], ["good", "bad"], ["bad", "good"])
    assert score == pytest.approx(0.5 * (0.75 + 1 - 0.25))
    assert score + other == pytest.approx(1.0)


def test_an_endpoint_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(generative, "PAUSE", 0.001)
    replies: list[tuple[int, Any]] = [(503, {}), (429, {})]
    with endpoint(lambda *_: replies.pop(0) if replies else (200, listed(A=0.9, B=0.1))) as url:
        judge = GenerativeJudge(url)
        assert judge.scores(["q"], ["a"], ["b"]) == [pytest.approx(0.5)], "the third attempt is answered"
    with (
        endpoint(lambda *_: (400, {})) as url,
        pytest.raises(UserError, match=r"the judge does not answer \(HTTP Error 400"),
    ):
        GenerativeJudge(url).scores(["q"], ["a"], ["b"])
    with endpoint(lambda *_: (500, {})) as url, pytest.raises(UserError, match="HTTP Error 500"):
        GenerativeJudge(url).scores(["q"], ["a"], ["b"])
    with endpoint(lambda *_: (200, {"choices": []})) as url, pytest.raises(UserError, match="has no log-probabilities"):
        GenerativeJudge(url).scores(["q"], ["a"], ["b"])
    with endpoint(lambda *_: (200, listed(Well=1.0))) as url:
        assert GenerativeJudge(url).scores(["q"], ["a"], ["b"]) == [0.5]
        assert "an answer begins with neither A nor B: it counts as parity" in capsys.readouterr().err


@pytest.mark.parametrize("reply", [b"no HTTP\r\n\r\n", b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"choices":'])
def test_an_endpoint_that_breaks_off(reply: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generative, "PAUSE", 0.001)
    replies: list[tuple[int, Any]] = [(0, reply)] * generative.ATTEMPTS
    with endpoint(lambda *_: replies.pop() if replies else (200, listed(A=0.9, B=0.1))) as url:
        judge = GenerativeJudge(url)
        with pytest.raises(UserError, match=r"the judge does not answer \(broken HTTP: (no HTTP|IncompleteRead)"):
            judge.preferences(["q"])
        assert judge.preferences(["q"]) == [pytest.approx(0.9)], "after as many attempts as there are"
