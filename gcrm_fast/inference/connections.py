"""The server's connections: how many are open, how long each may take for its headers, and how each ends.

uvicorn alone waits for headers without end, accepts until no file can be opened (and logs each failure), and closes a
connection that the client has half closed.
"""

import asyncio
import contextlib
import json
import logging
import resource
import socket
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gcrm_fast.common.errors import UserError

LOG = logging.getLogger("gcrm.serve")
CONNECTIONS = 4096  # open at a time, where the system allows enough files
RESERVE = 256  # files for everything else, connections on their way in or out included
LINGERING = 64  # connections over the maximum that get time to read why
ACCEPTED_AT_ONCE = 16  # per turn of the event loop; they must fit in RESERVE
BACKLOG = 1024
HEADER_SECONDS = 10.0


class OncePerMinute(logging.Filter):
    """Passes a record of each place in the code once per minute, so that a flood of requests cannot fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        place = record.pathname, record.lineno
        if time.monotonic() - self._last.get(place, -60.0) < 60:
            return False
        self._last[place] = time.monotonic()
        return True


def limit_logs() -> None:
    """Lets OncePerMinute filter what the server and its libraries log."""
    for name in ("asyncio", "uvicorn.error", "gcrm.serve"):
        logging.getLogger(name).addFilter(OncePerMinute())


def connection_limit() -> int:
    """Raises the soft limit on open files as far as needed and allowed; returns the connections that fit in it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + RESERVE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < 2 * RESERVE:
        raise UserError(f"only {soft} files may be open, the server needs {2 * RESERVE}: raise ulimit -n")
    return CONNECTIONS if soft == resource.RLIM_INFINITY else min(CONNECTIONS, soft - RESERVE)


class Connection(H11Protocol):
    """uvicorn's protocol with limits: ``limit`` connections, seconds ``for_headers``, and ``for_reading`` an answer."""

    def __init__(self, *args: Any, limit: int, for_headers: float, for_reading: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self._limit, self._for_headers, self._for_reading = limit, for_headers, for_reading
        self._timer: asyncio.TimerHandle | None = None  # of the headers, of the next probe, or of the end
        self._stalled: asyncio.TimerHandle | None = None
        self._refused = self._half_closed = False

    @property
    def _busy(self) -> bool:
        """Whether a request waits for its answer."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing tells of any byte that the client does not take
        if len(self.connections) <= self._limit:
            self._wait_for_headers()
            return
        LOG.warning("gcrm serve: %d connections are open, the maximum: more are answered 503", self._limit)
        self._refuse(503, f"{self._limit} connections are open, the maximum: try again")
        if len(self.connections) > self._limit + LINGERING:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.resume_writing()
        self._cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self._busy:
            self._cancel()
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in self.headers}:
                self.cycle.keep_alive = False  # RFC 9112, section 6.1: a proxy may see another end of this request

    def on_response_complete(self) -> None:
        if not self.flow.write_paused:
            self._wait_for_headers()
        super().on_response_complete()
        if self._half_closed and not self._busy:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not a valid HTTP/1.1 request")

    def eof_received(self) -> bool:  # type: ignore[override]  # as in asyncio
        """Keeps a connection open that only its client's half is closed of, as long as it waits for an answer."""
        self._half_closed = self._busy and not self.cycle.more_body
        if self._half_closed:
            self._probe(0.05)
        return self._half_closed

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._for_reading, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()
        if not (self._busy or self._refused):
            self._wait_for_headers()

    def _probe(self, seconds: float) -> None:
        """Sends an interim response, which clients skip, but which resets a connection that is closed on both sides."""
        if self._busy and not self.cycle.response_started and self.scope["http_version"] == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._timer = self.loop.call_later(seconds, self._probe, 2 * seconds)

    def _wait_for_headers(self) -> None:
        self._cancel()
        self._timer = self.loop.call_later(self._for_headers, self._too_slow)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _too_slow(self) -> None:
        self._refuse(408, f"the headers did not arrive within {self._for_headers:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Answers outside of HTTP's cycle, and closes the connection once the client has, or after a second."""
        self._refused = True
        if self._busy:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"error": message})
            retry = ("Retry-After: 1",) if status == 503 else ()
            lines = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
                "Connection: close",
                *retry,
            )
            self.transport.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
        with contextlib.suppress(OSError):  # the client is gone
            self.transport.write_eof()
        self._cancel()
        self._timer = self.loop.call_later(1.0, self.transport.abort)


class Server(uvicorn.Server):
    """uvicorn's server with these connections; ``on_ready`` is called once it listens.

    Args:
        timeout: seconds for a client to read its answer, and for pending requests when the server stops.
    """

    def __init__(self, app: ASGIApp, *, timeout: float, limit: int, on_ready: Callable[[], None]) -> None:
        connection = partial(Connection, limit=limit, for_headers=min(timeout, HEADER_SECONDS), for_reading=timeout)
        config = uvicorn.Config(
            app,
            http=connection,  # type: ignore[arg-type]  # called like a class
            loop="asyncio",
            ws="none",
            lifespan="on",
            access_log=False,
            log_level="warning",
            server_header=False,
            backlog=ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=int(timeout) + 1,
        )
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)  # asyncio takes one number for the system's queue and for what it accepts at once
        self._on_ready()
