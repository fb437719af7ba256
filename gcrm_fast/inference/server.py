"""The HTTP side of ``gcrm serve``: which requests are taken, and what is answered.

    GET  /health       {"status": "ok", "waiting": completions}, without a token
    POST /get_reward   as OpenRLHF asks: {"query": [prompt + completion], "prompts": [...], "labels": [...]}
                       -> {"rewards": [...], "scores": [...], "extra_logs": {"q_end": [...]}}
    POST /score        {"prompts": [...], "completions": [...], "cuts": [...], "goal": name}, text or messages
                       -> {"rewards": [...], "goal": name, "q_values": [[one a token], ...]}

Whatever is refused is answered with {"error": one line}.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gcrm_fast.inference.batcher import Batcher, Refusal, Text
from gcrm_fast.inference.scoring import Judged

UNION = ("str", "list[Turn]")  # how pydantic names the alternatives of a text in the place of an error


class Turn(BaseModel):
    """A message of a conversation; a template may read more of it than these two."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str


class RewardRequest(BaseModel):
    """OpenRLHF's. ``query`` is prompt + completion; with its prompt, samples of one prompt compute it once."""

    query: list[str]
    prompts: list[str] | None = None


class ScoreRequest(BaseModel):
    """``cuts`` tells completions that a length limit cut; ``goal`` names one of the model's goal states."""

    model_config = ConfigDict(extra="forbid")
    prompts: list[str | list[Turn]]
    completions: list[str | list[Turn]]
    cuts: list[StrictBool] | None = None
    goal: Annotated[str | None, Field(min_length=1)] = None


def refused(status: int, message: str) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}.get(status)
    return JSONResponse({"error": message}, status, headers)


# ------------------------------------------------------------------------------------------------------------- the gate


class Gate:
    """In front of everything: the bearer token first, then a body of at most ``max_body`` bytes in ``timeout`` seconds.

    Behind it the body is there, and ``receive`` waits for nothing but the client's hanging up.
    """

    def __init__(self, app: ASGIApp, token: str, max_body: int, timeout: float) -> None:
        self.app, self.token, self.max_body, self.timeout = app, token.encode(), max_body, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            if self.token and scope["path"] != "/health":
                self._authorize(headers.get(b"authorization", b""))
            async with asyncio.timeout(self.timeout):
                body = await self._body(headers.get(b"content-length", b""), receive)
        except Refusal as refusal:
            await refused(refusal.status, str(refusal))(scope, receive, send)
        except TimeoutError:
            await refused(408, f"the body did not come within {self.timeout:g} s")(scope, receive, send)
        else:
            if body is not None:
                await self.app(scope, _replayed(body, receive), send)

    def _authorize(self, header: bytes) -> None:
        scheme, _, given = header.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
            raise Refusal(401, "this server wants a token: send the header Authorization: Bearer TOKEN")

    async def _body(self, announced: bytes, receive: Receive) -> bytes | None:
        """All of it; None where the client hung up before its end."""
        too_long = Refusal(413, f"the body has more than {self.max_body} bytes: send fewer completions at a time")
        if announced.isdigit() and int(announced) > self.max_body:
            raise too_long
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body:
                raise too_long
            if not message.get("more_body"):
                return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


# -------------------------------------------------------------------------------------------------------------- the app


def create_app(batcher: Batcher, *, token: str, max_body: int, timeout: float) -> FastAPI:
    """The application; its lifespan is the batcher's. ``token`` "" asks for none; ``timeout`` in seconds, for a body to
    come and for its answer."""
    goals = list(batcher.model.goals)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(
        title="gcrm serve", lifespan=lifespan, docs_url=None, redoc_url=None
    )  # pages that load from elsewhere
    app.add_middleware(Gate, token=token, max_body=max_body, timeout=timeout)

    async def judged(
        request: Request, prompts: Sequence[Text], completions: Sequence[Text], cuts: Sequence[bool]
    ) -> list[Judged]:
        """What the completions are worth, unless the client hangs up or the time is over."""
        if not completions:
            return []
        future = batcher.submit(prompts, completions, cuts)
        gone = asyncio.ensure_future(_hang_up(request))
        try:
            first: set[asyncio.Future[Any]] = {future, gone}
            await asyncio.wait(first, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            raise Refusal(499, "hung up") if gone.done() else Refusal(504, f"no answer within {timeout:g} s")
        finally:
            gone.cancel()
            future.cancel()  # takes the job out of the queue; without effect on an answered one

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok", "waiting": batcher.waiting})

    @app.post("/get_reward")
    async def get_reward(body: RewardRequest, request: Request) -> JSONResponse:
        prompts = body.prompts or [""] * len(body.query)
        _same_length("prompts", prompts, "query", body.query)
        pad = batcher.model.tokenizer.pad_token
        split = [_split(query, prompt, pad) for query, prompt in zip(body.query, prompts, strict=True)]
        found = await judged(request, [p for p, _ in split], [c for _, c in split], [False] * len(split))
        rewards = [j.reward for j in found]
        logs = {"q_end": [float(j.q_Gn[0, -1]) for j in found if j.q_Gn is not None]} if found and goals else {}
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": logs})

    @app.post("/score")
    async def score(body: ScoreRequest, request: Request) -> JSONResponse:
        cuts = body.cuts if body.cuts is not None else [False] * len(body.completions)
        _same_length("prompts", body.prompts, "completions", body.completions)
        _same_length("cuts", cuts, "completions", body.completions)
        if body.goal is not None and body.goal not in goals:
            raise Refusal(
                422, f"field 'goal': the model has no goal {body.goal!r}, it has {', '.join(goals) or 'none'}"
            )
        goal = goals.index(body.goal) if body.goal else 0
        found = await judged(request, _plain(body.prompts), _plain(body.completions), cuts)
        return JSONResponse(
            {
                "rewards": [j.reward for j in found],
                "goal": goals[goal] if goals else None,
                "q_values": [j.q_Gn[goal].tolist() for j in found if j.q_Gn is not None] if goals else None,
            }
        )

    @app.exception_handler(Refusal)
    async def refusal(_: Request, error: Refusal) -> JSONResponse:
        return refused(error.status, str(error))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return refused(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return refused(422, _first(error))

    return app


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _same_length(name: str, values: Sequence[Any], other: str, others: Sequence[Any]) -> None:
    if len(values) != len(others):
        raise Refusal(422, f"field '{name}' has {len(values)} entries for {len(others)} of '{other}'")


def _plain(texts: Sequence[str | list[Turn]]) -> list[Text]:
    return [text if isinstance(text, str) else [turn.model_dump() for turn in text] for text in texts]


def _split(query: str, prompt: str, pad: str | None) -> tuple[str, str]:
    """(prompt, completion) of OpenRLHF's query, whose padding, if it left some, is taken off.

    Where the prompt ends changes no reward; it is what the samples of a prompt share.
    """
    while pad and query.startswith(pad):
        query = query.removeprefix(pad)
    while pad and query.endswith(pad):
        query = query.removesuffix(pad)
    return (prompt, query.removeprefix(prompt)) if query.startswith(prompt) else ("", query)


def _first(error: RequestValidationError) -> str:
    """One of pydantic's complaints in one line: the first of those that go deepest, since a text has alternatives."""
    found = max(error.errors(), key=lambda complaint: len(complaint["loc"]))
    if found["type"] == "json_invalid":
        return f"the body is not valid JSON ({found['ctx']['error']}, at {found['loc'][-1]})"
    place = [part for part in found["loc"] if part not in ("body", *UNION)]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    return f"field '{name}': {found['msg']}" if name else f"the body: {found['msg']}"
