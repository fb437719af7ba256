"""The rotary embedding with its gather against its float64 reference, in PyTorch and in Triton: compiled on a GPU, else
interpreted.

Uninitialized memory is NaN in all of these tests, so that an element that a kernel does not write shows.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gcrm_kernels import InverseIndex, gather_rows, reference, rotate_and_gather
from support.devices import DEVICE, HALVES

pytestmark = pytest.mark.usefixtures("poisoned")
SHARED = (0, 1, 2, 3, 0, 1, 2, 4, 5, 0, 1, 6, 0)  # a prefix of three tokens that three continuations read, and more


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


class Case(NamedTuple):
    """q, k and v, and what they are rotated and gathered with."""

    inputs: list[Tensor]
    cos_TD: Tensor
    sin_TD: Tensor
    index_K: Tensor
    inverse: InverseIndex | None

    def fused(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return rotate_and_gather(*inputs, self.cos_TD, self.sin_TD, self.index_K, self.inverse)

    def composed(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        angles = (x.to(inputs[0].dtype) for x in (self.cos_TD, self.sin_TD))
        return reference.rotate_and_gather(*inputs, *angles, self.index_K)

    def grads(self) -> list[Tensor]:
        """Of the three results, as they are rounded to the dtype of the inputs, in float64."""
        q, k, _ = self.inputs
        shapes = q.shape, *[(len(self.index_K), *k.shape[1:])] * 2
        return [normal(*shape, dtype=q.dtype, seed=10 + i).double() for i, shape in enumerate(shapes)]

    def strided(self) -> "Case":
        """The same values as slices of one matrix, one after another in each row."""
        wide = torch.cat([x.flatten(1) for x in self.inputs], dim=1)
        parts = wide.split([x[0].numel() for x in self.inputs], dim=1)
        return self._replace(inputs=[p.unflatten(1, x.shape[1:]) for p, x in zip(parts, self.inputs, strict=True)])


def case(
    index: Sequence[int],
    q_heads: int,
    kv_heads: int,
    size: int,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Rows 0 to tokens - 1, by default as far as the index goes, at positions up to 1000."""
    t = max(index) + 1 if tokens is None else tokens
    inputs = [
        normal(t, heads, size, dtype=dtype, seed=seed + i) for i, heads in enumerate((q_heads, kv_heads, kv_heads))
    ]
    angles = (
        1000
        * normal(t, 1, dtype=torch.float64, seed=seed + 3)
        * 0.01 ** torch.linspace(0, 1, size // 2, dtype=torch.float64, device=DEVICE)
    )
    angles = torch.cat((angles, angles), dim=1)
    positions = np.array(index, dtype=np.int64)
    inverse = InverseIndex(*(x.to(DEVICE) for x in InverseIndex.of(positions, t)))
    on_device = torch.from_numpy(positions).to(DEVICE)
    return Case(inputs, angles.cos().to(dtype), angles.sin().to(dtype), on_device, inverse)


def run(op: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The three outputs of op(*inputs) and the gradients of the inputs, given those of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    assert [x.stride() for x in leaves] == [x.stride() for x in inputs]
    outputs = op(*leaves)
    assert all(y.dtype == leaves[0].dtype for y in outputs)
    gradients = torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)])
    assert all(dx.dtype == x.dtype and dx.shape == x.shape for dx, x in zip(gradients, leaves, strict=True))
    return [*(y.detach() for y in outputs), *gradients]


def assert_right(given: Case) -> None:
    """Errors against float64 are at most twice those of PyTorch in float32, plus a floor: 2^-22 of the largest of what
    is summed for each result, and half a unit in the last place where one is rounded to 16 bits. v is copied."""
    grads = given.grads()
    found = run(given.fused, given.inputs, grads)
    exact = run(given.composed, [x.double() for x in given.inputs], grads)
    usual = run(given.composed, [x.float() for x in given.inputs], grads)
    assert torch.equal(found[2], given.inputs[2][given.index_K])
    read = [
        0.0
        if not len(given.index_K)
        else torch.zeros(len(given.cos_TD), *g.shape[1:], device=DEVICE)
        .double()
        .index_add_(0, given.index_K, g.abs())
        .max()
        for g in grads[1:]
    ]
    largest = [x.abs().max() if x.numel() else 0.0 for x in (*given.inputs, grads[0])] + read
    for i, (f, e, u, of) in enumerate(zip(found, exact, usual, largest, strict=True)):
        assert torch.isfinite(f).all(), i
        if not e.numel():
            continue
        kind = torch.finfo(f.dtype)
        allowed = 2 * (u - e).abs().max() + 2**-22 * (e.abs().max() + of)
        if kind.bits == 16:
            allowed += kind.eps / 2 * (e.abs().max() + kind.tiny)
        assert (f - e).abs().max() <= allowed, f"result {i}: error {(f - e).abs().max():.3g}, allowed {allowed:.3g}"


