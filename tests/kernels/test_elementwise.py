"""RMSNorm and SwiGLU against their float64 references, in PyTorch and in Triton: compiled on a GPU, else interpreted.

Uninitialized memory is NaN in all of these tests, so that an element that a kernel does not write shows.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_kernels import reference, rms_norm, swiglu
from support.devices import APPROXIMATE, DEVICE, HALVES
from support.small import small_config, small_model

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(0, 8), (1, 1), (1, 123), (7, 64), (3, 4097)]
EPS = 1e-5


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def run(op: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of op(*inputs) and the gradients of all inputs, given those of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(y.dtype == leaves[0].dtype for y in outputs)
    gradients = torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)])
    assert all(dx.dtype == x.dtype and dx.shape == x.shape for dx, x in zip(gradients, leaves, strict=True))
    return [*(y.detach() for y in outputs), *gradients]


def assert_within_budget(
    found: Sequence[Tensor],
    yardstick: Callable[..., Any],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    terms: Sequence[Tensor | float],
) -> None:
    """Errors against float64 are at most twice those of PyTorch in float32, plus a floor: 2^-22 of ``terms``, the
    largest of what is summed for each result, and half a unit in the last place where one is rounded to 16 bits."""
    exact = run(yardstick, [x.double() for x in inputs], grads)
    usual = run(yardstick, [x.float() for x in inputs], grads)
    for i, (f, e, u, largest) in enumerate(zip(found, exact, usual, terms, strict=True)):
        assert torch.isfinite(f).all(), i
        if not e.numel():
            continue
        kind = torch.finfo(f.dtype)
        allowed = 2 * (u - e).abs().max() + (2**-22 + APPROXIMATE) * (e.abs().max() + largest)
        if kind.bits == 16:
            allowed += kind.eps / 2 * (e.abs().max() + kind.tiny)
        assert (f - e).abs().max() <= allowed, f"result {i}: error {(f - e).abs().max():.3g}, allowed {allowed:.3g}"


def assert_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = EPS) -> None:
    """y, s and all gradients. What is compared with the reference starts at s as it was rounded."""
    dy, ds = normal(*x.shape, dtype=torch.float64, seed=1), normal(*x.shape, dtype=torch.float64, seed=2)
    dy, ds = (g.to(x.dtype).double() for g in (dy, ds))
    if residual is None:
        found, s, grads = run(lambda x, w: rms_norm(x, w, eps), (x, weight), (dy,)), x, (dy,)
    else:
        y, s, dx, dresidual, dweight = run(
            lambda x, r, w: rms_norm(x, w, eps, residual_TH=r), (x, residual, weight), (dy, ds)
        )
        assert torch.equal(s, x + residual)
        assert torch.equal(dx, dresidual)
        found, grads = [y, s, dx, dweight], (dy, ds)
    n = reference.rms_norm(s.double(), torch.ones_like(weight, dtype=torch.float64), eps)[0]
    inverse = (s.double().square().mean(1, keepdim=True) + eps).rsqrt()
    wdy = (weight.double() * dy).abs()
    own = inverse * (wdy + n.abs() * (wdy * n.abs()).mean(1, keepdim=True)) + (0 if residual is None else ds.abs())
    terms = [own.max() if own.numel() else 0.0, (dy * n).abs().sum(0).max()]

    def yardstick(s: Tensor, w: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y, s = reference.rms_norm(s, w, eps)
        return y if residual is None else (y, s)

    assert_within_budget(found, yardstick, (s, weight), grads, [0.0] * len(grads) + terms)


# ------------------------------------------------------------------------------------- the references themselves


@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_reference_gradcheck_and_definition(with_residual: bool) -> None:
    x, residual = (normal(4, 5, dtype=torch.float64, seed=i).requires_grad_() for i in range(2))
    weight = normal(5, dtype=torch.float64, seed=2).requires_grad_()
    inputs = (x, weight, EPS, residual) if with_residual else (x, weight, EPS)
    assert torch.autograd.gradcheck(reference.rms_norm, inputs)
    y, s = reference.rms_norm(*inputs)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(s, (5,), weight, EPS))


def test_swiglu_reference_gradcheck_and_definition() -> None:
    gate, up = (normal(4, 5, dtype=torch.float64, seed=i).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(reference.swiglu, (gate, up))
    torch.testing.assert_close(reference.swiglu(gate, up), torch.nn.functional.silu(gate) * up)


# ------------------------------------------------------------------------------------------------------------ RMSNorm


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_rms_norm(path: str, with_residual: bool, dtype: torch.dtype, tokens: int, width: int) -> None:
    if path == "triton" and dtype == torch.float64:
        pytest.skip("float64 takes the PyTorch path")
    residual = normal(tokens, width, dtype=dtype, seed=3) if with_residual else None
    assert_rms_norm(normal(tokens, width, dtype=dtype), residual, normal(width, dtype=dtype, seed=4))


def test_rms_norm_without_gradients_is_the_same_to_the_bit(path: str) -> None:
    x, residual, weight = normal(5, 64), normal(5, 64, seed=1), normal(64, seed=2)
    kept = rms_norm(x.requires_grad_(), weight, EPS, residual_TH=residual)
    with torch.no_grad():
        plain = rms_norm(x, weight, EPS, residual_TH=residual)
        assert torch.equal(rms_norm(x, weight, EPS), rms_norm(x, weight, EPS, residual_TH=torch.zeros_like(x))[0])
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_is_exact_in_float64(with_residual: bool) -> None:
    """Tighter than the budget, whose floor is that of float32."""
    inputs = [normal(50, 33, dtype=torch.float64), normal(33, dtype=torch.float64, seed=1)]
    inputs += [normal(50, 33, dtype=torch.float64, seed=2)] * with_residual
    grads = [normal(50, 33, dtype=torch.float64, seed=3 + i) for i in range(1 + with_residual)]
    found = run(lambda x, w, *r: rms_norm(x, w, EPS, *r), inputs, grads)
    expected = run(lambda x, w, *r: reference.rms_norm(x, w, EPS, *r)[: len(grads)], inputs, grads)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-13, atol=1e-13)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 12),
    width=st.integers(1, 300),
    with_residual=st.booleans(),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
)
def test_rms_norm_of_any_shape_and_scale(
    path: str, tokens: int, width: int, with_residual: bool, seed: int, scale: float, eps: float
) -> None:
    x, residual = (scale * normal(tokens, width, seed=seed + i) for i in (0, 100))
    assert_rms_norm(x, residual if with_residual else None, normal(width, seed=seed + 200), eps)


def test_rms_norm_of_more_rows_than_parts(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of three rows and one of two; each row's share of the weight's gradient counts once."""
    if path == "triton":
        monkeypatch.setattr(importlib.import_module("gcrm_kernels.triton_rms_norm"), "PARTS", 4)
    assert_rms_norm(normal(11, 20), normal(11, 20, seed=3), normal(20, seed=4))


