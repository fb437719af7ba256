"""The program as people run it: real subprocesses under torchrun, its files, its errors."""

import dataclasses
import functools
import html
import json
import os
import re
import shlex
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gcrm_fast import RewardModel, TrainConfig, train, train_reward_model
from gcrm_fast.common.errors import UserError
from gcrm_fast.model import heads
from gcrm_fast.train import locked, main
from gcrm_fast.training.config import parse, to_toml
from gcrm_fast.training.describe import beaten_rows, blind_rows, q_verdict, unlearned_rows
from gcrm_fast.training.output_folder import check_output
from support.training_runs import ROOT, TIMES, TINY, Gcrm, arguments, rows, torchrun


@pytest.fixture
def gcrm(gcrm: Gcrm) -> Gcrm:
    """``gcrm train ARGUMENTS``: what it returns before any process group work."""
    return functools.partial(gcrm, "train")


def test_default_run_learns_what_shortcuts_cannot(finished: Path) -> None:
    log = rows(finished)
    evaluations = [row for row in log if "eval/auroc" in row]
    assert len(evaluations) >= 8
    assert evaluations[0]["step"] == 0
    assert abs(evaluations[0]["eval/auroc"] - 0.5) < 0.15
    assert evaluations[-1]["eval/auroc"] > 0.75
    assert evaluations[-1]["eval/auroc/steps=1"] > evaluations[-1]["eval/auroc/steps=2"]
    baselines = next(row for row in log if "baseline/auroc_length" in row)
    assert baselines["baseline/auroc_length"] <= 0.6
    assert baselines["baseline/auroc_bag_of_tokens"] <= 0.6
    steps = [row for row in log if "pairs_per_s" in row]
    assert (
        TIMES - {"checkpoint_stall_s"} | {"loss", "loss/ranking", "loss/contrastive", "lr", "grad_norm"}
        <= steps[-1].keys()
    )
    for row in steps:
        assert 0 < row["mfu"] <= row["hfu"] < 2  # of a peak that was measured in passing
        assert 0 < row["tokens_per_s"] <= row["padded_equivalent_tokens_per_s"]
        assert 0 <= row["data_wait"] < 1
    assert steps[-1]["lr"] < 0.01 * max(row["lr"] for row in steps)


