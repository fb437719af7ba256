"""The multi-view loss against its transcription with Python floats, and torch's own divergences."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from gcrm_fast.model.views import WIDTH, Views, half_divergence

H = 5


@pytest.fixture
def views() -> Views:
    return Views(H).double()


def layers(module: torch.nn.Sequential, x: list[float]) -> list[float]:
    """Three linear layers, ReLU between them, one product after the other."""
    linear = [layer for layer in module if isinstance(layer, torch.nn.Linear)]
    assert len(linear) == 3
    for i, layer in enumerate(linear):
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        x = [sum(w * v for w, v in zip(row, x, strict=True)) + bias for row, bias in rows]
        x = [max(v, 0.0) for v in x] if i < 2 else x
    return x


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_loss_equals_its_transcription(views: Views) -> None:
    """SPEC section 3; the last pair has no other prompt in its block."""
    ends, noise = torch.randn(2, 3, H).double(), torch.randn(2, 3, WIDTH).double()
    other = [1, 0, 2]
    found = views(ends, noise, torch.tensor(other))
    mu = [[layers(views.mu, ends[v, n].tolist()) for n in range(3)] for v in range(2)]
    sigma = [[[softplus(x) + 1e-7 for x in layers(views.sigma, ends[v, n].tolist())] for n in range(3)] for v in (0, 1)]
    z = [
        [[m + s * e for m, s, e in zip(mu[v][n], sigma[v][n], noise[v, n].tolist(), strict=True)] for n in range(3)]
        for v in range(2)
    ]
    for n in range(3):
        information = -softplus(-layers(views.critic, z[0][n] + z[1][n])[0])
        apart = layers(views.critic, z[0][n] + z[1][other[n]])[0] if other[n] != n else 0.0
        information -= softplus(apart)
        assert found.information[n].item() == pytest.approx(information, rel=1e-9)
        divergence = 0.0
        for m1, m2, s1, s2 in zip(mu[0][n], mu[1][n], sigma[0][n], sigma[1][n], strict=True):
            d = m1 - m2
            divergence += ((s1**2 + d**2) / s2**2 + (s2**2 + d**2) / s1**2 - 2) / 4
        assert found.divergence[n].item() == pytest.approx(divergence, rel=1e-9)
        assert found.total()[n].item() == pytest.approx(divergence - information, rel=1e-9)
        assert found.total(0.1)[n].item() == pytest.approx(0.1 * divergence - information, rel=1e-9)


def test_the_divergence_is_that_of_torch() -> None:
    mu, sigma = torch.randn(2, 4, 7).double(), torch.rand(2, 4, 7).double() + 0.1
    p, q = Normal(mu[0], sigma[0]), Normal(mu[1], sigma[1])
    expected = (kl_divergence(p, q) + kl_divergence(q, p)).sum(1) / 2
    torch.testing.assert_close(half_divergence(mu, sigma), expected)


def test_a_critic_that_knows_nothing_gives_the_value_at_chance(views: Views) -> None:
    with torch.no_grad():
        views.critic[-1].weight.zero_()
        views.critic[-1].bias.zero_()
    found = views(torch.randn(2, 2, H).double(), torch.randn(2, 2, WIDTH).double(), torch.tensor([1, 0]))
    torch.testing.assert_close(found.information, torch.full((2,), -2 * math.log(2), dtype=torch.float64))


def test_gradients_reach_the_states(views: Views) -> None:
    ends = torch.randn(2, 2, H).double().requires_grad_()
    views(ends, torch.randn(2, 2, WIDTH).double(), torch.tensor([1, 0])).total().sum().backward()
    assert ends.grad is not None
    assert (ends.grad != 0).any(-1).all()
