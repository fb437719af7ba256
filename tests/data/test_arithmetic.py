"""Generated problems: right, disjoint, and without a shortcut."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from gcrm_fast import cli
from gcrm_fast.data import arithmetic
from gcrm_fast.data.arithmetic import generate, is_correct, is_held_out
from gcrm_fast.data.encoding import TokenizedPair, tokenize_pairs
from gcrm_fast.data.records import Pair
from gcrm_fast.data.tokenization import train_tokenizer
from gcrm_fast.evaluation.measures import halves

TRAIN, HELD_OUT = generate(6000, 1000, seed=0, max_steps=3)


def completions(pairs: list[TokenizedPair]) -> list[np.ndarray]:
    """Completion tokens: all chosen, then all rejected."""
    return [p.chosen_ids[p.chosen_start :] for p in pairs] + [p.rejected_ids[p.rejected_start :] for p in pairs]


def step_is_right(step: str) -> bool:
    """Whether one step, such as '4+2=1', is right in itself."""
    left, right, result = map(int, re.fullmatch(r"(\d)\+(\d)=(\d)", step).groups())
    return result == (left + right) % 5


PROMPT = "a=3,b=4,c=0,d=2:b+d+a?"


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        ("4+2=1;1+3=4;", True),
        ("4+2=3;3+3=1;", False),  # wrong step, consistent after it
        ("4+2=1;1+3=2;", False),
        ("4+2=1;", False),  # a step is missing
        ("4+2=1;1+3=4", False),  # not finished
        ("4+2=1;1+3=4;4+0=4;", False),  # a step too many
        ("2+4=1;1+3=4;", False),  # another problem
        ("4+2=6;6+3=4;", False),  # not reduced
        ("4+2=1;0+3=3;", False),  # continues from another value
        ("", False),
    ],
)
def test_is_correct(completion, correct):
    assert is_correct(PROMPT, completion) is correct


@pytest.mark.parametrize("max_steps", [1, 3, 6])
def test_chosen_is_right_and_rejected_has_one_wrong_step_where_recorded(max_steps):
    train, held_out = generate(300, 100, 3, max_steps)
    for pair in train + held_out:
        assert is_correct(pair.prompt, pair.chosen)
        assert not is_correct(pair.prompt, pair.rejected)
        steps = pair.rejected.split(";")[:-1]
        assert len(steps) == pair.fields["steps"] <= max_steps
        assert [n for n, step in enumerate(steps, 1) if not step_is_right(step)] == [pair.fields["error_step"]]
        results = [step.split("=")[1] for step in steps]
        assert all(step.startswith(value) for step, value in zip(steps[1:], results, strict=False))
        # Both sides agree up to the wrong result.
        assert pair.chosen.split(";")[: pair.fields["error_step"] - 1] == steps[: pair.fields["error_step"] - 1]


def test_held_out_problems_are_distinct_and_never_trained_on():
    assert (len(TRAIN), len(HELD_OUT)) == (6000, 1000)
    held_out = {pair.prompt for pair in HELD_OUT}
    assert len(held_out) == 1000
    assert held_out.isdisjoint(pair.prompt for pair in TRAIN)
    # By a property of the text, hence also across seeds and sizes.
    assert all(map(is_held_out, held_out))
    assert not any(is_held_out(pair.prompt) for pair in generate(2000, 0, seed=5, max_steps=3)[0])


def test_held_out_problems_fall_into_both_halves():
    assert 400 < halves([pair.prompt for pair in HELD_OUT]).sum() < 600


def test_the_same_seed_gives_the_same_pairs():
    assert generate(50, 20, 1, 3) == generate(50, 20, 1, 3)
    assert generate(50, 20, 1, 3) != generate(50, 20, 2, 3)
    assert TRAIN[16].where == "arithmetic:train:17"
    assert HELD_OUT[0].where == "arithmetic:held-out:1"


def test_fewer_held_out_problems_where_no_more_exist(monkeypatch):
    monkeypatch.setattr(arithmetic, "MODULUS", 3)
    monkeypatch.setattr(arithmetic, "PATIENCE", 5000)
    train, held_out = generate(10, 1000, 0, max_steps=1)
    assert len(train) == 10
    problems = (f"a={a},b={b}:{question}?" for a in range(3) for b in range(3) for question in ("a+b", "b+a"))
    assert {pair.prompt for pair in held_out} == {problem for problem in problems if is_held_out(problem)}


def test_steps_and_errors_are_spread():
    """n steps with weight 1 / sqrt(n); each training problem with one error per step, held-out ones with one error."""
    steps, weights = (
        [pair.fields["steps"] for pair in TRAIN if pair.fields["error_step"] == 1],
        np.array([1, 2, 3]) ** -0.5,
    )
    np.testing.assert_allclose(np.bincount(steps)[1:] / len(steps), weights / weights.sum(), atol=0.03)
    for pair in TRAIN[:1000]:
        errors = {other.fields["error_step"] for other in TRAIN if other.prompt == pair.prompt}
        assert errors == set(range(1, pair.fields["steps"] + 1))
    errors = [pair.fields["error_step"] for pair in HELD_OUT if pair.fields["steps"] == 3]
    np.testing.assert_allclose(np.bincount(errors, minlength=4)[1:] / len(errors), 1 / 3, atol=0.09)


@pytest.fixture(scope="module")
def tokenized() -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    def sides(pair: Pair) -> list[str]:
        return [pair.prompt + pair.chosen, pair.prompt + pair.rejected]

    tokenizer = train_tokenizer((text for pair in TRAIN for text in sides(pair)), 300)
    return tokenize_pairs(tokenizer, TRAIN, 128)[0], tokenize_pairs(tokenizer, HELD_OUT, 128)[0]


def test_length_tells_nothing(tokenized):
    for pair in tokenized[0] + tokenized[1]:
        assert len(pair.chosen_ids) == len(pair.rejected_ids)
        assert pair.chosen_start == pair.rejected_start


def test_token_counts_tell_nothing(tokenized):
    train, held_out = tokenized
    counts = CountVectorizer(analyzer=lambda ids: ids.tolist())
    classifier = LogisticRegression(max_iter=1000)
    classifier.fit(counts.fit_transform(completions(train)), np.repeat([1, 0], len(train)))
    scores = classifier.decision_function(counts.transform(completions(held_out)))
    assert abs(roc_auc_score(np.repeat([1, 0], len(held_out)), scores) - 0.5) < 0.1


# ---------------------------------------------------------------------------------------------------------- samples


def written(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The records that ``gcrm samples`` writes."""
    path = folder / "samples.jsonl"
    assert cli.run("samples", ["-o", str(path), *arguments]) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("max_steps", [2, 5])
