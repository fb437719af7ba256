"""Invariant 6 and what else can happen to a run: killed, told to stop, damaged files, numbers that are none.

Real processes under torchrun where processes matter, one process where files do. `make torture` has more of it.
"""

import gzip
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from gcrm_fast import train
from gcrm_fast.common.errors import UserError
from gcrm_fast.train import main
from gcrm_fast.training import parallel, snapshots
from gcrm_fast.training.snapshots import checkpoints, read_manifest
from support.training_runs import (
    ROOT,
    alive,
    arguments,
    assert_same,
    rows,
    start,
    torchrun,
    wait_for,
    workers,
)


@pytest.fixture(scope="module")
def undisturbed(pair_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process, by whose log and weights the others are judged."""
    output = tmp_path_factory.mktemp("undisturbed")
    assert main(arguments(pair_file, output)) == 0
    return output


# --------------------------------------------------------------------------------------------- killed, and told to stop


@pytest.mark.slow
def test_three_kills_change_nothing(pair_file: Path, tmp_path: Path) -> None:
    """Processes killed at a checkpoint, in the middle of writing one, and later; --max-restarts goes on each time."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert torchrun(*arguments(pair_file, whole), processes=2).returncode == 0
    run = start(*arguments(pair_file, killed), processes=2, options=["--max-restarts", "3"])
    folder = killed / "checkpoints"
    last = ""
    moments: list[tuple[str, Callable[[], bool]]] = [
        ("a checkpoint", lambda: (folder / "step-00000002").exists()),
        ("a checkpoint being written", lambda: any(folder.glob("*.partial"))),
        ("a later checkpoint", lambda: bool(checkpoints(killed)) and checkpoints(killed)[-1].name > last),
    ]
    for rank, (what, moment) in enumerate(moments):
        wait_for(lambda: len(workers(run)) == 2, "the processes")
        before = workers(run)
        wait_for(moment, what)
        os.kill(before[rank % 2], signal.SIGKILL)
        wait_for(lambda gone=before: len(workers(run)) == 2 and not set(gone) & set(workers(run)), "a restart")
        last = max((path.name for path in checkpoints(killed)), default="")
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    assert len(re.findall(r"resumed from \S*step-\d+ after step \d+", stdout)) >= 2, stdout
    assert_same(whole, killed)
    assert not folder.exists()
    assert not list(killed.glob("*.partial"))


@pytest.fixture(scope="module")
def stopped(pair_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long run in two processes under the README's launch line, told to save, and then to stop."""
    output = tmp_path_factory.mktemp("stopped")
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Runs that survive")[2]
    launch = shlex.split(next(line for line in section.splitlines() if "--signals-to-handle" in line))
    options = launch[1 : launch.index("gcrm_fast/train.py")]  # of which the last number of processes counts
    run = start(
        *arguments(
            pair_file, output, "--steps", "100000", "--save-every", "50000", "--eval-every", "50000", "--log-every", "1"
        ),
        processes=2,
        options=options,
    )
    wait_for(lambda: (output / "metrics.jsonl").exists() and len(rows(output)) > 3, "the first steps")
    os.kill(workers(run)[1], signal.SIGUSR1)
    wait_for(lambda: bool(checkpoints(output)), "the checkpoint of SIGUSR1")
    [asked] = checkpoints(output)
    beyond = int(asked.name[-8:]) + 5
    wait_for(lambda: rows(output)[-1]["step"] > beyond, "steps after SIGUSR1")
    ranks = workers(run)
    run.send_signal(signal.SIGTERM)
    stdout, stderr = run.communicate(timeout=120)
    assert not any(map(alive, ranks))
    assert stderr.count("Traceback (most recent call last)") <= 1, stderr  # torchrun's own
    (output / "said").write_text(stdout)
    return output


def test_signals_save_and_stop(stopped: Path) -> None:
    said = (stopped / "said").read_text()
    newest = checkpoints(stopped)[-1]
    assert f"stopped after step {int(newest.name[-8:])} of 100000; the last checkpoint is {newest}" in said
    assert not (stopped / "model").exists()
    assert read_manifest(newest)["facts"]["world_size"] == 2


@pytest.mark.slow
def test_another_number_of_processes_goes_on_alike(stopped: Path, pair_file: Path, tmp_path: Path) -> None:
    """From a checkpoint of two processes: two more steps in two processes and in one."""
    step = int(checkpoints(stopped)[-1].name[-8:])
    more = ("--steps", "100000", "--log-every", "1", "--eval-every", "50000")
    logs = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        shutil.copytree(stopped, output)
        run = start(*arguments(pair_file, output, *more), processes=processes)
        wait_for(lambda output=output: rows(output)[-1]["step"] > step + 2, "three steps")
        run.terminate()
        run.communicate(timeout=120)
        logs.append({row["step"]: row["loss"] for row in rows(output) if "loss" in row})
    assert [logs[0][s] for s in range(step + 1, step + 4)] == pytest.approx(
        [logs[1][s] for s in range(step + 1, step + 4)], rel=1e-4
    )
    before = {row["step"]: row["loss"] for row in rows(stopped) if "loss" in row}
    assert {s: loss for s, loss in logs[0].items() if s <= step} == before


def test_a_second_signal_ends_the_process_at_once() -> None:
    """But not what comes with the first one, nor what the process was started to ignore."""
    code = """
import signal, os, time, torch.distributed as dist
from gcrm_fast.training.interrupts import REPEATED, Interrupts
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Interrupts(dist.new_group(backend="gloo")).handled():
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    print("first", flush=True)
    time.sleep(REPEATED)  # else it counts as the same occasion
    os.kill(os.getpid(), signal.SIGHUP)
    print("ignored", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("second", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "first\nignored\n"), done.stderr


COPIES = """
import torch, torch.distributed as dist
from gcrm_fast.checkpoints.weights import fresh_weights
from gcrm_fast.training import parallel
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.training.optimizer import Updater, cast_weights
config = ModelConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8)
with parallel.process_group(replicas=2) as (mesh, device):
    with torch.device("meta"):
        model = LlamaRewardModel(config)
    cast_weights(model, "adamw-bf16")
    parallel.shard(model, mesh, torch.float32)
    parallel.materialize(model, mesh, device, fresh_weights(config, 0).rows)
    updater = Updater(model, TrainConfig(optimizer="adamw-bf16", warmup=0.0, lr=1e-4), 9, device)
    before = [p.to_local().clone() for p in model.parameters()]
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        updater.update(step, torch.zeros(()))
    for p, old in zip(model.parameters(), before):
        copies = [torch.empty_like(old) for _ in range(2)]
        dist.all_gather(copies, p.to_local().detach())
        assert torch.equal(*copies)
    assert any(not torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_copies_of_a_shard_round_alike(tmp_path: Path) -> None:
    script = tmp_path / "copies.py"
    script.write_text(COPIES)
    result = torchrun(processes=2, script=str(script))
    assert result.returncode == 0, result.stderr


def test_orphans_that_have_hardly_begun_end(pair_file: Path, tmp_path: Path) -> None:
    """torchrun is killed while its processes still import."""
    run = start(*arguments(pair_file, tmp_path), processes=2)
    wait_for(lambda: len(workers(run)) == 2, "the processes")
    ranks = workers(run)
    wait_for(lambda: all("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in ranks), "the first imports")
    run.kill()
    wait_for(lambda: not any(map(alive, ranks)), "the orphans' end", 60)
    run.communicate()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_orphans_end_and_free_the_folder(pair_file: Path, tmp_path: Path) -> None:
    more = ("--steps", "100000", "--eval-every", "50000", "--save-every", "50000", "--workers", "1")
    run = start(*arguments(pair_file, tmp_path, *more), processes=2)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(rows(tmp_path)) > 2, "the first steps")
    ranks = workers(run)
    loaders = [
        int(pid)
        for rank in ranks
        for pid in subprocess.run(
            ["pgrep", "-P", str(rank)], capture_output=True, text=True, check=False
        ).stdout.split()
    ]
    assert len(loaders) == 2
    run.kill()
    wait_for(lambda: not any(map(alive, [*ranks, *loaders])), "the orphans' end", 10)
    run.communicate()
    size = (tmp_path / "metrics.jsonl").stat().st_size
    time.sleep(0.5)
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    with train.locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("kind", "timeout", "message"),
    [
        pytest.param("hang", "20", "does not answer", marks=pytest.mark.slow),
        ("memory", "500", "rank 1: out of memory"),
        ("bug", "500", "a planted bug"),
    ],
)
def test_a_rank_that_fails_ends_the_run(pair_file: Path, tmp_path: Path, kind: str, timeout: str, message: str) -> None:
    """And its processes that build packs; what nobody expects is told with its traceback."""
    result = torchrun(
        f"{kind}:1:5",
        *arguments(pair_file, tmp_path, "--timeout", timeout, "--workers", "1"),
        processes=2,
        script="tests/support/faulty.py",
        options=["--shutdown-timeout", "2"],
    )
    assert result.returncode != 0
    assert message in result.stderr
    assert result.stderr.count("Traceback (most recent call last)") == 1 + (kind == "bug")  # torchrun's own
    assert checkpoints(tmp_path)
    assert main(arguments(pair_file, tmp_path)) == 0


# ---------------------------------------------------------------------------------------------------------- one process


class Ended(Exception):
    """Stands for a kill: nothing of the program runs after it."""


@pytest.fixture
def unfinished(pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ended in step 9, with checkpoints of steps 2, 4, 6 and 8."""
    output = tmp_path / "out"
    update = train.Updater.update

    def ending(self: train.Updater, step: int, loss: torch.Tensor) -> Any:
        if step == 9:
            raise Ended
        return update(self, step, loss)

    with monkeypatch.context() as patch:
        patch.setattr(train.Updater, "update", ending)
        with pytest.raises(Ended):
            main(arguments(pair_file, output, "--keep", "4"))
    assert [path.name[-1] for path in checkpoints(output)] == ["2", "4", "6", "8"]
    return output


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shard(checkpoint: Path) -> Path:
    return next(checkpoint.glob("__0_*.distcp"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped byte in a shard": lambda path: flip_a_byte(shard(path)),
    "flipped byte in the metadata": lambda path: flip_a_byte(path / ".metadata"),
    "flipped byte in the manifest": lambda path: flip_a_byte(path / "manifest.json"),
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


def test_all_checkpoints_damaged_starts_anew(
    unfinished: Path, undisturbed: Path, pair_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in checkpoints(unfinished):
        flip_a_byte(shard(path))
    assert main(arguments(pair_file, unfinished)) == 0
    said = capsys.readouterr().out
    assert said.count("checkpoint skipped") == 4
    assert "resumed" not in said
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
def test_a_restart_goes_on_whatever_was_asked_for_at_the_start(
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
    for changed, told in (
        (("--seed", "3"), "--seed was 0 and is 3"),
        (("--global-batch-pairs", "4"), "--global-batch-pairs was 8 and is 4"),
        (("--train-pairs", "20"), "the training data or its tokens are others"),
        ((), "the training data or its tokens are others"),
    ):
        assert main(arguments(pair_file if changed else other_margins, unfinished, *changed)) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    decays, update = set(), train.Updater.update

    def watched(self: train.Updater, step: int, loss: torch.Tensor) -> Any:
        decays.add(self.optimizer.param_groups[0]["weight_decay"])
        return update(self, step, loss)

    monkeypatch.setattr(train.Updater, "update", watched)
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
    assert decays == {0.25}, "forced to go on, with the options of now"


def test_checkpoints_that_stay(pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest ones and the best; and the best model is left at the end."""
    present, removed, real = [], snapshots.Checkpoints.remove_all, train.metrics
    values = iter([0.1, 0.7, 0.9, 0.8, 0.3, 0.2, 0.1])
    monkeypatch.setattr(train, "metrics", lambda scores: real(scores) | {"eval/auroc": next(values)})

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
        assert f"| held-out AUROC | 0.100 -> {auroc:.3f} |" in (tmp_path / name / "README.md").read_text()


def test_a_run_that_is_cut_short_at_its_end_ends_when_called_again(
    pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing tells of a finished run before all else is written; a damaged best checkpoint is not taken."""
    common = arguments(pair_file, tmp_path, "--keep-best", "eval/auroc", "--eval-every", "2")
    values, real = iter([0.1, 0.7, 0.9, 0.8, 0.3, 0.2, 0.1, 0.3, 0.2, 0.1]), train.metrics
    monkeypatch.setattr(train, "metrics", lambda scores: real(scores) | {"eval/auroc": next(values)})
    save, written = train.save_model, []

    def ending(folder: Path, *rest: Any) -> None:
        if folder.name.startswith("model."):
            raise Ended
        save(folder, *rest)
        written.append(folder.name)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_model", ending)
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


def test_no_checkpoints_if_none_are_wanted(pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots.Checkpoints, "save", None)
    assert main(arguments(pair_file, tmp_path, "--keep", "0")) == 0
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="lo is Linux's name")
def test_processes_of_one_machine_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # which notes the value to go back to
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with parallel.process_group():
        assert [os.environ[f"{name}_SOCKET_IFNAME"] for name in ("GLOO", "NCCL")] == ["lo", ""]


# ------------------------------------------------------------------------------------------------ numbers that are none


def not_a_number(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    losses, update, now = train.losses, train.Updater.update, [1]

    def faulty(*args: Any) -> Any:
        total, statistics = losses(*args)
        if now[0] not in steps:
            return total, statistics
        return total * torch.nan, replace(statistics, sums_K=statistics.sums_K * torch.nan)

    def counted(self: train.Updater, step: int, loss: torch.Tensor) -> Any:
        now[0] = step + 1
        before = [p.to_local().clone() for p in self.parameters]
        made = update(self, step, loss)
        same = all(torch.equal(a, p.to_local()) for a, p in zip(before, self.parameters, strict=True))
        assert same == (step in steps)
        return made

    monkeypatch.setattr(train, "losses", faulty)
    monkeypatch.setattr(train.Updater, "update", counted)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-bf16"])
def test_updates_that_are_not_finite_are_left_out_and_counted(
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
    # The schedule waits: twelve steps with two left out end where ten updates do.
    assert rates[12] == pytest.approx(0.01 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 8 / 11)).item()), rel=1e-5)


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


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    log = train.MetricsLog(tmp_path, 0)
    log._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(No space left"):
        log.write(1, {"loss": 1.0})


def test_the_log_is_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    log = train.MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float("nan") if step == 1 else step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    log = train.MetricsLog(tmp_path, 2)
    log.write(3, {"loss": 5.0})
    log.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": 2},
        {"step": 3, "loss": 5.0},
    ]
    assert [row["step"] for row in log.rows] == [1, 2, 3]
