"""Connections of gcrm serve, on raw sockets: too many, too slow, half closed, ambiguous, and never read."""

import contextlib
import gc
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gcrm_fast import RewardModel
from gcrm_fast.common.errors import UserError
from gcrm_fast.inference import server as endpoints
from gcrm_fast.inference.connections import ACCEPTED_AT_ONCE, LINGERING, RESERVE, OncePerMinute, connection_limit
from gcrm_fast.inference.scoring import Judged
from support.serving import HEAD, Server, Stopped, eventually, running
from support.training_runs import ROOT

BODY = json.dumps({"prompts": ["hello?"], "completions": ["yes"]}).encode()
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


def everything(connection: socket.socket) -> bytes:
    """What arrives until the server closes the connection."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def is_error(answer: bytes, status: int, words: str) -> bool:
    """Whether it is one HTTP answer of that status with an error in JSON that contains the words."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.startswith(b"HTTP/1.1 %d " % status) and words in json.loads(body)["error"]


# ------------------------------------------------------------------------------------------------------------ too slow


@pytest.mark.parametrize("start", [b"", b"POST /sc", HEAD], ids=["nothing", "half a line", "no end"])
def test_headers_that_do_not_arrive(model: RewardModel, start: bytes) -> None:
    with running(model, patience=0.3) as server, server.connect() as slow:
        slow.sendall(start)
        assert is_error(everything(slow), 408, "headers did not arrive within 0.3 s")
        assert server.open(0)
        assert server.score("yes").status == 200


def drip(connection: socket.socket) -> bytes:
    """Sends a byte now and then until an answer comes."""
    connection.settimeout(0.02)
    for _ in range(500):
        connection.sendall(b"x")
        with contextlib.suppress(TimeoutError):
            return connection.recv(65536)
    return b""


def test_a_byte_now_and_then_does_not_extend_the_time(model: RewardModel) -> None:
    """Neither on a new connection nor after an answer."""
    with running(model, patience=0.5) as server:
        for before in (b"", REQUEST):
            with server.connect() as slow:
                if before:
                    slow.sendall(before)
                    answer = slow.recv(65536)
                    while not answer.endswith(b"]]}"):
                        answer += slow.recv(65536)
                slow.sendall(b"GET /health HTTP/1.1\r\nHost: ")
                assert is_error(drip(slow), 408, "headers")


@pytest.fixture
def unread(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, socket.socket]]:
    """A server, and a client that has not read its answer of 100 kB, too large for the buffers in between."""
    monkeypatch.setattr(model, "judge", lambda *_, **__: [Judged(0.0, None, np.zeros((2, 20_000)))])
    with running(model, patience=1.0, send_buffer=4096) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(("127.0.0.1", server.port))
        client.sendall(REQUEST.replace(b"Host", b"Connection: close\r\nHost"))
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        yield server, client


def test_an_answer_that_is_not_read(unread: tuple[Server, socket.socket]) -> None:
    """Its connection is closed after --timeout, though the client stays."""
    server, _ = unread
    assert server.open(0)


def test_an_answer_that_is_read_late_arrives_whole(unread: tuple[Server, socket.socket]) -> None:
    server, client = unread
    assert server.idle()
    assert everything(client).endswith(b"0.0]]}")


# ------------------------------------------------------------------------------------------------------------ too many


def test_connections_over_the_maximum(model: RewardModel) -> None:
    """They read 503; as soon as one of the others closes, the next is served."""
    with running(model, connections=3) as server:
        held = [server.connect() for _ in range(3)]
        assert server.open(3)
        with server.connect() as refused:
            answer = everything(refused)
            assert is_error(answer, 503, "3 connections are open")
            assert b"\r\nRetry-After: 1\r\n" in answer
        assert server.open(3)
        held.pop().close()
        assert server.open(2)
        assert server.score("yes").status == 200
        for connection in held:
            connection.sendall(REQUEST)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            connection.close()


def test_refused_connections_stay_few(model: RewardModel) -> None:
    """Those that linger to read why have a maximum, too."""
    with running(model, connections=2) as server, contextlib.ExitStack() as stack:
        held = [stack.enter_context(server.connect()) for _ in range(2)]
        assert server.open(2)
        flood = [stack.enter_context(server.connect()) for _ in range(3 * LINGERING)]
        with contextlib.suppress(ConnectionResetError):
            everything(flood[-1])
        assert len(server.program.server_state.connections) <= 2 + LINGERING + 4 * ACCEPTED_AT_ONCE  # on their way out
        held[0].sendall(REQUEST)
        assert held[0].recv(100).startswith(b"HTTP/1.1 200")
        assert server.open(1) or server.open(2)


@pytest.mark.parametrize(
    ("limits", "expected", "raised"),
    [
        ((1024, 1024), 1024 - RESERVE, 1024),
        ((1024, 2000), 2000 - RESERVE, 2000),
        ((1024, 10**6), 4096, 4096 + RESERVE),
        ((256, resource.RLIM_INFINITY), 4096, 4096 + RESERVE),
        ((10**6, 10**6), 4096, None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 4096, None),
    ],
)
def test_the_soft_limit_on_files_is_raised(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], expected: int, raised: int | None
) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: calls.append(values))
    assert connection_limit() == expected
    assert calls == ([(raised, limits[1])] if raised else [])


def test_too_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (300, 300))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(UserError, match="only 300 files"):
        connection_limit()


