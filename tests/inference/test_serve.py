"""gcrm serve over real connections: answers, refusals, and what it survives."""

import asyncio
import contextlib
import importlib
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.routing import Route
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gcrm_fast import RewardModel, cli
from gcrm_fast.commands.serve import ServeOptions, is_open, read_token
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.tokenization import save_tokenizer
from gcrm_fast.inference.protocols import RewardRequest
from gcrm_fast.inference.server import Endpoints
from gcrm_fast.rlhf.trl import RewardFunction
from support.chat import TOOLS
from support.models import VERDICT
from support.serving import HEAD, Answer, Server, ask, eventually, running
from support.training_runs import ROOT

PROMPTS = ["hello?", "hello?", "naïve", "1 2 3", ""]
COMPLETIONS = [" yes.", " hello world 123<|eos|>", " 漢字", "", "no no no"]
QUERIES = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]


def test_help_names_every_endpoint() -> None:
    nothing: Any = None
    for route in Endpoints(nothing, nothing, "", "", 1, 1.0, nothing).routes():
        assert isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}:
            assert f"{method} {route.path}" in " ".join(str(ServeOptions.__doc__).split())


# ------------------------------------------------------------------------------------------------------------ answers


def test_get_reward_as_openrlhf_asks(server: Server, model: RewardModel) -> None:
    """Queries alone; with prompts; with labels, which are ignored; with padding left at both ends."""
    rewards = model.score(PROMPTS, COMPLETIONS)
    ends = [q[-1] for q in model.q_values(PROMPTS, COMPLETIONS)]
    pad = model.tokenizer.pad_token
    for body in (
        {"query": QUERIES},
        {"query": QUERIES, "prompts": PROMPTS, "labels": [None, "a", 1, {}, []]},
        {"query": [f"{pad}{pad}{query}{pad}" for query in QUERIES], "prompts": []},
    ):
        answer = server.ask("/get_reward", body)
        assert answer.status == 200
        assert answer.body.keys() == {"rewards", "scores", "extra_logs"}
        np.testing.assert_allclose(answer.body["rewards"], rewards, rtol=1e-5, atol=1e-5)
        assert answer.body["scores"] == answer.body["rewards"]
        np.testing.assert_allclose(answer.body["extra_logs"]["q_end"], ends, rtol=1e-5, atol=1e-5)
    empty = server.ask("/get_reward", {"query": [], "prompts": [], "labels": []})
    assert (empty.status, empty.body) == (200, {"rewards": [], "scores": [], "extra_logs": {}})


