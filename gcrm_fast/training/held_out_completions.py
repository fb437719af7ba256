"""Held-out metrics of --loss bce and mse: rewards against the labels or scores of single completions.

Letters: N completions, C prompts, B bootstrap resamples.
"""

from collections.abc import Sequence

import numpy as np

from gcrm_fast.common.statistics import auroc
from gcrm_fast.evaluation.measures import auroc_interval, correlations, interval, ratio_interval
from gcrm_fast.training.held_out import Scores, by_value, with_ends
from gcrm_fast.training.objectives import RIGHT


def completion_metrics(scores: Scores, loss: str, fields: Sequence[str], *, final: bool) -> dict[str, float]:
    """``eval/...`` values of a log row: the statistics of the loss, and AUROC (bce), or Pearson's and Spearman's
    correlation (mse). With ``final`` also 95% intervals over prompts, none for few prompts or for Spearman's, and the
    AUROC by value of each record field of ``fields``."""
    target_N = np.array([one.target for one in scores.pairs], dtype=np.float64)
    reward_N = scores.reward_2N[0].astype(np.float64)
    _, prompt_N, count_C = np.unique([p.prompt_key for p in scores.pairs], return_inverse=True, return_counts=True)
    row = {f"eval/{name}": value for name, value in scores.statistics.items()}
    row["eval/completions"] = len(target_N)
    if loss == "mse":
        row["eval/pearson"], row["eval/spearman"] = correlations(target_N, reward_N)
        error_C = np.bincount(prompt_N, (reward_N - target_N) ** 2)
        bounds = {
            "eval/pearson": pearson_interval(target_N, reward_N, prompt_N),
            "eval/loss/mse": ratio_interval(error_C, count_C),
        }
    else:
        right_N = target_N > RIGHT
        row["eval/auroc"] = auroc(right_N, reward_N)
        agree_C = np.bincount(prompt_N, (reward_N > 0) == right_N)
        bounds = {
            "eval/auroc": auroc_interval(right_N, reward_N, prompt_N),
            "eval/accuracy": ratio_interval(agree_C, count_C),
        }
    if not final:
        return row
    by = by_value(scores.pairs, fields, lambda own_N: auroc(target_N[own_N] > RIGHT, reward_N[own_N]))
    return row | with_ends(bounds) | {f"eval/auroc/{name}": value for name, value in by.items()}


def pearson_interval(a_N: np.ndarray, b_N: np.ndarray, prompt_N: np.ndarray) -> tuple[float, float]:
    """Interval of Pearson's correlation; prompts are numbered from 0."""
    a_N, b_N = a_N - a_N.mean(), b_N - b_N.mean()  # moments around a far point would lose digits
    moments = [np.ones_like(a_N), a_N, b_N, a_N * a_N, b_N * b_N, a_N * b_N]
    moments_C6 = np.stack([np.bincount(prompt_N, moment) for moment in moments], axis=1)

    def statistic(drawn_BC: np.ndarray) -> np.ndarray:
        n, a, b, aa, bb, ab = (drawn_BC @ moments_C6).T
        return (n * ab - a * b) / np.sqrt((n * aa - a * a) * (n * bb - b * b))

    return interval(len(moments_C6), len(moments_C6), statistic)
