"""The plots of ``gcrm evaluate`` and ``gcrm vote``: one panel per source or group."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from sklearn.metrics import roc_curve

from gcrm_fast.evaluation.measures import COVERAGE, PERCENT, Labeled, auroc_interval
from gcrm_fast.evaluation.overoptimization import Point
from gcrm_fast.evaluation.results import Row, with_interval
from gcrm_fast.evaluation.voting import Result, Saving

ACROSS = 3  # panels side by side
BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2, "frameon": False}


@contextmanager
def _panels(
    path: Path, sources: int, across: int, width: float, height: float, *, below: bool = False
) -> Iterator[list[Axes]]:
    """A panel for each of ``sources``, ``across`` side by side, saved to ``path`` at the end; their legends ``below``
    them, or where the data leaves most room."""
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
        if not axes.get_legend():
            axes.legend(fontsize=8, **(BELOW if below else {}))
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def _title(source: str) -> str:
    name = Path(source).name
    return name if len(name) <= 40 else name[:39] + "…"


def _of_sources(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The rows of whole sources, by source and measure."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.group == "all":
            found.setdefault(row.source, {})[row.measure] = row
    return found


def plot_roc(scored: Mapping[str, Labeled], rows: Sequence[Row], path: Path) -> None:
    """ROC of the reward, of Q at the last token, and of length in the better direction."""
    found = _of_sources(rows)
    with _panels(path, len(scored), min(len(scored), ACROSS), 4.2, 5.8) as panels:
        for axes, (source, labeled) in zip(panels, scored.items(), strict=True):
            kind, sign = ("longer", 1) if found[source]["auroc_longer"].value >= 0.5 else ("shorter", -1)
            curves = [
                ("reward", "-", labeled.reward_NP[:, -1], found[source]["auroc_reward"]),
                ("Q at the last token", "-", labeled.q_NP[:, -1], found[source]["auroc_q"]),
                (f"{kind} is better", ":", sign * labeled.lengths_N, found[source]["baseline_length"]),
            ]
            for name, style, score_N, row in curves:
                wrong, right, _ = roc_curve(labeled.right_N, score_N)
                axes.plot(wrong, right, style, label=f"{name}: {with_interval(row)}", linewidth=1.4)
            axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, label="chance: 0.5")
            axes.set(title=_title(source), xlabel="wrong completions accepted", ylabel="right completions accepted")
            axes.legend(title="AUROC", fontsize=8, **(BELOW | {"ncols": 1}))
            axes.set_aspect("equal")


def plot_partial(scored: Mapping[str, Labeled], rows: Sequence[Row], path: Path) -> None:
    """AUROC of reward, Q and position-only Q at the first p % of each completion, with intervals; empty circles where
    the interval is not above 0.5."""
    found = _of_sources(rows)
    with _panels(path, len(scored), min(len(scored), ACROSS), 5.2, 4.8, below=True) as panels:
        for axes, (source, labeled) in zip(panels, scored.items(), strict=True):
            values = found[source]
            for name, label, score_NP in (
                ("auroc_reward", "running reward", labeled.reward_NP),
                ("auroc_q", "Q-value", labeled.q_NP),
            ):
                aurocs = [values[f"{name}@{p}"].value for p in PERCENT]
                [line] = axes.plot(PERCENT, aurocs, "o-", label=label, markersize=3)
                bounds = [auroc_interval(labeled.right_N, score_N, labeled.question_N) for score_N in score_NP.T]
                axes.fill_between(PERCENT, *np.array(bounds).T, color=line.get_color(), alpha=0.15, linewidth=0)
                chance = [i for i, (low, _) in enumerate(bounds) if low <= 0.5]
                axes.plot(
                    [PERCENT[i] for i in chance],
                    [aurocs[i] for i in chance],
                    "o",
                    color=line.get_color(),
                    markerfacecolor="w",
                    markersize=5,
                    label=f"{label}: no better than chance" if chance else None,
                )
            by_position = [values[f"baseline_position_q@{p}"].value for p in PERCENT]
            axes.plot(PERCENT, by_position, ":", color="tab:orange", label="Q-value by position alone")
            length = values["baseline_length"].value
            axes.axhline(length, color="tab:red", linestyle=":", linewidth=1, label="final length alone")
            axes.axhline(0.5, color="0.7", linewidth=0.8)
            axes.set(
                title=_title(source), xlabel="% of the completion read", ylabel=f"AUROC, {100 * COVERAGE:.0f}% interval"
            )


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


def plot_overoptimization(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Gold and proxy gain over KL for each group."""
    with _panels(path, len(curves), min(len(curves), ACROSS), 4.8, 3.8) as panels:
        for axes, (group, points) in zip(panels, curves.items(), strict=True):
            kl = [point.kl for point in points]
            [line] = axes.plot(kl, [point.gold for point in points], "o-", markersize=3, label="gold")
            bounds = [point.low for point in points], [point.high for point in points]
            axes.fill_between(kl, *bounds, color=line.get_color(), alpha=0.15, linewidth=0)
            proxy = axes.twinx()
            proxy.plot(kl, [point.proxy for point in points], ":", color="tab:orange", label="proxy (right scale)")
            axes.plot([], [], ":", color="tab:orange", label="proxy (right scale)")
            axes.axhline(0, color="0.7", linewidth=0.8)
            axes.set(title=_title(group), xlabel="KL, nats", ylabel="gain over a plain sample")


