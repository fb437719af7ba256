"""Row gather whose backward adds repeated rows in a fixed order.

    out[i] = x[index[i]]          dx[r] = sum of dout[i] over all i with index[i] == r

PyTorch's index backward adds with atomics on CUDA, so its sum depends on the run. Here the host, which built
``index``, also passes its inverse in CSR form: the positions of row r are ``order[offsets[r]:offsets[r + 1]]``,
ascending. The backward reads them in that order: bitwise deterministic, no atomics, no host sync.

Shapes: T rows of x, I gathered rows. Compulsory bytes: read I rows, write I rows, forward and backward alike.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gcrm_kernels.launch import HAS_TRITON, operator_body, use_triton

if HAS_TRITON:
    from gcrm_kernels import triton_gather


class InverseIndex(NamedTuple):
    """CSR inverse of a row index: ``order`` [I] int64, ``offsets`` [T + 1] int64 (see the module's text)."""

    order: Tensor
    offsets: Tensor

    @staticmethod
    def of(index_I: np.ndarray, rows: int) -> "InverseIndex":
        """The inverse of ``index_I`` (integers in [0, rows)), built on the host."""
        order = np.argsort(index_I, kind="stable").astype(np.int64)
        offsets = np.zeros(rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(index_I, minlength=rows), out=offsets[1:])
        return InverseIndex(torch.from_numpy(order), torch.from_numpy(offsets))

    @staticmethod
    def on_device(index_I: Tensor, rows: int) -> "InverseIndex":
        """The same, built where the index is, without waiting for the device."""
        ordered, order = index_I.sort(stable=True)
        return InverseIndex(order, torch.searchsorted(ordered, torch.arange(rows + 1, device=index_I.device)))


@torch.library.custom_op("gcrm::gather_rows", mutates_args=())
def _gather(x: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """The inverse index is only for the backward."""
    return x.index_select(0, index)


@_gather.register_fake
def _(x: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((index.shape[0], *x.shape[1:]))


@torch.library.custom_op("gcrm::gather_rows_backward", mutates_args=())
@operator_body
def _add(grad: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Sums of 16-bit gradients are taken in float32 and rounded once."""
    flat = grad.flatten(1)
    if use_triton(grad):
        return triton_gather.add_rows(flat, order, offsets).unflatten(1, grad.shape[1:])
    exact = flat.to(torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype)
    if grad.is_cpu:  # index_add_ goes through the index in order there, and is several times faster
        summed = exact.new_zeros(len(offsets) - 1, exact.shape[1]).index_add_(0, index, exact)
    else:
        summed = torch.segment_reduce(exact.index_select(0, order), "sum", offsets=offsets, axis=0, initial=0.0)
    return summed.to(grad.dtype).unflatten(1, grad.shape[1:])


@_add.register_fake
def _(grad: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty((offsets.shape[0] - 1, *grad.shape[1:]))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _add(grad, *ctx.saved_tensors), None, None, None


_gather.register_autograd(_differentiate, setup_context=_save)


def gather_rows(x: Tensor, index: Tensor, inverse: InverseIndex | None) -> Tensor:
    """``x[index]`` for x [T, ...] and index [I] int64, with a deterministic backward.

    ``inverse`` is ``InverseIndex.of(index, T)`` on x's device. Differentiable once; None suffices for inference.
    """
    if inverse is None:
        return x.index_select(0, index)
    return _gather(x, index, inverse.order, inverse.offsets)
