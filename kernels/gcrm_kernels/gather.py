"""Row gather whose backward adds repeated rows in a fixed order.

    out[i] = x[index[i]]          dx[r] = sum of dout[i] over all i with index[i] == r

PyTorch's index backward adds with atomics on CUDA, so its sum depends on the run. Here the host, which built
``index``, also hands over its inverse in CSR form: the positions of row r are ``order[offsets[r]:offsets[r + 1]]``,
ascending. The backward reads them in that order: bitwise deterministic, no atomics, no host sync.

Shapes: T rows of x, I gathered rows. Compulsory bytes: read I rows, write I rows, forward and backward alike.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(index, order, offsets)
        ctx.row_shape = x.shape[1:]
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        index, order, offsets = ctx.saved_tensors
        # Sums of bf16 gradients are taken in fp32 and rounded once.
        exact = grad.flatten(1).to(torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype)
        if grad.is_cpu:  # index_add_ goes through the index in order there, and is several times faster
            summed = exact.new_zeros(len(offsets) - 1, exact.shape[1]).index_add_(0, index, exact)
        else:
            summed = torch.segment_reduce(exact.index_select(0, order), "sum", offsets=offsets, axis=0, initial=0.0)
        return summed.to(grad.dtype).unflatten(1, ctx.row_shape), None, None, None


def gather_rows(x: Tensor, index: Tensor, inverse: InverseIndex) -> Tensor:
    """``x[index]`` for x [T, ...] and index [I] int64, with a deterministic backward.

    ``inverse`` is ``InverseIndex.of(index, T)`` on x's device.
    """
    return _GatherRows.apply(x, index, inverse.order, inverse.offsets)
