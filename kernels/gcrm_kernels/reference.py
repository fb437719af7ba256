"""Goal-conditioned contrastive loss in plain PyTorch: the reference of every faster implementation.

Letters: R rows of hidden states, H their width, N pairs, S samples a pair.

    cos(a, b) = a.b / (max(|a|, eps) max(|b|, eps)),  eps = 1e-8
    positive term: -log sigmoid(cos / tau),  negative term: -log(1 - sigmoid(cos / tau)) = -log sigmoid(-cos / tau)

(GCRM, arXiv 2407.13887, section 3; the forms ``grid`` and ``mean_then_log`` are those of its released code.)
Arithmetic is in float32, or float64 for float64 inputs, whatever the dtype of the hidden states.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gcrm_kernels.gather import InverseIndex, gather_rows

EPS = 1e-8


class ContrastiveStatistics(NamedTuple):
    """Mean similarities of each pair, [N] each, detached."""

    positive_similarity: Tensor
    negative_similarity: Tensor


def unit_rows(x: Tensor) -> Tensor:
    """x / max(|x|, eps) along the last axis, in float32 (float64 stays), derivative zero through a clamped norm."""
    x = x if x.dtype == torch.float64 else x.float()
    norm = x.square().sum(-1, keepdim=True).clamp_min(EPS * EPS).sqrt()
    return x / norm


def _reduce(logits: Tensor, reduce: str) -> Tensor:
    """-mean(log sigmoid(x)) or -log(mean(sigmoid(x))) of each pair: [N, ...] -> [N]."""
    logits_NK = logits.flatten(1)
    if reduce == "log_then_mean":
        return -F.logsigmoid(logits_NK).mean(1)
    if reduce == "mean_then_log":
        return -torch.sigmoid(logits_NK).mean(1).log()
    raise ValueError(f"reduce={reduce!r}: must be 'log_then_mean' or 'mean_then_log'")


def _similarities(a_NSH: Tensor, b_NSH: Tensor, pairing: str) -> Tensor:
    """Cosines of each source with its goal, [N, S] (paired), or with every goal, [N, S, S] (grid)."""
    if pairing == "paired":
        return (a_NSH * b_NSH).sum(-1)
    if pairing == "grid":
        return a_NSH @ b_NSH.mT
    raise ValueError(f"pairing={pairing!r}: must be 'paired' or 'grid'")


def goal_contrastive_loss(
    hidden_RH: Tensor,
    sources_NS: Tensor,
    goals_NS: Tensor,
    negative_sources_NS: Tensor,
    negative_goals_NS: Tensor,
    *,
    has_positive_N: Tensor,
    pairing: str = "paired",
    reduce: str = "log_then_mean",
    temperature: float = 1.0,
    inverse: InverseIndex | None = None,
) -> tuple[Tensor, ContrastiveStatistics]:
    """Contrastive loss of each pair, [N] (float32, or float64 for float64 states), and its statistics.

    Args:
        hidden_RH: the states that are compared (hidden states or their projection), [R, H], any float dtype.
        sources_NS, goals_NS: rows of ``hidden_RH`` of the positive samples, [N, S] int64.
        negative_sources_NS, negative_goals_NS: the same for the negative samples. Rows may repeat: gradients add.
        has_positive_N: [N] bool; False (a chosen completion of one token) makes the positive term 0.
        pairing: ``paired`` compares sample k with sample k, ``grid`` every source with every goal.
        reduce: ``log_then_mean`` (the paper) or ``mean_then_log`` (the released code).
        temperature: tau in sigmoid(cos / tau).
        inverse: inverse of the four index arguments stacked as [4, N, S] and flattened; with it the sum over repeated
            rows has a fixed order on every device.

    Raises:
        ValueError: an unknown ``pairing`` or ``reduce``.
    """
    unit_RH = unit_rows(hidden_RH)
    rows_4NS = torch.stack([sources_NS, goals_NS, negative_sources_NS, negative_goals_NS])
    if inverse is None:
        unit_4NSH = unit_RH[rows_4NS]
    else:
        unit_4NSH = gather_rows(unit_RH, rows_4NS.flatten(), inverse).unflatten(0, rows_4NS.shape)
    positive = _similarities(unit_4NSH[0], unit_4NSH[1], pairing)
    negative = _similarities(unit_4NSH[2], unit_4NSH[3], pairing)
    positive_loss_N = _reduce(positive / temperature, reduce)
    # 1 - sigmoid(c) = sigmoid(-c), also of the mean, so the same reduction of -c serves the negatives.
    negative_loss_N = _reduce(-negative / temperature, reduce)
    loss_N = torch.where(has_positive_N, positive_loss_N, 0.0) + negative_loss_N
    statistics = ContrastiveStatistics(
        torch.where(has_positive_N, positive.detach().flatten(1).mean(1), 0.0), negative.detach().flatten(1).mean(1)
    )
    return loss_N, statistics


def q_values(hidden_TH: Tensor, goals_GH: Tensor) -> Tensor:
    """Q-values [T, G]: cosine of every row of hidden_TH [T, H] to each goal state of goals_GH [G, H]."""
    return unit_rows(hidden_TH) @ unit_rows(goals_GH).mT
