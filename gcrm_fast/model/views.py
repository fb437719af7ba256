"""The multi-view loss of RLP (arXiv 2403.19279, section 3.1): two samples of one prompt are two views of it.

Letters: N pairs of views of a pack, H hidden size, Z width of the latents.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 128  # Z
CRITIC_WIDTH = 1024
SMALLEST = 1e-7  # of sigma


class ViewLosses(NamedTuple):
    """Of each pair, [N]: the bound I_JS on the Jensen-Shannon information between its latents, at most 0, and -2 ln 2
    where the critic has learned nothing; and half the sum of both KL divergences."""

    information: Tensor
    divergence: Tensor

    def total(self, divergence_weight: float = 1.0) -> Tensor:
        """The loss, [N]: -I_JS + the weight times the divergence."""
        return divergence_weight * self.divergence - self.information


def mlp(width_in: int, *widths: int) -> nn.Sequential:
    """Linear layers with a ReLU between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip((width_in, *widths), widths, strict=False):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Views(nn.Module):
    """p(z|v) = N(mu(v), diag sigma(v)^2) of a view v, the state at a sample's last token, and the critic T of two
    latents."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        h = hidden_size
        self.mu, self.sigma = mlp(h, h, h, WIDTH), mlp(h, h, h, WIDTH)
        self.critic = mlp(2 * WIDTH, CRITIC_WIDTH, CRITIC_WIDTH, 1)

    def forward(self, ends_2NH: Tensor, noise_2NZ: Tensor, other_N: Tensor) -> ViewLosses:
        """
        Args:
            ends_2NH: states at the last tokens of both views, at least float32.
            noise_2NZ: standard normal values.
            other_N: int64, for each pair the number of the pair of another prompt that gives its negative view; its own
                number where there is none, and the negative term is ln 2, its value at chance.
        """
        mu_2NZ, sigma_2NZ = self.mu(ends_2NH), F.softplus(self.sigma(ends_2NH)) + SMALLEST
        z1_NZ, z2_NZ = mu_2NZ + sigma_2NZ * noise_2NZ
        joint_N = self.critic(torch.cat([z1_NZ, z2_NZ], dim=1)).squeeze(1)
        apart_N = self.critic(torch.cat([z1_NZ, z2_NZ.index_select(0, other_N)], dim=1)).squeeze(1)
        has_other_N = other_N != torch.arange(len(other_N), device=other_N.device)
        information_N = -F.softplus(-joint_N) - torch.where(has_other_N, F.softplus(apart_N), math.log(2))
        return ViewLosses(information_N, half_divergence(mu_2NZ, sigma_2NZ))

    @staticmethod
    def parameter_count(hidden_size: int) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Views(hidden_size).parameters())

    @staticmethod
    def flops(hidden_size: int) -> int:
        """Of the forward, per pair."""
        h = hidden_size
        of_a_view = 2 * (2 * h * h + h * WIDTH)
        critic = 2 * WIDTH * CRITIC_WIDTH + CRITIC_WIDTH**2 + CRITIC_WIDTH
        return 2 * (2 * of_a_view + 2 * critic)


def half_divergence(mu_2NZ: Tensor, sigma_2NZ: Tensor) -> Tensor:
    """Half of KL(p1 || p2) + KL(p2 || p1) of two diagonal normal distributions, [N]; the logarithms of sigma cancel."""
    square_NZ = mu_2NZ.diff(dim=0)[0] ** 2
    one_NZ, two_NZ = sigma_2NZ**2
    return ((one_NZ + square_NZ) / two_NZ + (two_NZ + square_NZ) / one_NZ - 2).sum(1) / 4
