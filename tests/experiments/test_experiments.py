"""The experiments: measures known by hand, both scripts end to end on little data, then again without new work."""

import gzip
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gcrm_fast import Policy, train
from gcrm_fast.checkpoints.config_json import read_config
from gcrm_fast.checkpoints.weights import open_weights
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.arithmetic import generate, is_correct
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.records import Candidate
from gcrm_fast.data.tokenization import train_tokenizer
from gcrm_fast.training.config import parse, to_toml
from support.folders import tokenizer
from support.models import save
from support.training_runs import ROOT

MODULES = (
    "arithmetic_chain",
    "ablations",
    "labeled_sets",
    "live",
    "objectives",
    "own_samples",
    "policies",
    "real_model",
    "same_as_trl",
    "smollm2",
    "summary",
)
SMALL = ("--hidden-size", "16", "--intermediate-size", "16", "--layers", "1", "--goal-pairs", "8", "--cache", "none")


@pytest.fixture
def experiments(script: Callable[[str], ModuleType]) -> SimpleNamespace:
    return SimpleNamespace(**{name: script(name) for name in MODULES})


@pytest.fixture
def chain(experiments: SimpleNamespace) -> ModuleType:
    return experiments.arithmetic_chain


@pytest.fixture
def objectives(experiments: SimpleNamespace) -> ModuleType:
    return experiments.objectives


# ----------------------------------------------------------------------------------------------------- localization


@pytest.mark.parametrize(("char", "token"), [(0, 0), (1, 0), (2, 2), (3, 3)])
def test_the_token_of_a_character(chain: ModuleType, char: int, token: int) -> None:
    assert chain.error_token(["5+", "", "2", "=4", ""], char) == token


def test_drop_compares_tokens_before_the_error_with_those_from_it_on(chain: ModuleType) -> None:
    values = np.array([0.9, 0.8, 0.1, 0.2])
    assert chain.drop(values, 2) == 1.0
    assert chain.drop(values[::-1], 2) == 0.0
    assert chain.drop(values, 1) == 1.0
    assert chain.drop(np.array([0.5, 0.1, 0.5]), 1) == 0.75


def test_localization_of_known_values(chain: ModuleType) -> None:
    same = np.array([0.3, 0.4])
    located = [
        # Above at the error and the token after it; at the error alone; after it alone.
        chain.Located(0, np.r_[same, 0.1, 0.1, 0.9], np.r_[same, 0.5, 0.6, 0.2], 2),
        chain.Located(0, np.r_[same, 0.1, 0.9], np.r_[same, 0.5, 0.6], 2),
        chain.Located(1, np.r_[same, 0.7, 0.7, 0.2], np.r_[same, 0.7, 0.6, 0.6], 3),
    ]
    found = {name: value for name, (value, *_) in chain.localization(located).items()}
    assert found["after"] == pytest.approx((2 + 1 + 1) / 7)
    assert found["error"] == pytest.approx(2 / 3)
    assert found["end"] == pytest.approx(1 / 3)
    assert found["drop"] == pytest.approx((4 / 6 + 0.5 + 3.5 / 6) / 3)
    assert found["offset -1"] == found["offset -2"] == 0.5
    assert found["offset 0"] == pytest.approx(2 / 3)
    assert found["offset 1"] == pytest.approx(2 / 3)
    many = [one._replace(problem=one.problem + 2 * k) for k in range(20) for one in located]
    after, low, high = chain.localization(many)["after"]
    assert after == pytest.approx(found["after"])
    assert low < after < high


def test_position_alone_takes_nothing_from_wrong_solutions(chain: ModuleType) -> None:
    candidates = [
        Candidate(prompt="p", completion="c", where="", row=i, name="completion", fields={"is_correct": right})
        for i, right in enumerate([True, False, True])
    ]
    values = [np.array([1.0, 2.0, 4.0]), np.array([9.0, 9.0]), np.array([3.0, 4.0])]
    replaced = chain.position_only(candidates, values)
    assert [own.tolist() for own in replaced] == [[2.0, 3.0, 4.0], [2.0, 3.0], [2.0, 3.0]]


# --------------------------------------------------------------------------------------------------------- numbers


