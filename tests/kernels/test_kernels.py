"""Every op against its float64 reference, in PyTorch and in Triton: compiled on a GPU, else in Triton's interpreter.

Uninitialized memory is NaN in all of these tests, so that an element that a kernel does not write shows.
"""

import importlib
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gcrm_kernels import (
    InverseIndex,
    RowTiles,
    contrastive,
    dense_contrastive_loss,
    gather_rows,
    goal_contrastive_loss,
    launch,
    q_values,
    reference,
)
from support.devices import APPROXIMATE, DEVICE, HALVES

pytestmark = pytest.mark.usefixtures("poisoned")
VARIANTS = [(pairing, reduce) for pairing in contrastive.PAIRINGS for reduce in contrastive.REDUCTIONS]


class Case:
    """Inputs of a sampled loss, on the test device."""

    def __init__(self, n: int, s: int, rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        self.rows = torch.randint(rows, (4, n, s), generator=generator).to(DEVICE)
        self.has_positive = torch.rand(n, generator=generator).to(DEVICE) > 0.3
        self.has_negative = self.has_positive.flip(0) | ~self.has_positive
        self.grad = torch.randn(n, generator=generator, dtype=torch.float64).to(DEVICE)

    def tiles(self) -> RowTiles:
        return RowTiles(*(t.to(DEVICE) for t in RowTiles.of(self.rows.cpu().numpy(), len(self.hidden))))


def with_gradient(
    op: Callable[[torch.Tensor], tuple[torch.Tensor, Any]], x: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, statistics [2, N], gradient of sum(grad * loss)), as float64."""
    x = x.detach().requires_grad_()
    loss, statistics = op(x)
    (dx,) = torch.autograd.grad((loss * grad.to(loss.dtype)).sum(), x)
    assert dx.dtype == x.dtype
    return loss.detach().double(), torch.stack(tuple(statistics)).double(), dx.double()


def assert_within_budget(
    op: Callable[..., Any], yardstick: Callable[..., Any], x: torch.Tensor, grad: torch.Tensor, temperature: float
) -> None:
    """Errors against float64 are at most twice those of PyTorch in float32, plus a floor: 2^-22 of the terms that are
    summed (they may cancel), and half a unit in the last place where a gradient is rounded to 16 bits. A cosine adds
    two terms to a source's gradient and two to a goal's; a row can be both, in the positives and in the negatives."""
    terms = 8 * grad.abs().sum() / temperature / x.double().norm(dim=1).clamp_min(1e-8).min() if grad.numel() else 0.0
    exact = with_gradient(yardstick, x.double(), grad)
    usual = with_gradient(yardstick, x.float(), grad)
    found = with_gradient(op, x, grad)
    for name, e, u, f in zip(("loss", "statistics", "gradient"), exact, usual, found, strict=True):
        if not e.numel():
            continue
        assert f.shape == e.shape
        assert torch.isfinite(f).all(), name
        kind = torch.finfo(x.dtype)
        largest = terms if name == "gradient" else e.abs().max() + 1
        allowed = 2 * (u - e).abs().max() + (2**-22 + APPROXIMATE) * largest
        if name == "gradient" and kind.bits == 16:
            allowed += kind.eps / 2 * (e.abs().max() + kind.tiny)
        assert (f - e).abs().max() <= allowed, f"{name}: error {(f - e).abs().max():.3g}, allowed {allowed:.3g}"


def assert_contrastive(case: Case, *, tiles: RowTiles | None = None, **options: Any) -> None:
    options |= {"has_positive_N": case.has_positive, "has_negative_N": case.has_negative}
    assert_within_budget(
        lambda h: goal_contrastive_loss(h, *case.rows, tiles=tiles, **options),
        lambda h: reference.goal_contrastive_loss(h, case.rows, **options),
        case.hidden,
        case.grad,
        options.get("temperature", 1.0),
    )


def kernels() -> ModuleType:
    """The module of the contrastive kernels, with ``column_parts``."""
    pytest.importorskip("triton")
    return importlib.import_module("gcrm_kernels.triton_contrastive")


# ------------------------------------------------------------------------------------- the references themselves


@pytest.mark.parametrize("distance", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize(("pairing", "reduce"), VARIANTS)
@pytest.mark.parametrize("projected", [False, True])
def test_reference_gradcheck(pairing: str, reduce: str, projected: bool, distance: str) -> None:
    case = Case(3, 4, 6, 5, torch.float64)
    w = torch.randn(3, 5, dtype=torch.float64, device=DEVICE, requires_grad=True) if projected else None

    def loss(h: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
        options = {"has_positive_N": case.has_positive, "pairing": pairing, "reduce": reduce, "temperature": 0.6}
        options |= {"has_negative_N": case.has_negative, "distance": distance}
        return reference.goal_contrastive_loss(h, case.rows, w, **options)[0]

    assert torch.autograd.gradcheck(loss, (case.hidden.requires_grad_(), w))


def test_dense_reference_gradcheck() -> None:
    cu_seqlens = torch.tensor([0, 4, 7, 8, 10], device=DEVICE)
    z = torch.randn(10, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: reference.dense_contrastive_loss(z, cu_seqlens, temperature=0.6)[0], (z,))


# --------------------------------------------------------------------------------------------------- sampled loss


@pytest.mark.parametrize(("pairing", "reduce"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("s", "width"), [(1, 123), (5, 64), (16, 200), (33, 40), (64, 123)])
def test_contrastive_loss(path: str, pairing: str, reduce: str, dtype: torch.dtype, s: int, width: int) -> None:
    if path == "triton" and dtype == torch.float64:
        pytest.skip("float64 takes the PyTorch path")
    case = Case(3, s, 150, width, dtype)
    assert_contrastive(case, tiles=case.tiles(), pairing=pairing, reduce=reduce, temperature=0.7)


@pytest.mark.parametrize("width", [2048, 4096, 5120])
def test_contrastive_loss_of_wide_states(path: str, width: int) -> None:
    assert_contrastive(Case(2, 16, 40, width, torch.float32), pairing="grid", reduce="mean_then_log")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    ("n", "s", "width", "pairing", "reduce"),
    [
        (1, 16, 2048, "grid", "mean_then_log"),
        (2, 5, 1031, "paired", "log_then_mean"),
        (8, 33, 257, "grid", "log_then_mean"),
        (1, 64, 300, "paired", "mean_then_log"),
    ],
)
def test_contrastive_loss_of_few_pairs(
    path: str, dtype: torch.dtype, n: int, s: int, width: int, pairing: str, reduce: str
) -> None:
    if path == "triton":
        assert kernels().column_parts(n, s, width)[0] > 1
    assert_contrastive(Case(n, s, 60, width, dtype), pairing=pairing, reduce=reduce, temperature=0.7)


@pytest.mark.parametrize("pairing", contrastive.PAIRINGS)
@pytest.mark.parametrize("split", [(1, 100), (2, 64), (4, 25), (7, 16), (16, 7)], ids=str)
def test_contrastive_loss_in_any_number_of_parts(
    pairing: str, split: tuple[int, int], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    if path == "triton":
        monkeypatch.setattr(kernels(), "column_parts", lambda *_: split)
    case = Case(3, 5, 40, 100, torch.float32)
    case.hidden[case.rows[0, 0, 0]] *= 1e-10
    assert_contrastive(case, pairing=pairing, reduce="mean_then_log")


def test_parts_agree_with_the_whole_and_with_themselves(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 16, 50, 1025, torch.float32)

    def run() -> tuple[torch.Tensor, ...]:
        options = {"has_positive_N": case.has_positive, "pairing": "grid"}
        return with_gradient(lambda h: goal_contrastive_loss(h, *case.rows, **options), case.hidden, case.grad)

    first, second = run(), run()
    if path == "triton":
        monkeypatch.setattr(kernels(), "column_parts", lambda n, samples, width: (1, width))
    for a, b, whole in zip(first, second, run(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, whole, rtol=1e-5, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 600), s=st.integers(1, 64), width=st.integers(1, 20000))
def test_parts_cover_the_columns(n: int, s: int, width: int) -> None:
    parts, columns = kernels().column_parts(n, s, width)
    assert (parts - 1) * columns < width <= parts * columns
    assert parts == 1 or (n < 264 and parts <= 16 and columns * max(s, 16) >= 4096)


def test_parts_keep_a_gpu_busy() -> None:
    assert kernels().column_parts(8, 16, 4096) == (8, 512)
    assert kernels().column_parts(1, 64, 4096) == (8, 512)
    assert kernels().column_parts(512, 16, 4096) == (1, 4096)  # pairs enough
    assert kernels().column_parts(8, 16, 256) == (1, 256)  # nothing to split


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 5),
    s=st.integers(1, 20),
    rows=st.integers(1, 300),
    width=st.integers(1, 90),
    variant=st.sampled_from(VARIANTS),
    temperature=st.floats(0.05, 4.0),
    host=st.booleans(),
    seed=st.integers(0, 99),
)
def test_contrastive_loss_of_any_shape_and_indices(
    path: str,
    n: int,
    s: int,
    rows: int,
    width: int,
    variant: tuple[str, str],
    temperature: float,
    host: bool,
    seed: int,
) -> None:
    """Few rows make them repeat within and across pairs; many leave rows that no sample names."""
    case = Case(n, s, rows, width, torch.float32, seed)
    tiles = case.tiles() if host else None
    assert_contrastive(case, tiles=tiles, pairing=variant[0], reduce=variant[1], temperature=temperature)


def test_states_below_eps_are_compared_and_pass_no_own_gradient(path: str) -> None:
    case = Case(2, 4, 8, 16, torch.float32)
    case.hidden[:4] *= 1e-9
    case.hidden[0] = 0
    assert_contrastive(case, pairing="grid")


def test_a_small_temperature_does_not_overflow(path: str) -> None:
    assert_contrastive(Case(3, 8, 20, 16, torch.float32), pairing="grid", reduce="mean_then_log", temperature=1e-3)


def test_strided_states_are_read_as_they_lie(path: str) -> None:
    case = Case(2, 3, 10, 24, torch.float32)
    wide = torch.randn(10, 24, device=DEVICE)
    for view in (wide[:, 4:20], wide.mT[:12]):
        case.hidden = view
        case.rows %= len(view)
        assert_contrastive(case, pairing="grid")


@pytest.mark.parametrize("rows", [30, 400])  # fewer than the samples: all are projected; more: they are gathered first
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_projected_states(path: str, rows: int, dtype: torch.dtype) -> None:
    case = Case(3, 8, rows, 20, dtype)
    w = torch.randn(6, 20, dtype=dtype, device=DEVICE)
    options = {"has_positive_N": case.has_positive, "pairing": "grid"}
    results = []
    for op in (
        lambda h, w: goal_contrastive_loss(h, *case.rows, w, **options),
        lambda h, w: reference.goal_contrastive_loss(h, case.rows, w, **options),
    ):
        leaves = [case.hidden.clone().requires_grad_(), w.clone().requires_grad_()]
        loss, _ = op(*leaves)
        results.append((loss, *torch.autograd.grad((loss * case.grad.to(loss.dtype)).sum(), leaves)))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_two_runs_are_bitwise_equal(path: str) -> None:
    case = Case(4, 16, 30, 100, torch.float32)
    runs = [
        with_gradient(
            lambda h: goal_contrastive_loss(h, *case.rows, has_positive_N=case.has_positive, pairing="grid"),
            case.hidden,
            case.grad,
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradients_only_where_required(path: str) -> None:
    case = Case(2, 3, 200, 6, torch.float32)
    loss, statistics = goal_contrastive_loss(case.hidden, *case.rows, has_positive_N=case.has_positive)
    assert not loss.requires_grad
    w = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    loss, statistics = goal_contrastive_loss(case.hidden, *case.rows, w, has_positive_N=case.has_positive)
    loss.sum().backward()
    assert w.grad is not None
    assert case.hidden.grad is None
    assert not any(s.requires_grad for s in statistics)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize("pairing", contrastive.PAIRINGS)
def test_rows_of_very_different_norms(path: str, dtype: torch.dtype, tolerance: float, pairing: str) -> None:
    """Coefficients go with 1 / norm: what 16-bit products keep of them must suit the largest and the smallest rows."""
    case = Case(4, 16, 64, 48, dtype)
    hidden = (case.hidden.double() * torch.logspace(-2, 2, 64, device=DEVICE)[:, None]).to(dtype)
    grad = case.grad * 64  # small float16 gradients would be subnormal
    options = {"has_positive_N": case.has_positive, "pairing": pairing}
    _, _, found = with_gradient(lambda h: goal_contrastive_loss(h, *case.rows, **options), hidden, grad)
    _, _, exact = with_gradient(
        lambda h: reference.goal_contrastive_loss(h, case.rows, reduce="log_then_mean", temperature=1.0, **options),
        hidden.double(),
        grad,
    )
    error_R = (found - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-3)
    assert error_R.max() < tolerance


def test_rows_that_no_sample_names_may_hold_anything(path: str) -> None:
    case = Case(2, 3, 20, 8, torch.float32)
    free = sorted(set(range(20)) - set(case.rows.flatten().tolist()))
    hidden = case.hidden.clone()
    hidden[free[0]], hidden[free[1]] = torch.inf, torch.nan
    _, _, gradient = with_gradient(
        lambda h: goal_contrastive_loss(h, *case.rows, has_positive_N=case.has_positive), hidden, case.grad
    )
    assert torch.isfinite(gradient).all()
    assert not gradient[free].any()


def test_strided_and_narrow_inputs(path: str) -> None:
    case = Case(6, 3, 20, 8, torch.float32)
    keep = torch.arange(6, device=DEVICE) % 3 > 0
    wide = keep.repeat_interleave(2)
    expected, _ = goal_contrastive_loss(case.hidden, *case.rows, has_positive_N=keep)
    found, _ = goal_contrastive_loss(case.hidden, *case.rows.int(), has_positive_N=wide[::2])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_autocast_changes_nothing(path: str) -> None:
    case = Case(4, 3, 20, 8, torch.float32)
    cuts, goals = torch.tensor([0, 9, 20], device=DEVICE), torch.randn(2, 8, device=DEVICE)

    def all_three(h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sampled, _ = goal_contrastive_loss(h, *case.rows, has_positive_N=case.has_positive, pairing="grid")
        dense, _ = dense_contrastive_loss(h, cuts, 20)
        return sampled, dense, q_values(h, goals), *torch.autograd.grad(sampled.sum() + dense.sum(), h)

    expected = all_three(case.hidden.clone().requires_grad_())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = all_three(case.hidden.clone().requires_grad_())
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairing": "other"}, "pairing"),
        ({"has_positive_N": torch.ones(1, dtype=torch.bool)}, "has_positive_N"),
        ({"has_negative_N": torch.ones(1, dtype=torch.bool)}, "has_negative_N"),
        ({"reduce": "other"}, "reduce"),
        ({"temperature": 0.0}, "temperature"),
        ({"rows": torch.zeros(4, 2, 65, dtype=torch.long)}, "S from 1 to 64"),
        ({"rows": torch.zeros(4, 2, 0, dtype=torch.long)}, "S from 1 to 64"),
        ({"rows": [torch.zeros(2, 3, dtype=torch.long)] * 3 + [torch.zeros(2, 4, dtype=torch.long)]}, "four times"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    options = {
        "rows": torch.zeros(4, 2, 3, dtype=torch.long),
        "has_positive_N": torch.ones(2, dtype=torch.bool),
    } | change
    with pytest.raises(ValueError, match=message):
        goal_contrastive_loss(torch.ones(3, 2), *options.pop("rows"), **options)


# ------------------------------------------------------------------------------------------------ the inverse index


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 6), s=st.integers(1, 9), rows=st.integers(1, 400), seed=st.integers(0, 99))
def test_row_tiles_name_each_unit_of_each_row_once(n: int, s: int, rows: int, seed: int) -> None:
    rows_4NS = np.random.default_rng(seed).integers(rows, size=(4, n, s))
    expected = {
        (int(rows_4NS[role, p, k]), p + n * (role // 2)) for role in range(4) for p in range(n) for k in range(s)
    }
    for tiles in (RowTiles.of(rows_4NS, rows), RowTiles.on_device(torch.from_numpy(rows_4NS), rows)):
        starts, offsets = tiles.starts.tolist(), tiles.offsets.tolist()
        assert (starts[0], starts[-1]) == (0, rows)
        assert all(0 < b - a <= contrastive.TILE_ROWS for a, b in pairwise(starts))
        assert len(offsets) == len(starts)
        listed = [(tile, unit) for tile, (a, b) in enumerate(pairwise(offsets)) for unit in tiles.units[a:b].tolist()]
        assert len(set(listed)) == len(listed)
        tile_of = {row: tile for tile, (a, b) in enumerate(pairwise(starts)) for row in range(a, b)}
        assert set(listed) == {(tile_of[row], unit) for row, unit in expected}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("rows", "indices", "shape"), [(7, 30, (3, 5)), (3, 0, (4,)), (40, 9, (1030,)), (5, 6, (1,))])
def test_gather_rows_adds_each_row_in_order(
    path: str, rows: int, indices: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    index = torch.randint(rows, (indices,), device=DEVICE)
    x = torch.randn(rows, *shape, device=DEVICE).to(dtype).requires_grad_()
    grad = torch.randn(*shape, indices, device=DEVICE).to(dtype).movedim(-1, 0)
    (found,) = torch.autograd.grad(gather_rows(x, index, InverseIndex.on_device(index, rows)), x, grad)
    expected = torch.zeros(x.shape, dtype=torch.float64, device=DEVICE).index_add_(0, index, grad.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-3 if dtype in HALVES else 1e-5, atol=1e-5)


@pytest.mark.parametrize("on_device", [False, True])
def test_gather_rows_gradcheck_and_rows_never_read(on_device: bool) -> None:
    index = torch.tensor([3, 0, 3, 3, 1])
    inverse = InverseIndex.on_device(index, 5) if on_device else InverseIndex.of(index.numpy(), 5)
    index, inverse = index.to(DEVICE), InverseIndex(*(v.to(DEVICE) for v in inverse))
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, index, inverse), (x,))
    gather_rows(x, index, inverse).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0, 0].tolist() == [1, 1, 0, 3, 0]


# --------------------------------------------------------------------------------------------------------- dense loss


def assert_dense(lengths: list[tuple[int, int]], width: int, dtype: torch.dtype, temperature: float = 1.0) -> None:
    cu_seqlens = torch.tensor([0, *(x for pair in lengths for x in pair)], device=DEVICE).cumsum(0).int()
    z = torch.randn(int(cu_seqlens[-1]), width, dtype=torch.float64).to(DEVICE, dtype)
    grad = torch.randn(len(lengths), dtype=torch.float64).to(DEVICE)
    longest = max((a + b for a, b in lengths), default=0)
    assert_within_budget(
        lambda z: dense_contrastive_loss(z, cu_seqlens, longest, temperature=temperature),
        lambda z: reference.dense_contrastive_loss(z, cu_seqlens, temperature=temperature),
        z,
        grad,
        temperature,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("lengths", [[(5, 3), (1, 4)], [(70, 90), (130, 20), (2, 2)], [(64, 64)]], ids=str)
def test_dense_loss(path: str, lengths: list[tuple[int, int]], dtype: torch.dtype) -> None:
    if path == "triton" and dtype == torch.float64:
        pytest.skip("float64 takes the PyTorch path")
    assert_dense(lengths, 33, dtype, 0.7)


def test_dense_loss_of_clamped_norms_and_strided_inputs(path: str) -> None:
    """Below eps a norm is a constant: a position's cosine with itself would not cancel out of its gradient."""
    cuts = torch.tensor([0, 0, 4, 0, 9, 0, 12, 0, 17, 0], device=DEVICE)[::2]
    z = (torch.randn(17, 5, dtype=torch.float64) * torch.logspace(-10, 0, 17)[:, None]).float().to(DEVICE)
    grad = torch.tensor([1.0, -2.0], dtype=torch.float64, device=DEVICE)
    exact = with_gradient(lambda z: reference.dense_contrastive_loss(z, cuts), z.double(), grad)
    # Terms of a row's gradient are as large as 1 / norm and cancel: what float32 leaves of them depends on the device.
    canceled = 2**-21 / z.double().norm(dim=1, keepdim=True).clamp_min(1e-8)
    for states in (z, z.T.contiguous().T):
        found = with_gradient(lambda z: dense_contrastive_loss(z, cuts, 9), states, grad)
        for f, e, floor in zip(found, exact, (0.0, 0.0, canceled), strict=True):
            assert ((f - e).abs() <= 1e-5 * (1 + e.abs()) + floor).all()


def test_losses_of_no_pairs_have_a_gradient(path: str) -> None:
    for z in (torch.ones(1, 4, device=DEVICE), torch.ones(0, 4, device=DEVICE)):
        z.requires_grad_()
        rows = torch.zeros(4, 0, 3, dtype=torch.long, device=DEVICE)
        sampled, _ = goal_contrastive_loss(z, *rows, has_positive_N=torch.ones(0, dtype=torch.bool, device=DEVICE))
        dense, _ = dense_contrastive_loss(z[:0], torch.zeros(1, dtype=torch.int32, device=DEVICE), 0)
        (sampled.sum() + dense.sum()).backward()
        assert z.grad is not None
        assert not z.grad.any()


def test_dense_loss_in_several_turns_and_blocks(path: str) -> None:
    """Long pairs of narrow states: the scratch holds some of a pair's tiles only; then some of the pairs."""
    assert_dense([(300, 200)], 3, torch.float32)
    assert_dense([(40, 30)] * 10, 64, torch.float32)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), max_size=3), width=st.integers(1, 70))