@pytest.mark.parametrize(
    ("query", "prompt", "pad", "split"),
    [
        ("<p><p>ab<p>", "a", "<p>", ("a", "b")),
        ("<p><p>ab<p>", "", "<p>", ("", "ab")),
        ("<p><p>ab", "<p>a", "<p>", ("<p>a", "b")),
        ("<s><s><s>user", "<s>us", "<s>", ("<s>us", "er")),
        ("<s>user", "<s>us", "<s>", ("<s>us", "er")),
        ("<s><s><s>user", "", "<s>", ("", "<s>user")),
        ("<s><s><s>user", "other", "<s>", ("", "<s>user")),
        ("user", "", "<s>", ("", "user")),
        ("</s></s>ab</s></s>", "a", "</s>", ("a", "b</s>")),
        ("ab", "a", "</s>", ("a", "b")),
    ],
)
def test_padding_of_queries(query: str, prompt: str, pad: str, split: tuple[str, str]) -> None:
    """It is removed until the query starts with its prompt, which may start with the same token."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"?": 0})), pad_token=pad, bos_token="<s>", eos_token="</s>"
    )
    prompts, completions = RewardRequest(query=[query], prompts=[prompt]).texts(tokenizer)
    assert (prompts, completions) == ([split[0]], [split[1]])


def test_get_reward_equals_score_for_chatml(folder: Path, tmp_path: Path) -> None:
    """Where the token that starts a turn is bos and pad, as SmolLM2 has it, and the tokenizer adds none."""
    shutil.copytree(folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    tokenizer.bos_token = tokenizer.pad_token = "<|im_start|>"
    save_tokenizer(tokenizer, tmp_path / "model")
    turns = [{"role": "user", "content": "hello?"}], [{"role": "assistant", "content": "yes"}]
    prompt, completion = "<|im_start|>user\nhello?<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>\n"
    with running(RewardModel.from_pretrained(tmp_path / "model", tokens_per_batch=256)) as server:
        (expected,) = server.ask("/score", {"prompts": turns[:1], "completions": turns[1:]}).body["rewards"]
        for query in (prompt + completion, "<|im_start|>" * 5 + prompt + completion + "<|im_start|>" * 3):
            for prompts in ([prompt], []):
                answer = server.ask("/get_reward", {"query": [query], "prompts": prompts}).body
                assert answer["rewards"] == pytest.approx([expected], abs=1e-5)


def test_samples_of_a_prompt_compute_it_once(
    server: Server, model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    judge = model.judge
    monkeypatch.setattr(model, "judge", lambda encoded, **more: seen.extend(encoded) or judge(encoded, **more))
    server.ask("/get_reward", {"query": QUERIES[:2], "prompts": PROMPTS[:2]})
    assert seen[0].start == seen[1].start > 2
    np.testing.assert_array_equal(seen[0].ids[: seen[0].start], seen[1].ids[: seen[1].start])


def test_score_gives_q_values_of_any_goal(server: Server, model: RewardModel) -> None:
    rewards = model.score(PROMPTS, COMPLETIONS)
    for name in (None, "default", "short"):
        body = {"prompts": PROMPTS, "completions": COMPLETIONS} | ({"goal": name} if name else {})
        answer = server.ask("/score", body).body
        np.testing.assert_allclose(answer["rewards"], rewards, rtol=1e-5, atol=1e-5)
        assert answer["goal"] == (name or "default")
        for q_n, expected_n in zip(answer["q_values"], model.q_values(PROMPTS, COMPLETIONS, name), strict=True):
            np.testing.assert_allclose(q_n, expected_n, rtol=1e-5, atol=1e-5)
    empty = server.ask("/score", {"prompts": [], "completions": []})
    assert empty.body == {"rewards": [], "goal": "default", "q_values": []}


def test_score_of_cut_completions_and_of_messages(server: Server, model: RewardModel) -> None:
    cut = server.ask("/score", {"prompts": PROMPTS[:2], "completions": COMPLETIONS[:2], "cuts": [True, False]}).body
    judged = model.judge(model.encode(PROMPTS[:2], COMPLETIONS[:2], [True, False]))
    np.testing.assert_allclose(cut["rewards"], [j.reward for j in judged], rtol=1e-5, atol=1e-5)
    user, answer = [{"role": "user", "content": "hello?"}], [{"role": "assistant", "content": "yes"}]
    scored = server.ask("/score", {"prompts": [user], "completions": [answer]})
    prompt = "<|im_start|>user\nhello?<|im_end|>\n<|im_start|>assistant\n"
    assert scored.body["rewards"] == pytest.approx(model.score([prompt], ["yes<|im_end|>\n"]), abs=1e-5)


def test_tasks_and_references_ask_for_the_hybrid_reward(model: RewardModel) -> None:
    body = {
        "prompts": PROMPTS[:4],
        "completions": ["#### 4", " yes.", " 漢字", " 5"],
        "task": ["sums", None, "talk", "sums"],
        "reference": [4, " no", " no", "4"],
        "cuts": [False, False, True, False],
    }
    verifiers = {"sums": r"regex:#### (\d+)"}
    with running(model, verifiers=verifiers) as server:
        answer = server.ask("/score", body)
        assert answer.status == 200, answer
        reward = RewardFunction(verifiers=verifiers, otherwise=model, ends=[0])
        expected = reward(
            body["prompts"], body["completions"], [[0], [0], [1], [0]], task=body["task"], reference=body["reference"]
        )
        np.testing.assert_allclose(answer.body["rewards"], expected, rtol=1e-5)
        assert answer.body["parts"][0] == {"verifier_sums": 1.0, "unreadable": 0.0, "failed": 0.0}
        assert answer.body["parts"][3] == {"verifier_sums": 0.0, "unreadable": 1.0, "failed": 0.0}
        assert answer.body["parts"][1].keys() == {"proxy", "reward", "reference_reward"}
        both = {
            "prompts": [[{"role": "user", "content": "one?"}]] * 2,
            "completions": [[{"role": "assistant", "content": "three"}]] * 2,
            "reference": ["seven"] * 2,
            "system": ["one one one", "five, six; seven"],
        }
        alone = [
            server.ask("/score", {name: values[i : i + 1] for name, values in both.items()}).body["rewards"][0]
            for i in range(2)
        ]
        assert server.ask("/score", both).body["rewards"] == pytest.approx(alone, rel=1e-5)
        assert alone[0] != pytest.approx(alone[1], rel=1e-4)
        for change, message in (
            ({"reference": None}, "the prompt 'hello?' has no verifier of its task and no reference"),
            ({"task": ["sums"]}, "field 'task' has 1 entries, but 'completions' has 4"),
            ({"goal": "default"}, "field 'goal': a hybrid reward has no Q-values"),
        ):
            refused = server.ask("/score", body | change)
            assert (refused.status, message in refused.body["error"]) == (422, True), refused
    with running(model, verifiers={"slow": "support.checks:misbehaves"}, timeout=1.0) as server:
        late = server.ask("/score", {"prompts": ["x"], "completions": ["sleep"], "task": ["slow"]})
        assert late.status == 504


def test_tools_and_system_reach_the_template(
    server: Server, model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in files and for RewardFunction: also calls without content, and parts of text."""
    monkeypatch.setattr(model.tokenizer, "chat_template", TOOLS)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "wx", "arguments": "{}"}}]}
    asked = [{"role": "user", "content": [{"type": "text", "text": "hello?"}]}, call, {"role": "tool", "content": "7"}]
    answer = [{"role": "assistant", "content": "yes"}]
    tools, system = [[{"name": "wx"}], None, None], [None, "be brief", None]
    expected = RewardFunction(model)([asked] * 3, [answer] * 3, tools=tools, system=system)
    assert len(set(expected)) == 3
    body = {"prompts": [asked] * 3, "completions": [answer] * 3, "tools": tools, "system": system}
    assert server.ask("/score", body).body["rewards"] == pytest.approx(expected, abs=1e-5)
    classified = server.ask("/classify", {"messages": asked + answer, "tools": tools[0]})
    assert classified.body["data"][0]["probs"] == pytest.approx(expected[:1], abs=1e-5)
    assert server.ask("/classify", {"input": "yes", "tools": tools[0]}).status == 422


