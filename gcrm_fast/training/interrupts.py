"""Signals, and processes whose parent is gone.

``torchrun`` starts every worker in its own session and forwards the signals in ``--signals-to-handle``; workers of a
killed torchrun would continue without it, hence ``end_with_parent``. A torchrun that got no signal would wait for
those of other machines and then report success without a model, hence ``stop``.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from enum import IntEnum
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from gcrm_fast.common import processes

# One stop can send several signals: to all processes of a service and forwarded by torchrun; from shell and kernel.
REPEATED = 2.0  # seconds
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Request(IntEnum):
    """What one process asks of all processes; the greatest wins."""

    NONE = 0
    SAVE = 1
    STOP = 2
    FAIL = 3


class Interrupts:
    """Requests by signals, on which all ranks agree at the same step.

    The first SIGTERM, SIGINT or SIGHUP asks to save and stop, a later one (after ``REPEATED`` seconds or more) ends the
    process at once; SIGUSR1 asks to save and continue. Signals that the process was started to ignore stay ignored.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """``group``: of CPU tensors (gloo), used for nothing else at the same time."""
        self.group = group
        self._own = Request.NONE
        self._stop_time, self._signal = 0.0, 0
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Turns signals into requests inside the context. Only the main thread may enter."""
        before = {
            number: signal.signal(number, self._stop)
            for number in STOPPING
            if signal.getsignal(number) != signal.SIG_IGN
        }
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._save)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agree(self, own: Request = Request.NONE) -> Request:
        """The greatest request of all ranks as of their previous call; every rank must call it once per step.

        One step late, so that no rank waits for another, and the device for none.
        """
        agreed = Request.NONE
        if self._pending:
            request, work = self._pending
            if work:
                work.wait()
            agreed = Request(int(request))
        request = torch.tensor(max(own, self._own))
        if self._own == Request.SAVE:
            self._own = Request.NONE
        self._pending = request, dist.all_reduce(request, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed

    def stop(self, launcher: int | None) -> NoReturn:
        """Ends this process as the signal would have, after ``agree`` returned STOP.

        ``launcher``: the process id of the torchrun that this process ends too unless a signal came through it; None
        for all processes of a machine but one, or without torchrun.
        """
        if launcher and not self._signal:
            os.kill(launcher, signal.SIGTERM)
        sys.exit(128 + (self._signal or signal.SIGTERM))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._own != Request.STOP:
            self._own, self._stop_time, self._signal = Request.STOP, now, number
            if processes.rank() == 0:
                os.write(2, b"\ngcrm train: stopping after this step; interrupt it again to end at once\n")
        elif now >= self._stop_time + REPEATED:
            os._exit(128 + number)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._own = max(self._own, Request.SAVE)


def end_with_parent(parent: int) -> None:
    """Ends this process, whatever it is doing, within a second or two of the end of its parent process.

    ``parent``: its process id, to be read as early as possible: once the parent is gone the system gives another.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # also where the process is blocked by a pipe that nobody reads, or in a collective

    threading.Thread(target=watch, daemon=True).start()
