"""Streams over HTTP: completions of a prompt that another program writes, judged chunk by chunk.

A session is one prompt and its rows, numbered from 0. All of this runs on the batcher's thread, one request at a time.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from starlette.exceptions import HTTPException

from gcrm_fast.data.chat import as_text
from gcrm_fast.inference.methods import lowest
from gcrm_fast.inference.protocols import Chunk, OpenRequest, PushRequest
from gcrm_fast.inference.scoring import RewardModel
from gcrm_fast.inference.streaming import LiveRow, LiveScorer, ending_of, reencode, rewards_of_texts


@dataclass(eq=False, kw_only=True)
class SessionRow:
    """A completion: ``text`` where it comes as text, the Q-values of its tokens so far."""

    live: LiveRow
    kind: Literal["", "ids", "text"] = ""
    text: str = ""
    q_n: list[float] = field(default_factory=list)
    state: Literal["running", "ended", "dropped"] = "running"

    def copy(self) -> "SessionRow":
        return replace(self, live=self.live.copy(), q_n=list(self.q_n))


@dataclass(eq=False, kw_only=True)
class Session:
    """``prompt``: the text of the request's, None where it was given as ids. ``goal``: an index into the model's
    goals."""

    request: OpenRequest
    prompt: str | None
    goal: int
    threshold: float | None
    rows: list[SessionRow]
    used: float

    def numbers(self, *states: str) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.state in states]


class Sessions:
    """Up to ``limit`` sessions, which keep up to ``tokens`` tokens in the cache together; one that is idle for ``idle``
    seconds is closed."""

    def __init__(
        self,
        model: RewardModel,
        *,
        limit: int,
        tokens: int,
        idle: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.limit, self.idle, self.clock = model, limit, idle, clock
        self.goals = list(model.goals)
        states = torch.stack(list(model.goals.values())) if self.goals else torch.empty(0, model.config.state_size)
        self.scorer = LiveScorer(model, states, limit=tokens)
        self.open_sessions: dict[str, Session] = {}

    @property
    def tokens(self) -> int:
        """Places of the cache that are taken."""
        return self.scorer.trunk.cache.taken

    def open(self, request: OpenRequest) -> dict[str, Any]:
        """Computes the prompt. Raises HTTPException, UserError."""
        self._expire()
        if len(self.open_sessions) >= self.limit:
            raise HTTPException(429, f"{self.limit} streams are open, the maximum: close one with DELETE /stream/ID")
        name = request.goal or (self.goals[0] if self.goals else None)
        if name not in self.goals:
            raise HTTPException(422, f"field 'goal': the model has no goal {name!r}; its goals: {self.goals}")
        prompt, ids, endings = None, request.prompt_ids, None
        if request.prompt is not None:
            prompt, answer = self._text(request, "")
            ids = self.model.encode([prompt], [""], [True])[0].ids.tolist() if prompt else []
            endings = [ending_of(self.model, prompt, answer)]
        assert ids is not None  # OpenRequest has one of the two
        if len(ids) > (most := self.scorer.trunk.cache.limit):
            raise HTTPException(
                422,
                f"the prompt has {len(ids)} tokens, but the streams keep {most} at most (--stream-tokens): send a "
                "shorter one, or start the server with more",
            )
        [opened] = self.scorer.open([ids], [request.rows], endings)
        key = secrets.token_urlsafe(16)
        rows = [SessionRow(live=row) for row in opened]
        session = Session(
            request=request,
            prompt=prompt,
            goal=self.goals.index(name),
            threshold=request.threshold,
            rows=rows,
            used=self.clock(),
        )
        self.open_sessions[key] = session
        return {"id": key, "rows": session.numbers("running"), "goal": name, "prompt_tokens": len(ids)}

    def push(self, key: str, request: PushRequest) -> dict[str, Any]:
        """Judges the chunks. Raises HTTPException, UserError; the rows are then as before, those of ``drop`` aside."""
        session = self._find(key)
        self._check(session, request)
        for number in request.drop:
            self._drop(session.rows[number])
        before = {chunk.row: session.rows[chunk.row].copy() for chunk in request.chunks}
        try:
            answers = self._judged(session, request.chunks)
        except BaseException:
            for number, row in before.items():
                self.scorer.drop([session.rows[number].live])
                session.rows[number] = row
            raise
        self.scorer.drop(row.live for row in before.values())
        dropped = self._fallen(session)
        session.used = self.clock()
        return {"rows": answers, "drop": dropped, "running": session.numbers("running")}

    def _judged(self, session: Session, chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
        """The answer to each chunk, after its tokens were read and its row ended. Raises HTTPException, UserError."""
        new_ids: list[list[int]] = [[] for _ in session.rows]
        places = [len(row.q_n) for row in session.rows]
        for chunk in chunks:
            new_ids[chunk.row], places[chunk.row] = self._new_ids(session, chunk)
        q_Gm = self.scorer.push([row.live for row in session.rows], new_ids)
        for chunk in chunks:
            row, place = session.rows[chunk.row], places[chunk.row]
            row.kind, row.text = "text" if chunk.ids is None else "ids", row.text + (chunk.text or "")
            row.q_n[max(0, place) :] = q_Gm[chunk.row][session.goal, max(0, -place) :].tolist()
        rewards = self._end(session, [chunk for chunk in chunks if chunk.end])
        return [
            {
                "row": chunk.row,
                "first": max(0, places[chunk.row]),
                "q_values": session.rows[chunk.row].q_n[max(0, places[chunk.row]) :],
                "reward": rewards.get(chunk.row),
            }
            for chunk in chunks
        ]

    def close(self, key: str) -> dict[str, Any]:
        """Frees the session. Raises HTTPException."""
        self._free(self._find(key))
        del self.open_sessions[key]
        return {"closed": key}

    def _find(self, key: str) -> Session:
        self._expire()
        if key not in self.open_sessions:
            raise HTTPException(
                404, f"there is no stream {key!r}: it was closed, or nothing was sent to it for {self.idle:g} s"
            )
        return self.open_sessions[key]

    def _expire(self) -> None:
        for key, session in list(self.open_sessions.items()):
            if self.clock() - session.used > self.idle:
                self._free(session)
                del self.open_sessions[key]

    def _free(self, session: Session) -> None:
        self.scorer.drop(row.live for row in session.rows)

    def _check(self, session: Session, request: PushRequest) -> None:
        """Raises HTTPException 422 for what the rows cannot take."""
        for number in [*request.drop, *(chunk.row for chunk in request.chunks)]:
            if not 0 <= number < len(session.rows):
                raise HTTPException(422, f"there is no row {number}: the stream has {len(session.rows)}")
        numbers = [chunk.row for chunk in request.chunks]
        for i, chunk in enumerate(request.chunks):
            row, where = session.rows[chunk.row], f"field 'chunks[{i}]': row {chunk.row}"
            if row.state != "running" or chunk.row in request.drop:
                state = "ended" if row.state == "ended" else "dropped"
                raise HTTPException(422, f"{where} was {state}: send chunks of running rows only")
            if chunk.row in numbers[:i]:
                raise HTTPException(422, f"{where} has another chunk: send one chunk per row")
            kind = "text" if chunk.ids is None else "ids"
            if row.kind not in ("", kind):
                raise HTTPException(422, f"{where} has had {row.kind} so far: send only {row.kind}")
            if kind == "text" and session.prompt is None:
                raise HTTPException(422, f"{where} is text, but the prompt was given as ids: send ids")
            if chunk.end == "length" and not (row.q_n or chunk.ids or chunk.text):
                raise HTTPException(422, f"{where} was cut before its first token: drop it instead")

    def _text(self, request: OpenRequest, completion: str) -> tuple[str, str]:
        """The prompt, which is no ids, and a completion as text. Raises UserError."""
        tokenizer, prompt = self.model.tokenizer, request.prompt
        assert prompt is not None
        return as_text(tokenizer, prompt, completion, tools=request.tools, system=request.system)

    def _new_ids(self, session: Session, chunk: Chunk) -> tuple[list[int], int]:
        """New tokens of a row, and the place of the first among those of its completion."""
        row = session.rows[chunk.row]
        if chunk.ids is not None:
            return chunk.ids, len(row.q_n)
        assert session.prompt is not None  # checked
        return reencode(self.model, row.live, session.prompt, row.text + (chunk.text or ""))

    def _end(self, session: Session, chunks: Sequence[Chunk]) -> dict[int, float]:
        """Ends rows; their rewards by number."""
        rows, cuts = [session.rows[chunk.row] for chunk in chunks], [chunk.end == "length" for chunk in chunks]
        if rows and all(row.kind == "text" for row in rows) and self.model.end.kind != "eos":
            rewards = rewards_of_texts(self.model, [self._text(session.request, row.text) for row in rows], cuts)
        else:
            rewards = self.scorer.close([row.live for row in rows], cuts)
        for row in rows:
            row.state = "ended"
        self.scorer.drop(row.live for row in rows)
        return {chunk.row: reward for chunk, reward in zip(chunks, rewards, strict=True)}

    def _fallen(self, session: Session) -> list[int]:
        """Drops the rows with a Q-value below the threshold, except the one whose lowest is greatest; returns their
        numbers."""
        kept = session.numbers("running", "ended")
        if session.threshold is None or not kept:
            return []
        low = {i: lowest(session.rows[i].q_n) for i in kept}
        best = max(kept, key=low.__getitem__)
        gone = [i for i in kept if low[i] < session.threshold and i != best]
        for i in gone:
            self._drop(session.rows[i])
        return gone

    def _drop(self, row: SessionRow) -> None:
        row.state = "dropped"
        self.scorer.drop([row.live])
