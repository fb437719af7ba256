"""A small server for tests, in a thread of the test's process, and a client."""

import contextlib
import functools
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gcrm_fast import RewardModel
from gcrm_fast.checkpoints.goals import GOAL_FILE, write_goals
from gcrm_fast.checkpoints.reading import Q_VALUES
from gcrm_fast.checkpoints.saving import write_model
from gcrm_fast.data.tokenization import choose_pad
from gcrm_fast.inference.batcher import Batcher
from gcrm_fast.inference.connections import Server as Program
from gcrm_fast.inference.server import create_app
from gcrm_fast.inference.sessions import Sessions
from gcrm_fast.rlhf.hybrid import scored
from gcrm_fast.rlhf.verifiers import Verifiers
from support.chat import CHATML, chat_tokenizer
from support.models import VERDICT
from support.small import small_config, small_model

HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"  # of a request


def write_served_model(path: Path, template: str = CHATML) -> Path:
    """A model with two goals and a chat template."""
    tokenizer = chat_tokenizer(template)
    config = small_config(vocab_size=len(tokenizer), num_hidden_layers=1)
    choose_pad(tokenizer, config.vocab_size, "test")
    state = {name: p.detach() for name, p in small_model(config, torch.float32).named_parameters()}
    weights = write_model(path, state, config, tokenizer, about={Q_VALUES: VERDICT})
    goals = {"default": torch.ones(32), "short": torch.arange(32.0)}
    write_goals(path / GOAL_FILE, goals, dict.fromkeys(goals, 1), weights)
    return path


class Answer(NamedTuple):
    status: int
    body: Any  # of JSON, or text
    headers: dict[str, str]


def ask(port: int, path: str, body: Any = None, *, method: str = "POST", **headers: str) -> Answer:
    """One request on a new connection; the body is sent as JSON unless it is bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    with contextlib.closing(connection):
        connection.request(method, path, raw, {"content-type": "application/json", **names})
        response = connection.getresponse()
        text = response.read()
        return Answer(
            response.status,
            json.loads(text) if "json" in response.headers["content-type"] else text.decode(),
            {k.lower(): v for k, v in response.getheaders()},
        )


class Server(NamedTuple):
    port: int
    batcher: Batcher
    program: Program

    def ask(self, path: str, body: Any = None, *, method: str = "POST", **headers: str) -> Answer:
        return ask(self.port, path, body, method=method, **headers)

    def score(self, *completions: str) -> Answer:
        return self.ask("/score", {"prompts": ["hello?"] * len(completions), "completions": completions})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def open(self, count: int) -> bool:
        """Whether the server sees that many connections within ten seconds."""
        return eventually(lambda: len(self.program.server_state.connections) == count)

    def idle(self) -> bool:
        """Whether the queue is empty within ten seconds."""
        return eventually(lambda: self.batcher.waiting == 0)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@contextlib.contextmanager
def running(
    model: RewardModel,
    *,
    token: str = "",
    max_body: int = 10_000,
    timeout: float = 20.0,
    limit: int = 64,
    delay: float = 0.002,
    patience: float = 20.0,
    connections: int = 100,
    send_buffer: int = 0,
    verifiers: Mapping[str, str] | None = None,
    sessions: Sessions | None = None,
) -> Iterator[Server]:
    batcher = Batcher(model, delay=delay, limit=limit)
    sessions = sessions or Sessions(model, limit=4, tokens=4096, idle=60)
    hybrid = functools.partial(scored, verifiers=Verifiers(verifiers or {}), judge=None)
    app = create_app(batcher, sessions, name="small", token=token, max_body=max_body, timeout=timeout, hybrid=hybrid)
    ready = threading.Event()

    def announce() -> None:
        socket.create_connection(listener.getsockname(), timeout=10).close()  # it listens by now
        ready.set()

    program = Program(app, timeout=patience, limit=connections, on_ready=announce)
    with socket.socket() as listener:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=program.run, kwargs={"sockets": [listener]})
        thread.start()
        assert ready.wait(30)
        try:
            yield Server(listener.getsockname()[1], batcher, program)
        finally:
            program.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


class Stopped:
    """Holds the model before its forward until ``go`` is called."""

    def __init__(self, model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        judge = model.judge

        def held(*args: Any, **more: Any) -> Any:
            self.entered.set()
            assert self.released.wait(30)
            return judge(*args, **more)

        monkeypatch.setattr(model, "judge", held)

    def go(self) -> None:
        self.released.set()
