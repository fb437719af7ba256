"""What ``GET /metrics`` reports, in Prometheus' format."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SIZES = [4**i for i in range(9)]
SECONDS = [0.001 * 4**i for i in range(9)]


class Metrics:
    """Counts of one server; ``waiting`` tells how many completions wait or run."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("gcrm_requests", "Requests.", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "gcrm_request_seconds", "Seconds from headers to answer.", ["path"], buckets=SECONDS, registry=registry
        )
        self._tokens = Counter("gcrm_tokens", "Tokens of scored completions with their prompts.", registry=registry)
        self._batch = Histogram("gcrm_batch_completions", "Completions per batch.", buckets=SIZES, registry=registry)
        self.watch("gcrm_waiting_completions", "Completions that wait or run.", waiting)

    def watch(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Adds a gauge that asks for its value."""
        Gauge(name, meaning, registry=self._registry).set_function(value)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, completions: int, tokens: int) -> None:
        """Counts a batch that the model has scored."""
        self._batch.observe(completions)
        self._tokens.inc(tokens)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class CountRequests:
    """Middleware that counts and times the requests of ``paths``, whose last part may be a name in braces; all others
    together as "other"."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self.metrics.request(self._named(scope["path"]), status, time.perf_counter() - start)

    def _named(self, path: str) -> str:
        if path in self.paths:
            return path
        folder = path.rpartition("/")[0] + "/{"
        return next((known for known in self.paths if known.startswith(folder)), "other")
