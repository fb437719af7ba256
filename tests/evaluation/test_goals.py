"""Goal files and ``gcrm goals``: which completions make a goal, and whose goal it is."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gcrm_fast.checkpoints.goals import read_goals, write_goals
from gcrm_fast.checkpoints.reading import POLICIES
from gcrm_fast.commands.goals import Condition, is_preferred
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.records import Candidate
from gcrm_fast.inference.scoring import RewardModel
from support import models
from support.judged import write
from support.training_runs import Gcrm

PAIRS = [
    {"prompt": "one", "chosen": "two", "rejected": "three", "chosen_cut": False},
    {"prompt": "six", "chosen": "five six", "rejected": "two", "chosen_cut": False},
    {"prompt": "six", "chosen": "seven", "rejected": "two", "chosen_cut": True},
]
LABELED = [
    {"question": "one", "completion": c, "is_correct": c == "two", "help": i, "family": f}
    for i, (c, f) in enumerate([("two", "x"), ("three", "x"), ("two", "y"), ("four", "y")])
]
LISTS = [{"prompt": "one", "completions": ["two", "three"], "is_correct": [False, True], "help": [3, 5], "k": 1}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "linear"
    models.save(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(folder, device="cpu")


@pytest.fixture
def gcrm(gcrm: Gcrm, folder: Path) -> Gcrm:
    """``gcrm goals MODEL ARGUMENTS``."""
    return functools.partial(gcrm, "goals", folder)


def end_mean(model: RewardModel, *completions: tuple[str, str]) -> np.ndarray:
    """The goal state, by another road: the mean of the last of each completion's states."""
    return np.mean([state[-1] for state in model.representations(*map(list, zip(*completions, strict=True)))], axis=0)


def test_files_keep_several_goals_and_say_whose_they_are(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    few, default = torch.randn(2, 5)
    write_goals(path, {"a few": few, "default": default}, {"a few": 20, "default": 7}, "abc")
    goals, counts = read_goals(path, "abc", 5)
    assert list(goals) == ["default", "a few"]
    assert torch.equal(goals["a few"], few)
    assert counts == {"a few": 20, "default": 7}
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["gcrm"])["end_policy"] == POLICIES["eos"]
    with pytest.raises(UserError, match="its goals are of another model's weights: make them"):
        read_goals(path, "abd", 5)
    save_file({"default": default}, path, metadata={"fingerprint": "abc", "end_policy": "none"})
    with pytest.raises(UserError, match="completions that end in an unknown way"):
        read_goals(path, "abc", 5)
    save_file({"default": default}, path)
    with pytest.raises(UserError, match="not a goal file"):
        read_goals(path, "abc", 5)
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="not a readable goal file"):
        read_goals(path, "abc", 5)


def test_another_models_goal_is_refused_with_its_model(folder: Path, model: RewardModel, tmp_path: Path) -> None:
    assert torch.equal(model.goals["default"], torch.ones(32))
    models.save(tmp_path / "other", rms_norm_eps=0.1, projection_size=32)
    assert RewardModel.from_pretrained(tmp_path / "other", device="cpu").fingerprint != model.fingerprint
    (folder / "goal.safetensors").rename(tmp_path / "other" / "goal.safetensors")
    try:
        with pytest.raises(UserError, match=r"other/goal\.safetensors: its goals are of another model's weights"):
            RewardModel.from_pretrained(tmp_path / "other", device="cpu")
    finally:
        (tmp_path / "other" / "goal.safetensors").rename(folder / "goal.safetensors")


def test_goals_are_means_of_preferred_ends(gcrm: Gcrm, model: RewardModel, tmp_path: Path) -> None:
    out = tmp_path / "g.safetensors"
    result = gcrm(write(tmp_path / "pairs", PAIRS), "-o", out)
    assert (result.returncode, "2 completions; skipped 1 cut completions" in result.stdout) == (
        0,
        True,
    )
    expected = {"default": end_mean(model, ("one", "two"), ("six", "five six"))}
    labeled = write(tmp_path / "labeled", LABELED)
    assert gcrm(labeled, "-o", out, "--name", "right").returncode == 0
    expected["right"] = end_mean(model, ("one", "two"))
    assert gcrm(labeled, "-o", out, "--name", "helpful", "--where", "help>=1", "family==y").returncode == 0
    expected["helpful"] = end_mean(model, ("one", "two"), ("one", "four"))
    assert gcrm(labeled, "-o", out, "--name", "first", "--where", "help<3", "--limit", "2").returncode == 0
    expected["first"] = end_mean(model, ("one", "two"), ("one", "three"))
    lists = write(tmp_path / "lists", LISTS)
    assert gcrm(lists, "-o", out, "--name", "list").returncode == 0
    expected["list"] = end_mean(model, ("one", "three"))
    assert gcrm(lists, "-o", out, "--name", "chosen of list", "--where", "help < 4", "k==1").returncode == 0
    expected["chosen of list"] = end_mean(model, ("one", "two"))
    goals, counts = read_goals(out, model.fingerprint, 32)
    assert goals.keys() == expected.keys()
    for name, goal in expected.items():
        np.testing.assert_allclose(goals[name].numpy(), goal, rtol=0, atol=1e-5)
    assert counts == {
        "default": 2,
        "right": 2,
        "helpful": 2,
        "first": 2,
        "list": 1,
        "chosen of list": 1,
    }
    assert {path.name for path in tmp_path.iterdir()} == {"pairs", "labeled", "lists", "g.safetensors"}


