"""Held-out metrics of a reward model during training, and the shortcuts it is compared with.

Letters: N pairs, Q quantiles of a completion (0, 10, ..., 100 %) and its last token but one, D width of the compared
states.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.progress import progress_bar
from gcrm_fast.common.statistics import auroc as auroc_of
from gcrm_fast.data.batches import Budget
from gcrm_fast.data.encoding import PairStates, TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.evaluation.measures import PERCENT, auroc_interval, ratio_interval
from gcrm_fast.model.inputs import Pack
from gcrm_fast.training import parallel
from gcrm_fast.training.loader import plan_pairs
from gcrm_fast.training.objectives import RIGHT, Objective, Statistics, losses
from gcrm_kernels import q_values
from gcrm_kernels.reference import unit_rows

EVALUATION_EPOCH = 2**32  # sampling counter that no training epoch reaches
NOT_FINITE_REMEDY = "lower --lr, or fix --model's weights"
SHORTCUT_PAIRS = 4096  # training pairs that the bag-of-tokens classifier sees


TokenScores = tuple[np.ndarray, np.ndarray]  # of chosen and rejected, [2, n] float32: running rewards, Q-values


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the mode is as before and gathered weights are dropped."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        parallel.reshard(model)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Rewards [2, N] and Q-values [2, N, Q] of chosen [0] and rejected [1], in the order of ``pairs``."""

    pairs: Sequence[TokenizedPair]
    reward_2N: np.ndarray
    q_2NQ: np.ndarray
    statistics: dict[str, float]


def _packs(
    pairs: Sequence[TokenizedPair], budget: Budget, sampling: Sampling, device: torch.device, *, quantiles: bool
) -> Iterator[Pack]:
    """This rank's packs of ``pairs``, one by one, with a progress bar where they take long; every rank gets the same
    number."""
    rank, world = dist.get_rank(), dist.get_world_size()
    plan = plan_pairs([[pair] for pair in pairs], budget, world, sampling)[rank::world]
    what = "evaluation" if quantiles else "goal state"
    for groups in progress_bar(plan, desc=what, brief=True, shown=rank == 0, unit="pack"):
        own = replace(sampling, noise=0, views=0, predict=sampling.predict and quantiles)
        yield build_pack(groups, own, EVALUATION_EPOCH, quantiles=quantiles).to(device)


def _chosen_alone(pair: TokenizedPair) -> TokenizedPair:
    """The pair without its rejected completion, so that a pack does not compute it."""
    states = pair.states and PairStates(pair.states.chosen, pair.states.own[:0], len(pair.chosen_ids))
    return replace(pair, rejected_ids=pair.chosen_ids, rejected_start=pair.chosen_start, states=states)


def end_states(model: nn.Module, pairs: Sequence[TokenizedPair], budget: Budget, device: torch.device) -> list[Tensor]:
    """z [n, D] at the last token of the preferred completions, one tensor per pack of this rank, on ``device``."""
    with evaluating(model):
        packs = _packs([*map(_chosen_alone, pairs)], budget, Sampling(samples=0), device, quantiles=False)
        return [model(pack).z_RD.index_select(0, pack.pairs.end_2N[0]) for pack in packs]


def score_pairs(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    goal_D: Tensor,
    objective: Objective,
    budget: Budget,
    sampling: Sampling,
    device: torch.device,
) -> Scores:
    """Rewards, Q-values along the completion and loss statistics of ``pairs``, gathered on every rank."""
    ids: list[int] = []
    parts: list[Tensor] = []
    total: Statistics | None = None
    within_2 = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(model):
        for pack in _packs(pairs, budget, sampling, device, quantiles=True):
            output = model(pack)
            statistics = losses(output, pack.pairs, objective)[1]
            total = statistics if total is None else total + statistics
            q_2NQ = q_values(output.z_RD, goal_D[None])[:, 0][pack.pairs.quantiles_2NQ]
            within_2 += similarity_within(output.z_RD, pack.pairs.quantiles_2NQ)
            parts.append(torch.cat([output.reward_2N[..., None], q_2NQ], dim=-1))
            ids += pack.pairs.pair_ids
        own_values = torch.cat(parts, dim=1).cpu().numpy()  # waits for the device once
    assert total is not None  # every rank has a pack, if only an empty one
    dist.all_reduce(total.sums_K)
    dist.all_reduce(within_2)
    measured = total.means(len(pairs)) | {"similarity/within": float(within_2[0] / within_2[1])}
    gathered: list[tuple[list[int], np.ndarray]] = [([], np.empty(0))] * dist.get_world_size()
    dist.all_gather_object(gathered, (ids, own_values))
    values = np.concatenate([part for _, part in gathered], axis=1)
    order = np.argsort(np.concatenate([np.array(i, dtype=np.int64) for i, _ in gathered]))
    back = np.argsort(np.argsort([pair.pair_id for pair in pairs]))  # from pair-id order to the order of `pairs`
    values = values[:, order][:, back]
    if not np.isfinite(values).all():
        raise UserError(f"rewards or Q-values are not finite: {NOT_FINITE_REMEDY}")
    return Scores(pairs=pairs, reward_2N=values[..., 0], q_2NQ=values[..., 1:], statistics=measured)


