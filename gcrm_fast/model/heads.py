"""Reward heads that torch does not have."""

from torch import nn


class MLPHead(nn.Sequential):
    """The paper's ablation: three ReLU layers of width H, then a linear layer to 1."""

    def __init__(self, hidden_size: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(hidden_size, hidden_size), nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden_size, 1))
