"""curves.png of a run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def _plot(axes: Axes, rows: list[dict[str, Any]], names: Mapping[str, str], title: str) -> None:
    for name, label in names.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            held_out = name.startswith("eval/")
            axes.plot(*zip(*points, strict=True), "o--" if held_out else "-", label=label, markersize=3, linewidth=1.2)
    axes.set(title=title, xlabel="optimizer step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses, accuracy and AUROC, similarities, and Q along the completion at the last evaluation."""
    figure, ((losses, quality), (similarity, q)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    _plot(
        losses,
        rows,
        {
            "loss/ranking": "ranking (train)",
            "eval/loss/ranking": "ranking (held out)",
            "loss/contrastive": "contrastive (train)",
            "eval/loss/contrastive": "contrastive (held out)",
        },
        "Loss a pair (nats)",
    )
    _plot(
        quality,
        rows,
        {
            "accuracy": "pair accuracy (train)",
            "eval/accuracy": "pair accuracy (held out)",
            "eval/auroc": "AUROC (held out)",
        },
        "Pair accuracy and AUROC",
    )
    quality.set_ylim(0.4, 1.01)
    _plot(
        similarity,
        rows,
        {
            "similarity/positive": "positive (train)",
            "similarity/negative": "negative (train)",
            "eval/similarity/positive": "positive (held out)",
            "eval/similarity/negative": "negative (held out)",
        },
        "Mean cosine similarity",
    )
    last = next((row for row in reversed(rows) if "eval/auroc" in row), None)
    for side in ("chosen", "rejected"):
        values = [(10 * i, last[f"eval/q_{side}/{10 * i}"]) for i in range(11)] if last else [(0, math.nan)]
        q.plot(*zip(*values, strict=True), "o-", label=side, markersize=3)
    q.set(title="Mean Q-value along held-out completions, last evaluation", xlabel="% of the completion")
    q.grid(alpha=0.3)
    q.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
