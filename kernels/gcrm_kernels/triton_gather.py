"""Triton kernel of the row gather's backward. Maths and shapes: gather.py.

A program takes one row and a block of its columns and adds, in float32, the gradients of the positions that read it, in
the order of the inverse index. Every row is written once; a row that nothing reads gets zeros.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns a program: 2 KiB of a 16-bit row


@triton.jit
def _add_rows_kernel(grad_ptr, order_ptr, offsets_ptr, out_ptr, width, row_stride, column_blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // column_blocks).to(tl.int64)
    d = (tl.program_id(0) % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)):
        position = tl.load(order_ptr + i)
        acc += tl.load(grad_ptr + position * row_stride + d, mask=d < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + d, acc.to(out_ptr.dtype.element_ty), mask=d < width)


def block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))


def add_rows(grad_IW: Tensor, order_I: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the gradients [I, W] of each row's positions, [T, W] in their dtype."""
    grad_IW = grad_IW if grad_IW.stride(-1) == 1 else grad_IW.contiguous()
    rows, width = len(offsets) - 1, grad_IW.shape[1]
    out_TW = grad_IW.new_empty(rows, width)
    if out_TW.numel():
        column_blocks = triton.cdiv(width, block(width))
        _add_rows_kernel[(rows * column_blocks,)](
            grad_IW, order_I, offsets, out_TW, width, grad_IW.stride(0), column_blocks, BLOCK=block(width)
        )
    return out_TW
