"""What a run leaves for people: metrics.jsonl, TensorBoard scalars, curves.png and the closing table."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from torch.utils.tensorboard import SummaryWriter

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


class MetricsLog:
    """Rows of numbers to ``metrics.jsonl`` (one object a row, always with ``step``) and to TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8", buffering=1)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # an earlier, unfinished or overwritten run's
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, **values}
        self.rows.append(row)
        # JSON has no NaN: a value that is not finite is written as null.
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
        self._file.write(json.dumps(finite) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


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


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
