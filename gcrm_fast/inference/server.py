"""The HTTP side of ``gcrm serve``: endpoints and limits.

    GET  /health       {"status": "ok", "waiting": completions}, without a token
    POST /get_reward   OpenRLHF's protocol: {"query": [prompt + completion], "prompts": [...], "labels": [...]}
                       -> {"rewards": [...], "scores": [...], "extra_logs": {"q_end": [...]}}
    GET  /metrics      Prometheus' format
    GET  /v1/models    {"object": "list", "data": [{"id": model, "object": "model"}]}
    POST /score        {"prompts": [...], "completions": [...], "cuts": [...], "tools": [...], "system": [...],
                        "goal": name}, text or messages
                       -> {"rewards": [...], "goal": name, "q_values": [[one per token], ...]}; with "task": [...] or
                          "reference": [...] the hybrid reward, {"rewards": [...], "parts": [{name: value}, ...]}
    POST /stream       {"prompt": text or messages, "rows": number, "threshold": number, "goal": name}
                       -> {"id": ID, "rows": [0, 1, ...], "goal": name, "prompt_tokens": number}
    POST /stream/ID    {"chunks": [{"row": number, "ids": [...] or "text": text, "end": "stop" or "length"}, ...]}
                       -> {"rows": [{"row": number, "first": place, "q_values": [...], "reward": number}, ...],
                           "drop": [rows], "running": [rows]}
    DELETE /stream/ID  {"closed": ID}
    POST /classify     vLLM's protocols: {"model": name, "input": [prompt + completion]}, or "messages"
    POST /pooling      -> {"data": [{"probs": [reward], ...}], ...}, {"data": [{"data": [reward], ...}], ...}

Errors are answered with {"error": one line}.
"""

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, Protocol

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gcrm_fast.common.errors import UserError
from gcrm_fast.inference.batcher import Batcher, Context, Job, Text
from gcrm_fast.inference.metrics import CountRequests
from gcrm_fast.inference.protocols import (
    OpenRequest,
    PushRequest,
    RewardRequest,
    ScoreRequest,
    Shape,
    VllmRequest,
    check_content,
    parse,
)
from gcrm_fast.inference.sessions import Sessions

HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
BODIES = 16  # of the maximum size that may be in memory at a time


class Hybrid(Protocol):
    """Scores of completions by the verifiers of their tasks or against references, and the parts of each; ``rewards``
    are the model's, of texts that answer the prompts of some numbers."""

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Any],
        *,
        rewards: Callable[[Sequence[int], Sequence[Text]], list[float]],
    ) -> tuple[list[float], list[dict[str, float]]]: ...


