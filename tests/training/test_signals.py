"""Invariant 6 with real processes under torchrun: killed, stopped by signals, orphaned, failing on one rank.

`make torture` has more of it.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gcrm_fast.train import locked, main
from gcrm_fast.training import parallel
from gcrm_fast.training.manifest import checkpoints, read_manifest
from support.training_runs import ROOT, alive, arguments, assert_same, rows, start, torchrun, wait_for, workers


@pytest.mark.slow
def test_three_kills_change_nothing(pair_file: Path, tmp_path: Path) -> None:
    """Processes killed at a checkpoint, in the middle of writing one, and later; --max-restarts continues each time."""
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
    """A long run in two processes under the launch line of docs/clusters.md, asked to save, and then to stop."""
    output = tmp_path_factory.mktemp("stopped")
    section = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    launch = shlex.split(next(line for line in section.splitlines() if "--signals-to-handle" in line))
    options = launch[1 : launch.index("-m")]  # the last number of processes counts
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
    (output / "stdout").write_text(stdout)
    return output


def test_signals_save_and_stop(stopped: Path) -> None:
    stdout = (stopped / "stdout").read_text()
    newest = checkpoints(stopped)[-1]
    assert f"stopped after step {int(newest.name[-8:])} of 100000; the last checkpoint is {newest}" in stdout
    assert not (stopped / "model").exists()
    assert read_manifest(newest)["facts"]["world_size"] == 2


def test_a_stopped_run_does_not_report_success(pair_file: Path, tmp_path: Path) -> None:
    """Without torchrun, which reports the signal itself."""
    more = ("--steps", "100000", "--eval-every", "50000", "--save-every", "50000")
    command = [sys.executable, "gcrm_fast/train.py", *arguments(pair_file, tmp_path, *more)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(rows(tmp_path)) > 2, "the first steps")
    run.terminate()
    stdout, stderr = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM
    assert "stopped after step" in stdout
    assert "Traceback" not in stderr
    assert len(checkpoints(tmp_path)) == 1


@pytest.mark.slow
def test_another_number_of_processes_continues_alike(stopped: Path, pair_file: Path, tmp_path: Path) -> None:
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
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/maps")
def test_orphans_that_are_still_importing_end(pair_file: Path, tmp_path: Path) -> None:
    """torchrun is killed while its processes still import torch."""
    run = start(*arguments(pair_file, tmp_path), processes=2)
    wait_for(lambda: len(workers(run)) == 2, "the processes")
    ranks = workers(run)
    wait_for(lambda: all("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in ranks), "the first imports")
    run.kill()
    wait_for(lambda: not any(map(alive, ranks)), "the orphans' end", 60)
    run.communicate()
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
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
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("kind", "timeout", "message"),
    [
        pytest.param("hang", "20", "does not answer", marks=pytest.mark.slow),
        pytest.param(
            "memory",
            "500",
            "rank 1: out of memory",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS limits memory on Linux alone"),
            ],
        ),
        ("bug", "500", "a planted bug"),
    ],
)
def test_a_rank_that_fails_ends_the_run(pair_file: Path, tmp_path: Path, kind: str, timeout: str, message: str) -> None:
    """Its processes that build packs end too; only an unexpected error shows its traceback."""
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


@pytest.mark.skipif(sys.platform != "linux", reason="lo is Linux's name")
def test_processes_of_one_machine_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # which notes the value to restore
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with parallel.process_group():
        assert [os.environ[f"{name}_SOCKET_IFNAME"] for name in ("GLOO", "NCCL")] == ["lo", ""]