def test_dense_loss_of_any_lengths(path: str, lengths: list[tuple[int, int]], width: int) -> None:
    if lengths:
        assert_dense(lengths, width, torch.float32)


def test_dense_loss_is_the_expectation_of_samples(path: str) -> None:
    """All ordered pairs and all negatives, handed to the sampled loss one by one, average to the dense loss."""
    z = torch.randn(9, 7, device=DEVICE)
    positives = torch.triu_indices(5, 5, offset=1)
    negatives = torch.cartesian_prod(torch.arange(5), torch.arange(5, 9)).T
    rows = torch.cat([positives.repeat(1, 2), negatives]).unsqueeze(2).to(DEVICE)  # 20 pairs of one sample each
    loss, _ = goal_contrastive_loss(z, *rows, has_positive_N=torch.ones(20, dtype=torch.bool, device=DEVICE))
    found, _ = dense_contrastive_loss(z, torch.tensor([0, 5, 9], device=DEVICE), 9)
    torch.testing.assert_close(found[0], loss.mean())


def test_dense_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="two segments per pair"):
        dense_contrastive_loss(torch.ones(3, 2), torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match="temperature"):
        dense_contrastive_loss(torch.ones(3, 2), torch.tensor([0, 2, 3]), 3, temperature=-1.0)


