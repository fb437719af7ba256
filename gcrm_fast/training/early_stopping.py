"""When a run stops early: after a number of consecutive evaluations that did not improve its metric."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(kw_only=True)
class EarlyStopping:
    """Counts consecutive evaluations without a greater value of ``metric`` (empty: of nothing); ``patience`` of them
    end the run (0: never). Every rank counts alike."""

    metric: str
    patience: int
    best: float | None = None
    without_improvement: int = 0

    def add(self, evaluation: Mapping[str, float]) -> None:
        """Counts an evaluation; an empty one is none. Every rank must call it."""
        if not self.metric or not evaluation:
            return
        value = [evaluation[self.metric]]
        dist.broadcast_object_list(value, src=0)  # kinds of CPUs may round differently
        if self.best is None or value[0] > self.best:
            self.best, self.without_improvement = value[0], 0
        else:
            self.without_improvement += 1

    @property
    def is_over(self) -> bool:
        return 0 < self.patience <= self.without_improvement

    def facts(self) -> dict[str, Any]:
        """What a checkpoint remembers."""
        return {"metric": self.metric, "best": self.best, "without_improvement": self.without_improvement}

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Continues the count of a checkpoint, unless that is of another metric or there is none."""
        if facts.get("metric") == self.metric:
            self.best, self.without_improvement = facts["best"], facts["without_improvement"]
