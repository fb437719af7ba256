"""curves.png of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from gcrm_fast.common.statistics import highest_by_chance

FEW = 10  # points of a line below which each is marked
# Title of a panel -> name of a metric -> its label; the log has the held-out values under "eval/" and the name.
PANELS = {
    "Ranking loss per pair (nats)": {"loss/ranking": "ranking"},
    "Contrastive loss per pair (nats)": {"loss/contrastive": "contrastive"},
    "Pair accuracy and AUROC": {"accuracy": "pair accuracy", "auroc": "AUROC"},
    "Gradient norm": {"grad_norm": "gradient norm"},
    "Mean cosine similarity": {"similarity/positive": "positive", "similarity/negative": "negative"},
}
OF_COMPLETIONS = {  # with --loss bce or mse
    "Loss per completion": {"loss/bce": "binary cross-entropy", "loss/mse": "squared error"},
    "Rewards against labels or scores": {
        "accuracy": "accuracy",
        "auroc": "AUROC",
        "pearson": "Pearson",
        "spearman": "Spearman",
    },
    "Gradient norm": PANELS["Gradient norm"],
    "Mean reward and label or score": {"reward": "reward", "target": "label or score"},
}


def _plot(axes: Axes, rows: list[dict[str, Any]], names: Mapping[str, str]) -> None:
    for name, label in names.items():
        for key, style, data in ((name, "-", "train"), (f"eval/{name}", "o--", "held out")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                marked = style if len(points) >= FEW else f"o{style.removeprefix('o')}"
                axes.plot(*zip(*points, strict=True), marked, label=f"{label} ({data})", markersize=3, linewidth=1.2)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses, accuracy and AUROC, similarities, and Q along the completion at the last evaluation. With --loss bce or
    mse: the loss, AUROC or correlations, and mean rewards."""
    pairs = not any("target" in row for row in rows)
    panels = PANELS if pairs else OF_COMPLETIONS
    figure, grid = plt.subplots(2, 3 if pairs else 2, figsize=(14, 7.5), layout="constrained")
    figure.suptitle(f"Run {path.resolve().parent.name}")
    for axes, (title, names) in zip(grid.flat, panels.items(), strict=False):
        _plot(axes, rows, names)
        last_step = max(row["step"] for row in rows)
        axes.set_xlim(-0.04 * last_step, 1.04 * last_step)
        axes.set(title=title, xlabel="optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    last = next((row for row in reversed(rows) if pairs and "eval/auroc" in row), None)
    if last:
        percents = range(0, 101, 10)
        for side in ("chosen", "rejected"):
            values = [last[f"eval/q_{side}/{percent}"] for percent in percents]
            grid[1, 2].plot(percents, values, "o-", label=side, markersize=3)
        chance = highest_by_chance(int(last["eval/pairs"]))
        blind = [percent for percent in percents if last[f"eval/auroc_q_at/{percent}"] <= chance]
        for i, percent in enumerate(blind):
            label = f"gray: AUROC of Q within chance (up to {chance:.2f})" if i == 0 else None
            grid[1, 2].axvspan(percent - 5, percent + 5, color="0.9", zorder=0, linewidth=0, label=label)
    if pairs:
        grid[1, 2].set(title="Mean Q-value at the last evaluation", xlabel="% of the held-out completion")
    for axes in grid.flat:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.ticklabel_format(useOffset=False)
        axes.grid(alpha=0.3)
        if axes.lines and not (pairs and axes is grid[1, 2]):
            axes.legend(fontsize=8)
    if last:  # Q may be anywhere in its panel
        grid[1, 2].legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, handlelength=1, columnspacing=1
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)