@pytest.mark.parametrize("path", ["/classify", "/pooling"])
def test_vllm_protocols(server: Server, model: RewardModel, path: str) -> None:
    """The rewards of whole texts, or of a conversation, in the fields that vLLM has."""
    rewards = model.score([""] * len(QUERIES), QUERIES)

    def values(answer: Answer) -> list[float]:
        assert answer.status == 200
        assert answer.body.keys() == {"id", "object", "created", "model", "data", "usage"}
        assert answer.body["id"].startswith({"/classify": "classify-", "/pooling": "pooling-"}[path])
        assert answer.body["object"] == "list"
        data = answer.body["data"]
        assert [one["index"] for one in data] == list(range(len(data)))
        if path == "/pooling":
            assert all(one.keys() == {"index", "object", "data"} and one["object"] == "pooling" for one in data)
            return [value for one in data for value in one["data"]]
        assert all(one.keys() == {"index", "label", "probs", "num_classes"} and one["num_classes"] == 1 for one in data)
        return [value for one in data for value in one["probs"]]

    many = server.ask(path, {"model": "mine", "input": QUERIES, "use_activation": False})
    np.testing.assert_allclose(values(many), rewards, rtol=1e-5, atol=1e-5)
    tokens = sum(len(c.ids) for c in model.encode([""] * len(QUERIES), QUERIES))
    assert many.body["usage"] == {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    assert many.body["model"] == "mine"
    one = server.ask(path, {"input": QUERIES[0]})
    np.testing.assert_allclose(values(one), rewards[:1], rtol=1e-5, atol=1e-5)
    assert server.ask("/v1/models", method="GET").body["data"][0]["id"] == one.body["model"] == "small"
    assert values(server.ask(path, {"input": []})) == []
    turns = [{"role": "user", "content": "hello?"}, {"role": "assistant", "content": "yes"}]
    prompt = "<|im_start|>user\nhello?<|im_end|>\n<|im_start|>assistant\n"
    expected = model.score([prompt], ["yes<|im_end|>\n"])
    np.testing.assert_allclose(values(server.ask(path, {"messages": turns})), expected, rtol=1e-5, atol=1e-5)
    for wrong in (
        {},
        {"input": "a", "messages": turns},
        {"input": [1, 2]},
        {"input": "a", "truncate_prompt_tokens": 1},
    ):
        assert server.ask(path, wrong).status == 422


def test_metrics(model: RewardModel) -> None:
    """Requests, seconds, tokens, batches and the queue, behind the token."""
    with running(model, token="secret") as server:
        assert server.ask("/metrics", method="GET").status == 401
        bearer = {"authorization": "Bearer secret"}
        assert server.ask("/score", {"prompts": ["a"] * 3, "completions": ["b"] * 3}, **bearer).status == 200
        assert server.ask("/score", {}, **bearer).status == 422
        assert server.ask("/no/such/path", {}).status == 404
        tokens = sum(len(c.ids) for c in model.encode(["a"] * 3, ["b"] * 3))
        lines = server.ask("/metrics", method="GET", **bearer).body.splitlines()
    expected = {
        'gcrm_requests_total{path="/score",status="200"} 1.0',
        'gcrm_requests_total{path="/score",status="422"} 1.0',
        'gcrm_requests_total{path="/metrics",status="401"} 1.0',
        'gcrm_requests_total{path="other",status="404"} 1.0',
        'gcrm_request_seconds_count{path="/score"} 2.0',
        f"gcrm_tokens_total {tokens:.1f}",
        'gcrm_batch_completions_bucket{le="1.0"} 0.0',
        'gcrm_batch_completions_bucket{le="4.0"} 1.0',
        "gcrm_batch_completions_sum 3.0",
        "gcrm_waiting_completions 0.0",
    }
    assert expected - set(lines) == set()


# ----------------------------------------------------------------------------------------------------------- refusals

MALFORMED = {
    "no body": (None, "body"),
    "no JSON": (b"prompts", "not valid JSON"),
    "half of an object": (b'{"prompts": ["a"], "completions": ', "not valid JSON"),
    "not UTF-8": (b'{"prompts": ["\xff"]}', "body"),
    "nested too deep": (b"[" * 9000, "nested too deeply"),
    "a number of too many digits": (b'{"prompts": ' + b"9" * 9000 + b"}", "body"),
    "a list": ([], "the body must be an object"),
    "null": (b"null", "body"),
    "no completions": ({"prompts": ["a"]}, "field 'completions' is missing: the fields are prompts, completions,"),
    "text for a list": ({"prompts": "a", "completions": "b"}, "field 'prompts' must be a list"),
    "a number for a text": (
        {"prompts": ["a"], "completions": [1]},
        "field 'completions[0]' must be text or a list of messages",
    ),
    "an object as a reference": (
        {"prompts": ["a"], "completions": ["b"], "reference": [{"answer": 4}]},
        "field 'reference[0]' must be text or a whole number or a number or a list of messages",
    ),
    "an empty goal": (
        {"prompts": ["a"], "completions": ["b"], "goal": ""},
        "field 'goal' must have at least 1 character",
    ),
    "NaN": (b'{"prompts": ["a"], "completions": [NaN]}', "completions[0]"),
    "other lengths": ({"prompts": ["a"], "completions": ["b", "c"]}, "has 1 entries"),
    "other cuts": ({"prompts": ["a"], "completions": ["b"], "cuts": []}, "cuts"),
    "cut by a word": (
        {"prompts": ["a"], "completions": ["b"], "cuts": ["yes"]},
        "field 'cuts[0]' must be true or false",
    ),
    "cut to nothing": ({"prompts": ["a"], "completions": [""], "cuts": [True]}, "no token"),
    "unknown goal": ({"prompts": ["a"], "completions": ["b"], "goal": "nix"}, "'nix'"),
    "unknown field": (
        {"prompt": ["a"], "completions": ["b"]},
        "field 'prompt' is unknown: the fields are prompts, completions, cuts, tools, system, goal, task, reference",
    ),
    "half a character": (b'{"prompts": ["a"], "completions": ["\\ud800"]}', "hex escape"),
    "half a character in a name": (b'{"prompts": ["a"], "completions": ["b"], "\\ud800": 1}', "hex escape"),
    "half a character in a goal": (b'{"prompts": ["a"], "completions": ["b"], "goal": "\\ud800"}', "hex escape"),
    "text and messages": ({"prompts": ["a"], "completions": [[{"role": "assistant", "content": "b"}]]}, "both"),
    "a message without content": ({"prompts": [[{"role": "user"}]], "completions": ["b"]}, "prompt[0].content"),
    "other tools": ({"prompts": ["a"], "completions": ["b"], "tools": []}, "'tools' has 0 entries"),
    "tools that are none": ({"prompts": ["a"], "completions": ["b"], "tools": [7]}, "tools[0]"),
    "a picture": (
        {"prompts": [[{"role": "user", "content": [{"type": "image_url"}]}]], "completions": ["b"]},
        "prompt[0].content[0]' is of type 'image_url'",
    ),
    "no messages": ({"prompts": [[]], "completions": [[]]}, "completion 0"),
    "longer than a batch": ({"prompts": ["a"], "completions": ["b c " * 300]}, "more than --tokens-per-batch 256"),
    "more than may wait": ({"prompts": ["a"] * 65, "completions": ["b"] * 65}, "the maximum is 64"),
    "a longer body": ({"prompts": ["a"], "completions": ["b" * 10_000]}, "10000 bytes"),
}


@pytest.mark.parametrize(("body", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_requests(server: Server, body: Any, message: str) -> None:
    """Each gets one clear line, and good requests are still answered."""
    answer = server.ask("/score", body)
    assert 400 <= answer.status < 500
    assert answer.body.keys() == {"error"}
    assert message in answer.body["error"]
    assert "\n" not in answer.body["error"]
    assert server.score("yes").status == 200


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"content_encoding": "gzip"}, "Content-Encoding 'gzip' is not read"),
        ({"content_type": "application/json; charset=latin-1"}, "send application/json in UTF-8"),
        ({"content_type": "application/x-www-form-urlencoded"}, "send application/json in UTF-8"),
        ({"content_type": ""}, "send application/json in UTF-8"),
    ],
)
def test_contents_that_are_not_read(server: Server, headers: dict[str, str], words: str) -> None:
    answer = server.ask("/score", {"prompts": ["a"], "completions": ["b"]}, **headers)
    assert answer.status == 415
    assert words in answer.body["error"]


