"""The attention backends of a GPU against the one written out, in float32 on the same inputs."""

import importlib.util
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from gcrm_fast.model.attention import packed_attention, resolve_backend
from support.devices import DEVICE

HEADS, KEY_HEADS = 8, 2
QUERIES = (5, 64, 1, 130, 17)
KEYS = (9, 64, 70, 200, 17)  # of which the first ones of some segments are a shared prefix


def backend_or_skip(backend: str) -> None:
    if backend == "eager":
        return
    if DEVICE != "cuda":
        pytest.skip(f"{backend} needs a GPU")
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def attention(backend: str, inputs: list[Tensor], grad: Tensor, compiled: bool = False) -> list[Tensor]:
    """Output and the gradients of queries, keys and values, as float32."""
    function = torch.compile(packed_attention, backend="aot_eager") if compiled else packed_attention
    leaves = q, k, v = [x.detach().requires_grad_() for x in inputs]
    out = function(q, k, v, bounds(QUERIES), bounds(KEYS), max(QUERIES), max(KEYS), backend)
    assert out.dtype == inputs[0].dtype
    assert out.shape == inputs[0].shape
    gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in inputs]
    return [x.detach().float() for x in (out, *gradients)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["eager", "torch_varlen", "flash_attn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", [64, 128])
def test_half_precision_agrees_with_float32(backend: str, dtype: torch.dtype, head: int, compiled: bool) -> None:
    """Grouped heads, and more keys than queries, whose causal mask is aligned at the end."""
    backend_or_skip(backend)
    shapes = [(sum(QUERIES), HEADS), (sum(KEYS), KEY_HEADS), (sum(KEYS), KEY_HEADS), (sum(QUERIES), HEADS)]
    *inputs, grad = (torch.randn(*shape, head).to(DEVICE, dtype) for shape in shapes)
    expected = attention("eager", [x.float() for x in inputs], grad)
    results = attention(backend, inputs, grad, compiled)
    for name, found, exact in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        assert torch.isfinite(found).all(), name
        assert (found - exact).norm() < 2e-2 * exact.norm(), name
        # No row is wrong by itself: a segment of one query weighs little in the norm of all.
        rows = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1).clamp_min(5e-2 * exact.norm())
        assert rows.max() < 1e-1, name


def test_the_causal_mask_is_aligned_at_the_end() -> None:
    """The written-out backend, by which the others are judged, against attention one query at a time."""
    shapes = [(sum(QUERIES), HEADS), (sum(KEYS), KEY_HEADS), (sum(KEYS), KEY_HEADS)]
    q, k, v = (torch.randn(*shape, 64, device=DEVICE) for shape in shapes)
    out = packed_attention(q, k, v, bounds(QUERIES), bounds(KEYS), max(QUERIES), max(KEYS), "eager")
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
    expected, first_query, first_key = [], 0, 0
    for queries, keys in zip(QUERIES, KEYS, strict=True):
        for i in range(queries):
            seen = slice(first_key, first_key + keys - queries + i + 1)
            scores = torch.einsum("nd,knd->nk", q[first_query + i], k[seen]) / 8
            expected.append(torch.einsum("nk,knd->nd", scores.softmax(-1), v[seen]))
        first_query, first_key = first_query + queries, first_key + keys
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_gpu_takes_a_fused_backend_in_half_precision_only() -> None:
    fused = "flash_attn" if importlib.util.find_spec("flash_attn") else "torch_varlen"
    device = torch.device(DEVICE)
    assert resolve_backend("auto", device, torch.bfloat16) == fused
    assert resolve_backend("auto", device, torch.float32) == "eager"
