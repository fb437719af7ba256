"""Measures of scored completions: hand-computed cases, and properties that a wrong formula breaks."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from gcrm_fast.common import statistics
from gcrm_fast.evaluation import measures
from gcrm_fast.evaluation.measures import Labeled


def labeled(right: list[int], reward: list[float], question: list[int], **changes: object) -> Labeled:
    """One Q-value a completion, its reward; eleven times the same running reward."""
    n = len(right)
    values: dict[str, object] = {
        "right_N": np.array(right, dtype=bool),
        "question_N": np.array(question),
        "half_N": np.array(question) % 2 == 1,
        "lengths_N": np.ones(n, dtype=np.int64),
        "reward_NP": np.repeat(np.array(reward, dtype=float)[:, None], 11, 1),
        "q_N": [np.array([value]) for value in reward],
        "pairs": False,
    }
    return Labeled(**{**values, **changes})  # type: ignore[arg-type]


def test_auroc_of_one_class_alone_is_not_a_number() -> None:
    assert math.isnan(statistics.auroc(np.array([True, True]), np.array([1.0, 2.0])))
    assert math.isnan(statistics.auroc(np.array([False]), np.array([1.0])))
    assert statistics.auroc(np.array([True, False, False]), np.array([1.0, 1.0, 0.0])) == 0.75


def test_auroc_is_that_of_sklearn() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 9, 400):
        right, score = np.arange(n) % 3 == 0, rng.integers(0, 20, n).astype(float)  # with ties
        assert statistics.auroc(right, score) == pytest.approx(roc_auc_score(right, score), abs=1e-12)


def test_within_questions_counts_couples_of_one_question_alone() -> None:
    right = np.array([1, 0, 1, 0, 1, 1], dtype=bool)
    score = np.array([2.0, 1.0, 0.0, 5.0, 1.0, 9.0])
    question = np.array([0, 0, 1, 1, 0, 2])
    # Question 0: right 2 and 1 against wrong 1: 1 + 1/2 of 2. Question 1: 0 of 1. Question 2: no couple.
    assert measures.within_questions(right, score, question).tolist() == [[1.5, 0, 0], [2, 1, 0]]


def test_a_weighed_draw_is_the_auroc_of_the_completions_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    question = rng.integers(0, 6, 40)
    right = rng.random(40) < 0.5
    score = rng.integers(0, 8, 40).astype(float)  # with ties
    drawn = np.array([[2, 0, 1, 1, 0, 2], [1, 1, 1, 1, 1, 1]])
    seen: list[np.ndarray] = []

    def interval(questions: int, width: int, statistic: object) -> tuple[float, float]:
        seen.append(statistic(drawn.astype(float)))  # type: ignore[operator]
        return 0.0, 1.0

    monkeypatch.setattr(measures, "interval", interval)
    measures.auroc_interval(right, score, question)
    taken = [np.concatenate([np.flatnonzero(question == c) for c in range(6) for _ in range(row[c])]) for row in drawn]
    np.testing.assert_allclose(seen[0], [roc_auc_score(right[rows], score[rows]) for rows in taken], rtol=1e-12)
    assert seen[0][1] == pytest.approx(statistics.auroc(right, score))


def test_intervals_draw_questions_and_not_completions() -> None:
    rng = np.random.default_rng(2)
    right, score = rng.random(60) < 0.5, rng.random(60)
    once = measures.auroc_interval(right, score, np.arange(60))
    # Every completion nine times over is no more evidence, as long as the copies belong to one question.
    copies = measures.auroc_interval(np.tile(right, 9), np.tile(score, 9), np.tile(np.arange(60), 9))
    assert copies == pytest.approx(once, abs=1e-12)
    alone = measures.auroc_interval(np.tile(right, 9), np.tile(score, 9), np.arange(540))
    assert alone[1] - alone[0] < 0.5 * (once[1] - once[0])


def test_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(100):
        mean = rng.normal(size=40)
        low, high = measures.ratio_interval(mean, np.ones(40))
        inside += low <= 0 <= high
    assert 86 <= inside <= 99  # 95 of 100, or a little less with so few; not 68 or 100


def test_few_questions_have_no_interval() -> None:
    for questions in (9, 10):
        low, high = measures.ratio_interval(np.ones(questions), np.ones(questions))
        assert math.isnan(low) == math.isnan(high) == (questions < 10)


def test_groups_score_nothing_where_the_group_says_nothing() -> None:
    rng = np.random.default_rng(4)
    right, question = rng.random(4000) < 0.5, rng.integers(0, 500, 4000)
    data = labeled(list(right), [0.0] * 4000, list(question))
    group = rng.integers(0, 40, 4000)

    def identity(fitted: np.ndarray) -> np.ndarray:
        return measures.group_scores(group, right, fitted)

    # A mean that holds the completion's own label, or one that omits it, is off by about 0.06 either way.
    assert measures.cross_fitted(data, identity) == pytest.approx([0.5], abs=0.02)
    assert measures.cross_fitted(data, lambda fitted: measures.group_scores(group * 0, right, fitted)) == [0.5]


def test_group_scores_are_learned_from_the_other_half() -> None:
    group, right = np.array([0, 0, 1, 1, 2]), np.array([1, 0, 1, 1, 0], dtype=bool)
    fitted = np.array([1, 1, 1, 0, 0], dtype=bool)
    assert measures.group_scores(group, right, fitted)[:, 0] == pytest.approx([0.5, 0.5, 1, 1, 2 / 3])


def test_position_scores_are_means_over_the_fitted_completions() -> None:
    q = [np.array([1.0, 2.0, 3.0]), np.array([3.0]), np.array([9.0, 9.0, 9.0, 9.0])]
    fitted = np.array([True, True, False])
    assert measures.position_scores(q, np.array([[0], [1], [3]]), fitted).tolist() == [[2], [2], [3]]


def test_halves_are_a_property_of_the_question_alone() -> None:
    names = [f"question {i}" for i in range(1000)]
    halves = measures.halves(names)
    assert measures.halves(names[::-1]).tolist() == halves[::-1].tolist()
    assert 400 < halves.sum() < 600


def test_measures_of_a_small_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "FEWEST", 2)
    data = labeled([1, 0, 1, 0], [3, 1, 2, 2], [0, 0, 1, 1], lengths_N=np.array([1, 2, 3, 9]), pairs=True)
    found = {measure.name: measure for measure in measures.measures(data)}
    assert found["auroc_reward"].value == found["auroc_q"].value == (1 + 1 + 1 + 0.5) / 4
    assert found["auroc_reward"].low <= 0.875 <= found["auroc_reward"].high
    assert found["pair_accuracy"].value == found["auroc_reward_within_questions"].value == 0.75
    assert (found["auroc_longer"].value, found["baseline_length"].value) == (0.25, 0.75)
    assert found["auroc_reward@50"].value == 0.875
    assert found["spearman_q_reward@20"].value == pytest.approx(1)
    assert len({measure.name for measure in measures.measures(data)}) == len(measures.measures(data))


def test_partial_auroc_reads_the_token_that_the_formula_names() -> None:
    # 20 tokens: 30 % is token 5 (from 0), 100 % the last.
    q = np.zeros((2, 20))
    q[0, 5], q[1, 19] = 1, 1
    data = labeled([1, 0], [0, 0], [0, 1], q_N=list(q), lengths_N=np.array([20, 20]))
    found = {measure.name: measure.value for measure in measures.measures(data)}
    assert (found["auroc_q@30"], found["auroc_q@20"], found["auroc_q@100"], found["auroc_q"]) == (1, 0.5, 0, 0)


def test_one_class_alone_has_no_auroc_and_no_interval() -> None:
    found = {measure.name: measure for measure in measures.measures(labeled([1, 1, 1], [1, 2, 3], [0, 1, 2]))}
    for name in (
        "auroc_reward",
        "auroc_q@50",
        "auroc_reward_within_questions",
        "baseline_length",
        "baseline_position_q@100",
    ):
        assert all(math.isnan(value) for value in found[name][1:]), found[name]
    assert found["pearson_q_reward@40"].value == pytest.approx(1)


def test_a_pair_that_ties_counts_one_half() -> None:
    data = labeled([1, 0, 1, 0, 1, 0], [1, 1, 2, 0, 0, 2], [0, 0, 1, 1, 2, 2], pairs=True)
    assert measures.pair_accuracy(data).value == 0.5