def test_evaluations_say_whether_q_is_more_than_the_end_token(pair_file: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    """In every evaluation, and in words at the end of the run."""
    result = gcrm(*arguments(pair_file, tmp_path, "--keep-best", "eval/auroc"))
    for evaluation in (row for row in rows(tmp_path) if "eval/auroc" in row):
        assert {"eval/auroc_q_at/50", "eval/auroc_q_at/90", "eval/auroc_q_at/before_end"} <= evaluation.keys()
        assert -1 <= evaluation["eval/similarity/within"] <= 1
    assert re.search(
        r"held-out AUROC of Q +[01]\.\d+ at 50% of the completion, .* one token before the end", result.stdout
    )
    verdict = r"([Tt]oo few held-out pairs \(21\)|Q tells chosen from rejected)"
    assert re.search(rf"Q-values +{verdict}", result.stdout)
    small = {"eval/auroc_q_at/before_end": 0.52, "eval/similarity/within": 0.9}
    assert "nothing before the end token (AUROC 0.520" in q_verdict(small | {"eval/pairs": 30})
    assert q_verdict(small | {"eval/pairs": 29}).startswith("too few held-out pairs (29)")
    assert "before the end token too (AUROC 0.520" in q_verdict(small | {"eval/pairs": 100_000})
    assert "collapsed" in q_verdict(small | {"eval/pairs": 100_000, "eval/similarity/within": 0.96})
    page = (tmp_path / "inspect.html").read_text()
    assert re.search(verdict, page)
    assert ">too few" not in page  # a sentence there
    for name in ("model", "model_best"):  # for those who use the model later
        assert re.search(rf"\| Q-values \| {verdict}", (tmp_path / name / "README.md").read_text())
        model = RewardModel.from_pretrained(tmp_path / name)
        assert re.match(verdict, model.q_verdict)
        about = html.unescape(model.inspect("one", "two").html)
        assert f"Found by the model's training run: {model.q_verdict}" in about


def test_where_q_is_blind_goals_at_the_end_are_to_be_tried() -> None:
    """Unless they were, or no contrastive loss was asked for, or nothing is known of Q."""
    blind = q_verdict({"eval/auroc_q_at/before_end": 0.5, "eval/similarity/within": 0.1, "eval/pairs": 99})
    [(name, text)] = blind_rows(blind, TrainConfig())
    assert (name, "--sampling end_mix" in text) == ("warning", True)
    assert not blind_rows(blind, TrainConfig(sampling="end_mix"))
    assert not blind_rows(blind, TrainConfig(objective="ranking"))
    assert not blind_rows("Q tells chosen from rejected before the end token too", TrainConfig())
    assert not blind_rows("", TrainConfig())


def test_a_ranking_loss_that_does_not_fall_is_a_warning() -> None:
    [(name, text)] = unlearned_rows([0.693, 0.688, 0.69], 9e-6)
    assert name == "warning"
    assert text == "the held-out ranking loss hardly fell (0.693 -> 0.690): raise --lr (here 9e-06) or --epochs"
    assert unlearned_rows([0.693, 0.5, 0.72], 9e-6) == []  # learned, and then too much


def test_a_shortcut_that_is_as_good_as_the_model_is_a_warning() -> None:
    shortcuts = {"baseline/auroc_length": 0.6, "baseline/auroc_bag_of_tokens": 0.7}
    assert beaten_rows({"eval/auroc": 0.71}, shortcuts) == []
    alone = "alone orders the held-out completions as well as this model"
    assert beaten_rows({"eval/auroc": 0.65}, shortcuts) == [
        ("warning", f"their bag of tokens (0.700) {alone} (AUROC 0.650)")
    ]
    [(_, text)] = beaten_rows({"eval/auroc": 0.6}, shortcuts)
    assert text.startswith(f"their length (0.600) or their bag of tokens (0.700) {alone}")


def test_training_from_python(pair_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(arguments(pair_file, tmp_path / "run", "--keep-best", "eval/auroc"))
    result = train_reward_model(config)
    assert result is not None
    assert (result.folder, result.model) == (tmp_path / "run", tmp_path / "run" / "model")
    assert result.best == tmp_path / "run" / "model_best"
    assert result.metrics["eval/auroc"] == [row["eval/auroc"] for row in rows(result.folder) if "eval/auroc" in row][-1]
    assert RewardModel.from_pretrained(result.model)
    with pytest.raises(UserError, match="holds a finished model"):
        train_reward_model(config)
    dry = parse(arguments(pair_file, result.folder, "--dry-run"))
    assert train_reward_model(dry) is None
    assert f"{result.folder}: holds a finished model: choose another --output" in capsys.readouterr().out
    with pytest.raises(UserError, match="--keep-best"):
        train_reward_model(TrainConfig(data=("x.jsonl",), keep_best="eval/auroc"))
    assert train_reward_model(dataclasses.replace(config, output=str(tmp_path / "dry"), dry_run=True)) is None


def test_a_folder_of_something_else_is_no_output(pair_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "thesis"
    output.mkdir()
    for name in (".gitignore", "slurm-1.out", "train.log"):  # of a run that is about to start
        (output / name).touch()
    config = parse(arguments(pair_file, output, "--dry-run"))
    assert check_output(config) == output
    (output / "chapter1.tex").touch()
    message = f"--output {output}: holds no run, but other files, such as chapter1.tex: choose another folder, or pass"
    for function in (check_output, train_reward_model):
        with pytest.raises(UserError, match=re.escape(message)):
            function(config)
    assert check_output(dataclasses.replace(config, overwrite=True)) == output
    (output / "metrics.jsonl").touch()  # of a run that was killed before its first checkpoint
    assert check_output(config) == output
    with pytest.raises(UserError, match=r"chapter1\.tex: is not a folder"):
        check_output(dataclasses.replace(config, output=str(output / "chapter1.tex")))


def test_dropped_pairs_and_short_completions_are_warned_of(tmp_path: Path, gcrm: Gcrm) -> None:
    data = tmp_path / "pairs.jsonl"
    records = [{"prompt": f"p{i}", "chosen": "y" * 50 ** (i > 7), "rejected": "n"} for i in range(10)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    stdout = gcrm("--data", data, "--vocab-size", "259", "--max-length", "32", "--dry-run", "--cache", "none").stdout
    assert "20% of the training pairs are dropped: raise --max-length" in stdout
    assert "100% of the chosen completions are one token and its end token" in stdout
    assert "a run of 1 optimizer step hardly changes a model: raise --epochs or lower --global-batch-pairs" in stdout


def test_a_run_of_few_pairs_names_its_files_and_seconds_per_step(tmp_path: Path, capsys: Any) -> None:
    """A step then has fewer pairs than --global-batch-pairs."""
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "p", "chosen": "yes it is", "rejected": "no it is not"}) + "\n")
    options = arguments(data, tmp_path / "run", "--steps", "2", "--global-batch-pairs", "1000000")
    start = time.perf_counter()
    assert main(options) == 0
    seconds = time.perf_counter() - start
    stdout, stderr = capsys.readouterr()
    assert "a run of 2 optimizer steps hardly changes a model: raise --steps" in stdout
    assert "1 held-out pairs cannot tell a good model from a bad one" in stdout
    assert all(float(shown) < seconds for shown in re.findall(r"s/step=([\d.e+]+)", stderr))
    assert "s/step=" in stderr
    assert len(re.findall("s/step|step/s", stderr.splitlines()[-1])) == 1  # no rate but the step's
    assert f"{tmp_path / 'run'}: trains a model from scratch on {data}" in stdout
    for name, file in (("model", "model"), ("curves", "curves.png"), ("held-out pairs", "inspect.html")):
        assert re.search(rf"  {name} +{re.escape(str(tmp_path / 'run' / file))}\n", stdout)


@pytest.mark.parametrize(("steps", "logged"), [(3, [1, 2, 3]), (25, [*range(3, 25, 3), 25])])
def test_a_short_run_logs_enough_for_its_curves(steps: int, logged: list[int], pair_file: Path, tmp_path: Path) -> None:
    assert main(arguments(pair_file, tmp_path, "--steps", str(steps), "--log-every", "0", "--keep", "0")) == 0
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == logged


def test_a_models_files_are_readable_as_the_umask_says(pair_file: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert main(arguments(pair_file, tmp_path / "run", "--steps", "1")) == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run" / "model").iterdir()}
    assert set(modes.values()) == {0o640}, modes


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-bf16"])
def test_no_librarys_warnings_on_the_terminal(pair_file: Path, tmp_path: Path, optimizer: str) -> None:
    """Neither torchao's about its kernels nor scikit-learn's about the convergence of the shortcut."""
    if optimizer != "adamw":
        pytest.importorskip("torchao")
    code = """
import sys, torch, sklearn.linear_model
from functools import partial
sklearn.linear_model.LogisticRegression = partial(sklearn.linear_model.LogisticRegression)
fit = sklearn.linear_model.LogisticRegression.func.fit
sklearn.linear_model.LogisticRegression.func.fit = lambda self, *data: fit(self.set_params(max_iter=1), *data)
from gcrm_fast.train import main
with torch.compiler.set_stance("force_eager"):
    sys.exit(main(sys.argv[1:]))
"""
    options = arguments(pair_file, tmp_path, "--optimizer", optimizer, "--steps", "1")
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in re.split(r"[\r\n]", done.stderr) if line.strip()]
    assert [line for line in lines if " steps [" not in line] == []


def test_run_leaves_its_files_and_nothing_else(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names - {".lock"} == {"config.toml", "curves.png", "inspect.html", "metrics.jsonl", "model", "tensorboard"}
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert parse(["--config", str(finished / "config.toml"), "--overwrite"]).arithmetic_steps == 2


def test_saved_model_scores_in_transformers_as_it_did_here(finished: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(finished / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    right, wrong = [], []
    with torch.no_grad():
        for a in range(5):
            for b in range(5):
                for score, result in ((right, (a + b) % 5), (wrong, (a + b + 3) % 5)):
                    text = f"a={a},b={b},c=0:a+b?{a}+{b}={result};{tokenizer.eos_token}"
                    score.append(model(**tokenizer(text, return_tensors="pt")).logits.item())
    assert np.mean(np.array(right) > np.array(wrong)) > 0.7
    goal = load_file(finished / "model" / "goal.safetensors")["default"]
    assert goal.shape == (model.config.hidden_size,)


def test_a_finished_run_is_not_overwritten(finished: Path, gcrm: Gcrm) -> None:
    before = (finished / "metrics.jsonl").read_text()
    result = gcrm("--output", str(finished))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "--overwrite" in result.stderr
    assert (finished / "metrics.jsonl").read_text() == before


def test_a_folder_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "LOCK_WAIT", 0.1)
    with locked(tmp_path), pytest.raises(UserError, match="another run"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.slow
def test_one_to_four_processes_give_the_same_losses_and_model(pair_file: Path, tmp_path: Path) -> None:
    """Invariant 4 through the real program: unequal packs, empty ones, a last batch of fewer pairs than ranks."""
    logs, models = [], []
    for processes, tokens, *shape in (
        (1, "4000"),
        (2, "150", "--gather", "block"),
        (3, "4000"),
        (4, "150", "--replicas", "2"),
    ):
        output = tmp_path / str(processes)
        result = torchrun(
            "--data",
            str(pair_file),
            "--eval-data",
            str(pair_file),
            "--output",
            str(output),
            *TINY,
            "--vocab-size",
            "300",
            "--allow-overlap",
            "--global-batch-pairs",
            "10",
            "--epochs",
            "2",
            "--tokens-per-batch",
            tokens,
            "--log-every",
            "1",
            "--group-prompts",
            "2",
            "--projection-size",
            "8",
            "--lr",
            "0.01",
            *shape,
            processes=processes,
        )
        assert result.returncode == 0, result.stderr
        logs.append(rows(output))
        models.append(load_file(output / "model" / "model.safetensors"))
    assert logs[0][-1]["step"] == 6  # two epochs of 10 + 10 + 1 pairs
    for other in (1, 2, 3):
        for a, b in zip(logs[0], logs[other], strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - TIMES:
                absolute = 1.5 / 21**2 if "auroc" in name else 2e-4  # of 21 x 21 couples one may be a near tie
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=absolute), (other, a["step"], name)
        for name, tensor in models[0].items():
            torch.testing.assert_close(models[other][name], tensor, rtol=2e-3, atol=2e-4)


def test_comparing_all_positions_trains(pair_file: Path, tmp_path: Path) -> None:
    """Every position makes the contrastive loss independent of the number of samples, and training lowers it."""
    contrastive = []
    for samples in ("1", "16"):
        output = tmp_path / samples
        code = main(
            [
                "--data",
                str(pair_file),
                "--output",
                str(output),
                *TINY,
                "--vocab-size",
                "300",
                "--lr",
                "0.01",
                "--objective-variant",
                "dense",
                "--samples",
                samples,
                "--epochs",
                "8",
                "--log-every",
                "1",
                "--global-batch-pairs",
                "21",
            ]
        )
        assert code == 0
        contrastive.append([row["loss/contrastive"] for row in rows(output) if "loss/contrastive" in row])
    assert contrastive[0] == contrastive[1]
    assert contrastive[0][-1] < contrastive[0][0] - 0.05


@pytest.mark.parametrize("optimizer", ["adamw-bf16", "adamw-8bit"])
def test_optimizers_that_spare_memory_train_and_save(pair_file: Path, tmp_path: Path, optimizer: str) -> None:
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        code = main(
            [
                "--data",
                str(pair_file),
                "--output",
                str(tmp_path / "out"),
                *TINY,
                "--vocab-size",
                "300",
                "--steps",
                "4",
                "--log-every",
                "1",
                "--lr",
                "0.01",
                "--optimizer",
                optimizer,
                "--workers",
                "1",
            ]
        )
    assert code == 0
    losses = [row["loss"] for row in rows(tmp_path / "out") if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_run_that_diverges_ends_with_one_line(pair_file: Path, tmp_path: Path, gcrm: Gcrm, evaluated: bool) -> None:
    more = (
        ["--eval-data", str(pair_file), "--allow-overlap", "--eval-every", "1"] if evaluated else ["--log-every", "1"]
    )
    result = gcrm(
        "--data",
        str(pair_file),
        "--output",
        str(tmp_path / "out"),
        *TINY,
        "--vocab-size",
        "300",
        "--lr",
        "1e30",
        "--warmup",
        "0",
        "--steps",
        "9",
        *more,
    )
    assert result.returncode == 2
    assert "not finite" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "model").exists()


def test_an_output_that_cannot_be_made_is_one_line(pair_file: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    (tmp_path / "file").touch()
    result = gcrm("--data", str(pair_file), "--output", str(tmp_path / "file" / "out"), *TINY, "--vocab-size", "300")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "file" in result.stderr


def test_dry_run_trains_and_writes_nothing(pair_file: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    result = gcrm("--data", str(pair_file), "--output", str(tmp_path / "out"), "--vocab-size", "300", "--dry-run")
    assert result.returncode == 0, result.stderr
    for word in ("training pairs", "21", "dropped", "steps", "pack fill", "GiB"):
        assert word in result.stdout
    assert not (tmp_path / "out").exists()


def test_what_became_of_the_records_is_told_and_listed(tmp_path: Path, gcrm: Gcrm) -> None:
    good = [{"prompt": f"p{i}", "chosen": "1" * 4**i, "rejected": "no", "chosen_cut": i == 1} for i in range(4)]
    bad = [{"prompt": "p", "chosen": 5, "rejected": "no"}, {"prompt": "p", "chosen": "a", "rejected": "a<|eos|>"}]
    data, held_out, output = tmp_path / "pairs.jsonl", tmp_path / "eval.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(record) + "\n" for record in [*good, *bad]))
    held_out.write_text(json.dumps({"prompt": "p2", "chosen": "other", "rejected": "no"}) + "\n")
    arguments = [
        "--data",
        str(data),
        "--eval-data",
        str(held_out),
        "--output",
        str(output),
        *TINY,
        "--steps",
        "1",
        "--vocab-size",
        "300",
        "--max-length",
        "32",
        "--on-bad-record",
        "skip",
    ]
    refused = gcrm(*arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"gcrm train: {held_out}:1: field 'prompt' is also in the training data")
    said = gcrm(*arguments, "--allow-overlap").stdout
    table = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in said.splitlines() if "  " in line.strip())
    assert table["training pairs"].startswith("3 (1 dropped")
    assert table["held out and trained on"] == "1 prompt, 1 completion"
    assert table["completion ends"] == "0 of their own, 5 with eos added, 1 cut"
    assert table["bad records"].startswith("2 skipped; the first: ")
    listed = (output / "skipped_records.txt").read_text().splitlines()
    assert [line.removeprefix(str(data))[:9] for line in listed] == [":5: field", ":6: field"]
    data.write_text("".join(json.dumps(record) + "\n" for record in good))
    assert gcrm(*arguments, "--allow-overlap", "--overwrite").returncode == 0
    assert not (output / "skipped_records.txt").exists()


def test_examples_of_the_formats_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gcrm: Gcrm) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = text.partition("## Formats")[2].partition("\n##")[0]
    commands = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    runs = []
    for command in commands:
        if command.startswith("gcrm train "):
            runs.append(gcrm(*shlex.split(command)[2:]))
            assert runs[-1].returncode == 0, runs[-1].stderr
        else:
            subprocess.run(command, shell=True, check=True)
    pairs = [re.search(r"training (?:pairs|completions) +(\d+) ", run.stdout) for run in runs]
    assert [found and found[1] for found in pairs] == ["1", "1", "1", "1", "1", "3", "3", "2", "2", "1"]


def test_bad_input_under_torchrun_fails_once_before_any_training(tmp_path: Path) -> None:
    result = torchrun("--data", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "out"), processes=2)
    assert result.returncode != 0
    assert result.stderr.count("gcrm train:") == 1
    assert "none.jsonl" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--global-batch-pairs", "0"], "--global-batch-pairs"),
        (["--epochs", "-1"], "--epochs"),
        (["--temperature", "nan"], "--temperature"),
        (["--warmup", "1.5"], "--warmup"),
        (["--hidden-size", "50", "--head-size", "0"], "--hidden-size"),
        (["--head-size", "31"], "--head-size 31: must be even"),
        (["--kv-heads", "3"], "--kv-heads"),
        (["--vocab-size", "100"], "--vocab-size"),
        (["--max-length", "5"], "--max-length"),
        (["--tokens-per-batch", "10"], "--tokens-per-batch"),
        (["--no-such-option", "3"], "--no-such-option"),
        (["--samples", "many"], "--samples"),
        (["--samples", "65"], "--samples"),
        (["--objective-variant", "dense", "--pairing", "grid"], "--pairing"),
        (["--objective-variant", "dense", "--reduce", "mean_then_log"], "--reduce"),
        (["--objective-variant", "dense", "--sampling", "avg"], "--sampling avg: must be random"),
        (["--objective-variant", "dense", "--distance", "dot"], "--distance dot: must be cosine"),
        (["--objective-variant", "repo", "--sampling", "end"], "--sampling end: must be random or avg"),
        (["--negatives", "after-divergence", "--sampling", "late_goal"], "--sampling late_goal: must be random or avg"),
        (["--compare", "latents"], "--compare latents: must be states without --head bottleneck"),
        (
            ["--head", "bottleneck", "--compare", "latents", "--projection-size", "4"],
            "--projection-size 4: must be 0 with --compare latents",
        ),
        (["--sampling", "avg", "--pairing", "grid"], "--pairing grid: must be paired"),
        (["--sampling", "rs", "--tokens-per-batch", "200"], "--sampling rs compares pairs of two prompts"),
        (["--config", "no.toml"], "no.toml"),
        (["--preset", "other"], "--preset other"),
        (["--preset", "arithmetic", "--data", "x.jsonl"], "--preset arithmetic"),
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--data", "/"], "/"),
    ],
)
def test_meaningless_flags_are_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, gcrm: Gcrm
) -> None:
    output = tmp_path / "out"
    result = gcrm(*arguments, "--output", str(output), "--steps", "1")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
    assert not output.exists()