def test_rms_norm_of_zero_and_of_strided_rows(path: str) -> None:
    wide = normal(12, 40)
    wide[3] = 0
    weight = normal(80, seed=1)[::2]
    assert_rms_norm(wide[:, 4:20], None, weight[:16])
    assert_rms_norm(wide.mT[:12, :12], wide[:, 5:17], weight[:12])
    for grad in (torch.ones(1, 1, device=DEVICE).expand(12, 40), normal(40, 12).mT):
        found = run(lambda x, w: rms_norm(x, w, EPS), (wide, weight), (grad,))
        expected = run(lambda x, w: reference.rms_norm(x, w, EPS)[0], (wide, weight), (grad,))
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=2e-4)


def test_rms_norm_takes_float32_weights_of_half_precision_states(path: str) -> None:
    assert_rms_norm(normal(5, 48, dtype=torch.float16), None, normal(48, seed=1))


def test_rms_norm_gradients_only_where_required(path: str) -> None:
    x, residual, weight = normal(4, 6), normal(4, 6, seed=1), normal(6, seed=2)
    y, s = rms_norm(x, weight, EPS, residual)
    assert not y.requires_grad
    assert not s.requires_grad
    frozen = rms_norm(x.requires_grad_(), weight, EPS)
    frozen.sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    # One of the two results unused, and the weight alone
    y, s = rms_norm(x, weight, EPS, residual.requires_grad_())
    torch.testing.assert_close(torch.autograd.grad(s.sum(), residual)[0], torch.ones_like(residual))
    alone = rms_norm(x.detach(), weight.requires_grad_(), EPS)
    (found,) = torch.autograd.grad(alone.sum(), weight)
    torch.testing.assert_close(found, (alone / weight).sum(0).detach())


def test_rms_norm_keeps_only_the_sum_the_weight_and_the_inverse_for_the_backward(path: str) -> None:
    x, residual, weight = (t.requires_grad_() for t in (normal(64, 32), normal(64, 32, seed=1), normal(32, seed=2)))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, s = rms_norm(x, weight, EPS, residual)
    assert sorted(t.numel() for t in saved) == [32, 64, 64 * 32]
    assert s.data_ptr() in {t.data_ptr() for t in saved}


