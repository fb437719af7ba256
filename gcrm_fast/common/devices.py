"""The device of a process."""

from typing import Literal

import torch

from gcrm_fast.common.options import check_value
from gcrm_fast.common.processes import local_rank


def default_device() -> torch.device:
    """The GPU of this process's rank, or the CPU if there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(dtype: str | torch.dtype, device: torch.device, *, training: bool = False) -> torch.dtype:
    """The dtype of that name; ``auto`` is bfloat16 on a GPU, else float32. Raises UserError for other names.

    In training ``auto`` is bfloat16 also on a CPU with matrix units for it (AMX: 950 against 150 GFLOP/s of float32 on
    two cores); rewards are computed exactly there.
    """
    name = str(dtype).removeprefix("torch.")
    check_value("dtype", name, Literal["auto", "bfloat16", "float16", "float32", "float64"])
    if name != "auto":
        return getattr(torch, name)
    units = device.type == "cuda" or (training and torch.cpu.get_capabilities().get("amx_bf16", False))
    return torch.bfloat16 if units else torch.float32
