"""Labeled sets of experiments/: drawn alike each time, measures known by hand, models compared by question."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gcrm_fast.data.records import Candidate
from gcrm_fast.evaluation.measures import Labeled
from gcrm_fast.inference.candidates import Judgement
from support.models import save


@pytest.fixture
def sets(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("labeled_sets")


def candidate(completion: str = "c", **fields: Any) -> Candidate:
    return Candidate(prompt="p", completion=completion, where="", row=0, name="completion", fields=fields)


def labeled(right: list[bool], question: list[int], reward: list[float], q: list[list[float]]) -> Labeled:
    return Labeled(
        right_N=np.array(right),
        question_N=np.array(question),
        half_N=np.array(question) % 2 == 1,
        lengths_N=np.array([len(own) for own in q]),
        reward_NP=np.array(reward)[:, None] * np.ones(11),
        q_N=[np.array(own) for own in q],
        pairs=False,
    )


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def test_the_same_questions_are_drawn_each_time_with_their_share_of_records(sets: ModuleType, tmp_path: Path) -> None:
    source = write(tmp_path / "all.gz", [{"qid": f"q{i % 9}", "i": i} for i in range(90)])
    drawn = [json.loads(x) for x in sets.drawn(source, tmp_path / "a" / "drawn", 4, 3).read_text().splitlines()]
    again = [json.loads(x) for x in sets.drawn(source, tmp_path / "b" / "drawn", 4, 3).read_text().splitlines()]
    assert drawn == again
    assert sorted(map([record["qid"] for record in drawn].count, {record["qid"] for record in drawn})) == [3, 3, 3, 3]
    assert [record["i"] for record in drawn] != sorted(record["i"] for record in drawn)


def test_questions_that_the_model_was_trained_on_are_omitted(sets: ModuleType, tmp_path: Path) -> None:
    source = write(tmp_path / sets.COMPLETIONS["MATH"], [{"qid": f"q{i % 9}", "i": i} for i in range(90)])
    found = sets.files(source.parent, tmp_path / "drawn", 1, ["MATH"], {"q0", "q1", "q2"})
    records = [json.loads(line) for line in found["MATH"].read_text().splitlines()]
    assert {record["qid"] for record in records} == {f"q{i}" for i in range(3, 9)}


def test_completions_are_compared_over_all_within_questions_and_within_authors(sets: ModuleType) -> None:
    """Two of all four couples are in order, and one of the two within a question."""
    found = sets.on_completions(
        [candidate(model=name) for name in "abab"],
        labeled([True, False, True, False], [0, 0, 1, 1], [3, 1, 2, 4], [[0.0, 1.0, 0.5], [0.0, 0.0, 0.5]] * 2),
    )
    assert found["completions"] == 4
    within_authors = found["reward"].pop("within authors")
    assert np.isnan(within_authors)  # each author is always right, or always wrong
    assert found["reward"] == {"all": 0.5, "within questions": 0.5, "questions": [1.0, 0.0]}
    assert found["author"] == 1.0
    assert found["Q one token before"]["all"] == 1.0
    assert found["Q at the end"]["questions"] == [0.5, 0.5]


def test_pairs_by_subset(sets: ModuleType) -> None:
    candidates = [candidate(subset=name) for name in ("x", "x", "y", "y", "y", "y")]
    found = sets.on_pairs(
        candidates, labeled([True, False] * 3, [0, 0, 1, 1, 2, 2], [2, 1, 1, 2, 1, 1], [[0.1, 0.2]] * 6), "subset"
    )
    assert found["pairs"] == 3
    assert found["reward"] == {"all": 0.5, "x": 1.0, "y": 0.25, "questions": [1.0, 0.0, 0.5]}


def test_q_before_and_after_the_first_wrong_step(sets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token per character: the second step begins at the fourth. The control falls at the same part of its length."""
    wrong = candidate("ab\n\nc\n\nd", first_error_step=1)
    others = [candidate("xyz", first_error_step=-1), candidate("none"), candidate("e", first_error_step=0)]
    values = [[0.9] * 4 + [0.1] * 4, [0.1, 0.9, 0.9, 0.1], [0.0], [0.0]]
    shuffled = Judgement(SimpleNamespace(), np.zeros(8), np.arange(8.0))
    monkeypatch.setattr(sets, "judge", lambda model, chosen, goal_D: [shuffled])
    monkeypatch.setattr(sets, "encoded", lambda chosen, model: [SimpleNamespace()])
    model = SimpleNamespace(goal=lambda name: torch.arange(4.0), texts=lambda tokens: list(wrong.completion))
    found = sets.at_first_error(
        model, [wrong, *others], labeled([False, True, True, False], [0, 1, 2, 3], [0.0] * 4, values)
    )
    assert found == {"first error": [1.0], "same place of a right solution": [0.5], "shuffled goal": [0.0]}


def test_a_pairs_first_wrong_step_is_that_of_its_rejected_side(sets: ModuleType) -> None:
    """Counted from 1, in any order, one step per line."""
    pair = candidate(error_steps=[4, 3, 6])
    assert sets.steps_before_error(pair, False) == ("\n", 2)
    assert sets.steps_before_error(pair, True) == ("\n", -1)
    assert sets.steps_before_error(candidate(error_steps=[]), False) is None


