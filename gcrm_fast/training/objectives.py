"""Ranking and goal-conditioned contrastive loss of a pack, per pair; and losses of single completions.

Letters: N pairs, S samples per pair, K statistics.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gcrm_fast.model import heads
from gcrm_fast.model.inputs import PairRows
from gcrm_fast.model.reward_model import Output
from gcrm_kernels import (
    ContrastiveStatistics,
    InverseIndex,
    RowTiles,
    dense_contrastive_loss,
    gather_rows,
    goal_contrastive_loss,
    reference,
)

RIGHT = 0.5  # labels above it are those of right completions
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
    "pairs_without_negative",
)
# And for every pair of views, of which a step has as many: views/i_js is I_JS + 2 ln 2, which is 0 at chance.
OF_VIEWS = ("loss/views", "views/i_js", "views/kl")
OF_COMPLETIONS = {  # by --loss, for every completion with a label or score
    "bce": ("loss", "loss/bce", "accuracy", "reward", "target"),
    "mse": ("loss", "loss/mse", "reward", "target"),
}


def statistics_of(head: str, *, sft: bool = False, loss: str = "ranking", views: bool = False) -> tuple[str, ...]:
    """STATISTICS, those of a head's own terms and of an lm_head, and OF_VIEWS; OF_COMPLETIONS for bce and mse."""
    if loss in OF_COMPLETIONS:
        return OF_COMPLETIONS[loss]
    terms = (f"loss/{name}" for name in (*heads.KINDS[head].terms, *(("sft",) if sft else ())))
    return (*STATISTICS, *terms, *(OF_VIEWS if views else ()))


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
    """Total loss L_R + contrastive_weight * L_C (GCRM, arXiv 2407.13887); weight 0 is plain ranking. ``term_weights``:
    of the terms that the model adds, by name (see Output); a term without a weight is only measured.

    ``dense`` compares all positions of a pair: the exact expectation of drawn ones, paired, log_then_mean. ``average``
    makes the mean of the drawn goal states the goal of each source. ``distance``: cosine, dot or euclidean (negative).
    ``label_smoothing`` and ``centering``: see ``preference_loss``. With ``loss`` bce or mse the total is
    ``completion_loss`` alone.
    """

    contrastive_weight: float = 0.5
    dense: bool = False
    pairing: str = "paired"
    reduce: str = "log_then_mean"
    temperature: float = 1.0
    average: bool = False
    distance: str = "cosine"
    label_smoothing: float = 0.0
    centering: float = 0.0
    term_weights: Mapping[str, float] = field(default_factory=dict)
    loss: str = "ranking"
    views_weight: float = 0.0  # of the multi-view loss (RLP, arXiv 2403.19279)
    divergence_weight: float = 1.0  # in that loss


