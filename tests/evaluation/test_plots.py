"""What the plots show: panels, titles, one line per method."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from gcrm_fast.evaluation import plots
from gcrm_fast.evaluation.measures import Labeled, measures
from gcrm_fast.evaluation.results import Row
from gcrm_fast.evaluation.voting import Question, results, saving, thresholds
from gcrm_fast.training.curves import plot_curves

Drawn = Callable[[], Figure]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """The figure that was saved last."""
    figures: list[Figure] = []
    monkeypatch.setattr(plt, "close", figures.append)
    return lambda: figures[-1]


def test_curves_keep_the_two_losses_apart_and_name_their_run(tmp_path: Path, drawn: Drawn) -> None:
    values = {"loss/ranking": 0.5, "loss/contrastive": 1.4, "accuracy": 0.1, "grad_norm": 1.0}
    (tmp_path / "mine").mkdir()
    plot_curves([{"step": step, **values} for step in (1, 2)], tmp_path / "mine" / "curves.png")
    axes = {axes.get_title(): axes for axes in drawn().axes}
    labels = [[line.get_label() for line in one.lines] for title, one in axes.items() if "loss" in title]
    assert labels == [["ranking (train)"], ["contrastive (train)"]]
    assert drawn().get_suptitle() == "Run mine"
    low, high = axes["Pair accuracy and AUROC"].get_ylim()
    assert low < 0.1 < high, "no value is cut off"


def test_curves_of_a_short_run_have_whole_steps_few_ticks_and_visible_points(tmp_path: Path, drawn: Drawn) -> None:
    rows: list[dict[str, float]] = [{"step": step, "eval/loss/ranking": 31.0 + 1e-4 * step} for step in (0, 1, 2)]
    plot_curves([*rows, {"step": 2, "loss/ranking": 31.0, "grad_norm": 0.1}], tmp_path / "curves.png")
    axes = {axes.get_title(): axes for axes in drawn().axes}
    for title in ("Ranking loss per pair (nats)", "Gradient norm"):
        low, high = axes[title].get_xlim()
        assert [tick for tick in axes[title].get_xticks() if low <= tick <= high] == [0, 1, 2]
        assert len(axes[title].get_yticks()) <= 8
        assert axes[title].lines[0].get_marker() == "o", "a line through one point cannot be seen"
    assert axes["Ranking loss per pair (nats)"].yaxis.get_offset_text().get_text() == ""
    labels = [text.get_text() for text in axes["Ranking loss per pair (nats)"].get_yticklabels()]
    assert any(text.startswith("31.00") for text in labels), "no offset to add"


def test_curves_are_gray_where_q_is_no_better_than_chance(tmp_path: Path, drawn: Drawn) -> None:
    percents = range(0, 101, 10)
    row = {"step": 1, "eval/auroc": 0.9, "eval/pairs": 100}
    row |= {f"eval/q_{side}/{p}": 0.5 for side in ("chosen", "rejected") for p in percents}
    row |= {f"eval/auroc_q_at/{p}": 0.6 if p < 50 else 0.7 for p in percents}
    plot_curves([row], tmp_path / "curves.png")
    [axes] = [axes for axes in drawn().axes if axes.get_title().startswith("Mean Q-value")]
    assert [patch.get_x() + 5 for patch in axes.patches] == [0, 10, 20, 30, 40]


@pytest.mark.parametrize(("loss", "metric"), [("bce", "auroc"), ("mse", "spearman")])
def test_curves_of_single_completions_have_no_panel_of_pairs(
    tmp_path: Path, drawn: Drawn, loss: str, metric: str
) -> None:
    step = {f"loss/{loss}": 0.5, "reward": 0.1, "target": 0.4, "grad_norm": 1.0}
    held_out = {f"eval/{metric}": 0.9, f"eval/loss/{loss}": 0.6, "eval/reward": 0.2, "eval/target": 0.3}
    plot_curves([{"step": 1, **step}, {"step": 1, **held_out}], tmp_path / "curves.png")
    lines = {axes.get_title(): [str(line.get_label()) for line in axes.lines] for axes in drawn().axes}
    assert [len(of_panel) for of_panel in lines.values()] == [2, 1, 1, 4]
    words = " ".join([*lines, *(label for of_panel in lines.values() for label in of_panel)])
    assert not any(word in words for word in ("pair", "Ranking", "contrastive", "Q-value"))


def test_savings_have_a_line_per_method(tmp_path: Path, drawn: Drawn) -> None:
    questions = [
        Question(
            expected="r",
            answers=["r", "w"],
            rewards_n=np.array([1.0, 0.0]),
            q_n=[np.full(9, 0.5), np.full(9, -0.5 + i / 10)],
        )
        for i in range(3)
    ]
    curve = [saving(questions, value) for value in thresholds(questions)]
    plots.plot_savings({"all": (results(questions, 0.0, 5), curve[0], curve)}, tmp_path / "savings.png")
    accuracy, shares = drawn().axes
    names = [line.get_label() for line in accuracy.lines]
    assert names[:-1] == ["Q-filtered majority", "majority", "reward-weighted", "best of n", "majority of the top 5"]
    assert [line.get_label() for line in shares.lines][:-1] == [
        "tokens saved",
        "samples dropped",
        "questions unfiltered",
    ]
    assert list(shares.lines[0].get_ydata()) == pytest.approx([100 * point.saved for point in curve])


def test_roc_and_partial_show_intervals(tmp_path: Path, drawn: Drawn) -> None:
    rng = np.random.default_rng(0)
    right, reward = np.arange(60) % 2 == 0, rng.random((60, 11))
    labeled = Labeled(
        right_N=right,
        question_N=np.arange(60) // 2,
        half_N=np.arange(60) // 2 % 2 == 0,
        lengths_N=rng.integers(2, 9, 60),
        reward_NP=reward,
        q_N=[rng.random(9) for _ in range(60)],
        pairs=False,
    )
    rows = [Row("some.jsonl", "all", *measure) for measure in measures(labeled)]
    found = {row.measure: row for row in rows}
    plots.plot_roc({"some.jsonl": labeled}, rows, tmp_path / "roc.png")
    [axes] = drawn().axes
    assert f"[{found['auroc_reward'].low:.3f}, {found['auroc_reward'].high:.3f}]" in str(axes.lines[0].get_label())
    plots.plot_partial({"some.jsonl": labeled}, rows, tmp_path / "partial.png")
    [axes] = drawn().axes
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_window_extent().y1 < axes.get_window_extent().y0, "the legend is below the data"
    band = axes.collections[0].get_paths()[0].vertices
    blind = {str(line.get_label()): len(line.get_xdata()) for line in axes.lines if "chance" in str(line.get_label())}
    assert blind == {"running reward: no better than chance": 11, "Q-value: no better than chance": 11}
    last = band[band[:, 0] == 100][:, 1]
    assert (last.min(), last.max()) == pytest.approx((found["auroc_reward"].low, found["auroc_reward"].high))