# ----------------------------------------------------------------------------------------------------------- Q-values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("tokens", "goals", "width"), [(100, 1, 123), (70, 3, 64), (5, 70, 40), (0, 2, 8)])
def test_q_values(path: str, dtype: torch.dtype, tokens: int, goals: int, width: int) -> None:
    hidden = torch.randn(tokens, width, dtype=torch.float64).to(DEVICE, dtype)
    if tokens:
        hidden[0] = 0
    goal = torch.randn(goals, width, device=DEVICE) * torch.logspace(-6, 6, goals, device=DEVICE)[:, None]
    found = q_values(hidden, goal.to(torch.float64 if dtype == torch.float64 else torch.float32))
    expected = reference.q_values(hidden.double(), goal.double())
    assert found.shape == (tokens, goals)
    # 16 bits of a bfloat16 goal's entries are kept; all other products are those of float32.
    tolerance = {torch.float64: 1e-13, torch.bfloat16: 2**-14}.get(dtype, 1e-6)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_q_values_of_projected_states_have_no_gradient(path: str) -> None:
    hidden = torch.randn(30, 12, device=DEVICE, requires_grad=True)
    w, goals = torch.randn(5, 12, device=DEVICE), torch.randn(2, 5, device=DEVICE)
    found = q_values(hidden, goals, w)
    assert not found.requires_grad
    torch.testing.assert_close(found, reference.q_values(hidden, goals, w), rtol=1e-5, atol=1e-5)


