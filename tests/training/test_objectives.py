"""The losses against direct transcriptions of SPEC.md, in float64, and facts that follow from the formulas."""

import math
from types import SimpleNamespace

import pytest
import torch

from gcrm_fast.training.config import parse
from gcrm_fast.training.objectives import Objective, contrastive_loss, preference_loss, ranking_loss
from gcrm_fast.training.prepare import objective_of
from gcrm_kernels import goal_contrastive_loss, q_values, reference


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b) / (max(float(a.norm()), 1e-8) * max(float(b.norm()), 1e-8))


def transcription(z: torch.Tensor, rows: torch.Tensor, pairing: str, reduce: str, tau: float) -> list[float]:
    """L_C of each pair, written as in SPEC.md with Python floats and loops."""
    result = []
    for n in range(rows.shape[1]):
        i, j, m, k = (rows[a, n].tolist() for a in range(4))
        size = range(len(i))
        combos = [(a, b) for a in size for b in size if pairing == "grid" or a == b]
        plus = [sigmoid(cosine(z[i[a]], z[j[b]]) / tau) for a, b in combos]
        minus = [sigmoid(cosine(z[m[a]], z[k[b]]) / tau) for a, b in combos]
        count = len(combos)
        if reduce == "log_then_mean":
            result.append(sum(-math.log(p) for p in plus) / count + sum(-math.log(1 - q) for q in minus) / count)
        else:
            result.append(-math.log(sum(plus) / count) - math.log(1 - sum(minus) / count))
    return result


