"""Trains and uses goal-conditioned reward models for Llama-family language models."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gcrm_fast.inference.generation import Policy
    from gcrm_fast.inference.scoring import RewardModel
    from gcrm_fast.train import train_reward_model
    from gcrm_fast.training.config import TrainConfig

__all__ = ["Policy", "RewardModel", "TrainConfig", "__version__", "train_reward_model"]
__version__ = "0.2.0"

# Imported on demand: `gcrm --help` needs no torch, and scoring nothing of training.
_MODULES = {
    "RewardModel": "inference.scoring",
    "TrainConfig": "training.config",
    "train_reward_model": "train",
    "Policy": "inference.generation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"gcrm_fast.{_MODULES[name]}"), name)
