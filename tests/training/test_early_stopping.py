"""--early-stopping: when a run stops, what it leaves, and that a resumed run stops at the same step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gcrm_fast.train import main
from gcrm_fast.training import finishing, run
from gcrm_fast.training.optimizer import Updater
from support.training_runs import Ended, arguments, assert_same, end_in_step_9, rows, torchrun

EVALUATED = ["--eval-every", "2", "--keep-best", "eval/auroc"]
# Held-out AUROC at steps 0, 2 ... 12: that of the untrained model does not count, an equal one is no better.
MEASURED = [0.9, 0.5, 0.7, 0.6, 0.7, 0.6, 0.6]


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations find MEASURED; the last one of a run finds what the one before did."""
    real, evaluate, now = run.metrics, run.Run.evaluate, {"step": 0}

    def at(self: run.Run, step: int, *rest: Any) -> dict[str, float]:
        now["step"] = step
        return evaluate(self, step, *rest)

    monkeypatch.setattr(run.Run, "evaluate", at)
    monkeypatch.setattr(run, "metrics", lambda scores: real(scores) | {"eval/auroc": MEASURED[now["step"] // 2]})


@pytest.fixture
def updated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The steps in which weights are updated."""
    steps, update = [], Updater.update

    def noted(self: Updater, step: int, loss: torch.Tensor) -> Any:
        steps.append(step)
        return update(self, step, loss)

    monkeypatch.setattr(Updater, "update", noted)
    return steps


def test_a_run_stops_after_evaluations_that_are_no_better(
    pair_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], updated: list[int]
) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    assert main(arguments(pair_file, stopped, *EVALUATED, "--early-stopping", "2")) == 0
    assert updated == [*range(1, 9)], "4 is the best step, 6 and 8 are no better"
    said = capsys.readouterr().out
    assert "after step 8 of 12: eval/auroc did not improve in 2 evaluations" in said
    assert f"0.700 at step 4, saved {stopped / 'model_best'}" in said
    assert "did not improve in 2 evaluations" in (stopped / "model" / "README.md").read_text()
    assert not (stopped / "checkpoints").exists()

    log = rows(stopped)
    assert [row["step"] for row in log if "loss" in row] == [2, 3, 4, 6, 8], "all steps are in a row of the log"
    last = [row for row in log if "eval/auroc" in row][-1]
    assert last["step"] == 8
    assert "eval/accuracy_low" in last, "the last evaluation has intervals"
    assert log[-1].keys() == {"step", "baseline/auroc_length", "baseline/auroc_bag_of_tokens"}
    assert log[-1]["step"] == 8

    assert main(arguments(pair_file, whole, "--eval-every", "2", "--steps", "12", "--log-every", "2")) == 0
    rates = [{row["step"]: row["lr"] for row in rows(folder) if "lr" in row} for folder in (stopped, whole)]
    assert [rates[0][step] for step in (2, 4, 6, 8)] == [rates[1][step] for step in (2, 4, 6, 8)], "the same schedule"


def test_a_killed_run_stops_at_the_same_step(
    pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updated: list[int]
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    options = [*EVALUATED, "--early-stopping", "3"]
    assert main(arguments(pair_file, undisturbed, *options)) == 0
    assert updated[-1] == 10
    end_in_step_9(arguments(pair_file, killed, *options), monkeypatch)
    assert main(arguments(pair_file, killed, *options)) == 0
    assert updated[-1] == 10
    assert_same(undisturbed, killed)
    best = [load_file(folder / "model_best" / "model.safetensors") for folder in (undisturbed, killed)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def test_a_run_that_is_killed_after_it_stopped_only_finishes(
    pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updated: list[int]
) -> None:
    call = arguments(pair_file, tmp_path, *EVALUATED, "--early-stopping", "2")

    def ended(*rest: Any) -> None:
        raise Ended

    with monkeypatch.context() as patch:
        patch.setattr(finishing, "save_model", ended)
        with pytest.raises(Ended):
            main(call)
    before = len(updated)
    assert main([*call, "--early-stopping", "2"]) == 0
    assert len(updated) == before
    assert rows(tmp_path)[-1]["step"] == 8


@pytest.mark.parametrize(("metric", "last"), [("eval/auroc", 10), ("eval/accuracy", 12)])
def test_patience_given_to_a_resumed_run_continues_the_count_of_its_metric(
    pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updated: list[int], metric: str, last: int
) -> None:
    end_in_step_9(arguments(pair_file, tmp_path, *EVALUATED), monkeypatch)
    options = ["--eval-every", "2", "--keep-best", metric, "--early-stopping", "3"]
    assert main(arguments(pair_file, tmp_path, *options)) == 0
    assert updated[-1] == last, "accuracy was watched from step 9 on"


def test_two_processes_stop_together(pair_file: Path, tmp_path: Path) -> None:
    """A learning rate that changes no weight: no evaluation after the first, at step 2, is better."""
    call = arguments(pair_file, tmp_path, *EVALUATED, "--early-stopping", "2", "--lr", "1e-30")
    result = torchrun(*call, processes=2)
    assert result.returncode == 0, result.stderr
    assert "after step 6 of 12: eval/auroc did not improve in 2 evaluations" in result.stdout
    assert rows(tmp_path)[-1]["step"] == 6
    assert (tmp_path / "model_best").is_dir()


def test_it_needs_a_metric(pair_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(pair_file, tmp_path / "out", "--early-stopping", "2")) == 2
    assert "--early-stopping 2: must be 0 without --keep-best METRIC" in capsys.readouterr().err
