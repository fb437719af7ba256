"""Requests that wait for the model together: batches, turns, full queues, clients that leave."""

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from gcrm_fast import RewardModel
from support.serving import HEAD, Server, Stopped, eventually, running


def test_many_clients_share_batches_and_each_gets_its_own(
    server: Server, model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    judge = model.judge
    monkeypatch.setattr(model, "judge", lambda encoded, **more: batches.append(len(encoded)) or judge(encoded, **more))
    texts = [f" {'yes ' * (i % 5)}{i}" for i in range(300)]
    expected = dict(zip(texts, model.score(["hello?"] * len(texts), texts), strict=True))
    batches.clear()
    with ThreadPoolExecutor(16) as pool:
        for text, answer in zip(texts, pool.map(server.score, texts), strict=True):
            assert answer.status == 200
            assert answer.body["rewards"] == pytest.approx([expected[text]], abs=1e-4)
    assert sum(batches) == len(texts)
    assert len(batches) < len(texts) / 2
    assert server.idle()


def test_batches_keep_to_the_token_budget(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that waited while the model was busy are answered in batches of tokens_per_batch, oldest first."""
    seen: list[list[int]] = []
    judge = model.judge
    with running(model) as server, ThreadPoolExecutor(12) as pool:
        stopped = Stopped(model, monkeypatch)
        first = pool.submit(server.score, "first")
        assert stopped.entered.wait(10)
        others = [pool.submit(server.score, "no " * 30) for _ in range(11)]
        assert eventually(lambda: server.batcher.waiting == 12)
        monkeypatch.setattr(model, "judge", lambda e, **more: seen.append([len(c.ids) for c in e]) or judge(e, **more))
        stopped.go()
        assert all(f.result().status == 200 for f in (first, *others))
    assert sum(map(len, seen)) == 11
    assert all(sum(lengths) <= model.budget.tokens for lengths in seen)
    assert max(map(len, seen)) > 1


def test_a_full_queue(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Stopped(model, monkeypatch)
    with running(model, limit=3) as server, ThreadPoolExecutor(2) as pool:
        held = [pool.submit(server.score, "a", "b"), pool.submit(server.score, "c")]
        assert eventually(lambda: server.batcher.waiting == 3)
        refused = server.score("d")
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert server.ask("/health", method="GET").body["waiting"] == 3
        stopped.go()
        assert [len(f.result().body["rewards"]) for f in held] == [2, 1]
        assert server.idle()
        assert server.score("d").status == 200


def test_no_answer_in_time(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """504, and the waiting job leaves the queue unread; a body that does not arrive: 408."""
    with running(model, timeout=0.3) as server:
        stopped = Stopped(model, monkeypatch)
        assert server.score("a").status == 504
        assert server.score("b").status == 504
        seen = []
        judge = model.judge
        monkeypatch.setattr(model, "judge", lambda encoded, **more: seen.append(encoded) or judge(encoded, **more))
        stopped.go()
        assert server.idle()
        assert seen == []  # of "b"
        assert server.score("c").status == 200
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
            raw.sendall(HEAD + b"Content-Length: 9\r\n\r\nhalf")
            assert raw.recv(1000).startswith(b"HTTP/1.1 408")


def test_clients_that_hang_up(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the body is complete, while they wait, and while the model works for them."""
    body = json.dumps({"prompts": ["a"], "completions": ["b"]}).encode()
    head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
    with running(model) as server:
        stopped = Stopped(model, monkeypatch)
        lines = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(30)]
        lines[1].sendall(head + body)
        assert stopped.entered.wait(30)  # the model works for one of them
        for i, raw in enumerate(lines):
            if i != 1:
                raw.sendall(head + (body if i % 3 else body[:9]))
        assert eventually(lambda: server.batcher.waiting == 20)
        judged = []
        for raw in lines:
            raw.close()
        with ThreadPoolExecutor(1) as pool:
            patient = pool.submit(server.score, "yes")
            assert eventually(lambda: server.batcher.waiting == 21)
            assert server.open(1)
            judge = model.judge
            monkeypatch.setattr(
                model, "judge", lambda encoded, **more: judged.append(encoded) or judge(encoded, **more)
            )
            stopped.go()
            assert patient.result().status == 200
        assert server.idle()
        assert [len(encoded) for encoded in judged] == [1]  # no work for clients that have left
        assert eventually(lambda: not server.program.server_state.tasks)
        assert server.score("yes").status == 200


def test_a_large_request_takes_turns_and_ends_with_its_client(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f" {i} words of a completion" for i in range(100)]
    judge, batches = model.judge, []

    def watched(encoded: Any, **more: Any) -> Any:
        batches.append(len(encoded))
        return judge(encoded, **more)

    monkeypatch.setattr(model, "judge", watched)
    expected = model.score(["hello?"] * 100, texts)
    with running(model, limit=200) as server, ThreadPoolExecutor(2) as pool:
        assert sum(len(c.ids) for c in model.encode(["hello?"] * 100, texts)) > 4 * model.budget.tokens
        stopped = Stopped(model, monkeypatch)
        large = pool.submit(server.score, *texts)
        assert stopped.entered.wait(30)
        small = pool.submit(server.score, "yes")
        assert eventually(lambda: server.batcher.waiting == 101)
        batches.clear()
        stopped.go()
        np.testing.assert_allclose(large.result().body["rewards"], expected, rtol=1e-5, atol=1e-5)
        assert small.result().status == 200
        assert len(batches) > 4
        assert sum(batches) == 101
        assert server.idle()
        # One that nobody waits for any more ends with the current batch.
        stopped = Stopped(model, monkeypatch)
        line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        line.request(
            "POST",
            "/score",
            json.dumps({"prompts": ["hello?"] * 100, "completions": texts}),
            {"content-type": "application/json"},
        )
        assert stopped.entered.wait(30)
        line.close()
        assert eventually(lambda: not server.program.server_state.tasks)
        batches.clear()
        stopped.go()
        assert server.idle()
        assert len(batches) == 1


def test_a_model_that_fails_for_one_answers_the_others(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = model.encode(["hello?"], ["poison"])[0].ids.tobytes()
    judge = model.judge

    def failing(encoded: Any, **more: Any) -> Any:
        if any(c.ids.tobytes() == poison for c in encoded):
            raise RuntimeError("out of memory")
        return judge(encoded, **more)

    monkeypatch.setattr(model, "judge", failing)
    with running(model, delay=0.2) as server, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(server.score, text) for text in ("yes", "poison", "no")]
        assert [f.result().status for f in answers] == [200, 503, 200]
        assert server.idle()


def test_pending_requests_are_answered_before_the_end(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Stopped(model, monkeypatch)
    with running(model) as server, ThreadPoolExecutor(4) as pool:
        held = [pool.submit(server.score, "yes") for _ in range(4)]
        assert eventually(lambda: server.batcher.waiting == 4)
        server.program.should_exit = True
        time.sleep(0.3)
        stopped.go()
        assert [f.result().status for f in held] == [200] * 4