# ------------------------------------------------------------------------------------------------- the reference itself


def test_reference_gradcheck() -> None:
    given = case(SHARED, 4, 2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(given.composed, [x.requires_grad_() for x in given.inputs])


def test_reference_multiplies_complex_numbers() -> None:
    """Of first halves as real and second halves as imaginary parts, by exp(i angle)."""
    given = case(SHARED, 4, 2, 6, dtype=torch.float64)
    turn = torch.complex(given.cos_TD, given.sin_TD)[:, None, :3]
    expected = [torch.complex(x[..., :3], x[..., 3:]) * turn for x in given.inputs[:2]]
    q, k, v = given.composed(*given.inputs)
    for found, e in ((q, expected[0]), (k, expected[1][given.index_K])):
        torch.testing.assert_close(torch.complex(found[..., :3], found[..., 3:]), e)
    assert torch.equal(v, given.inputs[2][given.index_K])


# --------------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "size"), [(8, 2, 64), (3, 3, 128), (8, 2, 10), (2, 1, 24), (1, 1, 2), (6, 6, 64)]
)
def test_rotate_and_gather(path: str, dtype: torch.dtype, q_heads: int, kv_heads: int, size: int) -> None:
    if (path == "triton" and dtype == torch.float64) or (path == "pytorch" and dtype in HALVES):
        pytest.skip("float64 takes the PyTorch path; in 16 bits that path rounds more than once")
    assert_right(case(SHARED, q_heads, kv_heads, size, dtype=dtype))


def test_float64_is_exact(path: str) -> None:
    """Tighter than the budget, whose floor is that of float32."""
    given = case(SHARED, 4, 2, 6, dtype=torch.float64)
    runs = [run(op, given.inputs, given.grads()) for op in (given.fused, given.composed)]
    for f, e in zip(*runs, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-13, atol=1e-13)


def test_pytorch_path_of_16_bits_composes_rotation_and_gather() -> None:
    given = case(SHARED, 4, 2, 8, dtype=torch.bfloat16)
    q, k, v = given.inputs
    angles = given.cos_TD, given.sin_TD
    expected = (
        reference.rotate(q, *angles),
        *(gather_rows(x, given.index_K, given.inverse) for x in (reference.rotate(k, *angles), v)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("gcrm_kernels.rotary"), "use_triton", lambda x: False)
        found = given.fused(q, k, v)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 9),
    rows=st.lists(st.integers(0, 8), max_size=20),
    heads=st.sampled_from([(1, 1), (5, 5), (7, 2)]),  # few kinds: each is compiled on a GPU
    size=st.sampled_from([10, 32]),
    seed=st.integers(0, 99),
    strided=st.booleans(),
)
def test_any_shape_and_index(
    path: str, tokens: int, rows: list[int], heads: tuple[int, int], size: int, seed: int, strided: bool
) -> None:
    given = case([row % tokens for row in rows], *heads, size, tokens=tokens, seed=seed)
    assert_right(given.strided() if strided else given)


def test_without_an_index_all_rows_stay_in_order(path: str) -> None:
    own = case(range(7), 4, 2, 8)
    expected = rotate_and_gather(*own.inputs, own.cos_TD, own.sin_TD, torch.arange(7, device=DEVICE), None)
    for plain, gathered in zip(
        rotate_and_gather(*own.inputs, own.cos_TD, own.sin_TD, None, None), expected, strict=True
    ):
        assert torch.equal(plain, gathered)


@pytest.mark.parametrize(("index", "tokens"), [((), 0), ((), 3), ((2,), 5)])
def test_nothing_to_gather_and_rows_never_read(path: str, index: tuple[int, ...], tokens: int) -> None:
    given = case(index, 4, 2, 8, tokens=tokens)
    assert_right(given)
    *_, dk, dv = run(given.fused, given.inputs, given.grads())
    assert not dk[:2].any()
    assert not dv[:2].any()


def test_slices_of_one_matrix_and_other_strides(path: str) -> None:
    given = case(SHARED, 4, 2, 8)
    assert given.strided().inputs[1].stride() == (64, 8, 1)
    assert_right(given.strided())
    # Heads apart from each other, and the last axis not the innermost
    assert_right(given._replace(inputs=[x.repeat(1, 2, 1)[:, ::2] for x in given.inputs]))
    assert_right(given._replace(inputs=[x.mT.contiguous().mT for x in given.inputs]))
    assert_right(given._replace(cos_TD=given.cos_TD.mT.contiguous().mT, sin_TD=given.sin_TD.mT.contiguous().mT))


