"""gcrm train with a fault in one rank: torchrun tests/support/faulty.py KIND:RANK:STEP ARGUMENTS...

KIND: nan (a loss that is not a number), hang, memory (exhausted), bug (an unexpected error), kill; in the given step.
"""

import os
import resource
import signal
import sys
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from gcrm_fast import train
from gcrm_fast.training.optimizer import Updater


def plant(kind: str, rank: int, step: int) -> None:
    """Replaces the loss of one rank in one step."""
    losses, update = train.losses, Updater.update
    now = [1]

    def faulty(*args: Any) -> Any:
        total, statistics = losses(*args)
        if now[0] != step or int(os.environ["RANK"]) != rank:
            return total, statistics
        if kind == "nan":
            return total * float("nan"), replace(statistics, sums_K=statistics.sums_K * float("nan"))
        if kind == "hang":
            time.sleep(3600)
        if kind == "memory":
            resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
            torch.empty(2**31)
        if kind == "bug":
            raise RuntimeError("a planted bug")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def counted(self: Updater, at: int, loss: torch.Tensor) -> Any:
        now[0] = at + 1
        return update(self, at, loss)

    mock.patch.object(train, "losses", faulty).start()
    mock.patch.object(Updater, "update", counted).start()


if __name__ == "__main__":
    kind, rank, step = sys.argv[1].split(":")
    plant(kind, int(rank), int(step))
    sys.exit(train.main(sys.argv[2:]))