def test_intervals_over_seeds_are_students(experiments: SimpleNamespace) -> None:
    mean, half = experiments.summary.mean_interval([0.60, 0.62, 0.67])
    assert mean == pytest.approx(0.63)
    # 4.302653 is the 97.5 % point of Student's t with two degrees of freedom.
    assert half == pytest.approx(4.302653 * math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2 / 3), rel=1e-5)
    assert math.isnan(experiments.summary.mean_interval([0.6])[1])


def test_aurocs_of_groups_are_blind_to_what_tells_groups_apart(objectives: ModuleType) -> None:
    rng = np.random.default_rng(0)
    number = np.repeat([0, 1, 2], 200)
    group = np.array(["a", "b", "c"])[number]
    right = rng.random(600) < np.array([0.9, 0.1, 1.0])[number]  # the last group has one class alone
    of_group = np.array([1.0, 0.0, 2.0])[number]
    assert objectives.auroc(right, of_group) > 0.9
    assert objectives.by_group(right, of_group, group) == {"a": 0.5, "b": 0.5}
    informed = of_group + np.where(right & (number == 0), 0.1, 0.0)
    assert objectives.by_group(right, informed, group) == {"a": 1.0, "b": 0.5}
    assert objectives.by_group(np.ones(600, dtype=bool), informed, group) == {}