def test_q_values_refuse_goals_of_another_width() -> None:
    with pytest.raises(ValueError, match="width"):
        q_values(torch.ones(3, 4), torch.ones(1, 5))


# ------------------------------------------------------------------------------------------------- as PyTorch operators


@pytest.mark.parametrize("grid", [True, False])
def test_operators_keep_pytorchs_contract(path: str, grid: bool) -> None:
    case = Case(2, 3, 8, 6, torch.float32)
    hidden = case.hidden.clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.gcrm.goal_contrastive_loss.default,
        (hidden, case.rows, torch.stack([case.has_positive, ~case.has_positive]), *case.tiles(), grid, True, 0.7),
    )
    cu_seqlens = torch.tensor([0, 3, 5, 6, 8], dtype=torch.int32, device=DEVICE)
    for states in (hidden, hidden.detach().T.contiguous().T.requires_grad_()):
        torch.library.opcheck(torch.ops.gcrm.dense_contrastive_loss.default, (states, cu_seqlens, 5, 0.7))
    index = torch.tensor([3, 0, 3], device=DEVICE)
    torch.library.opcheck(
        torch.ops.gcrm.gather_rows.default, (hidden, index, *InverseIndex.on_device(index, len(hidden)))
    )
    torch.library.opcheck(torch.ops.gcrm.q_values.default, (case.hidden, torch.ones(2, 6, device=DEVICE)))


