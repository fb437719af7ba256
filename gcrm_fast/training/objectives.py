"""Ranking and goal-conditioned contrastive loss of a pack, per pair.

Letters: N pairs, S samples per pair, K statistics.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gcrm_fast.model.inputs import PairRows
from gcrm_fast.model.reward_model import Output
from gcrm_kernels import ContrastiveStatistics, dense_contrastive_loss, gather_rows, goal_contrastive_loss

# What ``losses`` measures for every pair.
STATISTICS = (
    "loss",
    "loss/ranking",
    "loss/contrastive",
    "accuracy",
    "margin",
    "reward/chosen",
    "reward/rejected",
    "similarity/positive",
    "similarity/negative",
    "negatives/shared",
    "pairs_without_positive",
)


@dataclass(frozen=True)
class Statistics:
    """Sums over pairs, by name; float32, in one tensor, so that packs and processes add up in one operation."""

    names: tuple[str, ...]
    sums_K: Tensor

    @staticmethod
    def of(values_N: Mapping[str, Tensor]) -> "Statistics":
        """From the values of each pair."""
        return Statistics(tuple(values_N), torch.stack([values.float().sum() for values in values_N.values()]))

    def __getitem__(self, name: str) -> Tensor:
        """The sum of that name, 0-dimensional."""
        return self.sums_K[self.names.index(name)]

    def __add__(self, other: "Statistics") -> "Statistics":
        assert self.names == other.names
        return Statistics(self.names, self.sums_K + other.sums_K)

    def means(self, n_pairs: float) -> dict[str, float]:
        """Sums over ``n_pairs``, NaN for none. Waits for the device."""
        return {
            name: value / n_pairs if n_pairs else math.nan
            for name, value in zip(self.names, self.sums_K.tolist(), strict=True)
        }


@dataclass(frozen=True)
class Objective:
    """Total loss L_R + contrastive_weight * L_C (GCRM, arXiv 2407.13887); weight 0 is plain ranking.

    ``dense`` compares all positions of a pair: the exact expectation of drawn ones, paired, log_then_mean.
    """

    contrastive_weight: float = 0.5
    dense: bool = False
    pairing: str = "paired"
    reduce: str = "log_then_mean"
    temperature: float = 1.0


def ranking_loss(reward_2N: Tensor, margin_N: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) of each pair, [N]."""
    return -F.logsigmoid(reward_2N[0] - reward_2N[1] - margin_N)


def contrastive_loss(z_RD: Tensor, pairs: PairRows, objective: Objective) -> tuple[Tensor, ContrastiveStatistics]:
    """Contrastive loss of each pair, [N], and mean similarities."""
    if objective.dense:
        z_MD = gather_rows(z_RD, pairs.positions_M, pairs.positions_inverse)
        return dense_contrastive_loss(
            z_MD, pairs.positions_cu_seqlens, pairs.max_pair_length, temperature=objective.temperature
        )
    return goal_contrastive_loss(
        z_RD,
        *pairs.samples_4NS,
        has_positive_N=pairs.has_positive_N,
        pairing=objective.pairing,
        reduce=objective.reduce,
        temperature=objective.temperature,
        tiles=pairs.samples_tiles,
    )


def losses(output: Output, pairs: PairRows, objective: Objective) -> tuple[Tensor, Statistics]:
    """Sum over the pack's pairs of the total loss (scalar), and what is logged, detached.

    With weight 0 the contrastive loss is still measured, without a gradient: the curves stay comparable.
    """
    ranking_N = ranking_loss(output.reward_2N, pairs.margin_N)
    with torch.set_grad_enabled(torch.is_grad_enabled() and objective.contrastive_weight != 0):
        contrastive_N, similarity = contrastive_loss(output.z_RD, pairs, objective)
    total_N = ranking_N + objective.contrastive_weight * contrastive_N
    reward_2N = output.reward_2N.detach()
    statistics = Statistics.of(
        {
            "loss": total_N.detach(),
            "loss/ranking": ranking_N.detach(),
            "loss/contrastive": contrastive_N.detach(),
            "accuracy": reward_2N[0] > reward_2N[1],
            "margin": reward_2N[0] - reward_2N[1],
            "reward/chosen": reward_2N[0],
            "reward/rejected": reward_2N[1],
            "similarity/positive": similarity.positive_similarity,
            "similarity/negative": similarity.negative_similarity,
            "negatives/shared": pairs.shared_negatives_N,
            "pairs_without_positive": ~pairs.has_positive_N,
        }
    )
    # A dummy pack has no pairs; reading z keeps every parameter in its graph, so that all ranks reduce alike.
    total = total_N.sum() + 0.0 * output.z_RD.sum().to(total_N.dtype)
    return total, statistics
