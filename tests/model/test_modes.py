"""Training and evaluation mode, and randomness in a forward that is recomputed."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gcrm_fast import RewardModel
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.model.llama import maybe_recomputed
from gcrm_fast.training.objectives import Objective, losses
from support import models
from support.small import small_config, small_model


def test_modes(tmp_path: Path) -> None:
    """A model loaded for scoring is in evaluation mode, whole; one that is built to be trained is in training mode."""
    saved = models.save(tmp_path / "m")
    scorer = RewardModel.from_pretrained(tmp_path / "m", device="cpu").network
    assert all(module.training for module in saved.modules())
    assert not any(module.training for module in scorer.modules())
    assert not any(parameter.requires_grad for parameter in scorer.parameters())


class Noisy(nn.Module):
    """Multiplies by random numbers while it is trained, and keeps those that it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        self.drawn.append(torch.rand_like(x))
        return x * self.drawn[-1]


def test_randomness_survives_recomputation() -> None:
    noisy, x = Noisy(), torch.ones(4, 3, requires_grad=True)
    torch.manual_seed(0)
    out = maybe_recomputed(True, lambda x: noisy(x).square(), x)
    torch.rand(7)  # what comes after it draws too
    out.sum().backward()
    first, again = noisy.drawn
    assert torch.equal(first, again)
    torch.testing.assert_close(x.grad, 2 * first.square())


@pytest.mark.parametrize("recompute", ["product", "mlp", "block"])
def test_a_random_forward_survives_recomputation(pairs: Sequence[TokenizedPair], recompute: str) -> None:
    """A module like dropout in every MLP: loss and gradients are those of a model that keeps everything."""
    pack = build_pack([[pair] for pair in pairs[:3]], Sampling(samples=3), 0)
    gradients = []
    for what in ("none", recompute):
        torch.manual_seed(1)
        model = small_model(small_config())
        for layer in model.model.layers:
            layer.recompute = what
            layer.mlp.down_proj = nn.Sequential(Noisy(), layer.mlp.down_proj)
        torch.manual_seed(2)
        losses(model(pack), pack.pairs, Objective())[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-12, atol=1e-14)


def test_evaluation_mode_draws_nothing(pairs: Sequence[TokenizedPair]) -> None:
    model = small_model(small_config()).eval()
    model.model.layers[0].mlp.down_proj = nn.Sequential(Noisy(), model.model.layers[0].mlp.down_proj).eval()
    pack = build_pack([[pairs[0]]], Sampling(samples=3), 0)
    assert torch.equal(model(pack).reward_2N, model(pack).reward_2N)
