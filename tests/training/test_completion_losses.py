"""--loss bce and mse: completions with a label or score instead of pairs; their losses, metrics and whole runs."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from gcrm_fast import RewardModel
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.encoding import TokenizedPair, preferred
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.evaluation.measures import RESAMPLES
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.train import main
from gcrm_fast.training import memory
from gcrm_fast.training.accounting import work
from gcrm_fast.training.config import TrainConfig, parse, unused_options
from gcrm_fast.training.held_out import shortcuts
from gcrm_fast.training.held_out_completions import pearson_interval
from gcrm_fast.training.memory import MemoryPlan, MemoryShape, memory_plan
from gcrm_fast.training.objectives import Objective, completion_loss, losses
from gcrm_fast.training.prepare import prepare, steps_of
from support.folders import llama
from support.small import VOCAB, small_config, small_model
from support.training_runs import Gcrm, arguments, assert_same, end_in_step_9, rows, torchrun, trained

SINGLE = Sampling(samples=0)
OF_PAIRS = re.compile(r"(?<![-_])\bpairs?\b|rejected")  # outside of names of options


def completions(pairs: list[TokenizedPair], targets: list[float]) -> list[TokenizedPair]:
    """The chosen completions, each with a target."""
    return [
        replace(pair, rejected_ids=pair.chosen_ids, rejected_start=pair.chosen_start, margin=0.0, target=target)
        for pair, target in zip(pairs, targets, strict=True)
    ]


@pytest.fixture
def labeled(pairs: list[TokenizedPair]) -> list[TokenizedPair]:
    return completions(pairs, [1.0, 0.0, 0.0, 1.0, 0.25, 0.0, 1.0])


def gradients(model: LlamaRewardModel, pack: Pack, loss: str) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    total = losses(model(pack), pack.pairs, Objective(contrastive_weight=0.0, loss=loss))[0]
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ----------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_losses_and_their_gradients_equal_their_formulas(loss: str) -> None:
    reward = torch.randn(6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 0.5])
    found = completion_loss(reward, target, loss)
    (gradient,) = torch.autograd.grad(found.sum(), reward)
    for r, y, value, slope in zip(*(x.tolist() for x in (reward, target, found, gradient)), strict=True):
        p = 1 / (1 + math.exp(-r))
        expected = -y * math.log(p) - (1 - y) * math.log(1 - p) if loss == "bce" else (r - y) ** 2
        assert value == pytest.approx(expected, rel=1e-12)
        assert slope == pytest.approx(p - y if loss == "bce" else 2 * (r - y), rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "problem"), [("bce", "multi_label_classification"), ("mse", "regression")], ids=["bce", "mse"]
)
def test_loss_and_gradients_equal_those_of_transformers(labeled: list[TokenizedPair], loss: str, problem: str) -> None:
    """LlamaForSequenceClassification, completion by completion; it computes norms in float32."""
    config = small_config()
    model = small_model(config)
    raw = {name: value for name, value in vars(config).items() if name != "rope_scaling"}
    theirs = LlamaForSequenceClassification(LlamaConfig(**raw, num_labels=1, problem_type=problem, pad_token_id=0))
    theirs = theirs.double().eval()
    theirs.model.rotary_emb.inv_freq = model.model.inv_freq.clone()
    theirs.load_state_dict(model.state_dict())
    total = torch.zeros((), dtype=torch.float64)
    for one in labeled:
        label = torch.tensor([[one.target]], dtype=torch.float64)
        total += theirs(input_ids=torch.from_numpy(one.chosen_ids).long()[None], labels=label).loss
    total.backward()
    pack = build_pack([labeled[:2], labeled[2:5], labeled[5:6], labeled[6:]], SINGLE, 0)
    found, of_ours = gradients(model, pack, loss)
    torch.testing.assert_close(found, total.detach(), rtol=1e-6, atol=0)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(of_ours[name], parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_packed_completions_equal_single_ones_and_are_computed_once(labeled: list[TokenizedPair], loss: str) -> None:
    model = small_model(small_config())
    together = build_pack([labeled[:2], labeled[2:5], labeled[5:6], labeled[6:]], SINGLE, 0)
    total, expected = gradients(model, together, loss)
    alone = [gradients(model, build_pack([[one]], SINGLE, 0), loss) for one in labeled]
    torch.testing.assert_close(sum(value for value, _ in alone), total, rtol=1e-10, atol=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(sum(of_one[name] for _, of_one in alone), gradient, rtol=1e-10, atol=1e-12)
    for one in labeled:
        pack = build_pack([[one]], SINGLE, 0)
        assert pack.input_ids_T.tolist() == one.chosen_ids.tolist()
        assert len(pack.kv_index_K) == len(one.chosen_ids)
        assert len(pack.read_rows_R) == 1, "the reward's token alone"
        assert work(pack, model.config, "none").padded_tokens == len(one.chosen_ids)
    assert work(build_pack([], SINGLE, 0), model.config, "none").padded_tokens == 0
    total, of_dummy = gradients(model, build_pack([], SINGLE, 0), loss)
    assert float(total) == 0
    assert of_dummy.keys() == expected.keys()


def test_the_goal_is_that_of_completions_with_at_least_the_mean(pairs: list[TokenizedPair]) -> None:
    def kept(targets: list[float]) -> list[int]:
        return [one.pair_id for one in preferred(completions(pairs, targets))]

    assert kept([1, 0, 0, 1, 0.25, 0, 0]) == [0, 3]
    assert kept([5, -1, 3, 2, 2, 2, 1]) == [0, 2, 3, 4, 5]
    assert kept([0.1] * 7) == [*range(7)], "their mean, rounded, is more"
    cut = [replace(one, chosen_cut=one.pair_id == 0) for one in completions(pairs, [1, 0, 0, 1, 0, 0, 0])]
    assert [one.pair_id for one in preferred(cut)] == [3]
    assert preferred(pairs) == pairs


def test_shortcuts_of_labels(labeled: list[TokenizedPair]) -> None:
    lengths = [len(one.chosen_ids) - one.chosen_start for one in labeled]
    found = shortcuts(labeled, labeled, VOCAB)
    expected = roc_auc_score([one.target > 0.5 for one in labeled], lengths)
    assert found["baseline/auroc_length"] == pytest.approx(max(expected, 1 - expected))
    assert found["baseline/auroc_bag_of_tokens"] == 1, "it learned these very completions"
    alike = [replace(one, target=1.0) for one in labeled]
    assert math.isnan(shortcuts(alike, labeled, VOCAB)["baseline/auroc_bag_of_tokens"]), "nothing to learn from"


def test_pearson_interval_is_that_of_drawn_prompts() -> None:
    rng = np.random.default_rng(1)
    prompt = np.repeat(np.arange(40), 3)
    a = rng.normal(size=120) + 1e4
    b = a + rng.normal(size=120)
    drawn = [
        pearsonr(a.reshape(40, 3)[own].ravel(), b.reshape(40, 3)[own].ravel()).statistic
        for own in rng.integers(40, size=(RESAMPLES, 40))
    ]
    assert pearson_interval(a, b, prompt) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--objective", "gcrm"], "--objective gcrm: must be ranking with --loss bce"),
        (["--label-smoothing", "0.1"], "--label-smoothing 0.1: must be 0.0 with --loss bce, which has no pairs"),
        (["--center-rewards", "0.1"], "--center-rewards 0.1: must be 0.0 with --loss bce"),
        (["--pairs-per-prompt", "3"], "--pairs-per-prompt 3: must be 20 with --loss bce"),
        (["--sft-weight", "1", "--model", "m"], "--sft-weight 1.0: must be 0.0 with --loss bce"),
        (["--head", "bottleneck"], "--head bottleneck: must be linear or mlp with --loss bce"),
        (["--loss", "mse", "--eval-by", "x"], "--eval-by x: must be omitted with --loss mse"),
        (
            ["--loss", "mse", "--eval-split", "0.1", "--keep-best", "eval/auroc"],
            "must be eval/spearman with --loss mse",
        ),
        (["--eval-split", "0.1", "--keep-best", "eval/auroc_q"], "must be eval/auroc or eval/accuracy with --loss bce"),
        (["--columns", "prompt=a,chosen=b,rejected=c"], "'chosen' is not one of the fields"),
    ],
)
def test_what_needs_pairs_is_refused(options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        parse(["--loss", "bce", "--data", "x.jsonl", *options]).check()
    assert "\n" not in str(refused.value)


def test_the_reward_loss_alone_is_the_default_objective() -> None:
    assert parse(["--loss", "mse", "--data", "x"]).objective == "ranking"
    assert parse(["--data", "x"]).objective == "gcrm"
    assert {"label_smoothing", "contrastive_weight"} <= unused_options(parse(["--loss", "mse", "--data", "x"]))
    with pytest.raises(UserError, match="--loss bce: must be ranking without --data"):
        parse(["--loss", "bce"]).check()
    with pytest.raises(UserError, match="--objective gcrm: must be ranking"):
        TrainConfig(loss="bce", data=("x",), preset="").check()


# ----------------------------------------------------------------------------------------------------------- whole runs


def judgment(loss: str, i: int) -> Any:
    return {"label": i % 3 != 0} if loss == "bce" else {"score": float(i % 4) - 1.5}


@pytest.fixture(scope="module", params=["bce", "mse"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """--loss, and a file of 24 completions, two per prompt."""
    words, rng = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog"], np.random.default_rng(0)
    path = tmp_path_factory.mktemp("completions") / f"{request.param}.jsonl"
    records = [
        {"prompt": f"Question {i // 2}:", "completion": " " + " ".join(rng.choice(words, rng.integers(2, 9)))}
        | {"half": "ab"[i // 2 % 2]}
        | judgment(request.param, i)
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return request.param, path


def test_a_run_reports_rewards_against_labels_and_says_nothing_of_pairs(
    data: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss, path = data
    by = ["--eval-by", "half"] if loss == "bce" else []
    best = ["--keep-best", "eval/accuracy" if loss == "bce" else "eval/spearman"]
    assert main(arguments(path, tmp_path, "--loss", loss, *by, *best)) == 0
    printed = capsys.readouterr()
    assert not OF_PAIRS.search(printed.out), printed.out
    assert "8 completions" in printed.out
    assert re.search(f"held-out {'AUROC' if loss == 'bce' else 'Spearman'}", printed.err)
    card = (tmp_path / "model" / "README.md").read_text()
    assert not OF_PAIRS.search(card), card
    assert "labeled-completions" in card
    assert not (tmp_path / "inspect.html").exists()
    assert (tmp_path / "model_best" / "config.json").exists()

    records = [json.loads(line) for line in path.read_text().splitlines()]
    target = np.array([float(record["label" if loss == "bce" else "score"]) for record in records])
    model = RewardModel.from_pretrained(str(tmp_path / "model"), device="cpu")
    reward = np.array(model.score([r["prompt"] for r in records], [r["completion"] for r in records]))
    row = next(row for row in reversed(rows(tmp_path)) if "eval/completions" in row)
    assert row["eval/completions"] == 24
    if loss == "bce":
        expected = {"auroc": roc_auc_score(target, reward), "accuracy": ((reward > 0) == (target > 0.5)).mean()}
        of_a = np.array([record["half"] == "a" for record in records])
        expected["auroc/half=a"] = roc_auc_score(target[of_a], reward[of_a])
        expected["loss/bce"] = -np.mean(target * -np.logaddexp(0, -reward) + (1 - target) * -np.logaddexp(0, reward))
        intervals = "auroc", "accuracy"
    else:
        expected = {"pearson": pearsonr(reward, target).statistic, "spearman": spearmanr(reward, target).statistic}
        expected["loss/mse"] = ((reward - target) ** 2).mean()
        intervals = "pearson", "loss/mse"
    assert {name: row[f"eval/{name}"] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for name in intervals:
        assert row[f"eval/{name}_low"] <= row[f"eval/{name}"] <= row[f"eval/{name}_high"]
    with safe_open(tmp_path / "model" / "goal.safetensors", "pt") as file:
        count = json.loads(json.loads(file.metadata()["gcrm"])["counts"])["default"]
    assert count == int((target >= target.mean()).sum()) < 24


@pytest.mark.parametrize(
    "options", [(), ("--layers", "2", "--train-layers", "1", "--cache-states"), ("--lora-rank", "4")], ids=str
)
def test_a_run_resumes_bit_for_bit(
    data: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    loss, path = data
    if "--lora-rank" in options:
        options = (*options, "--model", str(llama(tmp_path / "base")))
    call = {name: arguments(path, tmp_path / name, "--loss", loss, *options) for name in ("whole", "resumed")}
    assert main(call["whole"]) == 0
    end_in_step_9(call["resumed"], monkeypatch)
    assert main(call["resumed"]) == 0
    assert_same(tmp_path / "whole", tmp_path / "resumed")


def test_a_run_does_not_resume_with_other_labels(
    data: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss, path = data
    other = tmp_path / path.name
    other.write_text(path.read_text())
    call = arguments(other, tmp_path / "run", "--loss", loss)
    end_in_step_9(call, monkeypatch)
    first, rest = path.read_text().split("\n", 1)
    other.write_text(json.dumps(json.loads(first) | judgment(loss, 1)) + "\n" + rest)
    assert main(call) == 2
    assert "the training data or its tokens have changed" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--tokens-per-batch", "30"), ("--group-prompts", "2")])
def test_losses_do_not_depend_on_packs(data: tuple[str, Path], tmp_path: Path, options: tuple[str, ...]) -> None:
    """Groups change the order, so that with them a step holds all completions."""
    loss, path = data
    every = ["--loss", loss, "--global-batch-pairs", "24"]
    assert main(arguments(path, tmp_path / "whole", *every)) == 0
    assert main(arguments(path, tmp_path / "other", *every, *options)) == 0
    (log, _), (found, _) = trained(tmp_path / "whole"), trained(tmp_path / "other")
    assert [row["loss"] for row in found if "loss" in row] == pytest.approx(
        [row["loss"] for row in log if "loss" in row], rel=1e-3
    )


@pytest.mark.slow
def test_two_processes_train_alike(data: tuple[str, Path], tmp_path: Path) -> None:
    loss, path = data
    for processes in (1, 2):
        result = torchrun(*arguments(path, tmp_path / str(processes), "--loss", loss), processes=processes)
        assert result.returncode == 0, result.stderr
    (_, expected), (_, found) = trained(tmp_path / "1"), trained(tmp_path / "2")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


def test_a_step_reads_no_other_states_than_those_of_the_rewards(data: tuple[str, Path], tmp_path: Path) -> None:
    loss, path = data
    config = parse(arguments(path, tmp_path, "--loss", loss))
    (pack,) = steps_of(prepare(config), config, 0, 1)[0].packs
    assert len(pack.read_rows_R) == pack.n_pairs == 8


def test_predicted_memory_counts_a_completion_once(
    data: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, path = data
    config = parse(arguments(path, tmp_path, "--loss", loss, "--global-batch-pairs", "24"))
    prepared = prepare(config)
    shapes, choose_plan = [], memory.choose_plan

    def noted(limit: int, shape: MemoryShape, *rest: Any) -> MemoryPlan:
        shapes.append(shape)
        return choose_plan(limit, shape, *rest)

    monkeypatch.setattr(memory, "choose_plan", noted)
    memory_plan(prepared, config, 1, torch.device("cpu"), 2**40)
    (shape,) = shapes
    assert shape.tokens == shape.keys == sum(len(one.chosen_ids) for one in prepared.train)


def test_dry_run_shows_the_first_completion(data: tuple[str, Path], gcrm: Gcrm) -> None:
    loss, path = data
    result = gcrm("train", "--loss", loss, "--data", path, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert re.search(r"first completion +\S+:1\n", result.stdout)
    assert re.search(r"label or score +(0|-1\.5)\n", result.stdout)
    assert not OF_PAIRS.search(result.stdout)


def test_the_metric_of_keep_best_needs_two_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "alike.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "a", "label": 0.9}) + "\n" for i in range(4)))
    call = ["--loss", "bce", "--data", str(path), "--eval-split", "0.5", "--output", str(tmp_path / "run")]
    assert main([*call, "--keep-best", "eval/auroc"]) == 2
    assert "all 2 held-out completions have the same label" in capsys.readouterr().err
