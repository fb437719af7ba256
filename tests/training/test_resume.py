"""Invariant 6 in one process: checkpoints that are damaged, chosen, of another run, kept and removed; full disks."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.tokenization import load_tokenizer
from gcrm_fast.train import main
from gcrm_fast.training import finishing, resume, run, snapshots
from gcrm_fast.training.config import parse
from gcrm_fast.training.manifest import checkpoints, read_manifest
from gcrm_fast.training.metrics_log import MetricsLog
from gcrm_fast.training.optimizer import Updater
from gcrm_fast.training.output_folder import default_output
from support.chat import CHATML, chat_tokenizer
from support.training_runs import Ended, arguments, assert_same, end_in_step_9


@pytest.fixture(scope="module")
def undisturbed(pair_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process with which log and weights of the others are compared."""
    output = tmp_path_factory.mktemp("undisturbed")
    assert main(arguments(pair_file, output)) == 0
    return output


@pytest.fixture
def unfinished(pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ended in step 9, with checkpoints of steps 2, 4, 6 and 8."""
    output = tmp_path / "out"
    end_in_step_9(arguments(pair_file, output, "--keep", "4"), monkeypatch)
    assert [path.name[-1] for path in checkpoints(output)] == ["2", "4", "6", "8"]
    return output


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def shard(checkpoint: Path) -> Path:
    return next(checkpoint.glob("__0_*.distcp"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped byte in a shard": lambda path: flip_a_byte(shard(path)),
    "flipped byte in the metadata": lambda path: flip_a_byte(path / ".metadata"),
    "flipped byte in the manifest": lambda path: flip_a_byte(path / "manifest.json"),
    "another fact in the manifest": lambda path: replace(path / "manifest.json", '"facts": {', '"facts": {"more": 1,'),
    "truncated shard": lambda path: os.truncate(shard(path), 100),
    "missing shard": lambda path: shard(path).unlink(),
    "missing manifest": lambda path: (path / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_named_and_skipped(
    unfinished: Path, undisturbed: Path, pair_file: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    DAMAGES[damage](unfinished / "checkpoints" / "step-00000008")
    shutil.copytree(unfinished / "checkpoints" / "step-00000008", unfinished / "checkpoints" / "step-00000010.partial")
    assert main(arguments(pair_file, unfinished)) == 0
    said = capsys.readouterr().out
    assert re.search(r"step-00000008\S*: .*: checkpoint skipped", said), said
    assert "step-00000006 after step 6" in said
    assert_same(undisturbed, unfinished)


def test_all_checkpoints_damaged_starts_over(
    unfinished: Path,
    undisturbed: Path,
    pair_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for path in checkpoints(unfinished):
        flip_a_byte(shard(path))
    there: list[list[str]] = []
    save = snapshots.Checkpoints.save

    def noted(self: snapshots.Checkpoints, *arguments: Any) -> float:
        there.append([path.name for path in checkpoints(unfinished)])
        return save(self, *arguments)

    monkeypatch.setattr(snapshots.Checkpoints, "save", noted)
    assert main(arguments(pair_file, unfinished)) == 0
    said = capsys.readouterr().out
    assert said.count("checkpoint skipped") == 4
    assert "resumed" not in said
    assert there[0] == [], "damaged ones are out of the way"
    assert_same(undisturbed, unfinished)


def test_a_chosen_checkpoint_or_none(
    unfinished: Path, undisturbed: Path, pair_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(unfinished, other)
    chosen = unfinished / "checkpoints" / "step-00000004"
    assert main(arguments(pair_file, unfinished, "--resume", str(chosen))) == 0
    assert f"resumed from {chosen} after step 4" in capsys.readouterr().out
    assert_same(undisturbed, unfinished)
    assert main(arguments(pair_file, other, "--resume", "never")) == 0
    assert "resumed" not in capsys.readouterr().out
    assert_same(undisturbed, other)
    assert main(arguments(pair_file, tmp_path / "third", "--resume", str(chosen))) == 2
    assert "manifest.json: missing" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["never", "checkpoints/step-00000002"])
def test_a_restart_continues_whatever_resume_was(
    unfinished: Path,
    undisturbed: Path,
    pair_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: str,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    asked = asked if asked == "never" else str(unfinished / asked)
    assert main(arguments(pair_file, unfinished, "--resume", asked)) == 0
    assert "step-00000008 after step 8" in capsys.readouterr().out
    assert_same(undisturbed, unfinished)


@pytest.mark.parametrize("named", [True, False])
def test_a_template_with_a_date_is_read_alike_on_the_next_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """In the folder that --output names, and in the default one."""
    chat_tokenizer("{{ strftime_now('%d %b %Y') }}|" + CHATML).save_pretrained(tmp_path / "tokenizer")
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for i in range(21):
            sides = {
                side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "b"), ("rejected", "c"))
            }
            file.write(json.dumps({"prompt": [{"role": "user", "content": f"question {i}"}], **sides}) + "\n")
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--cache", "none"]
    call, output = [*arguments(tmp_path / "pairs.jsonl", tmp_path / "out"), *options], tmp_path / "out"
    if not named:
        at = call.index("--output")
        del call[at : at + 2]
        monkeypatch.chdir(tmp_path)
        output = tmp_path / default_output(parse(call))
    monkeypatch.setattr(resume, "date", SimpleNamespace(today=lambda: date(2026, 1, 31)))
    end_in_step_9(call, monkeypatch)
    monkeypatch.setattr(resume, "date", SimpleNamespace(today=lambda: date(2026, 2, 1)))
    assert main(call) == 0
    template = load_tokenizer(output / "model").chat_template
    assert '{{ "31 Jan 2026" }}|' in template


def test_another_configuration_is_refused_with_the_difference(
    unfinished: Path,
    pair_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other_margins = tmp_path / "margins.jsonl"
    with gzip.open(pair_file, "rt") as file:
        other_margins.write_text("".join(json.dumps({**json.loads(line), "margin": 1.0}) + "\n" for line in file))
    for changed, expected in (
        (("--seed", "3"), "--seed was 0 and is 3"),
        (("--global-batch-pairs", "4"), "--global-batch-pairs was 8 and is 4"),
        (("--train-pairs", "20"), "the training data or its tokens have changed"),
        ((), "the training data or its tokens have changed"),
    ):
        assert main(arguments(pair_file if changed else other_margins, unfinished, *changed)) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    decays, update = set(), Updater.update

    def watched(self: Updater, step: int, loss: torch.Tensor) -> Any:
        decays.add(self.optimizer.param_groups[0]["weight_decay"])
        return update(self, step, loss)

    monkeypatch.setattr(Updater, "update", watched)
    assert (
        main(
            arguments(
                pair_file,
                unfinished,
                "--seed",
                "3",
                "--resume-force",
                "--tokens-per-batch",
                "300",
                "--weight-decay",
                "0.25",
            )
        )
        == 0
    )
    assert decays == {0.25}, "forced to continue, with the new options"


def test_checkpoints_that_stay(pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest ones and the best; the run ends with the best model in its folder."""
    present, removed, real = [], snapshots.Checkpoints.remove_all, run.metrics
    values = iter([0.1, 0.7, 0.9, 0.8, 0.3, 0.2, 0.1])
    monkeypatch.setattr(run, "metrics", lambda scores: real(scores) | {"eval/auroc": next(values)})

    def look(self: snapshots.Checkpoints) -> None:
        present.extend((path.name, read_manifest(path)["facts"]["metrics"]) for path in checkpoints(tmp_path))
        dcp_to_torch_save(tmp_path / "checkpoints" / "step-00000004", tmp_path / "step4.pt")
        removed(self)

    monkeypatch.setattr(snapshots.Checkpoints, "remove_all", look)
    assert (
        main(
            arguments(
                pair_file,
                tmp_path,
                "--eval-every",
                "2",
                "--keep",
                "2",
                "--keep-best",
                "eval/auroc",
                "--save-every",
                "5",
            )
        )
        == 0
    )
    assert [name for name, _ in present] == ["step-00000004", "step-00000008", "step-00000010"]
    assert [about["eval/auroc"] for _, about in present] == [0.9, 0.3, 0.2]
    then = torch.load(tmp_path / "step4.pt")["model"]
    best, last = (load_file(tmp_path / name / "model.safetensors") for name in ("model_best", "model"))
    assert all(torch.equal(best[name], then[name]) for name in best)
    assert any(not torch.equal(last[name], then[name]) for name in last)
    for name, auroc in (("model_best", 0.9), ("model", 0.1)):
        assert f"| held-out AUROC | 0.100 -> {auroc:.3f} " in (tmp_path / name / "README.md").read_text()


def test_a_run_that_is_killed_at_its_end_finishes_when_called_again(
    pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model that marks a finished run is written last; a damaged best checkpoint is skipped."""
    common = arguments(pair_file, tmp_path, "--keep-best", "eval/auroc", "--eval-every", "2")
    values, real = iter([0.1, 0.7, 0.9, 0.8, 0.3, 0.2, 0.1, 0.3, 0.2, 0.1]), run.metrics
    monkeypatch.setattr(run, "metrics", lambda scores: real(scores) | {"eval/auroc": next(values)})
    save, written = finishing.save_model, []

    def ending(folder: Path, *rest: Any) -> None:
        if folder.name.startswith("model."):
            raise Ended
        save(folder, *rest)
        written.append(folder.name)

    with monkeypatch.context() as patch:
        patch.setattr(finishing, "save_model", ending)
        with pytest.raises(Ended):
            main(common)
    assert written == ["model_best.partial"]
    flip_a_byte(shard(tmp_path / "checkpoints" / "step-00000004"))
    capsys.readouterr()
    assert main(common) == 0
    said = capsys.readouterr().out
    assert re.search(r"step-00000004\S*: .*: checkpoint skipped", said), said
    assert "0.300 at step 8" in said
    assert (tmp_path / "model" / "README.md").is_file()
    assert not (tmp_path / "checkpoints").exists()


def test_checkpoints_may_be_a_link_to_another_disk(
    unfinished: Path, undisturbed: Path, pair_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run resumes through the link and removes its checkpoints at the end; a link to nothing is refused at once."""
    link, elsewhere = unfinished / "checkpoints", tmp_path / "elsewhere"
    link.rename(elsewhere)
    link.symlink_to(elsewhere)
    assert main(arguments(pair_file, unfinished)) == 0
    assert "step-00000008 after step 8" in capsys.readouterr().out
    assert_same(undisturbed, unfinished)
    assert link.is_symlink()
    assert list(elsewhere.iterdir()) == []
    elsewhere.rmdir()
    assert main(["--data", "none", "--output", str(unfinished), "--overwrite"]) == 2
    assert capsys.readouterr().err == f"gcrm train: {link}: links to no folder: make it or remove the link\n"


def test_keep_0_writes_no_checkpoints(pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots.Checkpoints, "save", None)
    assert main(arguments(pair_file, tmp_path, "--keep", "0")) == 0
    assert not (tmp_path / "checkpoints").exists()


# --------------------------------------------------------------------------------------------------------- full disks


def test_a_checkpoint_that_cannot_be_written_ends_the_run(pair_file: Path, tmp_path: Path) -> None:
    """No file may be larger than 40 kB: the log can be written, a checkpoint cannot."""
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
from gcrm_fast.train import main
sys.exit(main({arguments(pair_file, tmp_path, "--cache", "none")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("gcrm train:")]
    assert "cannot be written (no room for a whole file" in line
    assert "Traceback" not in done.stderr
    assert not checkpoints(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, options={})
    log._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(No space left"):
        log.write(1, {"loss": 1.0})


def test_the_log_is_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, options={})
    for step in (1, 2, 3):
        log.write(step, {"loss": float("nan") if step == 1 else step})
    log.close({})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    log = MetricsLog(tmp_path, 2, options={})
    log.write(3, {"loss": 5.0})
    log.close({})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": 2},
        {"step": 3, "loss": 5.0},
    ]
    assert [row["step"] for row in log.rows] == [1, 2, 3]