def test_more_connections_than_files(folder: Path, tmp_path: Path) -> None:
    """The program at a hard limit of 600 files, under 900 connections that send nothing: new ones read 503, the log
    stays short, and when the time for headers is over it serves although the clients are still there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("this test opens 1,000 files")
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "gcrm_fast.cli", "serve", str(folder), "--port", "0", "--timeout", "4"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    try:
        with contextlib.ExitStack() as stack:
            process = stack.enter_context(
                subprocess.Popen(
                    [*command, "--ready-file", str(ready)],
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600)),
                )
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stderr is not None
            assert "goals: default, short" in process.stdout.readline()
            address = ready.read_text().strip()
            place = ("127.0.0.1", int(address.rpartition(":")[2]))
            flood = [stack.enter_context(socket.create_connection(place, timeout=20)) for _ in range(900)]
            answers = []
            for connection in flood[-100:]:
                with contextlib.suppress(ConnectionResetError):
                    answers.append(everything(connection))
            assert any(is_error(answer, 503, "344 connections are open") for answer in answers if answer)

            def served() -> bool:
                with contextlib.suppress(OSError), socket.create_connection(place, timeout=20) as client:
                    client.sendall(REQUEST)
                    return client.recv(100).startswith(b"HTTP/1.1 200")
                return False

            assert eventually(served)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
            assert process.returncode == 0
            own = [line for line in errors.splitlines() if not line.startswith("gcrm: warning: ")]  # of the text sent
            assert own == ["gcrm serve: 344 connections are open, the maximum: more are answered 503"]
            assert not ready.exists()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_logs_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("test_connections")
    logger.addFilter(OncePerMinute())
    for i in range(100):
        logger.warning("a flood: %d", i)
    logger.warning("another line")
    assert caplog.messages == ["a flood: 0", "another line"]


# --------------------------------------------------------------------------------------------- half closed and hung up


def test_a_half_closed_client_gets_its_answer(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it waits so long that the server probes whether it is still there."""
    stopped = Stopped(model, monkeypatch)
    with running(model) as server, server.connect() as client:
        client.sendall(REQUEST)
        client.shutdown(socket.SHUT_WR)
        assert stopped.entered.wait(10)
        assert client.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        stopped.go()
        answer = everything(client)
        final = answer[answer.index(b"HTTP/1.1 200") :]
        assert len(json.loads(final.partition(b"\r\n\r\n")[2])["rewards"]) == 1
        assert server.open(0)


def test_a_client_that_left_is_forgotten(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is not kept in memory by a timer, whatever the client waited for."""
    stopped = Stopped(model, monkeypatch)
    with running(model) as server:
        with server.connect() as client:
            client.sendall(REQUEST)
            assert stopped.entered.wait(10)
            (connection,) = map(weakref.ref, server.program.server_state.connections)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100).startswith(b"HTTP/1.1 100 Continue")
        assert server.open(0)
        stopped.go()
        assert server.idle()
        assert eventually(lambda: gc.collect() >= 0 and connection() is None)


def test_an_old_half_closed_client_gets_no_interim_answer(model: RewardModel) -> None:
    with running(model, delay=0.3) as server, server.connect() as client:
        client.sendall(REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"))
        client.shutdown(socket.SHUT_WR)
        assert everything(client).startswith(b"HTTP/1.1 200")


def test_half_closed_in_the_middle_of_a_body(server: Server) -> None:
    with server.connect() as client:
        client.sendall(REQUEST[:-5])
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == b""
    assert server.open(0)


# ------------------------------------------------------------------------------------------------------------ ambiguous


def test_content_length_with_chunks_closes_the_connection(server: Server) -> None:
    """A proxy in front may take the one for the end of the request, this server takes the other."""
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    with server.connect() as client:
        client.sendall(HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + REQUEST)
        answer = everything(client)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1
    with server.connect() as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + REQUEST)
        answer = client.recv(65536)
        while answer.count(b"HTTP/1.1 200") < 2:
            answer += client.recv(65536)


@pytest.mark.parametrize(
    "raw",
    [
        b"no HTTP at all\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nnot a number\r\n",
        HEAD + b"X: " + b"y" * 400_000 + b"\r\n\r\n",
    ],
    ids=["no HTTP", "no host", "two lengths", "a chunk without a length", "long headers"],
)
def test_what_is_not_http(server: Server, raw: bytes) -> None:
    with server.connect() as client:
        client.sendall(raw)
        assert is_error(everything(client), 400, "not a valid HTTP/1.1 request")
    assert server.open(0)


def test_redirects_and_errors_do_not_repeat_the_host(server: Server) -> None:
    for path in (b"/score/", b"/health/", b"//evil.example"):
        with server.connect() as client:
            client.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
            answer = everything(client)
        assert answer.startswith(b"HTTP/1.1 404")
        assert b"evil" not in answer


def test_head_of_health(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b"HEAD /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = everything(client)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"\r\n\r\n")


def test_bodies_together(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests, each of less than --max-body, do not fill the memory."""
    monkeypatch.setattr(endpoints, "BODIES", 2)
    with running(model, max_body=1000) as server:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(server.connect()) for _ in range(2)]
            for connection in held:
                connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + b" " * 990)

            # Both bodies have been read as far as they came once a third, small one goes through and a large one not.
            def too_large() -> bool:
                return server.ask("/score", b" " * 900 + BODY).status == 503

            assert eventually(too_large)
            assert server.ask("/health", method="GET").status == 200
        assert eventually(lambda: server.ask("/score", b" " * 900 + BODY).status == 200)
