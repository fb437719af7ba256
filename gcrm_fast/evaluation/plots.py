"""The plots of ``gcrm evaluate`` and ``gcrm vote``: one panel per source or group."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from sklearn.metrics import roc_curve

from gcrm_fast.common.statistics import auroc
from gcrm_fast.evaluation.measures import PERCENT, Labeled
from gcrm_fast.evaluation.results import Row
from gcrm_fast.evaluation.voting import Saving

ACROSS = 3  # panels side by side


@contextmanager
def _panels(path: Path, sources: int, across: int, width: float, height: float) -> Iterator[list[Axes]]:
    """A panel for each of ``sources``, ``across`` side by side, saved to ``path`` at the end."""
    down = -(-sources // across)
    figure, axes = plt.subplots(
        down, across, figsize=(width * across, height * down), layout="constrained", squeeze=False
    )
    panels = list(axes.ravel())
    for unused in panels[sources:]:
        unused.axis("off")
    yield panels[:sources]
    for axes in panels[:sources]:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _title(source: str) -> str:
    name = Path(source).name
    return name if len(name) <= 40 else name[:39] + "…"


def plot_roc(scored: Mapping[str, Labeled], path: Path) -> None:
    """ROC of the reward, of Q at the last token, and of length in the better direction."""
    with _panels(path, len(scored), min(len(scored), ACROSS), 4.2, 4) as panels:
        for axes, (source, labeled) in zip(panels, scored.items(), strict=True):
            length_N, longer = labeled.lengths_N, auroc(labeled.right_N, labeled.lengths_N) >= 0.5
            curves = [
                ("reward", "-", labeled.reward_NP[:, -1]),
                ("Q", "-", labeled.q_NP[:, -1]),
                ("longer" if longer else "shorter", ":", length_N if longer else -length_N),
            ]
            for name, style, score_N in curves:
                wrong, right, _ = roc_curve(labeled.right_N, score_N)
                value = auroc(labeled.right_N, score_N)
                axes.plot(wrong, right, style, label=f"{name} {value:.3f}", linewidth=1.4)
            axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
            axes.set(title=_title(source), xlabel="share of wrong ones above", ylabel="share of right ones above")
            axes.set_aspect("equal")


def plot_partial(rows: Sequence[Row], path: Path) -> None:
    """AUROC of reward, Q and position-only Q at the first p % of each completion."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.group == "all":
            values.setdefault(row.source, {})[row.measure] = row.value
    with _panels(path, len(values), min(len(values), ACROSS), 4.2, 3.6) as panels:
        for axes, (source, found) in zip(panels, values.items(), strict=True):
            for name, label, style in (
                ("auroc_reward", "reward", "o-"),
                ("auroc_q", "Q", "o-"),
                ("baseline_position_q", "Q by position alone", "o:"),
            ):
                axes.plot(PERCENT, [found[f"{name}@{p}"] for p in PERCENT], style, label=label, markersize=3)
            axes.axhline(found["baseline_length"], color="tab:red", linestyle=":", linewidth=1, label="length, known")
            axes.axhline(0.5, color="0.7", linewidth=0.8)
            axes.set(title=_title(source), xlabel="% of the completion read", ylabel="AUROC")


def plot_histograms(scored: Mapping[str, Labeled], path: Path) -> None:
    """Reward and final Q of right and wrong completions, one row per source."""
    with _panels(path, 2 * len(scored), 2, 5, 3) as panels:
        drawn = [
            (source, labeled, name, score_NP[:, -1])
            for source, labeled in scored.items()
            for name, score_NP in (("reward", labeled.reward_NP), ("Q", labeled.q_NP))
        ]
        for axes, (source, labeled, name, score_N) in zip(panels, drawn, strict=True):
            edges = np.histogram_bin_edges(score_N.astype(np.float64), 50).tolist()
            for label, mask_N in (("right", labeled.right_N), ("wrong", ~labeled.right_N)):
                axes.hist(score_N[mask_N], edges, density=True, alpha=0.55, label=f"{label} ({mask_N.sum()})")
            axes.set(title=_title(source), xlabel=f"{name} at the last token", ylabel="density")


def plot_savings(groups: Mapping[str, tuple[float, Saving, Sequence[Saving]]], path: Path) -> None:
    """Accuracy of the filtered majority against tokens saved, over thresholds. ``groups``: by name (accuracy of the
    plain majority, the result at the threshold in use, the results at all thresholds)."""
    with _panels(path, len(groups), min(len(groups), ACROSS), 4.8, 3.6) as panels:
        for axes, (group, (plain, chosen, curve)) in zip(panels, groups.items(), strict=True):
            saved, accuracy = [100 * s.saved for s in curve], [s.accuracy for s in curve]
            axes.plot(saved, accuracy, color="0.8", linewidth=0.8)  # the order of the thresholds
            points = axes.scatter(saved, accuracy, c=[s.threshold for s in curve], s=14, zorder=3, label="filtered")
            axes.figure.colorbar(points, ax=axes, label="threshold")
            label = f"Q >= {chosen.threshold:.3f}"
            axes.plot(100 * chosen.saved, chosen.accuracy, "D", color="tab:red", zorder=4, label=label)
            axes.axhline(plain, color="0.4", linestyle=":", linewidth=1.2, label="plain majority")
            axes.set(title=group, xlabel="% of all completion tokens saved", ylabel="accuracy")
