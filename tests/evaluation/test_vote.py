"""Votes: hand-computed questions, and ``gcrm vote`` end to end."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from gcrm_fast import cli
from gcrm_fast.commands import vote
from gcrm_fast.evaluation import voting
from gcrm_fast.evaluation.voting import Question
from gcrm_fast.inference.scoring import RewardModel
from support import models
from support.judged import samples, write


def question(answers: list[str], rewards: list[float], q: list[list[float]] | None = None) -> Question:
    """Its right answer is "r"."""
    q_n = [np.array(values, dtype=np.float32) for values in q or [[0.0] * 9] * len(answers)]
    return Question(expected="r", answers=answers, rewards_n=np.array(rewards), q_n=q_n)


# ------------------------------------------------------------------------------------------------------------ filter


def test_filter_judges_no_token_before_the_sixth() -> None:
    q = [[-1] * 5 + [1], [-1] * 5, [-1] * 3, [1] * 5 + [-1], [1] * 6]
    kept_n, saved, _ = voting.filtered(question(["a"] * 5, [0] * 5, q), 0.0)
    assert kept_n.tolist() == [True, True, True, False, True]
    assert saved == 0  # the token that fell below was the last


def test_filter_keeps_a_q_value_at_the_threshold_and_saves_what_follows_the_first_below() -> None:
    q = [[0] * 10, [9] * 7 + [-1, 9, -1], [9] * 5 + [-0.1] + [9] * 4]
    kept_n, saved, _ = voting.filtered(question(["a"] * 3, [0] * 3, q), 0.0)
    assert kept_n.tolist() == [True, False, False]
    assert saved == 2 + 4


def test_filter_that_drops_all_drops_none() -> None:
    kept_n, *rest = voting.filtered(question(["r", "w"], [0, 0], [[-1] * 9, [-1] * 20]), 0.0)
    assert kept_n.tolist() == [True, True]
    assert rest == [0, True]
    kept_n, *rest = voting.filtered(question(["r", ""], [0, 0], [[-1] * 9, [1] * 20]), 0.0)
    assert kept_n.tolist() == [True, True], "no answer would be left"
    assert rest == [0, True]


def test_savings_are_shares_of_all_completions_and_tokens() -> None:
    dropped = question(["w", "r", "w"], [0, 0, 0], [[9] * 5 + [-1] * 5, [9] * 10, [9] * 5 + [-1] * 5])
    whole = question(["w", "w"], [0, 0], [[-1] * 10, [-1] * 20])  # all below: nothing is dropped
    found = voting.saving([dropped, whole], 0.0)
    assert found == (0.0, 0.5, 2 / 5, (4 + 4) / 60, (5 + 5) / (3 * 5 + 5 + 15), 0.5)


def test_the_released_accounting_takes_no_answer_for_one() -> None:
    unanswered = question(["r", ""], [0, 0], [[9] * 5 + [-1] * 5, [9] * 10])
    assert voting.saving([unanswered], 0.0)[3:] == (0.0, 5 / 10, 1.0)
    assert voting.kept_as_released(unanswered, 0.0).tolist() == [False, True]
    below = question(["r", "w"], [0, 0], [[-1] * 9, [-1] * 4 + [1] * 3 + [-1]])
    assert voting.kept_as_released(below, 0.0).tolist() == [True, True]
    assert voting.saved_as_released([below], 0.0) == 0.0
    assert voting.saved_as_released([question(["r"], [0], [[9] * 5])], 0.0) == 0.0


# ------------------------------------------------------------------------------------------------------------- votes


def test_majority_breaks_ties_by_summed_reward_and_counts_no_empty_answers() -> None:
    assert voting.majority(question(["w", "r", "r"], [9, 0, 0])) == "r"
    assert voting.majority(question(["w", "r", "w", "r"], [1, 0.5, -1, 0])) == "r"
    assert voting.majority(question(["", "", "w"], [9, 9, -9])) == "w"
    assert voting.majority(question(["", ""], [0, 0])) == ""
    assert voting.majority(question(["w", "w", "r"], [0, 0, 0]), np.array([True, False, True])) == "w"  # the first


def test_weighted_vote_does_not_depend_on_a_constant() -> None:
    split = question(["w", "w", "w", "r"], [0, 0, 0, 1.2])  # e^1.2 = 3.32 > 3
    assert voting.weighted(split) == "r"
    assert voting.weighted(question(["w", "w", "w", "r"], [50, 50, 50, 51.2])) == "r"
    assert voting.weighted(question(["w", "w", "w", "r"], [0, 0, 0, 1])) == "w"


def test_top_k_takes_the_majority_of_the_best_samples_with_an_answer() -> None:
    ranked = question(["w", "r", "r", "w", "w", ""], [5, 4, 3, 2, 1, 9])
    # k = 2: one each, w has the greater reward. k = 4: two each and 7 each, so the first.
    assert [voting.top(ranked, k) for k in (1, 2, 3, 4, 5)] == ["w", "w", "r", "w", "w"]
    assert voting.top(question(["w", "r", "r", "w"], [5, 4, 3, 1]), 4) == "r"


def test_released_metric_takes_ties_for_right_and_counts_missing_answers() -> None:
    def right(answers: list[str], kept: list[bool] | None = None, correct: tuple[bool, ...] = ()) -> bool:
        asked = dataclasses.replace(question(answers, [0] * len(answers)), correct=correct)
        return voting.released(asked, np.array(kept or [True] * len(answers)))

    assert right(["r", "w", "v"])
    assert right(["r", "w"])
    assert not right(["r", "w", "w"])
    assert not right(["w", "v"])
    assert not right(["", ""])
    assert not right(["r", "", ""])  # no answer is a class that can win
    assert right(["r", "w", "w"], [True, True, False])
    assert right(["r", "r2", "w", "w"], correct=(True, True, False, False))  # the data's labels, not the answers


def test_a_paired_test_counts_only_questions_that_differ() -> None:
    right = np.array([1, 1, 1, 1, 1, 0, 1, 0], dtype=bool)
    other = np.array([0, 0, 0, 0, 1, 0, 1, 1], dtype=bool)
    found = voting.compared("", right, other)
    assert (found.right, found.questions, found.won, found.lost) == (6, 8, 4, 1)
    assert found.p == pytest.approx(2 * (1 + 5) / 2**5)  # 4 or 5 of 5, both sides
    assert found.low < found.accuracy < found.high
    assert voting.compared("", right, right).p == 1


def test_the_chosen_threshold_is_the_most_accurate_then_the_one_that_saves_most() -> None:
    wrong = [[9.0] * 5 + [-0.5] + [9.0] * 9] * 2
    questions = [question(["w", "w", "r"], [0, 0, 0], [*wrong, [9.0] * 5 + [level] * 10]) for level in (0.5, 0.7)]
    threshold = voting.chosen_threshold(questions)
    assert -0.5 < threshold <= 0.5
    assert voting.saving(questions, threshold).accuracy == 1


def test_every_way_to_vote_is_reported() -> None:
    questions = [question(["w", "w", "r"], [0, 0, 5], [[9] * 5 + [-1] * 5, [9] * 5 + [-1] * 5, [9] * 10])]
    found = {result.name: result for result in voting.results(questions, 0.0, 2)}
    right = {name for name, result in found.items() if result.accuracy == 1}
    assert right == {
        "reward-weighted",
        "best of n",
        "majority of the top 2",
        "Q-filtered majority",
        "released metric, Q-filtered",
    }
    assert found["Q-filtered majority"].won == 1


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vote") / "model"
    models.save(folder, verdict=models.VERDICT)
    return folder


def rows(folder: Path) -> dict[tuple[str, str], float]:
    with (folder / "results.csv").open() as file:
        return {(row["group"], row["measure"]): float(row["value"]) for row in csv.DictReader(file)}


def test_vote_reports_what_the_votes_give(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = samples()
    file = write(tmp_path / "samples.jsonl", records)
    out = tmp_path / "out"
    assert cli.run("vote", [str(model), str(file), "-o", str(out), "--by", "family", "--top-k", "3"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["results.csv", "results.json", "savings.png"]
    found = rows(out)
    assert found["all", "questions"] == found["family=a", "questions"] == 6
    assert found["all", "samples"] == 30
    assert found["family=b", "samples"] == 12
    # Of five samples 1, 2, 3, 4, 5 and again 1 are right: three questions have a right majority.
    assert found["all", "accuracy:majority"] == 0.5
    reward = RewardModel.from_pretrained(model).score(
        [r["question"] for r in records], [r["completion"] for r in records]
    )
    best = [
        max(range(5 * q, 5 * q + 5), key=lambda i: (records[i]["predicted_answer"] is not None, reward[i]))
        for q in range(6)
    ]
    expected = np.mean([records[i]["predicted_answer"] == "five" for i in best])
    assert found["all", "accuracy:best of n"] == expected
    assert json.loads((out / "results.json").read_text())["threshold"] == 0.0
    assert found["all", "tokens_saved_as_released"] >= found["all", "tokens_saved"]
    stdout = capsys.readouterr().out
    assert "all: Q-filtered majority" in stdout
    assert "more than one sample" not in stdout
    assert f"Found by the model's training run: {models.VERDICT}\n" in stdout


def test_a_field_with_one_value_is_no_group(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "samples.jsonl", [record | {"family": "a"} for record in samples()])
    assert cli.run("vote", [str(model), str(file), "-o", str(tmp_path / "out"), "--by", "family"]) == 0
    printed = capsys.readouterr()
    assert "family" not in printed.out
    assert "--by family: every completion has family=a, the same as all" in printed.err
    assert {group for group, _ in rows(tmp_path / "out")} == {"all"}


def test_the_table_says_that_an_automatic_threshold_leaves_half_of_the_questions(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "samples.jsonl", samples())
    for threshold in ("0", "auto"):
        arguments = [str(model), str(file), "-o", str(tmp_path / threshold), "--threshold", threshold]
        assert cli.run("vote", arguments) == 0
        assert ("report one half of each group's questions" in capsys.readouterr().out) == (threshold == "auto")


def test_one_sample_per_question_leaves_nothing_to_vote_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "samples.jsonl", samples()[::5])
    assert cli.run("vote", [str(model), str(file), "-o", str(tmp_path / "out")]) == 0
    assert "no question has more than one sample" in capsys.readouterr().out


def test_an_automatic_threshold_is_chosen_on_one_half_and_reported_on_the_other() -> None:
    by_half = {half: [name for name in map(str, range(39)) if vote.halves([name])[0] == half] for half in (False, True)}
    # In the half to choose on a wrong majority falls to -0.5, in the other to 0.5 only.
    questions = {
        name: question(["w", "w", "r"], [0, 0, 0], [[9] * 5 + [level] * 9] * 2 + [[9] * 14])
        for half, level in ((False, -0.5), (True, 0.5))
        for name in by_half[half]
    }
    found = vote.elect("all", questions, "auto", 5)
    assert found.results[0].questions == len(by_half[True]) != len(by_half[False])
    assert -0.5 < found.saving.threshold <= 9
    assert found.saving.threshold == voting.chosen_threshold([questions[name] for name in by_half[False]])


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"predicted_answer": ...}, [], r"samples\.jsonl:3: field 'predicted_answer', named by --answer, is missing"),
        ({"predicted_answer": [1]}, [], r"samples\.jsonl:3: field 'predicted_answer', .* is list, not a string"),
        ({"expected_answer": None}, [], r"samples\.jsonl:3: field 'expected_answer', .* is NoneType"),
        ({"expected_answer": " "}, [], r"samples\.jsonl:3: field 'expected_answer' is empty"),
        ({"expected_answer": "ten"}, [], r"samples\.jsonl:3: .* 'ten', but 'five' in another sample of the question"),
        ({"completion": ""}, [], r"samples\.jsonl:3: field 'completion' is empty"),
        ({}, ["--by", "size"], r"samples\.jsonl:1: field 'size', named by --by, is missing"),
        ({}, ["--question", "size"], r"samples\.jsonl:1: field 'size', named by --question, is missing"),
        ({}, ["--top-k", "0"], r"--top-k 0: must be at least 1"),
        ({}, ["--limit", "-1"], r"--limit -1: must be at least 0"),
        ({}, ["--threshold", "low"], r"--threshold"),
        ({}, ["--limit", "1", "--threshold", "auto"], r"--threshold auto: all has too few questions"),
        ({}, ["--goal", "none.safetensors"], r"none\.safetensors: not a readable goal file"),
    ],
)
def test_bad_input_of_vote(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    arguments: list[str],
    message: str,
) -> None:
    records = samples()
    records[2] = {k: v for k, v in (records[2] | change).items() if v is not ...}
    file = write(tmp_path / "samples.jsonl", records)
    assert cli.run("vote", [str(model), str(file), "-o", str(tmp_path / "deep" / "out"), *arguments]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, err), err
    assert sorted(tmp_path.iterdir()) == [file]