def test_samples_are_labeled_by_doing_the_sums(tmp_path, max_steps):
    records = written(tmp_path, "--problems", "60", "--samples", "8", "--arithmetic-steps", str(max_steps))
    assert len(records) == 60 * 8
    assert len({record["prompt"] for record in records}) == 60
    for record in records:
        steps = record["completion"].split(";")[:-1]
        assert len(steps) == record["steps"] <= max_steps
        wrong = [number for number, step in enumerate(steps, 1) if not step_is_right(step)]
        assert wrong == ([] if record["is_correct"] else [record["error_step"]])
        assert is_correct(record["prompt"], record["completion"]) is record["is_correct"]
        assert steps[-1].endswith(f"={record['predicted_answer']}")
        assert (record["predicted_answer"] == record["expected_answer"]) is record["is_correct"]


def test_the_place_of_the_error_is_the_digit_that_makes_the_step_wrong(tmp_path):
    wrong = 0
    for record in written(tmp_path, "--problems", "50", "--samples", "6"):
        place, completion = record["error_char"], record["completion"]
        if record["is_correct"]:
            assert (place, record["error_step"]) == (-1, 0)
            continue
        wrong += 1
        assert completion[place - 1] == "="
        assert completion[:place].count(";") == record["error_step"] - 1
        # Another digit there makes the solution right up to the end of the step.
        fixed = [completion[:place] + digit for digit in "01234" if digit != completion[place]]
        assert [step_is_right(text.split(";")[-1]) for text in fixed].count(True) == 1
    assert wrong > 100


def test_samples_are_as_often_right_as_asked_and_errors_are_spread(tmp_path):
    records = written(tmp_path, "--problems", "300", "--samples", "10", "--right", "0.4")
    assert np.mean([record["is_correct"] for record in records]) == pytest.approx(0.4, abs=0.03)
    errors = [record["error_step"] for record in records if record["steps"] == 3 and not record["is_correct"]]
    np.testing.assert_allclose(np.bincount(errors, minlength=4)[1:] / len(errors), 1 / 3, atol=0.08)


def test_sides_are_disjoint_and_the_held_out_one_is_never_trained_on(tmp_path):
    for side in ("held-out", "train"):
        records = written(tmp_path, "--side", side, "--problems", "100", "--samples", "1", "--seed", "3")
        assert {is_held_out(record["prompt"]) for record in records} == {side == "held-out"}
        assert len({record["prompt"] for record in records}) == 100


def test_samples_to_stdout_and_gzip(tmp_path, capsysbinary):
    records = written(tmp_path, "--problems", "5", "--samples", "2")
    assert cli.run("samples", ["-o", "-", "--problems", "5", "--samples", "2"]) == 0
    assert [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()] == records
    assert cli.run("samples", ["-o", str(tmp_path / "s.jsonl.gz"), "--problems", "5", "--samples", "2"]) == 0
    with gzip.open(tmp_path / "s.jsonl.gz", "rt") as file:
        assert [json.loads(line) for line in file] == records


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--problems", "500", "--arithmetic-steps", "1"], "--problems 500: only 5 have up to 1 steps"),
        (["--samples", "0"], "--samples 0: must be between 1 and 100000"),
        (["--right", "1.5"], "--right 1.5: must be between 0 and 1"),
        (["--arithmetic-steps", "26"], "--arithmetic-steps 26: must be between 1 and 25"),
    ],
)
def test_samples_that_cannot_be_made_are_one_line_and_no_file(tmp_path, capsys, arguments, said):
    assert cli.run("samples", ["-o", str(tmp_path / "s.jsonl"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