def test_configuration_file_round_trip_and_precedence(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    config = TrainConfig(data=('we"ird\\\n.jsonl', "b"), lr=3e-5, eval_by=("a", "b"), overwrite=True)
    path.write_text(to_toml(config))
    again = parse(["--config", str(path)])
    assert again == TrainConfig(**{**vars(config), "config": str(path)})
    assert parse(["--config", str(path), "--lr", "0.5"]).lr == 0.5
    assert parse(["--preset", "hh", "--data", "x.jsonl"]).max_length == 4096
    path.write_text("lr = 'fast'\n")
    with pytest.raises(UserError, match="lr"):
        parse(["--config", str(path)])
    path.write_text("speed = 1\n")
    with pytest.raises(UserError, match="speed"):
        parse(["--config", str(path)])


CHOICES = {
    name: typing.get_args(kind)
    for name, kind in typing.get_type_hints(TrainConfig).items()
    if typing.get_origin(kind) is typing.Literal
}


@pytest.mark.parametrize("name", [*CHOICES])
def test_a_choice_in_a_file_or_in_python_is_checked_as_on_the_command_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    wrong = {"negatives": "after_divergence", "overlong": "truncate_prompt"}.get(name, "no such")
    path.write_text(f'{name} = "{wrong}"\n')
    with pytest.raises(UserError, match=f"option '{name}' is '{wrong}': must be one of "):
        parse(["--config", str(path)])
    with pytest.raises(UserError, match="must be one of"):
        TrainConfig(**{name: wrong})


def test_the_nearest_choice_is_named() -> None:
    with pytest.raises(UserError, match=r"\(did you mean after-divergence\?\)"):
        TrainConfig(negatives="after_divergence")  # type: ignore[arg-type]


def test_every_kind_of_reward_head_can_be_chosen() -> None:
    assert CHOICES["head"] == tuple(heads.KINDS)
