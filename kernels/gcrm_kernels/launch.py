"""How a Triton kernel is launched: an analytic rule, or, if GCRM_AUTOTUNE=1, the fastest of a few candidates."""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # macOS, or a CPU-only installation: the analytic PyTorch path serves
    HAS_TRITON = False
else:
    HAS_TRITON = True

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LaunchConfig:
    """Columns a program takes at a time, warps a program, loads in flight."""

    block: int
    num_warps: int
    num_stages: int


_tuned: dict[Hashable, LaunchConfig] = {}


def use_triton(x: Tensor) -> bool:
    """Whether a kernel runs on ``x``: on a GPU with triton, in the dtypes that the kernels are written for."""
    return HAS_TRITON and x.is_cuda and x.dtype in TRITON_DTYPES


def pick(key: Hashable, candidates: Sequence[LaunchConfig], run: Callable[[LaunchConfig], object]) -> LaunchConfig:
    """The first of ``candidates``; with GCRM_AUTOTUNE=1 the fastest, timed once for each ``key``.

    Timing is outside the kernel's decorator, because ``triton.autotune`` needs a driver where it is written.
    """
    if os.environ.get("GCRM_AUTOTUNE") != "1":
        return candidates[0]
    if key not in _tuned:
        times = [triton.testing.do_bench(lambda c=c: run(c), return_mode="median") for c in candidates]
        _tuned[key] = candidates[times.index(min(times))]
    return _tuned[key]