def create_app(
    batcher: Batcher, sessions: Sessions, *, name: str, token: str, max_body: int, timeout: float, hybrid: Hybrid
) -> Starlette:
    """The application, which starts and closes the batcher.

    Args:
        name: of the model in answers.
        token: the bearer token that requests need; "" for none.
        max_body: bytes of a request's body.
        timeout: seconds for a body to arrive, and again for its answer.
        hybrid: the hybrid reward of requests with tasks or references.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher.start()
        yield
        await asyncio.to_thread(batcher.close)

    batcher.metrics.watch("gcrm_streams", "Open streams.", lambda: len(sessions.open_sessions))
    batcher.metrics.watch("gcrm_stream_tokens", "Tokens of open streams in the cache.", lambda: sessions.tokens)
    routes = Endpoints(batcher, sessions, name, token, max_body, timeout, hybrid).routes()
    count = Middleware(CountRequests, metrics=batcher.metrics, paths=frozenset(route.path for route in routes))
    handlers = {HTTPException: error_response}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers, middleware=[count])
    app.router.redirect_slashes = False  # redirects would repeat the request's Host
    return app


async def error_response(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers, detail = error.headers or HEADERS.get(error.status_code), error.detail
    if detail == HTTPStatus.NOT_FOUND.phrase:  # the router's words
        detail = "there is no such path: POST /score answers with rewards and Q-values, GET /health with the status"
    elif detail == HTTPStatus.METHOD_NOT_ALLOWED.phrase and headers:
        detail = f"this path does not answer {request.method}: send {headers['Allow']}"
    return JSONResponse({"error": detail}, error.status_code, headers)


class Endpoints:
    """What the server answers; the arguments are those of ``create_app``."""

    def __init__(
        self,
        batcher: Batcher,
        sessions: Sessions,
        name: str,
        token: str,
        max_body: int,
        timeout: float,
        hybrid: Hybrid,
    ) -> None:
        self.batcher, self.sessions, self.name, self.token = batcher, sessions, name, token.encode()
        self.max_body, self.timeout, self.hybrid = max_body, timeout, hybrid
        self.held = 0  # bytes of all bodies in memory

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health),
            self._post("/get_reward", RewardRequest, self.get_reward),
            self._post("/score", ScoreRequest, self.score),
            self._post("/stream", OpenRequest, self.open_stream),
            self._post("/stream/{id}", PushRequest, self.push),
            Route("/stream/{id}", self.close_stream, methods=["DELETE"]),
            self._post("/classify", VllmRequest, self.classify),
            self._post("/pooling", VllmRequest, self.pooling),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
        ]

    async def health(self, _: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "waiting": self.batcher.waiting})

    async def get_reward(self, body: RewardRequest, request: Request) -> dict[str, Any]:
        prompts, completions = body.texts(self.batcher.scorer.tokenizer)
        judged = (await self._judge(request, prompts, completions, [{}] * len(prompts))).judged
        rewards = [j.reward for j in judged]
        ends = [float(j.q_Gn[0, -1]) for j in judged if j.q_Gn is not None]
        return {"rewards": rewards, "scores": rewards, "extra_logs": {"q_end": ends} if ends else {}}

    async def score(self, body: ScoreRequest, request: Request) -> dict[str, Any]:
        texts = body.texts()
        if body.task is not None or body.reference is not None:
            return await self._score_hybrid(body, request, *texts)
        goals = list(self.batcher.scorer.goals)
        if body.goal is not None and body.goal not in goals:
            names = ", ".join(goals) or "none"
            raise HTTPException(422, f"field 'goal': the model has no goal {body.goal!r}; its goals: {names}")
        goal = goals.index(body.goal) if body.goal else 0
        judged = (await self._judge(request, *texts, body.cuts)).judged
        return {
            "rewards": [j.reward for j in judged],
            "goal": goals[goal] if goals else None,
            "q_values": [j.q_Gn[goal].tolist() for j in judged if j.q_Gn is not None] if goals else None,
        }

    async def _score_hybrid(
        self,
        body: ScoreRequest,
        request: Request,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        contexts: Sequence[Context],
    ) -> dict[str, Any]:
        if body.goal is not None:
            raise HTTPException(
                422, "field 'goal': a hybrid reward has no Q-values: omit it, or 'task' and 'reference'"
            )
        loop, cuts = asyncio.get_running_loop(), body.cuts or [False] * len(completions)

        def rewards(own: Sequence[int], texts: Sequence[Text]) -> list[float]:
            """In the thread of the verifiers. References, which are other texts than the completions, are whole."""
            own_cuts = [cuts[i] and text is completions[i] for i, text in zip(own, texts, strict=True)]
            job = self._judge(request, [prompts[i] for i in own], texts, [contexts[i] for i in own], own_cuts)
            return [j.reward for j in asyncio.run_coroutine_threadsafe(job, loop).result().judged]

        columns = {"task": body.task, "reference": body.reference, "tools": body.tools, "system": body.system}
        work = asyncio.to_thread(self.hybrid, prompts, completions, columns, rewards=rewards)
        try:
            scores, parts = await asyncio.wait_for(work, self.timeout)
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        except TimeoutError:
            raise HTTPException(504, f"no answer within {self.timeout:g} s") from None
        return {"rewards": scores, "parts": parts}

    async def open_stream(self, body: OpenRequest, request: Request) -> dict[str, Any]:
        return await self._called(request, lambda: self.sessions.open(body))

    async def push(self, body: PushRequest, request: Request) -> dict[str, Any]:
        return await self._called(request, lambda: self.sessions.push(request.path_params["id"], body))

    async def close_stream(self, request: Request) -> JSONResponse:
        self._authorize(request)
        return JSONResponse(await self._called(request, lambda: self.sessions.close(request.path_params["id"])))

    async def classify(self, body: VllmRequest, request: Request) -> dict[str, Any]:
        job = await self._judge(request, *body.texts())
        labels = {"label": "reward", "num_classes": 1}
        data = [{"index": i, **labels, "probs": [j.reward]} for i, j in enumerate(job.judged)]
        return self._vllm("classify", body, job, data)

    async def pooling(self, body: VllmRequest, request: Request) -> dict[str, Any]:
        job = await self._judge(request, *body.texts())
        data = [{"index": i, "object": "pooling", "data": [j.reward]} for i, j in enumerate(job.judged)]
        return self._vllm("pooling", body, job, data)

    async def metrics(self, request: Request) -> Response:
        self._authorize(request)
        return Response(self.batcher.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> JSONResponse:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model"}]})

    def _vllm(self, kind: str, body: VllmRequest, job: Job, data: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{kind}-{body.request_id or uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model or self.name,
            "data": data,
            "usage": {"prompt_tokens": job.tokens, "completion_tokens": 0, "total_tokens": job.tokens},
        }

    def _post(
        self, path: str, shape: type[Shape], answer: Callable[[Shape, Request], Awaitable[dict[str, Any]]]
    ) -> Route:
        """A route that answers a body of ``shape`` from those who have the token."""

        async def endpoint(request: Request) -> JSONResponse:
            self._authorize(request)
            check_content(request.headers)
            body = bytearray()
            try:
                await self._read(request, body)
                return JSONResponse(await answer(parse(shape, body), request))
            finally:
                self.held -= len(body)

        return Route(path, endpoint, methods=["POST"])

    def _authorize(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        correct = hmac.compare_digest(given.strip().encode(), self.token)
        if self.token and not (scheme.lower() == "bearer" and correct):
            raise HTTPException(401, "this server requires a token: send the header Authorization: Bearer TOKEN")

    async def _read(self, request: Request, body: bytearray) -> None:
        """Reads the request's body into ``body`` and counts it in ``held``, whatever happens."""
        try:
            async with asyncio.timeout(self.timeout):
                async for part in request.stream():
                    body += part
                    self.held += len(part)
                    if len(body) > self.max_body:
                        raise HTTPException(
                            413, f"the body has more than {self.max_body} bytes: send fewer completions"
                        )
                    if self.held > BODIES * self.max_body:
                        raise HTTPException(503, "the requests being read are too large together: try again")
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {self.timeout:g} s") from None
        except ClientDisconnect:
            raise HTTPException(499, "the client hung up") from None  # nobody reads it

    async def _judge(
        self,
        request: Request,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        contexts: Sequence[Context],
        cuts: Sequence[bool] | None = None,
    ) -> Job:
        """The job of the completions, judged."""
        future = self.batcher.submit(prompts, completions, contexts, cuts or [False] * len(completions))
        job: Job = await self._result(request, future)
        return job

    async def _called(self, request: Request, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``work`` returns on the model's thread."""
        result: dict[str, Any] = await self._result(request, self.batcher.call(work))
        return result

    async def _result(self, request: Request, future: asyncio.Future[Any]) -> Any:
        """The future's result, unless the client hangs up or the time is over."""
        gone = asyncio.ensure_future(_hang_up(request))
        try:
            await asyncio.wait((future, gone), timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            if gone.done():
                raise HTTPException(499, "the client hung up")
            raise HTTPException(504, f"no answer within {self.timeout:g} s")
        finally:
            gone.cancel()
            future.cancel()  # takes the job out of the queue; no effect on an answered one


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
