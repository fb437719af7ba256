"""Where a process computes, and in what precision."""

import torch

from gcrm_fast.common.processes import local_rank


def default_device() -> torch.device:
    """The GPU of this process's rank, or the CPU where there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """What ``dtype`` means, a name or ``auto``: bfloat16 on a GPU, else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype)