@pytest.mark.parametrize(
    ("x", "weight", "residual"),
    [
        (torch.ones(2, 3), torch.ones(2), None),
        (torch.ones(2, 3, 4), torch.ones(4), None),
        (torch.ones(2, 3), torch.ones(3), torch.ones(1, 3)),
        (torch.ones(2, 3), torch.ones(3), torch.ones(2, 3, dtype=torch.float64)),
    ],
)
def test_rms_norm_refuses_what_does_not_fit(x: Tensor, weight: Tensor, residual: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        rms_norm(x, weight, EPS, residual)


# ------------------------------------------------------------------------------------------------------------- SwiGLU


def assert_swiglu(gate: Tensor, up: Tensor) -> None:
    dy = normal(*gate.shape, dtype=gate.dtype, seed=1).double()
    found = run(swiglu, (gate, up), (dy,))
    largest = [
        (a.double().abs() * b.double().abs()).max() if gate.numel() else 0.0
        for a, b in ((gate, up), (dy * up, 1 + gate.abs()), (dy, gate))
    ]
    assert_within_budget(found, reference.swiglu, (gate, up), (dy,), largest)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_swiglu(path: str, dtype: torch.dtype, tokens: int, width: int) -> None:
    if (path == "triton") == (dtype == torch.float64) or (path == "pytorch" and dtype in HALVES):
        pytest.skip("float64 takes the PyTorch path; in 16 bits that path is PyTorch's own, which rounds twice")
    assert_swiglu(normal(tokens, width, dtype=dtype), normal(tokens, width, dtype=dtype, seed=2))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(0, 12), width=st.integers(1, 300), seed=st.integers(0, 99), scale=st.sampled_from([0.1, 9.0]))
def test_swiglu_of_any_shape(path: str, tokens: int, width: int, seed: int, scale: float) -> None:
    assert_swiglu(scale * normal(tokens, width, seed=seed), normal(tokens, width, seed=seed + 100))


@pytest.mark.filterwarnings("ignore:overflow")  # of an exponential that is then divided by
def test_swiglu_of_large_gates_and_strided_inputs(path: str) -> None:
    wide = normal(6, 30)
    wide[0] *= 1e4
    assert_swiglu(wide[:, :15], wide[:, 15:])
    assert_swiglu(wide.mT, normal(6, 30, seed=3).mT)


def test_swiglu_keeps_only_gate_and_up_for_the_backward() -> None:
    pytest.importorskip("triton")
    gate, up = normal(5, 7).requires_grad_(), normal(5, 7, seed=1).requires_grad_()
    saved: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("gcrm_kernels.swiglu"), "use_triton", lambda x: True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            swiglu(gate, up)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("up", [torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64)])
def test_swiglu_refuses_what_does_not_fit(up: Tensor) -> None:
    with pytest.raises(ValueError, match="must be alike"):
        swiglu(torch.ones(2, 3), up)


# ------------------------------------------------------------------------------------------------- as PyTorch operators


def test_two_runs_are_bitwise_equal(path: str) -> None:
    inputs, grads = [normal(30, 20), normal(30, 20, seed=1), normal(20, seed=2)], [normal(30, 20, seed=3)] * 2
    for op, n in ((lambda x, r, w: rms_norm(x, w, EPS, r), 3), (swiglu, 2)):
        runs = [run(op, inputs[:n], grads[: n - 1]) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_operators_keep_pytorchs_contract(path: str) -> None:
    x, residual, weight = (t.requires_grad_() for t in (normal(4, 6), normal(4, 6, seed=1), normal(6, seed=2)))
    for r in (None, residual):
        torch.library.opcheck(torch.ops.gcrm.rms_norm.default, (x, r, weight, EPS))
    torch.library.opcheck(torch.ops.gcrm.rms_norm.default, (x, residual, weight.detach(), EPS))
    if path == "triton":  # the other path is not an operator of its own
        torch.library.opcheck(torch.ops.gcrm.swiglu.default, (x, residual))


def test_compile_without_a_graph_break(path: str) -> None:
    def total(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        y, s = rms_norm(x, w, EPS, residual)
        return (swiglu(y, rms_norm(s, w, EPS)) * s).sum()

    inputs = [normal(7, 12), normal(7, 12, seed=1), normal(12, seed=2)]
    one = torch.ones((), device=DEVICE)
    eager, compiled = (
        run(f, inputs, [one]) for f in (total, torch.compile(total, backend="aot_eager", fullgraph=True))
    )
    for e, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(c, e)


def test_model_with_kernels_equals_the_model_without(
    pairs: list[TokenizedPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    model = small_model(small_config(), torch.float32).to(DEVICE)
    pack = build_pack([[pair] for pair in pairs], Sampling(samples=2), 0).to(DEVICE)
    results = []
    for takes_triton in (False, True):
        for name in ("rms_norm", "swiglu"):
            module = importlib.import_module(f"gcrm_kernels.{name}")
            monkeypatch.setattr(module, "use_triton", lambda x, takes=takes_triton: takes)
        model.zero_grad()
        output = model(pack)
        output.reward_2N.square().sum().backward()
        results.append((output.reward_2N.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
    assert len(results[0]) > 20
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