def test_a_goal_of_random_tokens_reads_each_position_of_a_completion(
    gcrm: Gcrm, model: RewardModel, tmp_path: Path
) -> None:
    data, out = write(tmp_path / "pairs", PAIRS[1:2]), tmp_path / "g.safetensors"
    for seed in range(12):
        result = gcrm(data, "-o", out, "--name", str(seed), "--token", "random", "--seed", str(seed))
        assert "is the mean state at a random token of 1 completions" in result.stdout
    goals, _ = read_goals(out, model.fingerprint, 32)
    (states_nD,) = model.representations(["six"], ["five six"])
    nearest = [int(np.abs(states_nD - goal.numpy()).max(1).argmin()) for goal in goals.values()]
    assert set(nearest) == set(range(len(states_nD)))
    for at, goal in zip(nearest, goals.values(), strict=True):
        np.testing.assert_allclose(goal.numpy(), states_nD[at], rtol=0, atol=1e-5)
    again = tmp_path / "again.safetensors"
    gcrm(data, "-o", again, "--name", "3", "--token", "random", "--seed", "3")
    assert torch.equal(read_goals(again, model.fingerprint, 32)[0]["3"], goals["3"])


def candidate(name: str = "completion", **fields: Any) -> Candidate:
    return Candidate(prompt="p", completion="c", where="f:3", row=0, name=name, fields=fields)


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("a>=4", 4, True),
        ("a>=4", 3.9, False),
        ("a > 4", 4, False),
        ("a<=4", 5, False),
        ("a<4", -1, True),
        ("a==4", 4.0, True),
        ("a!=4", 4, False),
        ("a==true", True, True),
        ("a!=true", False, True),
        ("a==x y", "x y", True),
        ("a!=x", "x", False),
        ('a=="4"', "4", True),
        ("a == [1]", "[1]", True),
    ],
)
def test_conditions(text: str, value: Any, holds: bool) -> None:
    assert is_preferred(candidate(a=value), [Condition.parse(text)]) is holds
    assert not is_preferred(candidate("rejected", a=value), [Condition.parse(text)])
    assert is_preferred(candidate("chosen", a=value), []), "a pair needs no label"


def test_wrong_conditions_and_fields() -> None:
    for text in ("a", "a=4", ">=4", "a>=", "a>=x", "a>=true"):
        with pytest.raises(UserError, match=f"^--where {re.escape(text)}: "):
            Condition.parse(text)
    for fields, message in (
        ({}, "f:3: field 'a', named by --where, is missing"),
        ({"a": "4"}, "f:3: field 'a' is str, not a number"),
        ({"a": True}, "f:3: field 'a' is bool, not a number"),
        ({"a": None}, "f:3: field 'a' is NoneType, not a number"),
        ({"a": [4, None]}, r"f:3: field 'a' is NoneType, not a number \(completions\[1\]\)"),
        ({"a": [4]}, r"f:3: field 'a' has 1 entries, none for completions\[1\]"),
    ):
        with pytest.raises(UserError, match=message):
            is_preferred(candidate("completions[1]", **fields), [Condition.parse("a>=4")])
    with pytest.raises(UserError, match="f:3: field 'is_correct' is int, not true or false"):
        is_preferred(candidate(is_correct=1), [])


def test_wrong_calls_write_nothing(gcrm: Gcrm, tmp_path: Path) -> None:
    pairs, out = write(tmp_path / "pairs", PAIRS), tmp_path / "g.safetensors"
    bare = write(tmp_path / "bare", [{"prompt": "one", "completion": "two"}])
    other = tmp_path / "other.safetensors"
    write_goals(other, {"x": torch.ones(32)}, {"x": 1}, "of another model")
    before = other.read_bytes()
    for arguments, message in (
        (
            [bare, "-o", out],
            "bare:1: field 'is_correct', read where --where is not given, is missing",
        ),
        ([bare, "-o", out, "--on-bad-record", "skip"], "no completion to make a goal of"),
        ([write(tmp_path / "cut", PAIRS[2:]), "-o", out], r"no completion to make a goal of \(1 cut\)"),
        ([pairs, "-o", other], "other.safetensors: its goals are of another model's weights"),
        ([pairs, "-o", tmp_path], "is a folder"),
        ([pairs, "-o", pairs], "is also an input"),
        ([pairs, "-o", tmp_path / "no" / "g"], "no folder"),
        ([pairs, "-o", out, "--limit", "-1"], "--limit -1: must be at least 0"),
        ([tmp_path / "missing", "-o", out], "missing: cannot be read"),
    ):
        result = gcrm(*arguments)
        assert result.returncode == 2
        assert re.search(message, result.stderr.splitlines()[-1]), result.stderr
        assert not out.exists()
    assert other.read_bytes() == before
    assert gcrm(pairs, "-o", out).returncode == 0
    result = gcrm(pairs, "-o", out)
    assert (result.returncode, "already holds a goal 'default'" in result.stderr) == (2, True)