def test_compiles_without_a_graph_break(path: str) -> None:
    case = Case(2, 3, 8, 6, torch.float32)
    cu_seqlens = torch.tensor([0, 3, 5, 6, 8], dtype=torch.int32, device=DEVICE)
    w = torch.randn(4, 6, device=DEVICE)

    def total(h: torch.Tensor) -> torch.Tensor:
        sampled, _ = goal_contrastive_loss(h, *case.rows, w, has_positive_N=case.has_positive, pairing="grid")
        every, _ = dense_contrastive_loss(h, cu_seqlens, 5)
        return sampled.sum() + every.sum() + q_values(h, torch.ones(1, 6, device=DEVICE)).sum()

    results = []
    for function in (total, torch.compile(total, backend="aot_eager", fullgraph=True)):
        h = case.hidden.clone().requires_grad_()
        value = function(h)
        results.append((value.detach(), *torch.autograd.grad(value, h)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


# ------------------------------------------------------------------------------------------------------------ launching


def test_autotuning_takes_the_fastest_and_times_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    slow, fast = launch.LaunchConfig(64, 4, 2), launch.LaunchConfig(128, 8, 3)
    ran: list[launch.LaunchConfig] = []

    def timed(run: Callable[[], None], return_mode: str) -> float:
        run()
        return {slow: 2.0, fast: 1.0}[ran[-1]]

    monkeypatch.setattr(launch.triton.testing, "do_bench", timed)
    assert launch.pick("key", [slow, fast], ran.append) == slow
    assert ran == []
    monkeypatch.setenv("GCRM_AUTOTUNE", "1")
    assert [launch.pick("key", [slow, fast], ran.append) for _ in range(2)] == [fast, fast]
    assert ran == [slow, fast]


def test_the_kernels_need_a_gpu_tensor_of_a_supported_dtype() -> None:
    assert not launch.use_triton(torch.ones(1))
    assert not launch.use_triton(torch.ones(1, dtype=torch.float64, device=DEVICE))