def test_gradients_of_any_stride(path: str) -> None:
    given = case(SHARED, 4, 2, 8)
    expected = run(given.fused, given.inputs, given.grads())
    for change in (
        lambda g: g.mT.contiguous().mT,
        lambda g: torch.cat((g, g), dim=2).unflatten(2, (2, -1))[:, :, 0],
        lambda g: torch.cat((g, g), dim=1)[:, : g.shape[1]],
    ):
        found = run(given.fused, given.inputs, [change(g) for g in given.grads()])
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    ones = [torch.ones(1, 1, 1, device=DEVICE).expand(g.shape) for g in given.grads()]
    found = run(given.fused, given.inputs, ones)
    expected = run(given.fused, given.inputs, [g.contiguous() for g in ones])
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_inference_without_an_inverse_index(path: str) -> None:
    given = case(SHARED, 4, 2, 8)
    alone = given._replace(inverse=None)
    with torch.inference_mode():
        for f, e in zip(alone.fused(*given.inputs), given.fused(*given.inputs), strict=True):
            assert torch.equal(f, e)
    assert_right(alone)


def test_gradients_only_where_required(path: str) -> None:
    given = case(SHARED, 4, 2, 8)
    assert not any(y.requires_grad for y in given.fused(*given.inputs))
    expected = run(given.fused, given.inputs, given.grads())[3:]
    for i, x in enumerate(given.inputs):
        inputs = [x.detach() for x in given.inputs]
        inputs[i] = x.detach().requires_grad_()
        output = given.fused(*inputs)[i]  # the other results unused
        (found,) = torch.autograd.grad(output, inputs[i], given.grads()[i].to(output.dtype))
        torch.testing.assert_close(found, expected[i])


def test_keeps_only_angles_and_indices_for_the_backward() -> None:
    pytest.importorskip("triton")
    given = case(SHARED, 4, 2, 8)
    saved: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("gcrm_kernels.rotary"), "use_triton", lambda x: True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            given.fused(*(x.requires_grad_() for x in given.inputs))
    kept = {t.data_ptr() for t in saved}
    assert kept == {x.data_ptr() for x in (given.cos_TD, given.sin_TD, given.index_K, *given.inverse)}


def test_mixed_dtypes_are_promoted_as_by_pytorch(path: str) -> None:
    given = case(SHARED, 4, 2, 8)
    q, k, v = (x.half() for x in given.inputs)
    found = given.fused(q, k, v)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.float16]
    expected = reference.rotate(q, given.cos_TD, given.sin_TD)
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3, 5), (2, 1, 5), (2, 1, 5), (2, 5), (2, 5)],
        [(2, 3, 4), (3, 1, 4), (3, 1, 4), (2, 4), (2, 4)],
        [(2, 3, 4), (2, 1, 4), (2, 3, 4), (2, 4), (2, 4)],
        [(2, 3, 4), (2, 1, 6), (2, 1, 6), (2, 4), (2, 4)],
        [(2, 3, 4), (2, 1, 4), (2, 1, 4), (2, 2), (2, 2)],
        [(2, 3, 4), (2, 1, 4), (2, 1, 4), (2, 4), (1, 4)],
        [(2, 4), (2, 4), (2, 4), (2, 4), (2, 4)],
    ],
)
def test_refuses_what_does_not_fit(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="must be"):
        rotate_and_gather(*(torch.ones(shape) for shape in shapes), torch.zeros(3, dtype=torch.int64), None)


# ------------------------------------------------------------------------------------------------ as a PyTorch operator


def test_two_runs_are_bitwise_equal(path: str) -> None:
    given = case(np.random.default_rng(0).integers(0, 6, size=60).tolist(), 4, 2, 8, tokens=6)
    runs = [run(given.fused, given.inputs, given.grads()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_operator_keeps_pytorchs_contract() -> None:
    pytest.importorskip("triton")
    given = case(SHARED, 4, 2, 8)
    for inputs, inverse in ((given.inputs, (None, None)), (given.strided().inputs, given.inverse)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        arguments = (*leaves, given.cos_TD, given.sin_TD, given.index_K, *inverse)
        torch.library.opcheck(torch.ops.gcrm.rotate_and_gather.default, arguments)
    grads = [g.float() for g in given.grads()]
    arguments = (*grads, given.cos_TD, given.sin_TD, *given.inverse)
    torch.library.opcheck(torch.ops.gcrm.rotate_and_gather_backward.default, arguments)


@pytest.mark.parametrize("with_inverse", [True, False])
def test_compile_without_a_graph_break(path: str, with_inverse: bool) -> None:
    given = case(SHARED, 4, 2, 8).strided()
    given = given if with_inverse else given._replace(inverse=None)
    compiled = torch.compile(given.fused, backend="aot_eager", fullgraph=True, dynamic=True)
    runs = [run(op, given.inputs, given.grads()) for op in (given.fused, compiled)]
    for e, c in zip(*runs, strict=True):
        torch.testing.assert_close(c, e)