def similarity_within(z_RD: Tensor, rows_2NQ: Tensor) -> Tensor:
    """Sum over completions of the mean cosine between states at different ones of the Q rows, and how many completions
    have such rows: [2] float64. A mean near 1 is a collapse: all states of a completion are one (sigmoid(cos) never
    saturates, so equal chosen and opposite rejected states are an optimum of the contrastive loss)."""
    unit_2NQD = unit_rows(z_RD)[rows_2NQ]
    differ_2NQQ = rows_2NQ.unsqueeze(-1) != rows_2NQ.unsqueeze(-2)
    cosine_2NQQ = (unit_2NQD @ unit_2NQD.mT).double() * differ_2NQQ
    count_2N = differ_2NQQ.sum((-1, -2))
    mean_2N = cosine_2NQQ.sum((-1, -2)) / count_2N.clamp_min(1)
    return torch.stack([mean_2N.sum(), (count_2N > 0).sum()]).to(torch.float64)


def score_tokens(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    goal_D: Tensor,
    budget: Budget,
    sampling: Sampling,
    device: torch.device,
) -> dict[int, TokenScores]:
    """Running rewards and Q-values at every completion token, by pair id, gathered on every rank."""
    scores: dict[int, TokenScores] = {}
    with evaluating(model):
        for pack in _packs(
            pairs,
            budget,
            replace(sampling, variant="dense", positions="random", negatives="anywhere"),
            device,
            quantiles=False,
        ):
            rows_M = pack.pairs.positions_M
            # The model gives rewards at end rows: here every row is one.
            output = model(replace(pack, pairs=replace(pack.pairs, end_2N=rows_M.expand(2, -1))))
            q_M = q_values(output.z_RD, goal_D[None])[:, 0][rows_M]
            values_2M = torch.stack([output.reward_2N[0].float(), q_M.float()]).cpu().numpy()
            bounds = pack.pairs.positions_cu_seqlens.tolist()
            sides = [values_2M[:, a:b] for a, b in pairwise(bounds)]
            scores |= {name: (sides[2 * i], sides[2 * i + 1]) for i, name in enumerate(pack.pairs.pair_ids)}
    gathered: list[dict[int, TokenScores]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, scores)
    return {name: values for part in gathered for name, values in part.items()}


def auroc(score_2N: np.ndarray) -> float:
    """AUROC of all chosen against all rejected scores, [2, N]."""
    return auroc_of(np.repeat([True, False], score_2N.shape[1]), score_2N.ravel())


def metrics(scores: Scores) -> dict[str, float]:
    """``eval/...`` values of a log row."""
    row = {f"eval/{name}": value for name, value in scores.statistics.items()}
    row["eval/pairs"] = len(scores.pairs)
    row["eval/auroc"] = auroc(scores.reward_2N)
    q_2NQ, before_end_2N = scores.q_2NQ[..., :-1], scores.q_2NQ[..., -1]
    row["eval/auroc_q"] = auroc(q_2NQ[..., -1])
    row |= {f"eval/auroc_q_at/{percent}": auroc(q_2NQ[..., i]) for i, percent in enumerate(PERCENT)}
    row["eval/auroc_q_at/before_end"] = auroc(before_end_2N)
    for side, name in enumerate(("chosen", "rejected")):
        for percent, value in zip(PERCENT, q_2NQ[side].mean(0), strict=True):
            row[f"eval/q_{name}/{percent}"] = float(value)
    return row


