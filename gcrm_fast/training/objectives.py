"""Ranking and goal-conditioned contrastive loss of a pack, per pair.

Letters: N pairs, S samples a pair.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gcrm_kernels import ContrastiveStatistics, dense_contrastive_loss, gather_rows, goal_contrastive_loss
from torch import Tensor

from gcrm_fast.model.inputs import PairRows
from gcrm_fast.model.reward_model import Output

# Order of the sums that `losses` returns; each is divided by the number of pairs when logged.
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


def losses(output: Output, pairs: PairRows, objective: Objective) -> tuple[Tensor, Tensor]:
    """Sum over the pack's pairs of the total loss (scalar), and the detached sums of ``STATISTICS`` [11] float32.

    With weight 0 the contrastive loss is still measured, without a gradient: the curves stay comparable.
    """
    ranking_N = ranking_loss(output.reward_2N, pairs.margin_N)
    with torch.set_grad_enabled(torch.is_grad_enabled() and objective.contrastive_weight != 0):
        contrastive_N, similarity = contrastive_loss(output.z_RD, pairs, objective)
    total_N = ranking_N + objective.contrastive_weight * contrastive_N
    reward_2N = output.reward_2N.detach()
    statistics_N = (
        total_N.detach(),
        ranking_N.detach(),
        contrastive_N.detach(),
        reward_2N[0] > reward_2N[1],
        reward_2N[0] - reward_2N[1],
        reward_2N[0],
        reward_2N[1],
        similarity.positive_similarity,
        similarity.negative_similarity,
        pairs.shared_negatives_N,
        ~pairs.has_positive_N,
    )
    # A dummy pack has no pairs; reading z keeps every parameter in its graph, so that all ranks reduce alike.
    total = total_N.sum() + 0.0 * output.z_RD.sum().to(total_N.dtype)
    return total, torch.stack([s.float().sum() for s in statistics_N])