def plot_monitor(values: Mapping[str, tuple[Sequence[float], float]], names: Sequence[str], path: Path) -> None:
    """A panel per detector: its value for each file of samples, and its null. ``values``: (values, null)."""
    with _panels(path, len(values), 2, 5, 3) as panels:
        for axes, (detector, (of_files, null)) in zip(panels, values.items(), strict=True):
            axes.plot(range(len(names)), of_files, "o-", markersize=4, label="samples")
            if null == null:
                axes.axhline(null, color="0.5", linestyle=":", label="reference against itself")
            axes.set(title=detector, ylim=(min(0, np.nanmin([0, *of_files])), None))
            axes.set_xticks(range(len(names)), [_title(name) for name in names], rotation=30, ha="right", fontsize=7)


def plot_map(points: Mapping[str, np.ndarray], path: Path) -> None:
    """Two principal components of latents, [N, 2] by name; the reference first, in gray."""
    with _panels(path, 1, 1, 7, 5.5) as [axes]:
        for i, (name, points_N2) in enumerate(points.items()):
            color = "0.75" if i == 0 else matplotlib.colormaps["viridis"](i / max(len(points) - 1, 1))
            axes.scatter(points_N2[:, 0], points_N2[:, 1], s=8, color=color, label=_title(name), alpha=0.7, linewidth=0)
        axes.set(title="Latents of the last token", xlabel="first principal component", ylabel="second")


def plot_selection(scores: Mapping[str, tuple[np.ndarray, np.ndarray]], name: str, path: Path) -> None:
    """A panel per domain: the scores of its prompts, and of those that are kept. ``scores``: (scores, kept or not)."""
    with _panels(path, len(scores), min(len(scores), ACROSS), 4.2, 3) as panels:
        for axes, (domain, (score_N, kept_N)) in zip(panels, scores.items(), strict=True):
            edges = np.histogram_bin_edges(score_N, 30).tolist()
            axes.hist(score_N, edges, alpha=0.55, label=f"all ({len(score_N)})")
            axes.hist(score_N[kept_N], edges, alpha=0.8, label=f"kept ({kept_N.sum()})")
            axes.set(title=_title(domain), xlabel=name, ylabel="prompts")


def plot_savings(groups: Mapping[str, tuple[Sequence[Result], Saving, Sequence[Saving]]], path: Path) -> None:
    """Over thresholds on Q: accuracy of every method, and what filtering drops and saves. ``groups``: by name (results
    of the methods, the result at the threshold in use, the results at all thresholds)."""
    with _panels(path, 2 * len(groups), 2, 5.4, 3.6) as panels:
        for accuracy, shares, (group, (results, chosen, curve)) in zip(
            panels[::2], panels[1::2], groups.items(), strict=True
        ):
            thresholds = [point.threshold for point in curve]
            accuracy.plot(thresholds, [point.accuracy for point in curve], color="k", label="Q-filtered majority")
            fixed = [
                result for result in results if result.name != "Q-filtered majority" and "released" not in result.name
            ]
            for i, result in enumerate(fixed):
                accuracy.axhline(result.accuracy, color=f"C{i}", linestyle="--", linewidth=1.2, label=result.name)
            for name, label in (
                ("saved", "tokens saved"),
                ("dropped", "samples dropped"),
                ("none_left", "questions unfiltered"),
            ):
                shares.plot(thresholds, [100 * getattr(point, name) for point in curve], label=label)
            for axes in (accuracy, shares):
                axes.axvline(
                    chosen.threshold, color="0.5", linestyle=":", label=f"threshold in use, {chosen.threshold:.2f}"
                )
                axes.set(title=_title(group), xlabel="threshold: samples with a lower Q-value are dropped")
            accuracy.set_ylabel("accuracy")
            shares.set_ylabel("%")
