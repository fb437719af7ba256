"""Reward heads: one class each, with all that other files need of it. ``config.head`` names it in ``KINDS``."""

import math
from typing import ClassVar

from torch import Tensor, nn


class LinearHead(nn.Linear):
    """One linear layer without a bias, which transformers' sequence classifiers have as ``score.weight``."""

    in_transformers: ClassVar[bool] = True  # whether the head of its sequence classifiers can hold it

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    @staticmethod
    def initial_weight(normal: Tensor) -> Tensor:
        """From standard normal values: standard deviation 1 / (H + 1) (GCRM, appendix)."""
        return normal / (normal.shape[1] + 1)

    @staticmethod
    def flops(hidden_size: int) -> int:
        """Of the forward, per row."""
        return 2 * hidden_size


class MLPHead(nn.Sequential):
    """The paper's ablation: three ReLU layers of width H, then a linear layer to 1."""

    in_transformers: ClassVar[bool] = False

    def __init__(self, hidden_size: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(hidden_size, hidden_size), nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden_size, 1))

    @staticmethod
    def initial_weight(normal: Tensor) -> Tensor:
        """From standard normal values: variance 1 / fan-in. (The release's 1 / (fan-in + 1) as standard deviation gives
        rewards that are constant to 3e-8.)"""
        return normal / math.sqrt(normal.shape[1])

    @staticmethod
    def flops(hidden_size: int) -> int:
        return 3 * 2 * hidden_size * hidden_size + 2 * hidden_size


KINDS: dict[str, type[LinearHead] | type[MLPHead]] = {"linear": LinearHead, "mlp": MLPHead}
