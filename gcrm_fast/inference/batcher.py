"""One model thread behind any number of waiting requests: what waits is tokenized together and packed by tokens.

The event loop submits jobs and awaits their futures; the thread takes them in order of arrival, and one of more tokens
than a batch holds in turns with those behind it. A job that has waited while the model ran goes into the next batch at
once; only one that finds the model idle waits ``delay`` for company.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.chat import Messages, as_text
from gcrm_fast.data.encoding import Completion
from gcrm_fast.inference.scoring import Judged, RewardModel

Text = str | Messages
LOG = logging.getLogger("gcrm.serve")


class Refusal(Exception):
    """An answer that is none: an HTTP status and one line that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(eq=False)
class Job:
    """The completions of one request, and the future that gets what they are worth, or a Refusal."""

    prompts: Sequence[Text]
    completions: Sequence[Text]
    cuts: Sequence[bool]
    future: asyncio.Future[list[Judged]]
    arrived: float
    encoded: list[Completion] | None = None
    judged: list[Judged] = field(default_factory=list)
    turn: list[Completion] = field(default_factory=list)  # of ``encoded`` behind ``judged``: what the model works on
    refused: bool = False

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.refused or self.future.done()

    def take(self, room: int) -> int:
        """Makes the next completions, of at most ``room`` tokens, its turn; returns their tokens."""
        self.turn = []
        left = room
        for completion in (self.encoded or [])[len(self.judged) :]:
            if len(completion.ids) > left:
                break
            self.turn.append(completion)
            left -= len(completion.ids)
        return room - left


class Batcher:
    """Rewards of submitted completions, with Q-values for every goal of the model, [G, n] in the order of its goals.

    At most ``limit`` completions wait or run. ``start`` and ``submit`` are for the event loop's thread.
    """

    def __init__(self, model: RewardModel, *, delay: float, limit: int) -> None:
        self.model, self.delay, self.limit = model, delay, limit
        self.goals_GD = torch.stack(list(model.goals.values())) if model.goals else None
        self.waiting = 0  # completions, those that the model works on included
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        # A daemon: a second interrupt ends the program without waiting for it.
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Takes no more jobs, answers those that somebody waits for, and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(
        self, prompts: Sequence[Text], completions: Sequence[Text], cuts: Sequence[bool]
    ) -> asyncio.Future[list[Judged]]:
        """A future of what the completions are worth; cancelling it takes the job out of the queue.

        Raises:
            Refusal: 413 for more completions than may ever wait, 429 for more than may wait now, 503 after ``close``.
        """
        count = len(completions)
        if count > self.limit:
            raise Refusal(413, f"{count} completions in one request: at most {self.limit} are taken")
        with self._changed:
            if self._closing:
                raise Refusal(503, "the server is shutting down")
            if self.waiting + count > self.limit:
                raise Refusal(429, f"{self.waiting} completions are waiting, at most {self.limit} may: try again")
            future = self._loop.create_future()
            self._jobs.append(Job(prompts, completions, cuts, future, time.monotonic()))
            self.waiting += count
            self._changed.notify()
        return future

    # ------------------------------------------------------------------------------------------------ the model thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                first = self._jobs[0].arrived
            time.sleep(max(0.0, first + self.delay - time.monotonic()))
            self._work()

    def _work(self) -> None:
        """Tokenizes what is new, then judges what fits in one batch of the oldest jobs; one with more to come goes to
        the end of the queue."""
        with self._changed:
            fresh = [job for job in self._jobs if job.encoded is None and not job.over]
        self._together(fresh, self._encode)
        batch = self._batch()
        self._together(batch, self._judge)
        with self._changed:
            for job in batch:
                if len(job.judged) == len(job.completions):
                    self.waiting -= len(job.completions)
                else:
                    self._jobs.append(job)

    def _batch(self) -> list[Job]:
        """The oldest jobs, out of the queue; those that are over are left out."""
        batch: list[Job] = []
        room = self.model.budget.tokens
        with self._changed:
            while self._jobs:
                job = self._jobs[0]
                if job.over:
                    self.waiting -= len(job.completions)
                elif job.encoded is None or not (taken := job.take(room)):
                    break  # came while the others were tokenized, or does not fit
                else:
                    batch.append(job)
                    room -= taken
                self._jobs.popleft()
        return batch

    def _together(self, jobs: Sequence[Job], work: Callable[[Sequence[Job]], None]) -> None:
        """Does the work for all jobs at once; where that fails, for each alone, so that none fails for another."""
        try:
            if jobs:
                work(jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._together([job], work)
            elif isinstance(error, Refusal):
                self._refuse(jobs[0], error)
            else:
                LOG.exception("a request failed")
                self._refuse(jobs[0], Refusal(503, f"the model failed ({type(error).__name__}): see the server's log"))

    def _encode(self, jobs: Sequence[Job]) -> None:
        texts = [self._texts(job) for job in jobs]
        encoded = iter(
            self.model.encode(
                [prompt for of_job in texts for prompt, _ in of_job],
                [completion for of_job in texts for _, completion in of_job],
                [cut for job in jobs for cut in job.cuts],
            )
        )
        for job in jobs:
            job.encoded = [next(encoded) for _ in job.completions]
            for i, completion in enumerate(job.encoded):
                if unfit := self.model.unfit(completion):
                    too_long = len(completion.ids) > self.model.budget.tokens
                    raise Refusal(413 if too_long else 422, f"completion {i} {unfit}")

    def _texts(self, job: Job) -> list[tuple[str, str]]:
        texts = []
        for i, (prompt, completion) in enumerate(zip(job.prompts, job.completions, strict=True)):
            try:
                texts.append(as_text(self.model.tokenizer, prompt, completion))
            except UserError as error:
                raise Refusal(422, f"completion {i}: {error}") from None
        return texts

    def _judge(self, jobs: Sequence[Job]) -> None:
        judged = iter(self.model.judge([c for job in jobs for c in job.turn], goals_GD=self.goals_GD))
        for job in jobs:
            job.judged += [next(judged) for _ in job.turn]
        whole = [job for job in jobs if len(job.judged) == len(job.completions)]
        self._loop.call_soon_threadsafe(_resolve, [(job.future, job.judged) for job in whole])

    def _refuse(self, job: Job, why: Refusal) -> None:
        job.encoded, job.refused = [], True
        self._loop.call_soon_threadsafe(_reject, job.future, why)


def _resolve(answers: list[tuple[asyncio.Future[list[Judged]], list[Judged]]]) -> None:
    for future, judged in answers:
        if not future.done():  # else nobody waits any more
            future.set_result(judged)


def _reject(future: asyncio.Future[list[Judged]], why: Refusal) -> None:
    if not future.done():
        future.set_exception(why)