@pytest.mark.parametrize("content_type", ["application/json; charset=UTF-8", 'Application/JSON;charset="utf-8"'])
def test_contents_that_are_read(server: Server, content_type: str) -> None:
    body = {"prompts": ["a"], "completions": ["b"]}
    assert server.ask("/score", body, content_type=content_type, content_encoding="identity").status == 200


def test_a_missing_content_type(server: Server) -> None:
    with server.connect() as raw:
        raw.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
        answer = b"".join(iter(lambda: raw.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 415")
    assert b"the header Content-Type is missing" in answer


def test_malformed_openrlhf_requests_and_wrong_paths(server: Server) -> None:
    for body in ({}, {"query": "a"}, {"query": [1]}, {"query": ["a"], "prompts": ["a", "b"]}, []):
        assert server.ask("/get_reward", body).status == 422
    nowhere, get = server.ask("/nowhere", {}), server.ask("/score", method="GET")
    assert (nowhere.status, get.status) == (404, 405)
    assert "POST /score" in nowhere.body["error"]
    assert get.body["error"] == "this path does not answer GET: send POST"
    assert "error" in server.ask("/score", method="GET").body
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"no HTTP at all\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 400")
    assert server.score("yes").status == 200


def test_a_body_without_an_announced_length(server: Server) -> None:
    """Chunked, and too long: refused as soon as that is known."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(20):
                raw.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_token_is_asked_for_before_anything_is_read(model: RewardModel) -> None:
    with running(model, token="secret") as server:
        body = {"prompts": ["a"], "completions": ["b"]}
        for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"authorization": "Bearer"}):
            answer = server.ask("/score", body, **wrong)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert server.ask("/score", b"x" * 20_000).status == 401
        assert server.ask("/score", body, authorization="Bearer secret").status == 200
        assert server.ask("/get_reward", {"query": ["a"]}, authorization="bearer secret").status == 200
        assert server.idle()
        assert server.ask("/health", method="GET").body == {"status": "ok", "waiting": 0}


# ------------------------------------------------------------------------------------- the benchmark and the command


def test_the_benchmark_sees_wrong_answers(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    bench = importlib.import_module("serve")
    texts = [f" {i}" for i in range(40)]
    bodies = [bench.body_of("hello?", text) for text in texts]
    expected = model.score(["hello?"] * len(texts), texts)
    with running(model, max_body=2**20) as server:
        right = asyncio.run(bench.ask_all(server.port, bodies, expected, 8))
        assert (right.wrong, np.isnan(right.latencies).sum()) == (0, 0)
        assert asyncio.run(bench.ask_all(server.port, bodies, expected + 1, 8)).wrong == len(texts)
        assert asyncio.run(bench.malformed(server.port)) == []
        asyncio.run(bench.hang_up(server.port, bodies, random.Random(0)))
        assert server.idle()
        monkeypatch.setattr(bench, "MALFORMED", (bodies[0],))
        assert len(asyncio.run(bench.malformed(server.port))) == 1
    for name in ("serve", "measure"):
        sys.modules.pop(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "--port", "70000"], "--port 70000"),
        (["{folder}", "--port", "{taken}"], "cannot listen there"),
        (["{folder}", "--queue", "0"], "--queue 0"),
        (["{folder}", "--token-file", "{empty}"], "must hold one token"),
        (["{folder}", "--token-file", "nowhere"], "nowhere"),
        (["nowhere", "--port", "0"], "nowhere"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    folder: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"folder": folder, "taken": taken.getsockname()[1], "empty": tmp_path / "empty"}
        assert cli.run("serve", [argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_addresses_that_others_can_reach() -> None:
    assert not any(map(is_open, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert all(map(is_open, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file comes before the variable; without both there is none; an empty token is an error."""
    (tmp_path / "token").write_text(" secret\n")
    options = ServeOptions(model="m", token_file=str(tmp_path / "token"))
    monkeypatch.delenv("GCRM_TOKEN", raising=False)
    assert read_token(ServeOptions(model="m")) == ""
    monkeypatch.setenv("GCRM_TOKEN", "other")
    assert (read_token(options), read_token(ServeOptions(model="m"))) == ("secret", "other")
    for wrong in ("", " ", "two words", "ü"):
        monkeypatch.setenv("GCRM_TOKEN", wrong)
        with pytest.raises(UserError, match="GCRM_TOKEN"):
            read_token(ServeOptions(model="m"))


def test_the_program_warns_serves_and_ends_in_order(folder: Path) -> None:
    """On all addresses without a token it warns; on SIGTERM it answers pending requests and ends with code 0."""
    command = [
        sys.executable,
        "-m",
        "gcrm_fast.cli",
        "serve",
        str(folder),
        "--port",
        "0",
        "--delay",
        "1",
        "--host",
        "0.0.0.0",
    ]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        too_late = threading.Timer(60, process.kill)  # a line that is missing would be waited for without end
        too_late.start()
        line, verdict = process.stdout.readline(), process.stdout.readline()
        too_late.cancel()
        port = int(line.partition(",")[0].rpartition(":")[2])
        assert "goals: default, short" in line
        assert verdict == f"Found by the model's training run: {VERDICT}\n"
        waiting = socket.create_connection(("127.0.0.1", port), timeout=20)
        body = b'{"query": ["a"]}'
        waiting.sendall(
            b"POST /get_reward HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert eventually(lambda: ask(port, "/health", method="GET").body["waiting"] == 1)
        process.send_signal(signal.SIGTERM)
        assert waiting.recv(1000).startswith(b"HTTP/1.1 200")
        waiting.close()
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    first, second = errors.splitlines()
    assert "warning: 0.0.0.0 can be reached" in first
    assert "plain text, although the model has a chat template" in second


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_commands_of_the_docs(server: Server) -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("    curl ")]
    assert len(commands) == 8
    for command in commands:
        arguments = shlex.split(command.replace(":8000", f":{server.port}"))
        result = subprocess.run([*arguments, "--fail-with-body", "-sS"], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stdout + result.stderr
