"""Trains and uses goal-conditioned reward models for Llama-family language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gcrm_fast.inference.scoring import RewardModel

__all__ = ["RewardModel", "__version__"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name == "RewardModel":  # on demand, so that `gcrm --help` needs no torch
        from gcrm_fast.inference.scoring import RewardModel

        return RewardModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
