"""Losses and gradients that are not finite: skipped, counted, and in the end the end of the run; and the dtype."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gcrm_fast import train
from gcrm_fast.train import main
from gcrm_fast.training.manifest import checkpoints, read_manifest
from gcrm_fast.training.optimizer import Updater
from support.training_runs import arguments, rows


def not_a_number(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    losses, update, now = train.losses, Updater.update, [1]

    def faulty(*args: Any) -> Any:
        total, statistics = losses(*args)
        if now[0] not in steps:
            return total, statistics
        return total * torch.nan, replace(statistics, sums_K=statistics.sums_K * torch.nan)

    def counted(self: Updater, step: int, loss: torch.Tensor) -> Any:
        now[0] = step + 1
        before = [p.to_local().clone() for p in self.parameters]
        made = update(self, step, loss)
        same = all(torch.equal(a, p.to_local()) for a, p in zip(before, self.parameters, strict=True))
        assert same == (step in steps)
        return made

    monkeypatch.setattr(train, "losses", faulty)
    monkeypatch.setattr(Updater, "update", counted)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-bf16"])
def test_updates_that_are_not_finite_are_skipped_and_counted(
    pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    if optimizer != "adamw":
        pytest.importorskip("torchao")
    not_a_number(monkeypatch, {4, 5})
    with torch.compiler.set_stance("force_eager"):
        assert main(arguments(pair_file, tmp_path, "--optimizer", optimizer)) == 0
    log = rows(tmp_path)
    assert {row["step"]: row["skipped"] for row in log if "skipped" in row} == {3: 0, 6: 2, 9: 0, 12: 0}
    assert all(row["loss"] > 0 for row in log if "loss" in row)  # the mean over updates that were made
    named = {row["skipped_step"]: row["records"] for row in log if "skipped_step" in row}
    assert named.keys() == {4, 5}
    assert [len(records) for records in named.values()] == [8, 8]
    assert all(re.fullmatch(rf"{pair_file}:\d+", record) for records in named.values() for record in records)
    rates = {row["step"]: row["lr"] for row in log if "lr" in row}
    # The schedule waits: twelve steps with two skipped end where ten updates do.
    assert rates[12] == pytest.approx(0.01 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 8 / 11)).item()), rel=1e-5)


def test_samples_of_a_skipped_step_are_named(pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({"prompt": f"q{i}", "completions": [" a", " b"]}) + "\n" for i in range(3)))
    not_a_number(monkeypatch, {4})
    assert main(arguments(pair_file, tmp_path / "out", "--on-policy", str(samples))) == 0
    (records,) = [row["records"] for row in rows(tmp_path / "out") if "skipped_step" in row]
    assert [record.partition(":")[0] for record in records] == [str(pair_file)] * 8 + [str(samples)] * 8


def test_too_many_in_a_row_end_the_run(
    pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    not_a_number(monkeypatch, set(range(5, 13)))
    assert main(arguments(pair_file, tmp_path, "--max-skipped", "3")) == 2
    error = capsys.readouterr().err
    assert error.count("gcrm train:") == 1
    assert "5 steps in a row, up to step 9" in error
    assert "the last checkpoint is" in error
    monkeypatch.undo()
    assert main(arguments(pair_file, tmp_path)) == 0


# ------------------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize("units", [True, False])
def test_the_dtype_is_decided_once_and_kept_by_a_resumed_run(
    pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    """A run that starts on a CPU with bfloat16 units, or without, and ends on one of the other kind."""

    def on_a_machine(with_units: bool) -> int:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": with_units})
        return main(arguments(pair_file, tmp_path, "--dtype", "auto", "--max-skipped", "3"))

    not_a_number(monkeypatch, set(range(5, 13)))  # ends the run behind a checkpoint
    assert on_a_machine(units) == 2
    dtype = "bfloat16" if units else "float32"
    assert read_manifest(checkpoints(tmp_path)[-1])["facts"]["config"]["dtype"] == dtype
    monkeypatch.undo()
    assert on_a_machine(not units) == 0
    assert f'dtype = "{dtype}"' in (tmp_path / "config.toml").read_text()
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights["model.norm.weight"].dtype == getattr(torch, dtype)