def ranking_loss(reward_2N: Tensor, margin_N: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) of each pair, [N]."""
    return -F.logsigmoid(reward_2N[0] - reward_2N[1] - margin_N)


def preference_loss(reward_2N: Tensor, margin_N: Tensor, objective: Objective) -> Tensor:
    """Ranking loss of each pair, [N], whose label is the other way round with probability ``label_smoothing`` (Mitchell
    2023, conservative DPO), plus ``centering`` times the squared sum of its rewards (Eisenstein et al. 2023,
    arXiv 2312.09244, section 2)."""
    loss_N = ranking_loss(reward_2N, margin_N)
    if objective.label_smoothing:
        loss_N = loss_N + objective.label_smoothing * (reward_2N.diff(dim=0)[0].neg() - margin_N)
    return loss_N + objective.centering * reward_2N.sum(0) ** 2 if objective.centering else loss_N


def completion_loss(reward_N: Tensor, target_N: Tensor, loss: str) -> Tensor:
    """Of each completion, [N]: the binary cross-entropy (nats) of sigmoid(reward) and a label from 0 to 1 (bce), or the
    squared difference of reward and score (mse)."""
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(reward_N, target_N.to(reward_N), reduction="none")
    return (reward_N - target_N) ** 2


def contrastive_loss(z_RD: Tensor, pairs: PairRows, objective: Objective) -> tuple[Tensor, ContrastiveStatistics]:
    """Contrastive loss of each pair, [N], and mean similarities."""
    if objective.dense:
        z_MD = gather_rows(z_RD, pairs.positions_M, pairs.positions_inverse)
        return dense_contrastive_loss(
            z_MD, pairs.positions_cu_seqlens, pairs.max_pair_length, temperature=objective.temperature
        )
    rows_4NS: Tensor = pairs.samples_4NS
    tiles: RowTiles | None = pairs.samples_tiles
    if objective.average:
        z_RD, rows_4NS = average_goals(z_RD, rows_4NS)
        tiles = None
    options: dict[str, Any] = {
        "has_positive_N": pairs.has_positive_N,
        "has_negative_N": pairs.has_negative_N,
        "pairing": objective.pairing,
        "reduce": objective.reduce,
        "temperature": objective.temperature,
    }
    if objective.distance != "cosine":
        loss_N, similarity_2N = reference.goal_contrastive_loss(z_RD, rows_4NS, distance=objective.distance, **options)
        return loss_N, ContrastiveStatistics(*similarity_2N)
    return goal_contrastive_loss(z_RD, *rows_4NS, tiles=tiles, **options)


def average_goals(z_RD: Tensor, rows_4NS: Tensor) -> tuple[Tensor, Tensor]:
    """States [R + 2N, D] and rows [4, N, S] where the goal of all of a pair's sources is the mean of its S goal states,
    raw, not normalized (as released); likewise for the negatives."""
    _, n, s = rows_4NS.shape
    goals = rows_4NS[1::2].flatten()
    means_GD = gather_rows(z_RD, goals, InverseIndex.on_device(goals, len(z_RD))).view(2 * n, s, -1).mean(1)
    goal_2N1 = torch.arange(len(z_RD), len(z_RD) + 2 * n, device=goals.device).view(2, n, 1)
    rows = torch.stack([rows_4NS[0::2], goal_2N1.expand(2, n, s)], dim=1)
    return torch.cat([z_RD, means_GD.to(z_RD.dtype)]), rows.flatten(0, 1)


def losses(output: Output, pairs: PairRows, objective: Objective) -> tuple[Tensor, Statistics]:
    """Sum over the pack's pairs, and pairs of views, of the total loss (scalar), and what is logged, detached.

    With weight 0 the contrastive loss is still measured, without a gradient: the curves stay comparable.
    """
    if objective.loss in OF_COMPLETIONS:
        return completion_losses(output, pairs, objective.loss)
    ranking_N = preference_loss(output.reward_2N, pairs.margin_N, objective)
    with torch.set_grad_enabled(torch.is_grad_enabled() and objective.contrastive_weight != 0):
        contrastive_N, similarity = contrastive_loss(output.z_RD, pairs, objective)
    total_N = ranking_N + objective.contrastive_weight * contrastive_N
    for name, weight in objective.term_weights.items():
        total_N = total_N + weight * output.terms[name]
    of_views: dict[str, Tensor] = {}
    if output.views is not None:
        views_V = output.views.total(objective.divergence_weight)
        total_N = torch.cat([total_N, objective.views_weight * views_V])
        above_chance_V = output.views.information + 2 * math.log(2)
        of_views = dict(zip(OF_VIEWS, (views_V, above_chance_V, output.views.divergence), strict=True))
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
            "pairs_without_negative": ~pairs.has_negative_N,
            **{f"loss/{name}": term_N.detach() for name, term_N in output.terms.items()},
            **{name: value_V.detach() for name, value_V in of_views.items()},
        }
    )
    return summed(total_N, output), statistics


def completion_losses(output: Output, pairs: PairRows, loss: str) -> tuple[Tensor, Statistics]:
    """As ``losses``, of completions, which are both sides of their pair: the first one is read."""
    reward_N = output.reward_2N[0]
    loss_N = completion_loss(reward_N, pairs.target_N, loss)
    measured = {
        "loss": loss_N.detach(),
        f"loss/{loss}": loss_N.detach(),
        "accuracy": (reward_N > 0) == (pairs.target_N > RIGHT),
        "reward": reward_N.detach(),
        "target": pairs.target_N,
    }
    return summed(loss_N, output), Statistics.of({name: measured[name] for name in OF_COMPLETIONS[loss]})


def summed(total_N: Tensor, output: Output) -> Tensor:
    """The sum over the pack. A dummy pack has no pairs; reading z keeps every parameter in its graph, so that all ranks
    reduce alike."""
    return total_N.sum() + 0.0 * output.z_RD.sum().to(total_N.dtype)
