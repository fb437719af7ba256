"""Reward heads: one class each, with all that other files need of it. ``config.head`` names it in ``KINDS``.

Letters: R rows of hidden states, E rows at the end of completions, H hidden size, D width of a bottleneck.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcrm_fast.model.llama import ModelConfig


class Read(NamedTuple):
    """Rewards [E], and by the names in ``Head.terms`` what the head adds to the loss or measures, [E] each; a pair's
    value is the sum over its two ends."""

    reward_E: Tensor
    terms: dict[str, Tensor]


class Head(nn.Module):
    """What every head has. ``forward`` gives rewards [R, 1] from states [R, H], both at least float32."""

    in_transformers: ClassVar[bool]  # whether its sequence classifiers can hold it, as one linear layer without a bias
    terms: ClassVar[tuple[str, ...]] = ()
    forwards: ClassVar[tuple[str, ...]] = ()  # methods that use parameters themselves, where those may be sharded

    def read(self, ends_EH: Tensor, noise_ED: Tensor) -> Read:
        """What the losses read. ``noise_ED``: standard normal values for a head that is random in training."""
        return Read(self(ends_EH).squeeze(1), {})

    def latents(self, hidden_RH: Tensor) -> Tensor | None:
        """The head's own representation [R, D] of states; None for a head without one."""
        return None

    @staticmethod
    def initial_weight(normal: Tensor) -> Tensor:
        """From standard normal values."""
        raise NotImplementedError

    @staticmethod
    def flops(config: ModelConfig) -> int:
        """Of the forward, per row."""
        raise NotImplementedError

    @staticmethod
    def exported(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``score.weight`` [1, H] for other programs, where ``state`` has it in another form."""
        return {}


class LinearHead(nn.Linear, Head):
    """One linear layer without a bias, which transformers' sequence classifiers have as ``score.weight``."""

    in_transformers: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, 1, bias=False)

    @staticmethod
    def initial_weight(normal: Tensor) -> Tensor:
        """From standard normal values: standard deviation 1 / (H + 1) (GCRM, appendix)."""
        return normal / (normal.shape[1] + 1)

    @staticmethod
    def flops(config: ModelConfig) -> int:
        return 2 * config.hidden_size


class MLPHead(nn.Sequential, Head):
    """The paper's ablation: three ReLU layers of width H, then a linear layer to 1."""

    in_transformers: ClassVar[bool] = False

    def __init__(self, config: ModelConfig) -> None:
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(config.hidden_size, config.hidden_size), nn.ReLU()]
        super().__init__(*layers, nn.Linear(config.hidden_size, 1))

    @staticmethod
    def initial_weight(normal: Tensor) -> Tensor:
        """From standard normal values: variance 1 / fan-in. (The release's 1 / (fan-in + 1) as standard deviation gives
        rewards that are constant to 3e-8.)"""
        return normal / math.sqrt(normal.shape[1])

    @staticmethod
    def flops(config: ModelConfig) -> int:
        return 3 * 2 * config.hidden_size**2 + 2 * config.hidden_size


class BottleneckHead(Head):
    """Information bottleneck (InfoRM, arXiv 2402.09345, section 4): the reward is read from a latent s ~ N(mu, sigma^2)
    of width D in training, from its mean mu = W_mu h otherwise.

    The term ``kl`` is KL(N(mu, sigma^2) || N(0, 1)), a sum over dimensions. (The release averages mu and log sigma^2
    over dimensions before it.) ``kl_per_dimension`` is its mean over the dimensions of a pair's two latents.
    """

    in_transformers: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("kl", "kl_per_dimension")
    forwards: ClassVar[tuple[str, ...]] = ("read", "latents")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = nn.Linear(config.hidden_size, 2 * config.bottleneck_size, bias=False)  # mu, then log sigma^2
        self.reward = nn.Linear(config.bottleneck_size, 1, bias=False)

    def forward(self, hidden_RH: Tensor) -> Tensor:
        return self.reward(self._mean(hidden_RH))

    def latents(self, hidden_RH: Tensor) -> Tensor:
        """mu [R, D]."""
        return self._mean(hidden_RH)

    def _mean(self, hidden_RH: Tensor) -> Tensor:
        return F.linear(hidden_RH, self.encoder.weight[: self.reward.in_features])

    def read(self, ends_EH: Tensor, noise_ED: Tensor) -> Read:
        mu_ED, log_variance_ED = self.encoder(ends_EH).chunk(2, dim=1)
        latent_ED = mu_ED + (log_variance_ED / 2).exp() * noise_ED if self.training else mu_ED
        kl_E = 0.5 * (mu_ED**2 + log_variance_ED.exp() - log_variance_ED - 1).sum(1)
        per_dimension_E = kl_E.detach() / (2 * mu_ED.shape[1])
        # A sum and no view of the only column: FSDP's hooks must own the tensors that leave a module.
        return Read(self.reward(latent_ED).sum(1), {"kl": kl_E, "kl_per_dimension": per_dimension_E})

    @staticmethod
    def initial_weight(normal: Tensor) -> Tensor:
        """From standard normal values: variance 1 / (3 fan-in), that of PyTorch's linear layers, as in the release."""
        return normal / math.sqrt(3 * normal.shape[1])

    @staticmethod
    def flops(config: ModelConfig) -> int:
        return 2 * config.bottleneck_size * (2 * config.hidden_size + 1)

    @staticmethod
    def exported(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """w W_mu, float32: the reward in evaluation is linear in the hidden state."""
        w_1D, encoder = state["score.reward.weight"].double(), state["score.encoder.weight"].double()
        return {"score.weight": (w_1D @ encoder[: w_1D.shape[1]]).to(torch.float32)}


KINDS: dict[str, type[LinearHead] | type[MLPHead] | type[BottleneckHead]] = {
    "linear": LinearHead,
    "mlp": MLPHead,
    "bottleneck": BottleneckHead,
}