def test_a_pair_stays_or_goes_as_a_whole(objectives: ModuleType) -> None:
    candidates = [
        Candidate(prompt="p", completion="c", where="", row=i // 2, name=name)
        for i, name in enumerate(["chosen", "rejected"] * 2)
    ]
    encoded = [Completion(np.zeros(n, dtype=np.int32), 1, 0) for n in (3, 9, 4, 5)]
    kept = objectives.Completions(candidates, encoded).no_longer_than(5)
    assert [len(ids) for ids, _, _ in kept.encoded] == [4, 5]
    assert [candidate.row for candidate in kept.candidates] == [1, 1]


# -------------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.slow
def test_the_chain_from_nothing_and_again(
    chain: ModuleType, trainings: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = (*SMALL, "--train-pairs", "300", "--eval-pairs", "20", "--steps", "2")
    monkeypatch.setattr(chain, "MODELS", {name: (*options, *little) for name, options in chain.MODELS.items()})
    monkeypatch.setattr(chain, "CASES", (("gcrm", "any"),))
    monkeypatch.setattr(chain, "PERMUTATIONS", 2)
    arguments = ["--runs", str(tmp_path), "--problems", "12", "--samples", "6", "-o", str(tmp_path / "report")]
    assert chain.main(arguments) == 0
    assert len(trainings) == 2
    text = (tmp_path / "report.md").read_text()
    numbers = json.loads((tmp_path / "report.json").read_text())
    cases = numbers["localization"]
    assert len(cases["gcrm: Q, goal with shuffled coordinates"]) == 2
    [by_position] = cases["gcrm: Q by position alone"]
    assert by_position["after"][0] == 0.5
    assert by_position["drop"][0] == by_position["drop_right"][0]
    assert all(found["offset -1"][0] == 0.5 for several in cases.values() for found in several)  # the same tokens
    assert f"{cases['gcrm: Q'][0]['after'][0]:.3f}" in text
    assert {name: len(right) for name, right in numbers["by hand"].items()} == dict.fromkeys(chain.MODELS, 20)
    assert f"{sum(numbers['by hand']['gcrm'])} of 20 (gcrm)" in text
    assert set(numbers["vote"]) == {"gcrm, any, 0", "gcrm, any, auto"}
    assert chain.main(arguments) == 0
    assert len(trainings) == 2
    assert (tmp_path / "report.md").read_text() == text


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def data(objectives: ModuleType, tmp_path: Path) -> Path:
    """Files with the names and fields of the real ones: 24 questions, two models."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    labeled, pairs = [], []
    for q in range(24):
        for i in range(4):
            right, model = bool(rng.random() < 0.5), f"model{i % 2}"
            labeled.append(
                {
                    "question": f"{q}+{i}?",
                    "completion": f" is {q + i + (not right)}",
                    "is_correct": right,
                    "predicted_answer": str(q + i + (not right)),
                    "expected_answer": str(q + i),
                    "family": "all",
                    "model": model,
                }
            )
        pairs.append(
            {
                "prompt": f"{q}+{q}?",
                "chosen": f" is {2 * q}",
                "rejected": f" is {2 * q + 1}",
                "family": "all",
                "chosen_model": "a",
                "rejected_model": "b",
            }
        )
    for file in objectives.SETS.values():
        lines(folder / file, pairs if "pairs" in file else labeled)
    lines(folder / objectives.VOTE_FILE, labeled)
    lines(folder / objectives.TRAIN_FILE, [{**pair, "prompt": "How much is " + pair["prompt"]} for pair in pairs])
    return folder


def test_objectives_from_nothing_and_again(
    objectives: ModuleType,
    trainings: list[list[str]],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = objectives.train_arguments
    monkeypatch.setattr(objectives, "train_arguments", lambda *values: [*given(*values), *SMALL])
    monkeypatch.setattr(objectives, "VARIANTS", {name: objectives.VARIANTS[name] for name in ("ranking", "paper")})
    monkeypatch.setattr(objectives, "SMALLEST_CLASS", 2)
    monkeypatch.setenv("GCRM_DATA", str(data))
    common = ["--runs", str(tmp_path / "runs"), "--seeds", "2", "-o", str(tmp_path / "report"), "--steps"]
    assert objectives.main([*common, "1"]) == 0
    assert len(trainings) == 4
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert [len(of_variant) for of_variant in numbers["found"].values()] == [2, 2]
    assert numbers["found"]["paper"][1]["GSM8K"]["completions"] == 96
    assert numbers["found"]["paper"][0]["GSM8K pairs"]["completions"] == 48
    text = (tmp_path / "report.md").read_text()
    (tmp_path / "report.md").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(objectives.RewardModel, "judge", None)  # nothing is judged again
        assert objectives.main([*common, "1"]) == 0
    assert (tmp_path / "report.md").read_text() == text
    capsys.readouterr()
    assert objectives.main([*common, "2"]) == 2
    assert "holds another run's model (config.toml differs in: steps)" in capsys.readouterr().err
    assert len(trainings) == 4


def test_a_model_is_reused_with_the_same_options_alone(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Also options that a run may change when it resumes, where results depend on them."""
    summary, folder = script("summary"), tmp_path / "run"
    words = ["--data", "a.jsonl", "--goal-pairs", "9", "--log-every", "5", "--output", str(folder)]
    (folder / "model").mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(parse(words)))
    assert summary.trained(folder, [*words[:4], "--log-every", "7"]) == folder / "model"
    for name, value in {"goal-pairs": "8", "eval-pairs": "7", "eval-data": "b.jsonl"}.items():
        with pytest.raises(UserError, match=f"config.toml differs in: {name.replace('-', '_')}"):
            summary.trained(folder, [*words[:6], f"--{name}", value])


def test_files_of_other_options_are_not_reused(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    summary, runs = script("summary"), tmp_path / "runs"
    for _ in range(2):
        summary.bind(runs, {"policy": "a", "train_pairs": 3})
    with pytest.raises(UserError, match="runs: holds files of --train-pairs 3, not 4: choose another --runs"):
        summary.bind(runs, {"policy": "a", "train_pairs": 4})


@pytest.mark.parametrize(
    ("value", "said"),
    [("", "no data: set GCRM_DATA"), ("nowhere", "GCRM_DATA nowhere: not a folder"), (".", "gsm8k_pairs.jsonl.gz")],
)
def test_objectives_without_data_say_so_in_one_line(
    objectives: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GCRM_DATA", value)
    assert objectives.main([]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- intervals


def test_an_interval_over_seeds_and_questions_holds_both_variances(experiments: SimpleNamespace) -> None:
    seeds_SQ = np.array([[1.0], [2.0], [6.0]]).repeat(50, axis=1)
    mean, half = experiments.summary.two_way_interval(seeds_SQ)
    assert (mean, half) == experiments.summary.mean_interval([1.0, 2.0, 6.0])
    questions_SQ = np.array([[0.0, 1.0, np.nan, 1.0, 0.0]]).repeat(3, axis=0)
    mean, half = experiments.summary.two_way_interval(questions_SQ)
    assert mean == 0.5
    assert half == pytest.approx(4.3027 * math.sqrt((1 / 3) / 4), rel=1e-4)  # t with 2 degrees of freedom


# ---------------------------------------------------------------------------------------------------------- policies


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies for sums of two values, of one training run in a process of its own."""
    runs = tmp_path_factory.mktemp("policies")
    small = {"hidden-size": 32, "layers": 1, "arithmetic-steps": 1, "problems": 2000, "held-out": 50, "lr": 0.01}
    options = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "experiments" / "policies.py"), "--runs", str(runs), *options]
    subprocess.run([*command, "--right", "12", "3", "--steps", "200"], check=True, timeout=300)
    return runs


@pytest.mark.slow
def test_policies_are_written_where_they_reach_a_percentage(policies: Path) -> None:
    weak, strong = (json.loads((policies / name / "policy.json").read_text()) for name in ("right-3", "right-12"))
    assert 0.03 <= weak["right"] < 0.12 <= strong["right"]
    assert 0 < weak["trained_steps"] < strong["trained_steps"]
    assert sorted(path.name for path in policies.iterdir()) == ["right-12", "right-3"]


@pytest.mark.slow
def test_the_exact_share_is_that_of_samples(policies: Path) -> None:
    policy = Policy.from_pretrained(policies / "right-12")
    prompts = [pair.prompt for pair in generate(0, 50, 0, 1)[1]] * 20
    texts = policy.generate(prompts, max_new_tokens=12, temperature=1.0)
    sampled = np.mean([is_correct(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])
    exact = json.loads((policies / "right-12" / "policy.json").read_text())["right"]
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / len(prompts)))


def test_the_exact_share_is_the_probability_of_every_token_of_the_solutions(experiments: SimpleNamespace) -> None:
    options = experiments.policies.Options(hidden_size=16, layers=1, problems=40, held_out=8)
    pairs, held_out = experiments.policies.problems(options)
    tokenizer = train_tokenizer([pair.prompt + pair.chosen for pair in pairs], 259)
    policy = experiments.policies.new_policy(options, tokenizer)
    expected = 0.0
    for pair in held_out:
        prompt = tokenizer(pair.prompt)["input_ids"]
        ids = [*tokenizer(pair.prompt + pair.chosen)["input_ids"], tokenizer.eos_token_id]
        log_p = policy(torch.tensor([ids])).logits[0].detach().double().log_softmax(-1)
        expected += np.exp(sum(log_p[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))) / len(held_out)
    assert experiments.policies.share_right(policy, tokenizer, held_out) == pytest.approx(expected, rel=1e-4, abs=0)


def test_policies_that_cannot_be_reached(
    experiments: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--hidden-size", "16", "--layers", "1", "--problems", "40", "--held-out", "8", "--runs", str(tmp_path))
    assert experiments.policies.main([*small, "--right", "99", "--steps", "5"]) == 2
    assert "--steps 5: too few to reach 99% of right samples" in capsys.readouterr().err
    assert experiments.policies.main([*small, "--right", "100"]) == 2
    assert "--right 100: must be a whole number between 1 and 99" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- live Q-values


def test_the_best_and_the_most_common_of_some_samples(experiments: SimpleNamespace) -> None:
    live = experiments.live
    scores, right = [0.1, 0.9, 0.5, -np.inf], [1.0, 0.0, 1.0, 1.0]
    for k in (1, 2, 3, 4):
        subsets = list(itertools.combinations(range(4), k))
        best = [right[max(own, key=lambda i: scores[i])] for own in subsets]
        assert live.best_of(scores, right, k) == pytest.approx(np.mean(best))
    assert live.majority_of(["1", "2", "2"], "2", 3) == 1.0
    assert live.majority_of(["1", "2", "2"], "1", 1) == pytest.approx(1 / 3, abs=0.25)
    assert (live.answer("3+1=4;4+4=3;"), live.answer("3+1="), live.answer("")) == ("3", "", "")


def test_levels_at_the_same_number_of_tokens(experiments: SimpleNamespace) -> None:
    """Two problems of 10 tokens per sample; the values are the number of samples, and its double."""
    live = experiments.live
    sizes = [float(k) for k in live.SIZES]
    pool = {"length": [8.0, 12.0], "best": [sizes, [2 * k for k in sizes]]}
    found = live.Found([{"objective": "o", "arm": live.UNSTEERED, "seed": 3, "problems": pool}], "o", [3])
    assert found.at_tokens("best", np.array([50.0])).tolist() == [[5.0, 10.0]]  # between 4 and 6 samples


def test_an_interval_of_one_seed_is_over_problems(experiments: SimpleNamespace) -> None:
    values_SP = np.array([[0.0, 1.0, 1.0, 0.0, 1.0]])
    assert experiments.live.interval(values_SP) == experiments.summary.mean_interval([0.0, 1.0, 1.0, 0.0, 1.0])
    assert experiments.live.interval(np.repeat(values_SP, 2, 0)) == experiments.summary.two_way_interval(
        np.repeat(values_SP, 2, 0)
    )
    assert "*" not in experiments.live.difference(values_SP - 0.5)
    assert experiments.live.difference(np.full((1, 4), 0.5)).endswith("*")


@pytest.mark.slow
def test_live_from_policies_and_again(
    experiments: SimpleNamespace,
    policies: Path,
    trainings: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    live = experiments.live
    little = (*SMALL, "--train-pairs", "300", "--eval-pairs", "20", "--steps", "1")
    of_policy = ("--steps", "1", "--goal-pairs", "8", "--cache", "none")
    short = {name: (*given, *(of_policy if live.OWN in name else little)) for name, given in live.OBJECTIVES.items()}
    monkeypatch.setattr(live, "OBJECTIVES", short)
    monkeypatch.setattr(live, "FROM_POLICY", ())
    monkeypatch.setattr(experiments.own_samples, "PROBLEMS", 200)
    for module in (live, experiments.own_samples):
        monkeypatch.setattr(module, "generate", lambda train, held_out, seed, steps: generate(train, held_out, seed, 1))
    monkeypatch.setattr(live, "ARMS", {name: live.ARMS[name] for name in (*live.CONTROLS, "beams, alpha 0")})
    paths = ("--policy", str(policies / "right-12"), "--runs", str(tmp_path / "runs"), "-o", str(tmp_path / "report"))
    common = [*paths, "--problems", "5", "--seeds"]
    assert live.main([*common, "1"]) == 0
    assert len(trainings) == 4
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == list(live.wanted()) * 4
    assert all(len(values) == 5 for row in rows for values in row["problems"].values())
    own, other = (
        next(row["problems"] for row in rows if row["arm"] == "filter, Q < 0" + end) for end in ("", live.SHUFFLED)
    )
    assert own != other
    pairs = [json.loads(line) for line in (tmp_path / "runs" / "own-pairs.jsonl").read_text().splitlines()]
    assert pairs
    assert all(is_correct(p["prompt"], p["chosen"]) > is_correct(p["prompt"], p["rejected"]) for p in pairs)
    text = (tmp_path / "report.md").read_text()
    assert "## With less without the contrastive loss, own samples" in text
    assert f"{np.mean(own['tokens']):.0f} | {np.mean(own['reward_tokens']):.0f}" in text
    (tmp_path / "report.json").write_text(json.dumps({"rows": rows[:-2]}))
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", None)
        assert live.main([*common, "1"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == rows
    assert live.main([*common, "2"]) == 0
    assert len(trainings) == 8
    text = (tmp_path / "report.md").read_text()
    assert "still missing" not in text
    assert "2 seeds each" in text
    capsys.readouterr()
    assert live.main([*paths, "--problems", "6"]) == 2
    assert "its rows are of another number of problems" in capsys.readouterr().err
    assert live.main(["--policy", "nowhere"]) == 2
    assert "--policy nowhere: is not a folder: run python experiments/policies.py first" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- a pretrained model


def test_a_pretrained_models_arms_one_by_one(
    experiments: SimpleNamespace,
    trainings: list[list[str]],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Finished arms are read from the report; the next call adds what is missing and compares by seed."""
    script = experiments.real_model
    monkeypatch.setenv("GCRM_DATA", str(data))
    save(tmp_path / "model")
    sizes = ("--train-layers", "1", "--pairs", "20", "--held-out", "10", "--goal-pairs", "8", "--questions", "0")
    paths = ("--model", str(tmp_path / "model"), "--runs", str(tmp_path / "runs"), "-o", str(tmp_path / "report"))
    arms = ("--sets", "GSM8K", "--only", "ranking", "paper")
    assert script.main([*sizes, *paths, *arms, "--seeds", "1"]) == 0
    assert script.main([*sizes, *paths, *arms, "--seeds", "2"]) == 0
    assert len(trainings) == 4
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [(row["arm"], row["seed"]) for row in rows] == [("ranking", 0), ("paper", 0), ("ranking", 1), ("paper", 1)]
    assert rows[0]["before"] != rows[0]["after"]
    held_out = (tmp_path / "runs" / "GSM8K-held-out.jsonl").read_text().splitlines()
    assert len(set(held_out)) == 10
    text = (tmp_path / "report.md").read_text()
    assert "| ranking (2) | paper (2) |" in text
    assert text.count("| paper | ") == 1
    capsys.readouterr()
    assert script.main([*sizes, *paths, "--lr", "1", "--seeds", "1"]) == 2
    assert "its rows are of another budget" in capsys.readouterr().err
    for option, known in (("--sets", "GSM8K, HH"), ("--only", "ranking, paper")):
        assert script.main([*sizes, *paths, option, "absent"]) == 2
        assert f"{option} absent: must be one of {known}" in capsys.readouterr().err


def test_the_ranking_loss_is_that_of_trl_at_each_step(
    experiments: SimpleNamespace, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model that learns within six steps; the report keeps what it has."""
    pytest.importorskip("trl", reason="pip install 'gcrm-fast[trl]'")
    monkeypatch.setenv("GCRM_DATA", str(data))
    save(tmp_path / "model")
    script, report = experiments.real_model, tmp_path / "report"
    common = {"model": "m", "train_layers": 3, "pairs": 1, "held_out": 1, "goal_pairs": 1, "questions": 0, "lr": 1.0}
    common |= {"epochs": 1}
    report.with_suffix(".json").write_text(json.dumps({"machine": "m", "budget": common, "rows": []}))
    words = ["--model", str(tmp_path / "model"), "--runs", str(tmp_path / "runs"), "-o", str(report)]
    for dtype in ("auto", "bfloat16"):
        assert script.main([*words, "--trl-steps", "6", "--lr", "0.01", "--dtype", dtype]) == 0
    report_of = json.loads(report.with_suffix(".json").read_text())
    assert report_of["budget"] == common
    for dtype, budget in {"float32": 1e-4, "bfloat16": 0.05}.items():
        found = report_of["trl"][dtype]
        assert len(found["ours"]) == 6
        assert max(found["ours"]) - min(found["ours"]) > 0.01
        assert found["largest_difference"] < budget
        assert min(found["our_pairs_per_s"], found["trl_pairs_per_s"]) > 0
    assert report.with_suffix(".md").read_text().count("Largest difference of the loss at any step: ") == 2


def test_a_trunk_cut_after_its_first_layers_gives_their_states(experiments: SimpleNamespace, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    whole = LlamaForCausalLM(config)
    whole.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    folder = experiments.real_model.first_layers(str(tmp_path / "model"), 2, tmp_path / "cut")
    cut = LlamaForCausalLM.from_pretrained(folder)
    ids = torch.arange(5)[None]
    states = whole.eval()(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(cut.model.norm.weight, whole.model.norm.weight)
    torch.testing.assert_close(cut(ids).logits, whole.lm_head(whole.model.norm(states[2])))


def test_differences_by_seed_and_what_they_would_have_shown(experiments: SimpleNamespace) -> None:
    difference = experiments.real_model.difference
    assert difference({0: 0.7, 1: 0.71, 2: 0.72}, {0: 0.6, 1: 0.61, 2: 0.62}).endswith("(effect over seeds)")
    assert "no effect shown" in difference({0: 0.7, 1: 0.5}, {0: 0.6, 1: 0.6})
    assert difference({0: 0.7}, {0: 0.6, 1: 0.6}) == "-"


def test_the_pretrained_model_ends_with_the_command_of_the_readme(experiments: SimpleNamespace) -> None:
    assert experiments.smollm2.NEXT in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not (ROOT / "runs" / "smollm2").is_dir(), reason="needs the model of make real-model")
def test_the_pretrained_model_is_read_and_has_no_trace_of_its_quantization() -> None:
    folder = ROOT / "runs" / "smollm2"
    config = read_config(folder, head="linear", projection_size=0)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert open_weights(folder, config, seed=0).notes == (f"{folder}: holds no reward head: a new one is initialized",)
    assert "Apache-2.0" in (folder / "LICENSE.txt").read_text()