def intervals(scores: Scores) -> dict[str, float]:
    """95% intervals over prompts of AUROC and accuracy: ``eval/..._low``, ``eval/..._high``; none for few prompts."""
    prompt_N = np.array([pair.prompt_key for pair in scores.pairs])
    right = np.repeat([True, False], len(prompt_N))
    _, number_N, count_C = np.unique(prompt_N, return_inverse=True, return_counts=True)
    won_C = np.bincount(number_N, scores.reward_2N[0] > scores.reward_2N[1])
    bounds = {
        "eval/auroc": auroc_interval(right, scores.reward_2N.ravel(), np.tile(prompt_N, 2)),
        "eval/accuracy": ratio_interval(won_C, count_C),
    }
    return with_ends(bounds)


def with_ends(bounds: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """``NAME_low`` and ``NAME_high`` of the intervals that there are."""
    ends = {f"{name}_{end}": pair[i] for name, pair in bounds.items() for i, end in enumerate(("low", "high"))}
    return {name: value for name, value in ends.items() if np.isfinite(value)}


def breakdown(scores: Scores, fields: Sequence[str]) -> dict[str, float]:
    """AUROC by value of each record field: {"steps=2": 0.97, ...}."""
    return by_value(scores.pairs, fields, lambda own_N: auroc(scores.reward_2N[:, own_N]))


def by_value(
    pairs: Sequence[TokenizedPair], fields: Sequence[str], measured: Callable[[np.ndarray], float]
) -> dict[str, float]:
    """What is measured of the pairs [N] with each value of each record field, short values first."""
    table = {}
    for name in fields:
        values = np.array([str(pair.fields[name]) for pair in pairs])
        for value in sorted(set(values), key=lambda v: (len(v), v)):
            table[f"{name}={value}"] = measured(values == value)
    return table


def shortcuts(train: Sequence[TokenizedPair], held_out: Sequence[TokenizedPair], vocab_size: int) -> dict[str, float]:
    """Held-out AUROC of what needs no understanding: completion length (either sign), and logistic regression on the
    token counts of a completion, fitted on the first training pairs (NaN where all their labels are alike). A reward
    model should beat both. Right are chosen completions, or those whose label says so."""
    from scipy.sparse import csr_matrix  # here, and sklearn: a fifth of the start of every process
    from sklearn.linear_model import LogisticRegression

    def completions(pairs: Sequence[TokenizedPair]) -> list[np.ndarray]:
        rejected = [p.rejected_ids[p.rejected_start :] for p in pairs if p.target is None]
        return [p.chosen_ids[p.chosen_start :] for p in pairs] + rejected

    def right(pairs: Sequence[TokenizedPair]) -> np.ndarray:
        labels = [p.target > RIGHT for p in pairs if p.target is not None]
        return np.array(labels) if labels else np.repeat([True, False], len(pairs))

    def counts(pairs: Sequence[TokenizedPair]) -> csr_matrix:
        tokens = completions(pairs)
        indptr = np.concatenate([[0], np.cumsum([len(t) for t in tokens])])
        indices = np.concatenate(tokens)
        matrix = csr_matrix((np.ones(len(indices)), indices, indptr), shape=(len(tokens), vocab_size))
        matrix.sum_duplicates()
        return matrix

    fitted = train[:SHORTCUT_PAIRS]
    right_N = right(held_out)
    length = auroc_of(right_N, np.array([len(t) for t in completions(held_out)]))
    length = max(length, 1 - length)
    labels = right(fitted)
    if len(set(labels)) < 2:
        return {"baseline/auroc_length": length, "baseline/auroc_bag_of_tokens": math.nan}
    classifier = LogisticRegression(solver="newton-cg")  # converges in a few steps, lbfgs in a thousand
    with warnings.catch_warnings():  # of convergence: the last digits do not matter here
        warnings.simplefilter("ignore")
        classifier.fit(counts(fitted), labels)
    bag = auroc_of(right_N, classifier.decision_function(counts(held_out)))
    return {"baseline/auroc_length": length, "baseline/auroc_bag_of_tokens": bag}