def test_votes_of_the_half_that_the_threshold_was_not_chosen_on(sets: ModuleType) -> None:
    """Two models answer each question. In question 1 the wrong samples have low Q-values; the threshold is that of
    question 0, where they have them too, or where the right samples have them."""

    def votes(answers_of_0: list[str]) -> dict[str, Any]:
        answers = {"0": answers_of_0, "1": ["5", "7", "7"]}
        candidates = [
            candidate(qid=qid, model=model, expected_answer="5", predicted_answer=answer)
            for qid in answers
            for model in "ab"
            for answer in answers[qid]
        ]
        q = [[0.0] * 5 + [value] * 5 for value in (0.9, 0.1, 0.1)] * 4
        return sets.votes(candidates, labeled([True, False, False] * 4, [0] * 6 + [1] * 6, [2.0, 1.0, 0.0] * 4, q))

    found = votes(["5", "6", "6"])
    assert (found["majority"], found["Q-filtered majority"], found["best of n"]) == ([0.0], [1.0], [1.0])
    assert 0.2 < found["tokens saved"] < 0.3  # four tokens of ten, of two samples in three
    assert votes(["6", "5", "5"])["Q-filtered majority"] == [0.0]


def rows(arm: str, seeds: int, shift: float) -> list[dict[str, Any]]:
    def values(seed: int) -> dict[str, Any]:
        score = {
            "all": 0.5 + shift,
            "within questions": 0.6,
            "questions": [0.5 + shift + 0.01 * seed, None, 0.6 + shift],
        }
        names = ("reward", "Q at the end", "Q one token before")
        return {"GSM8K": {"length": 0.61, "author": 0.79, **dict.fromkeys(names, score)}}

    return [{"arm": arm, "seed": seed, "labeled": values(seed)} for seed in range(seeds)]


def test_models_are_compared_question_by_question(sets: ModuleType) -> None:
    text = sets.report([*rows("ranking", 3, 0.0), *rows("paper", 3, 0.2)], "ranking")
    assert "AUROC of a shortcut alone: length 0.610, author 0.790." in text
    assert "| reward, all | 0.500 ± 0.000 | 0.700 ± 0.000 |" in text
    assert "| Q at the end, within questions | 0.600 ± 0.000 | 0.600 ± 0.000 |" in text
    [effects] = [line for line in text.splitlines() if line.startswith("| paper |")]
    assert effects == "| paper | +0.200 ± 0.000 * | +0.200 ± 0.000 * | +0.200 ± 0.000 * |"
    assert text.count("| ranking | - | - | - |") == 1


def test_a_model_is_measured_on_every_kind_of_set(sets: ModuleType, tmp_path: Path) -> None:
    """On records as those of the real sets; each measure has a number for each question or pair."""
    model = tmp_path / "model"
    save(model)
    solutions = [
        {
            "question": f"{q} + {q}?",
            "completion": f"first\n\nthen {q + i}\n\nso {2 * q + i}",
            "is_correct": i == 0,
            "model": f"model{i}",
            "qid": f"q{q}",
            "first_error_step": -1 if i == 0 else 1,
            "expected_answer": str(2 * q),
            "predicted_answer": str(2 * q + i),
        }
        for q in range(12)
        for i in range(2)
    ]
    for file in (*sets.COMPLETIONS.values(), sets.FILES[sets.VOTES]):
        write(tmp_path / file, solutions)
    pairs = [{"prompt": "p", "chosen": f"yes {i}", "rejected": "no", "subset": f"s{i % 2}"} for i in range(4)]
    write(tmp_path / sets.PAIRS["HH"][0], pairs)
    injected = [
        {
            "prompt": f"p{q}",
            "chosen": f"a\n{q}",
            "rejected": f"a\nwrong{q}",
            "error_steps": [2],
            "error_type": "t",
            "qid": q,
        }
        for q in range(12)
    ]
    write(tmp_path / sets.PAIRS["PRMBench"][0], injected)
    found = sets.measured(model, sets.files(tmp_path, tmp_path / "drawn", 10, sets.defaults("GSM8K")))
    assert list(found) == ["GSM8K", "SVAMP", "ASDiv", "MAWPS", "MATH", "MATH: first error", "votes"]
    assert [len(found[name]["reward"]["questions"]) for name in ("GSM8K", "MATH")] == [10, 12]
    assert [len(own) for own in found["MATH: first error"].values()] == [12, 12, 12]
    found = sets.measured(model, sets.files(tmp_path, tmp_path / "drawn", 10, sets.defaults("HH")))
    assert list(found) == ["HH"]
    assert len(found["HH"]["reward"]["questions"]) == 4
    assert {"s0", "s1"} <= found["HH"]["reward"].keys()
    found = sets.measured(model, sets.files(tmp_path, tmp_path / "drawn", 10, sets.defaults("PRMBench")))
    assert list(found) == ["PRMBench", "PRMBench: first error"]
    assert len(found["PRMBench"]["reward"]["questions"]) == 10
    assert [len(own) for own in found["PRMBench: first error"].values()] == [10, 10, 10]
