"""Where a process computes."""

import torch

from gcrm_fast.common.processes import local_rank


def default_device() -> torch.device:
    """The GPU of this process's rank, or the CPU where there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
