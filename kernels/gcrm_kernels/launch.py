"""How a Triton kernel is launched: an analytic rule, or, if GCRM_AUTOTUNE=1, the fastest of a few candidates."""

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # macOS, or a CPU-only installation: the analytic PyTorch path serves
    HAS_TRITON = False
else:
    HAS_TRITON = True

P = ParamSpec("P")
R = TypeVar("R")

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LaunchConfig:
    """Columns that a program takes at a time, warps per program, loads in flight."""

    block: int
    num_warps: int
    num_stages: int


_tuned: dict[Hashable, LaunchConfig] = {}


def use_triton(x: Tensor) -> bool:
    """Whether a kernel runs on ``x``: on a GPU with triton, in the dtypes that the kernels are written for."""
    return HAS_TRITON and x.is_cuda and x.dtype in TRITON_DTYPES


def operator_body(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Runs an operator's implementation on the device of its first argument, as Triton launches on the current one, and
    without autocast, which would round what is meant to be float32."""

    @functools.wraps(function)
    def run(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(first), torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return run


def pick(key: Hashable, candidates: Sequence[LaunchConfig], run: Callable[[LaunchConfig], object]) -> LaunchConfig:
    """The first of ``candidates``; with GCRM_AUTOTUNE=1 the fastest, timed once per ``key`` and process: the order
    of sums may then differ from run to run.

    Timing is outside the kernel's decorator, because ``triton.autotune`` needs a driver at import.
    """
    if os.environ.get("GCRM_AUTOTUNE") != "1":
        return candidates[0]
    if key not in _tuned:
        times = [triton.testing.do_bench(lambda c=c: run(c), return_mode="median") for c in candidates]
        _tuned[key] = candidates[times.index(min(times))]
    return _tuned[key]
