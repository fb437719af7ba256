"""Tensor operations of goal-conditioned reward models. Knows tensors only; never imports gcrm_fast."""

from gcrm_kernels.gather import InverseIndex, gather_rows
from gcrm_kernels.reference import goal_contrastive_loss, q_values

__all__ = ["InverseIndex", "gather_rows", "goal_contrastive_loss", "q_values"]
