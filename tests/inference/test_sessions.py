"""Streams over HTTP: their Q-values and rewards are those of one forward, what is dropped, limits, errors."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcrm_fast import RewardModel
from gcrm_fast.inference.protocols import Chunk, OpenRequest, PushRequest
from gcrm_fast.inference.sessions import Sessions
from gcrm_fast.model.cache import CacheFull
from support.chat import CHATML, LLAMA3, TOOLS
from support.serving import Answer, Server, running, write_served_model

PROMPT = "hello?"
TEXTS = (" yes.", " hello world 123, and no", " 漢字", " no no no no no no no no")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def streams(model: RewardModel, clock: Clock) -> Iterator[Server]:
    """A server of up to two streams of 400 tokens together, which close when idle for a minute of the clock."""
    with running(model, sessions=Sessions(model, limit=2, tokens=400, idle=60, clock=clock)) as started:
        yield started


@pytest.fixture
def opened(streams: Server) -> Iterator[str]:
    """The path of a stream of four rows for PROMPT as text, closed at the end of the test."""
    path = open_stream(streams)
    yield path
    streams.ask(path, method="DELETE")


def open_stream(server: Server, **changes: Any) -> str:
    answer = server.ask("/stream", {"prompt": PROMPT, "rows": 4, **changes})
    assert answer.status == 200, answer.body
    return f"/stream/{answer.body['id']}"


def push(server: Server, path: str, *chunks: dict[str, Any], drop: tuple[int, ...] = ()) -> Answer:
    return server.ask(path, {"chunks": chunks, "drop": drop})


def collected(answers: list[Answer], rows: int) -> list[list[float]]:
    """The Q-values of each row, where later ones replace earlier ones from their place on."""
    values: list[list[float]] = [[] for _ in range(rows)]
    for answer in answers:
        assert answer.status == 200, answer.body
        for one in answer.body["rows"]:
            values[one["row"]][one["first"] :] = one["q_values"]
    return values


def test_chunks_of_ids_give_the_values_of_one_forward(streams: Server, model: RewardModel) -> None:
    whole = model.encode([PROMPT] * 4, TEXTS, [True] * 4)
    ids = [one.ids[one.start :].tolist() for one in whole]
    path = open_stream(streams, prompt=None, prompt_ids=whole[0].ids[: whole[0].start].tolist(), goal="short")
    cuts = [(0, 2, 3), (0, 0, 5), (0, 1, 2), (0, 4, 8)]
    answers = [
        push(streams, path, *({"row": row, "ids": ids[row][cuts[row][i] : cuts[row][i + 1]]} for row in order))
        for i, order in enumerate([(0, 1, 2, 3), (3, 1, 0, 2)])
    ]
    last = [{"row": row, "ids": ids[row][cuts[row][2] :], "end": "length" if row == 2 else "stop"} for row in range(4)]
    answers.append(push(streams, path, *last))
    for own, expected in zip(
        collected(answers, 4), model.judge(whole, goals_GD=model.goal("short")[None]), strict=True
    ):
        assert expected.q_Gn is not None
        np.testing.assert_allclose(own, expected.q_Gn[0], rtol=1e-4, atol=1e-5)
    ended = model.judge(model.encode([PROMPT] * 4, TEXTS, [row == 2 for row in range(4)]))
    rewards = [one["reward"] for one in answers[-1].body["rows"]]
    np.testing.assert_allclose(rewards, [one.reward for one in ended], rtol=1e-4, atol=1e-5)
    assert answers[-1].body["running"] == []
    assert streams.ask(path, method="DELETE").body == {"closed": path.removeprefix("/stream/")}


def test_chunks_of_text_that_cut_tokens_give_the_values_of_the_whole_text(
    streams: Server, opened: str, model: RewardModel
) -> None:
    answers = [
        push(streams, opened, *({"row": row, "text": TEXTS[row][a:b]} for row in range(4)))
        for a, b in ((0, 1), (1, 4), (4, 5), (5, 40))
    ]
    values = collected(answers, 4)
    sent = sum(len(one["q_values"]) for answer in answers for one in answer.body["rows"])
    assert sent > sum(map(len, values))  # some tokens were replaced
    for own, whole in zip(values, model.encode([PROMPT] * 4, TEXTS, [True] * 4), strict=True):
        [expected] = model.judge([whole], goals_GD=model.goal()[None])
        assert expected.q_Gn is not None
        np.testing.assert_allclose(own, expected.q_Gn[0], rtol=1e-4, atol=1e-5)
    end = push(streams, opened, *({"row": row, "text": "", "end": "stop"} for row in range(4)))
    rewards = [one["reward"] for one in end.body["rows"]]
    np.testing.assert_allclose(rewards, model.score([PROMPT] * 4, TEXTS), rtol=1e-4, atol=1e-5)


def test_messages_are_rendered(streams: Server, model: RewardModel) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    path = open_stream(streams, prompt=messages, rows=1, system="short")
    answer = push(streams, path, {"row": 0, "text": TEXTS[0], "end": "length"})
    conversation = [{"role": "system", "content": "short"}, *messages]
    text = model.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    text = text.removeprefix(model.tokenizer.bos_token)
    [expected] = model.judge(model.encode([text], [TEXTS[0]], [True]))
    assert answer.body["rows"][0]["reward"] == pytest.approx(expected.reward, rel=1e-4)
    streams.ask(path, method="DELETE")


def test_rows_below_the_threshold_are_dropped_but_the_best(streams: Server, model: RewardModel) -> None:
    q = model.q_values([PROMPT] * 4, TEXTS)
    path = open_stream(streams, threshold=1.0)
    early = push(streams, path, *({"row": row, "text": TEXTS[row][:2]} for row in range(4)))
    assert (early.body["drop"], early.body["running"]) == ([], [0, 1, 2, 3])
    ids = [model.encode([PROMPT], [text], [True])[0] for text in TEXTS]
    lengths = [len(one.ids) - one.start for one in ids]
    lowest = [own[5:length].min(initial=np.inf) for own, length in zip(q, lengths, strict=True)]
    best = int(np.argmax(lowest))
    fall = [row for row in range(4) if lowest[row] < 1 and row != best]
    assert fall
    answer = push(streams, path, *({"row": row, "text": TEXTS[row][2:]} for row in range(4)))
    assert answer.body["drop"] == fall
    assert answer.body["running"] == [row for row in range(4) if row not in fall]
    refused = push(streams, path, {"row": fall[0], "text": "more"})
    assert refused.status == 422
    assert f"field 'chunks[0]': row {fall[0]} was dropped" in refused.body["error"]
    streams.ask(path, method="DELETE")


def test_the_client_drops_rows_and_their_tokens_are_free(streams: Server, opened: str) -> None:
    sessions_tokens = metric(streams, "gcrm_stream_tokens")
    push(streams, opened, *({"row": row, "text": "a" * 70} for row in (0, 1)))
    full = metric(streams, "gcrm_stream_tokens")
    assert full > sessions_tokens
    answer = push(streams, opened, drop=(0, 1))
    assert (answer.body["drop"], answer.body["running"]) == ([], [2, 3])
    assert metric(streams, "gcrm_stream_tokens") == sessions_tokens
    assert push(streams, opened, {"row": 2, "text": "b"}).status == 200


def metric(server: Server, name: str) -> float:
    text = server.ask("/metrics", method="GET").body
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(name + " ")))


def test_requests_are_counted_by_path_without_the_streams_names(streams: Server, opened: str) -> None:
    assert metric(streams, "gcrm_streams") == 1
    push(streams, opened, {"row": 0, "text": "a"})
    text = streams.ask("/metrics", method="GET").body
    assert 'gcrm_requests_total{path="/stream/{id}",status="200"}' in text
    assert 'gcrm_requests_total{path="/stream",status="200"}' in text
    assert opened not in text


def test_too_many_streams(streams: Server, opened: str) -> None:
    other = open_stream(streams)
    refused = streams.ask("/stream", {"prompt": PROMPT, "rows": 1})
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert refused.body == {"error": "2 streams are open, the maximum: close one with DELETE /stream/ID"}
    assert streams.ask(other, method="DELETE").status == 200
    assert streams.ask(open_stream(streams), method="DELETE").status == 200


def test_a_full_cache_leaves_the_rows_as_they_were(streams: Server, opened: str, model: RewardModel) -> None:
    first = push(streams, opened, {"row": 0, "text": TEXTS[0]})
    refused = push(streams, opened, {"row": 1, "text": "a"}, {"row": 0, "text": "b" * 500})
    assert refused.status == 429
    assert "the maximum is 400 tokens" in refused.body["error"]
    again = push(streams, opened, {"row": 0, "text": "", "end": "stop"})
    assert again.body["running"] == [1, 2, 3]
    assert again.body["rows"][0]["first"] == len(first.body["rows"][0]["q_values"])
    assert again.body["rows"][0]["reward"] == pytest.approx(float(model.score([PROMPT], [TEXTS[0]])[0]), rel=1e-4)


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_an_end_that_finds_no_room_leaves_the_row_as_it_was(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    sessions = Sessions(model, limit=2, tokens=400, idle=60)
    [whole] = model.encode([PROMPT], [TEXTS[1]], [True])
    prompt = {"prompt": PROMPT} if kind == "text" else {"prompt_ids": whole.ids[: whole.start].tolist()}
    key = sessions.open(OpenRequest(rows=2, **prompt))["id"]
    cut = 6 if kind == "text" else 3
    written: Any = TEXTS[1] if kind == "text" else whole.ids[whole.start :].tolist()
    sessions.push(key, PushRequest(chunks=[Chunk(row=1, **{kind: written[:cut]})]))
    taken = sessions.tokens
    last = PushRequest(chunks=[Chunk(row=1, end="stop", **{kind: written[cut:]})])
    with monkeypatch.context() as patch:
        patch.setattr(sessions.scorer, "close", full)
        with pytest.raises(CacheFull):
            sessions.push(key, last)
    assert sessions.tokens == taken
    [answer] = sessions.push(key, last)["rows"]
    assert answer["first"] <= cut
    assert answer["reward"] == pytest.approx(float(model.score([PROMPT], [TEXTS[1]])[0]), rel=1e-4)
    sessions.close(key)
    assert sessions.tokens == 0


def full(*_: Any) -> list[float]:
    raise CacheFull("full")


def test_a_prompt_that_never_fits_is_not_to_be_sent_again(streams: Server) -> None:
    refused = streams.ask("/stream", {"prompt_ids": [5] * 401, "rows": 1})
    assert (refused.status, "retry-after" in refused.headers) == (422, False)
    assert "the prompt has 401 tokens, but the streams keep 400 at most (--stream-tokens)" in refused.body["error"]
    assert metric(streams, "gcrm_stream_tokens") == 0
    assert streams.ask(open_stream(streams, prompt=None, prompt_ids=[5] * 400), method="DELETE").status == 200


def test_an_idle_stream_is_closed(streams: Server, clock: Clock) -> None:
    used, idle = open_stream(streams), open_stream(streams)
    clock.now += 40
    assert push(streams, used, {"row": 0, "text": "a"}).status == 200
    clock.now += 40
    assert push(streams, used, {"row": 0, "text": "a"}).status == 200
    gone = push(streams, idle, {"row": 0, "text": "a"})
    assert gone.status == 404
    assert "it was closed, or nothing was sent to it for 60 s" in gone.body["error"]
    assert streams.ask(used, method="DELETE").status == 200
    assert streams.ask(used, method="DELETE").status == 404
    assert metric(streams, "gcrm_stream_tokens") == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"rows": 2}, "give one of the fields 'prompt' and 'prompt_ids'"),
        ({"prompt": "a", "prompt_ids": [5], "rows": 2}, "give one of the fields 'prompt' and 'prompt_ids'"),
        ({"prompt": "a", "rows": 0}, "field 'rows'"),
        ({"prompt": "a", "rows": 2000}, "field 'rows'"),
        ({"prompt": "a", "rows": 1, "row": 1}, "field 'row'"),
        ({"prompt_ids": ["a"], "rows": 1}, "field 'prompt_ids[0]'"),
        ({"prompt_ids": [100_000], "rows": 1}, "the prompt has a token that is not between 0 and"),
        ({"prompt": "a", "rows": 1, "goal": "none"}, "field 'goal': the model has no goal 'none'"),
    ],
)
def test_streams_that_cannot_be_opened(streams: Server, body: Any, message: str) -> None:
    answer = streams.ask("/stream", body)
    assert answer.status == 422
    assert message in answer.body["error"]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([{"row": 4, "text": "a"}], "there is no row 4: the stream has 4"),
        ([{"row": -1, "text": "a"}], "there is no row -1: the stream has 4"),
        ([{"row": 0, "text": "a"}, {"row": 0, "text": "b"}], "field 'chunks[1]': row 0 has another chunk"),
        ([{"row": 0, "text": "a", "ids": [5]}], "field 'chunks[0]'"),
        ([{"row": 0}], "give one of the fields 'ids' and 'text'"),
        ([{"row": 0, "text": "", "end": "length"}], "row 0 was cut before its first token: drop it instead"),
        ([{"row": 0, "text": "a", "end": "eos"}], "field 'chunks[0].end'"),
        ([{"row": 1, "ids": [5]}], "field 'chunks[0]': row 1 has had text so far: send only text"),
        ([{"row": 2, "ids": [5]}, {"row": 3, "ids": [-1]}], "row 3 has a token that is not between 0 and"),
        ([{"row": 2, "text": "a"}, {"row": 3, "text": "a"}], ""),
    ],
)
def test_chunks_that_are_refused_change_nothing(streams: Server, chunks: Any, message: str) -> None:
    path = open_stream(streams)
    assert push(streams, path, {"row": 1, "text": "a"}).status == 200
    answer = push(streams, path, *chunks)
    assert answer.status == (422 if message else 200)
    assert message in answer.body.get("error", "")
    assert push(streams, path, {"row": 0, "text": "a"}).body["rows"][0]["first"] == 0
    streams.ask(path, method="DELETE")


def test_text_needs_the_prompts_text(streams: Server) -> None:
    path = open_stream(streams, prompt=None, prompt_ids=[5, 6])
    answer = push(streams, path, {"row": 0, "text": "a"})
    assert answer.status == 422
    assert "row 0 is text, but the prompt was given as ids: send ids" in answer.body["error"]
    streams.ask(path, method="DELETE")


def test_streams_need_the_token(model: RewardModel) -> None:
    with running(model, token="secret") as server:
        bodies = {"/stream": {"prompt": "a", "rows": 1}, "/stream/x": {"chunks": []}}
        assert [server.ask(path, body).status for path, body in bodies.items()] == [401, 401]
        assert server.ask("/stream/x", method="DELETE").status == 401
        assert server.ask("/stream", bodies["/stream"], Authorization="Bearer secret").status == 200


def test_a_failure_of_the_model_is_answered_and_the_next_request_too(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(model, limit=2, tokens=400, idle=60)
    with running(model, sessions=sessions) as server:
        path = open_stream(server)
        with monkeypatch.context() as broken:
            broken.setattr(sessions.scorer, "push", lambda *_: 1 / 0)
            failed = push(server, path, {"row": 0, "text": "a"})
        assert (failed.status, "ZeroDivisionError" in failed.body["error"]) == (503, True)
        assert push(server, path, {"row": 0, "text": "a"}).status == 200


def test_streams_and_scores_at_the_same_time(model: RewardModel) -> None:
    sessions = Sessions(model, limit=4, tokens=4000, idle=60)
    expected = model.q_values([PROMPT] * 4, TEXTS)
    found: list[list[float]] = [[] for _ in range(4)]

    def write(number: int) -> None:
        path = open_stream(server, rows=1)
        answers = [push(server, path, {"row": 0, "text": part}) for part in TEXTS[number]]
        [found[number]] = collected(answers, 1)

    with running(model, sessions=sessions) as server:
        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        scores = [server.score(*TEXTS).body["rewards"] for _ in range(10)]
        for thread in threads:
            thread.join()
    for own, q in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, q[: len(own)], rtol=1e-4, atol=1e-5)
        assert len(own) == len(q) - 1  # without the end token
    np.testing.assert_allclose(scores, [model.score([PROMPT] * 4, TEXTS)] * 10, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, TOOLS])
def test_an_answer_to_messages_ends_as_the_chat_template_ends_it(template: str, tmp_path: Path) -> None:
    """Which is not with eos, and with two tokens of the last."""
    model = RewardModel.from_pretrained(write_served_model(tmp_path / "m", template), device="cpu")
    asked = [{"role": "user", "content": PROMPT}]
    sessions = Sessions(model, limit=2, tokens=400, idle=60)
    given = {"text": "yes 123"}, {"ids": model.encode([""], ["yes 123"], [True])[0].ids[1:].tolist()}  # without bos
    for content in given:
        opened = sessions.open(OpenRequest(prompt=asked, rows=1))
        pushed = sessions.push(opened["id"], PushRequest(chunks=[Chunk(row=0, end="stop", **content)]))
        assert pushed["rows"][0]["reward"] == pytest.approx(model.score(asked, "yes 123"), abs=1e-5)