@pytest.mark.parametrize("pairing", ["paired", "grid"])
@pytest.mark.parametrize("reduce", ["log_then_mean", "mean_then_log"])
@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_contrastive_loss_equals_its_transcription(pairing: str, reduce: str, tau: float) -> None:
    z = torch.randn(11, 6, dtype=torch.float64)
    rows = torch.randint(11, (4, 5, 3))
    loss, statistics = goal_contrastive_loss(
        z, *rows, has_positive_N=torch.ones(5, dtype=torch.bool), pairing=pairing, reduce=reduce, temperature=tau
    )
    expected = torch.tensor(transcription(z, rows, pairing, reduce, tau), dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert statistics.positive_similarity.shape == statistics.negative_similarity.shape == (5,)


def test_smoothed_labels_and_centered_rewards_equal_their_transcription() -> None:
    reward = torch.randn(2, 5, dtype=torch.float64)
    margin = torch.rand(5, dtype=torch.float64)
    found = preference_loss(reward, margin, Objective(label_smoothing=0.1, centering=0.3))
    for n, (chosen, rejected) in enumerate(reward.T.tolist()):
        difference = chosen - rejected - float(margin[n])
        expected = -0.9 * math.log(sigmoid(difference)) - 0.1 * math.log(sigmoid(-difference))
        assert float(found[n]) == pytest.approx(expected + 0.3 * (chosen + rejected) ** 2, rel=1e-12)


@pytest.mark.parametrize(
    ("option", "field"), [("--label-smoothing", "label_smoothing"), ("--center-rewards", "centering")]
)
def test_the_options_reach_the_objective(option: str, field: str) -> None:
    assert getattr(objective_of(parse([option, "0.2"])), field) == 0.2


@pytest.mark.parametrize("distance", ["cosine", "dot", "euclidean"])
def test_average_goals_and_distances_equal_their_transcription(distance: str) -> None:
    """Each source against the mean of the S raw goal states; the gradient reaches all of them."""
    z = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    rows = torch.randint(9, (4, 2, 3))
    pairs = SimpleNamespace(
        samples_4NS=rows,
        samples_tiles=None,
        has_positive_N=torch.tensor([True, False]),
        has_negative_N=torch.tensor([True, True]),
    )
    objective = Objective(average=True, distance=distance, temperature=0.7)

    def compare(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if distance == "cosine":
            return a @ b / (a.norm() * b.norm())
        return a @ b if distance == "dot" else -(a - b).norm()

    def expected(z: torch.Tensor) -> torch.Tensor:
        losses = []
        for n, has_positive in enumerate((1.0, 0.0)):
            i, j, m, k = rows[:, n]
            plus = torch.stack([compare(z[a], z[j].mean(0)) for a in i]) / 0.7
            minus = torch.stack([compare(z[a], z[k].mean(0)) for a in m]) / 0.7
            terms = -torch.log(torch.sigmoid(plus)).mean() * has_positive, -torch.log(1 - torch.sigmoid(minus)).mean()
            losses.append(sum(terms))
        return torch.stack(losses)

    loss_N, _ = contrastive_loss(z, pairs, objective)
    torch.testing.assert_close(loss_N, expected(z), rtol=1e-12, atol=1e-12)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((loss_N * weights).sum(), z)
    (wanted,) = torch.autograd.grad((expected(z) * weights).sum(), z)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


def test_one_average_goal_equals_grid() -> None:
    z = torch.randn(9, 6, dtype=torch.float64)
    rows = torch.randint(9, (4, 3, 1))
    has = {"has_positive_N": torch.ones(3, dtype=torch.bool), "has_negative_N": torch.ones(3, dtype=torch.bool)}
    pairs = SimpleNamespace(samples_4NS=rows, samples_tiles=None, **has)
    averaged, _ = contrastive_loss(z, pairs, Objective(average=True))
    torch.testing.assert_close(averaged, goal_contrastive_loss(z, *rows, pairing="grid", **has)[0])


def test_equal_states_are_at_distance_zero_without_a_gradient() -> None:
    z = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    loss, similarity = reference.goal_contrastive_loss(
        z, torch.tensor([[[0]], [[1]], [[0]], [[1]]]), has_positive_N=torch.tensor([True]), distance="euclidean"
    )
    loss.sum().backward()
    assert similarity.tolist() == [[0.0], [0.0]]
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize("pairing", ["paired", "grid"])
def test_gradients_of_repeated_rows_add(pairing: str) -> None:
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randint(4, (4, 3, 6))  # 72 uses of 4 rows

    def loss(z: torch.Tensor) -> torch.Tensor:
        return goal_contrastive_loss(z, *rows, has_positive_N=torch.tensor([True, False, True]), pairing=pairing)[0]

    assert torch.autograd.gradcheck(loss, (z,))


def test_orthogonal_states_give_two_log_two_and_no_value_leaves_the_bounds() -> None:
    z = torch.eye(4, dtype=torch.float64)
    rows = torch.tensor([[[0]], [[1]], [[2]], [[3]]])
    options = {"has_positive_N": torch.tensor([True])}
    assert goal_contrastive_loss(z, *rows, **options)[0].item() == pytest.approx(1.3863, abs=1e-4)
    line = torch.tensor([[1.0, 0], [-1, 0]], dtype=torch.float64)
    best = goal_contrastive_loss(line, *torch.tensor([[[0]], [[0]], [[0]], [[1]]]), **options)[0].item()
    worst = goal_contrastive_loss(line, *torch.tensor([[[0]], [[1]], [[0]], [[0]]]), **options)[0].item()
    assert (best, worst) == (pytest.approx(0.6265, abs=1e-4), pytest.approx(2.6265, abs=1e-4))


def test_a_pair_without_positives_keeps_its_negative_term_only() -> None:
    z = torch.randn(6, 3, dtype=torch.float64)
    rows = torch.randint(6, (4, 2, 3))
    both, _ = goal_contrastive_loss(z, *rows, has_positive_N=torch.tensor([True, True]))
    one, statistics = goal_contrastive_loss(z, *rows, has_positive_N=torch.tensor([True, False]))
    assert one[0] == both[0]
    cos = torch.cosine_similarity(z[rows[2, 1]], z[rows[3, 1]])
    torch.testing.assert_close(one[1], -torch.log(1 - torch.sigmoid(cos)).mean())
    assert statistics.positive_similarity[1] == 0


def test_zero_states_have_similarity_zero_and_a_finite_gradient() -> None:
    z = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    loss, _ = goal_contrastive_loss(z, *torch.tensor([[[0]], [[1]], [[0]], [[1]]]), has_positive_N=torch.tensor([True]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(2 * math.log(2))
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_half_precision_states_are_compared_in_float32() -> None:
    z = torch.randn(8, 512)
    rows = torch.randint(8, (4, 3, 4))
    options = {"has_positive_N": torch.ones(3, dtype=torch.bool)}
    half = goal_contrastive_loss(z.bfloat16(), *rows, **options)[0]
    exact = goal_contrastive_loss(z.bfloat16().double(), *rows, **options)[0]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, rtol=1e-5, atol=1e-6)


def test_ranking_loss_with_margin() -> None:
    reward = torch.tensor([[1.0, 2.0], [0.5, 3.0]], dtype=torch.float64)
    margin = torch.tensor([0.0, 0.7], dtype=torch.float64)
    expected = [-math.log(sigmoid(0.5)), -math.log(sigmoid(-1.7))]
    assert ranking_loss(reward, margin).tolist() == pytest.approx(expected, rel=1e-12)


def test_q_values_are_cosines_to_each_goal() -> None:
    hidden, goals = torch.randn(5, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    expected = torch.tensor([[cosine(h, g) for g in goals] for h in hidden], dtype=torch.float64)
    torch.testing.assert_close(q_values(hidden, goals), expected)
