"""One model thread behind any number of waiting requests: they are tokenized together and packed by tokens.

The event loop submits jobs and awaits their futures; the thread takes them in order of arrival, and one with more
tokens than a batch holds in turns with those behind it. A job that waited while the model ran enters the next batch at
once; only one that arrives at an idle model waits ``delay`` for others.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from starlette.exceptions import HTTPException

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.chat import as_text
from gcrm_fast.data.encoding import Completion
from gcrm_fast.inference.metrics import Metrics
from gcrm_fast.inference.scoring import Judged, RewardModel, Text
from gcrm_fast.model.cache import CacheFull

Context = Mapping[str, Any]  # a prompt's tools and system message: arguments of as_text
LOG = logging.getLogger("gcrm.serve")


@dataclass(eq=False, kw_only=True)
class Job:
    """The completions of one request, and the future that becomes this job when all are judged, or an HTTPException."""

    prompts: Sequence[Text]
    completions: Sequence[Text]
    contexts: Sequence[Context]
    cuts: Sequence[bool]
    future: asyncio.Future["Job"]
    arrived: float
    encoded: list[Completion] | None = None
    judged: list[Judged] = field(default_factory=list)
    turn: list[Completion] = field(default_factory=list)  # the part of ``encoded`` in the current batch
    refused: bool = False

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.refused or self.future.done()

    @property
    def whole(self) -> bool:
        return len(self.judged) == len(self.completions)

    @property
    def tokens(self) -> int:
        return sum(len(completion.ids) for completion in self.encoded or [])

    def take(self, room: int) -> int:
        """Puts its next completions, up to ``room`` tokens, into ``turn``; returns their tokens."""
        self.turn = []
        left = room
        for completion in (self.encoded or [])[len(self.judged) :]:
            if len(completion.ids) > left:
                break
            self.turn.append(completion)
            left -= len(completion.ids)
        return room - left


class Batcher:
    """Rewards of submitted completions, with Q-values [G, n] for every goal of the scorer, in the order of its goals.

    At most ``limit`` completions wait or run. ``start`` and ``submit`` are for the event loop's thread.
    """

    def __init__(self, scorer: RewardModel, *, delay: float, limit: int) -> None:
        self.scorer, self.delay, self.limit = scorer, delay, limit
        self.goals_GD = torch.stack(list(scorer.goals.values())) if scorer.goals else None
        self.waiting = 0  # completions, including those in the current batch
        self.metrics = Metrics(lambda: self.waiting)
        self._jobs: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        # A daemon: a second interrupt ends the program without waiting for it.
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Refuses new jobs, answers those that are waited for, and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        contexts: Sequence[Context],
        cuts: Sequence[bool],
    ) -> asyncio.Future[Job]:
        """A future of the job with its completions judged; canceling it takes the job out of the queue.

        Raises:
            HTTPException: 413 for more completions than may ever wait, 429 for more than may wait now, 503 after
                ``close``.
        """
        count = len(completions)
        if count > self.limit:
            raise HTTPException(413, f"{count} completions in one request, but the maximum is {self.limit}")
        with self._changed:
            if self._closing:
                raise HTTPException(503, "the server is shutting down")
            if self.waiting + count > self.limit:
                raise HTTPException(429, f"{self.waiting} completions are waiting (maximum {self.limit}): try again")
            future = self._loop.create_future()
            arrived = time.monotonic()
            job = Job(
                prompts=prompts,
                completions=completions,
                contexts=contexts,
                cuts=cuts,
                future=future,
                arrived=arrived,
            )
            if count:
                self._jobs.append(job)
                self.waiting += count
                self._changed.notify()
            else:
                future.set_result(job)
        return future

    def call(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """A future of what ``work`` returns on the model's thread, between two batches; canceling it takes the work out
        of the queue. Raises HTTPException 503 after ``close``."""
        with self._changed:
            if self._closing:
                raise HTTPException(503, "the server is shutting down")
            future = self._loop.create_future()
            self._calls.append((work, future))
            self._changed.notify()
        return future

    # ------------------------------------------------------------------------------------------------ the model thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._calls or self._closing)
                if not (self._jobs or self._calls):
                    return
                calls, self._calls = self._calls, deque()
                first = self._jobs[0].arrived if self._jobs else None
            for work, future in calls:
                self._call(work, future)
            if first is not None:
                time.sleep(max(0.0, first + self.delay - time.monotonic()))
                self._work()

    def _call(self, work: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        if future.done():
            return
        try:
            result = work()
        except CacheFull as error:
            result = HTTPException(429, f"{error}: or close streams")
        except UserError as error:
            result = HTTPException(422, str(error))
        except HTTPException as error:
            result = error
        except Exception as error:
            result = _failed(error)
        self._loop.call_soon_threadsafe(_settle, [(future, result)])

    def _work(self) -> None:
        """Tokenizes new jobs, then judges one batch of the oldest; an unfinished job joins the end of the queue."""
        with self._changed:
            fresh = [job for job in self._jobs if job.encoded is None and not job.over]
        self._together(fresh, self._encode)
        batch = self._batch()
        self._together(batch, self._judge)
        with self._changed:
            self.waiting -= sum(len(job.completions) for job in batch if job.whole)
            self._jobs.extend(job for job in batch if not job.whole)

    def _batch(self) -> list[Job]:
        """The oldest jobs that fit in one batch, taken out of the queue; jobs that are over are dropped."""
        batch: list[Job] = []
        room = self.scorer.budget.tokens
        with self._changed:
            while self._jobs:
                job = self._jobs[0]
                if job.over:
                    self.waiting -= len(job.completions)
                elif job.encoded is None or not (taken := job.take(room)):
                    break  # arrived while the others were tokenized, or does not fit
                else:
                    batch.append(job)
                    room -= taken
                self._jobs.popleft()
        return batch

    def _together(self, jobs: Sequence[Job], work: Callable[[Sequence[Job]], None]) -> None:
        """Does the work for all jobs at once; if that fails, for each alone, so that none fails because of another."""
        try:
            if jobs:
                work(jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._together([job], work)
                return
            if not isinstance(error, HTTPException):
                error = _failed(error)
            jobs[0].encoded, jobs[0].refused = [], True
            self._loop.call_soon_threadsafe(_settle, [(jobs[0].future, error)])

    def _encode(self, jobs: Sequence[Job]) -> None:
        prompts, completions = zip(*(text for job in jobs for text in self._texts(job)), strict=True)
        encoded = iter(self.scorer.encode(prompts, completions, [cut for job in jobs for cut in job.cuts]))
        for job in jobs:
            job.encoded = [next(encoded) for _ in job.completions]
            for i, completion in enumerate(job.encoded):
                if unfit := self.scorer.unfit(completion):
                    too_long = len(completion.ids) > self.scorer.budget.tokens
                    raise HTTPException(413 if too_long else 422, f"completion {i} {unfit}")

    def _texts(self, job: Job) -> Iterator[tuple[str, str]]:
        of_completions = zip(job.prompts, job.completions, job.contexts, strict=True)
        for i, (prompt, completion, context) in enumerate(of_completions):
            try:
                yield as_text(self.scorer.tokenizer, prompt, completion, **context)
            except UserError as error:
                raise HTTPException(422, f"completion {i}: {error}") from None

    def _judge(self, jobs: Sequence[Job]) -> None:
        batch = [completion for job in jobs for completion in job.turn]
        judged = iter(self.scorer.judge(batch, goals_GD=self.goals_GD))
        self.metrics.batch(len(batch), sum(len(completion.ids) for completion in batch))
        for job in jobs:
            job.judged += [next(judged) for _ in job.turn]
        self._loop.call_soon_threadsafe(_settle, [(job.future, job) for job in jobs if job.whole])


def _failed(error: Exception) -> HTTPException:
    """The answer to a request that failed, in an except clause; the log has the traceback."""
    LOG.exception("a request failed")
    return HTTPException(503, f"the model failed ({type(error).__name__}): see the server's log")


def _settle(results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    """Gives each future its result, or its HTTPException."""
    for future, result in results:
        if future.done():  # nobody waits any more
            continue
        if isinstance(result, HTTPException):
            future.set_exception(result)
        else:
            future.set_result(result)
