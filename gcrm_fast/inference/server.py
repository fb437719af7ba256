"""The HTTP side of ``gcrm serve``: endpoints and limits.

    GET  /health       {"status": "ok", "waiting": completions}, without a token
    POST /get_reward   OpenRLHF's protocol: {"query": [prompt + completion], "prompts": [...], "labels": [...]}
                       -> {"rewards": [...], "scores": [...], "extra_logs": {"q_end": [...]}}
    POST /score        {"prompts": [...], "completions": [...], "cuts": [...], "goal": name}, text or messages
                       -> {"rewards": [...], "goal": name, "q_values": [[one per token], ...]}

Errors are answered with {"error": one line}.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from gcrm_fast.inference.batcher import Batcher, Text
from gcrm_fast.inference.protocols import RewardRequest, ScoreRequest, Shape, parse
from gcrm_fast.inference.scoring import Judged

HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
BODIES = 16  # of the maximum size that may be in memory at a time


def create_app(batcher: Batcher, *, token: str, max_body: int, timeout: float) -> Starlette:
    """The application, which starts and closes the batcher.

    Args:
        token: the bearer token that requests need; "" for none.
        max_body: bytes of a request's body.
        timeout: seconds for a body to arrive, and again for its answer.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher.start()
        yield
        await asyncio.to_thread(batcher.close)

    routes = Endpoints(batcher, token, max_body, timeout).routes()
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: error_response})
    app.router.redirect_slashes = False  # redirects would repeat the request's Host
    return app


async def error_response(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = error.headers or HEADERS.get(error.status_code)
    return JSONResponse({"error": error.detail}, error.status_code, headers)


class Endpoints:
    """What the server answers; the arguments are those of ``create_app``."""

    def __init__(self, batcher: Batcher, token: str, max_body: int, timeout: float) -> None:
        self.batcher, self.token, self.max_body, self.timeout = batcher, token.encode(), max_body, timeout
        self.held = 0  # bytes of all bodies in memory

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health),
            self._post("/get_reward", RewardRequest, self.get_reward),
            self._post("/score", ScoreRequest, self.score),
        ]

    async def health(self, _: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "waiting": self.batcher.waiting})

    async def get_reward(self, body: RewardRequest, request: Request) -> dict[str, Any]:
        prompts, completions = body.texts(self.batcher.scorer.tokenizer.pad_token)
        judged = await self._judge(request, prompts, completions)
        rewards = [j.reward for j in judged]
        ends = [float(j.q_Gn[0, -1]) for j in judged if j.q_Gn is not None]
        return {"rewards": rewards, "scores": rewards, "extra_logs": {"q_end": ends} if ends else {}}

    async def score(self, body: ScoreRequest, request: Request) -> dict[str, Any]:
        prompts, completions = body.texts()
        goals = list(self.batcher.scorer.goals)
        if body.goal is not None and body.goal not in goals:
            names = ", ".join(goals) or "none"
            raise HTTPException(422, f"field 'goal': the model has no goal {body.goal!r}; its goals: {names}")
        goal = goals.index(body.goal) if body.goal else 0
        judged = await self._judge(request, prompts, completions, body.cuts)
        return {
            "rewards": [j.reward for j in judged],
            "goal": goals[goal] if goals else None,
            "q_values": [j.q_Gn[goal].tolist() for j in judged if j.q_Gn is not None] if goals else None,
        }

    def _post(
        self, path: str, shape: type[Shape], answer: Callable[[Shape, Request], Awaitable[dict[str, Any]]]
    ) -> Route:
        """A route that answers a body of ``shape`` from those who have the token."""

        async def endpoint(request: Request) -> JSONResponse:
            self._authorize(request)
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
        self, request: Request, prompts: Sequence[Text], completions: Sequence[Text], cuts: Sequence[bool] | None = None
    ) -> list[Judged]:
        """The completions' rewards and Q-values, unless the client hangs up or the time is over."""
        if not completions:
            return []
        future = self.batcher.submit(prompts, completions, cuts or [False] * len(completions))
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
