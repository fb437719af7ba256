"""Every op of this package in plain PyTorch: slow, differentiable by autograd, exact in float64. The tests' yardstick.

Letters: R rows of hidden states, H their width, D width after a projection, N pairs, S samples per pair, M positions of
dense pairs, T tokens, G goal states.

    cos(a, b) = a.b / (max(|a|, eps) max(|b|, eps)),  eps = 1e-8
    positive term: -log sigmoid(cos / tau),  negative term: -log(1 - sigmoid(cos / tau)) = -log sigmoid(-cos / tau)

(GCRM, arXiv 2407.13887, section 3; the forms ``grid`` and ``mean_then_log`` are those of its released code.)
Arithmetic is in float32, or float64 for float64 inputs, whatever the dtype of the hidden states.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def unit_rows(x: Tensor) -> Tensor:
    """x / max(|x|, eps) along the last axis, in float32 (float64 stays), derivative zero through a clamped norm."""
    x = x if x.dtype == torch.float64 else x.float()
    norm = x.square().sum(-1, keepdim=True).clamp_min(EPS * EPS).sqrt()
    return x / norm


def _project(hidden: Tensor, projection_DH: Tensor | None) -> Tensor:
    return hidden if projection_DH is None else F.linear(hidden, projection_DH)


def _reduce(logits: Tensor, reduce: str) -> Tensor:
    """-mean(log sigmoid(x)) or -log(mean(sigmoid(x))) of each pair: [N, ...] -> [N]."""
    log_sigmoid_NK = F.logsigmoid(logits.flatten(1))
    if reduce == "log_then_mean":
        return -log_sigmoid_NK.mean(1)
    return math.log(log_sigmoid_NK.shape[1]) - log_sigmoid_NK.logsumexp(1)


def similarity(a_NSH: Tensor, b_NSH: Tensor, pairing: str, distance: str) -> Tensor:
    """Cosine, dot product or negative Euclidean distance of sample k with sample k, [N, S], or of all, [N, S, S].

    In float32 (float64 stays). The derivative of the distance of equal states is 0.
    """
    if distance == "cosine":
        a_NSH, b_NSH = unit_rows(a_NSH), unit_rows(b_NSH)
    elif a_NSH.dtype != torch.float64:
        a_NSH, b_NSH = a_NSH.float(), b_NSH.float()
    if pairing == "grid":
        a_NSH, b_NSH = a_NSH.unsqueeze(2), b_NSH.unsqueeze(1)
    if distance == "euclidean":
        squares = (a_NSH - b_NSH).square().sum(-1)
        return -torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    return (a_NSH * b_NSH).sum(-1)


def goal_contrastive_loss(
    hidden_RH: Tensor,
    rows_4NS: Tensor,
    projection_DH: Tensor | None = None,
    *,
    has_positive_N: Tensor,
    has_negative_N: Tensor | None = None,
    pairing: str = "paired",
    reduce: str = "log_then_mean",
    temperature: float = 1.0,
    distance: str = "cosine",
) -> tuple[Tensor, Tensor]:
    """(loss [N], mean similarity [2, N] of positives and negatives); rows: sources, goals, negative sources, goals.

    ``distance``: what is compared instead of cosines; the paper names the others as future work (section 6).
    """
    a_NSH, b_NSH, m_NSH, n_NSH = _project(hidden_RH, projection_DH)[rows_4NS]
    if has_negative_N is None:
        has_negative_N = torch.ones_like(has_positive_N)
    positive = similarity(a_NSH, b_NSH, pairing, distance)
    negative = similarity(m_NSH, n_NSH, pairing, distance)
    # 1 - sigmoid(c) = sigmoid(-c), also of the mean, so the same reduction of -c serves the negatives.
    loss_N = torch.where(has_positive_N, _reduce(positive / temperature, reduce), 0.0) + torch.where(
        has_negative_N, _reduce(-negative / temperature, reduce), 0.0
    )
    similarity_2N = torch.stack(
        [
            torch.where(has_positive_N, positive.flatten(1).mean(1), 0.0),
            torch.where(has_negative_N, negative.flatten(1).mean(1), 0.0),
        ]
    )
    return loss_N, similarity_2N.detach()


def dense_contrastive_loss(states_MD: Tensor, cu_seqlens: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(loss [N], mean similarity [2, N]) over all (i < j) of chosen and all (chosen, rejected) positions of each pair;
    segments are chosen 0, rejected 0, chosen 1, ... ``cu_seqlens`` [2N + 1]."""
    unit_MD = unit_rows(states_MD)
    losses, similarities = [], []
    cuts = cu_seqlens.tolist()
    for a, b, c in zip(cuts[0:-1:2], cuts[1::2], cuts[2::2], strict=True):
        chosen, rejected = unit_MD[a:b], unit_MD[b:c]
        i, j = torch.triu_indices(b - a, b - a, offset=1, device=states_MD.device)
        positive, negative = (chosen @ chosen.mT)[i, j], (chosen @ rejected.mT).flatten()
        terms = [-F.logsigmoid(x / temperature).mean() if len(x) else x.sum() for x in (positive, -negative)]
        losses.append(terms[0] + terms[1])
        similarities.append(torch.stack([x.mean() if len(x) else x.sum() for x in (positive, negative)]))
    return torch.stack(losses), torch.stack(similarities, dim=1).detach()


def q_values(hidden_TH: Tensor, goals: Tensor, projection_DH: Tensor | None = None) -> Tensor:
    """Cosine of every row of hidden_TH [T, H], projected with W if given, to each goal state [G, H or D]: [T, G]."""
    return unit_rows(_project(hidden_TH, projection_DH)) @ unit_rows(goals).mT


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, residual_TH: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(y, s): s = x + residual of x, residual [T, H], or x without one, and y = w s / sqrt(mean(s^2) + eps)."""
    s_TH = x_TH if residual_TH is None else x_TH + residual_TH
    return weight_H * s_TH * (s_TH.square().mean(-1, keepdim=True) + eps).rsqrt(), s_TH


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up"""
    return gate * torch.sigmoid(gate) * up


def rotate(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary embedding with halves paired (i with i + D/2), as in Hugging Face checkpoints."""
    a, b = x_TND.chunk(2, dim=-1)
    return x_TND * cos_TD.unsqueeze(1) + torch.cat((-b, a), dim=-1) * sin_TD.unsqueeze(1)


def rotate_and_gather(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor, kv_index_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(q [T, N, D] rotated, k [K, G, D] rotated and gathered, v [K, G, D] gathered)"""
    return rotate(q_TND, cos_TD, sin_TD), rotate(k_TGD, cos_TD, sin_TD)[kv_index_K], v_TGD[kv_index_K]
