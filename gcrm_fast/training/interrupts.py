"""Signals, and processes whose parent is gone.

``torchrun`` starts every worker in a session of its own and hands on the signals that it is told to
(``--signals-to-handle``); a worker whose torchrun was killed would go on by itself, hence ``end_with_the_parent``.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed as dist

# Of one occasion come several: to all processes of a service, and handed on by torchrun; from the shell and the kernel.
REPEATED = 2.0
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Wish(IntEnum):
    """What a process wants of all of them; the greatest wins."""

    NONE = 0
    SAVE = 1
    STOP = 2
    FAIL = 3


class Interrupts:
    """The wishes of signals, on which all ranks agree at the same step.

    The first SIGTERM, SIGINT or SIGHUP asks to save and stop, one that comes ``REPEATED`` seconds later or more ends
    the process at once; SIGUSR1 asks to save and go on. Signals that the process was started to ignore stay ignored.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """``group``: of CPU tensors (gloo), used for nothing else at the same time."""
        self.group = group
        self.signal_name = ""
        self._own = Wish.NONE
        self._told = 0.0
        self._asked: tuple[torch.Tensor, dist.Work | None] | None = None

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Signals are wishes within; as before after it. Only the main thread may enter."""
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

    def agree(self, own: Wish = Wish.NONE) -> Wish:
        """The greatest wish of all ranks as of their previous call; every rank must call it once a step.

        One step late, so that no rank waits for another, and the device for none.
        """
        agreed = Wish.NONE
        if self._asked:
            wish, work = self._asked
            if work:
                work.wait()
            agreed = Wish(int(wish))
        wish = torch.tensor(max(own, self._own))
        if self._own == Wish.SAVE:
            self._own = Wish.NONE
        self._asked = wish, dist.all_reduce(wish, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed

    def _stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._own == Wish.STOP:
            if now >= self._told + REPEATED:
                os._exit(128 + number)
            return
        self._own, self._told = Wish.STOP, now
        self.signal_name = signal.Signals(number).name

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._own = max(self._own, Wish.SAVE)


def end_with_the_parent(parent: int) -> None:
    """Ends this process, whatever it is doing, within a second or two of the end of ``parent``, its process id.

    To be taken as early as may be: of a process whose parent is gone the system names another.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # also where the process is blocked on a pipe that nobody reads, or in a collective

    threading.Thread(target=watch, daemon=True).start()
