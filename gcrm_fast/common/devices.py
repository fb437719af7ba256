"""The device of a process."""

import torch

from gcrm_fast.common.processes import local_rank


def default_device() -> torch.device:
    """The GPU of this process's rank, or the CPU if there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(dtype: str | torch.dtype, device: torch.device, *, training: bool = False) -> torch.dtype:
    """The dtype of that name; ``auto`` is bfloat16 on a GPU, else float32.

    In training ``auto`` is bfloat16 also on a CPU with matrix units for it (AMX: 950 against 150 GFLOP/s of float32 on
    two cores); rewards are computed exactly there.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return getattr(torch, dtype)
    units = device.type == "cuda" or (training and torch.cpu.get_capabilities().get("amx_bf16", False))
    return torch.bfloat16 if units else torch.float32
