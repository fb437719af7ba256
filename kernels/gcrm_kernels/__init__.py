"""Tensor operations of goal-conditioned reward models. Knows tensors only; never imports gcrm_fast."""

from gcrm_kernels.contrastive import ContrastiveStatistics, RowTiles, goal_contrastive_loss
from gcrm_kernels.dense import dense_contrastive_loss
from gcrm_kernels.gather import InverseIndex, gather_rows
from gcrm_kernels.qvalues import q_values
from gcrm_kernels.rms_norm import rms_norm
from gcrm_kernels.rotary import rotate_and_gather
from gcrm_kernels.swiglu import swiglu

__all__ = [
    "ContrastiveStatistics",
    "InverseIndex",
    "RowTiles",
    "dense_contrastive_loss",
    "gather_rows",
    "goal_contrastive_loss",
    "q_values",
    "rms_norm",
    "rotate_and_gather",
    "swiglu",
]
