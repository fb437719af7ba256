"""Tests that take too long for `make test`: many kills at random moments, small disks, faults on several ranks, a
server under every kind of client.

make torture        # pytest tests/torture.py; KILLS=50 and SOAK_MINUTES=15 by default
"""

import asyncio
import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gcrm_fast import RewardModel
from gcrm_fast.training.manifest import checkpoints
from support.serving import write_served_model
from support.soak import Soak, resident_bytes
from support.training_runs import ROOT, arguments, assert_same, rows, start, torchrun, wait_for, workers

KILLS = int(os.environ.get("KILLS", "50"))
SOAK_MINUTES = float(os.environ.get("SOAK_MINUTES", "15"))


def test_many_kills_at_random_moments_change_nothing(pair_file: Path, tmp_path: Path) -> None:
    """One process, all of them, or torchrun is killed, from its start to its last seconds."""
    draw = random.Random(0)
    more = ("--steps", "300", "--log-every", "5", "--eval-every", "100", "--save-every", "3")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    assert torchrun(*arguments(pair_file, whole, *more), processes=2).returncode == 0
    length = time.monotonic() - started
    kills = 0
    while kills < KILLS:
        run = start(*arguments(pair_file, killed, *more), processes=2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, stderr = run.communicate(timeout=draw.uniform(0.2, 0.8) * length)
            assert run.returncode == 0, stderr
            assert_same(whole, killed)
            shutil.rmtree(killed)
            continue
        kills += 1
        ranks = workers(run)
        victims = {0: [run.pid], 1: draw.sample(ranks, min(1, len(ranks))), 2: ranks}[draw.randrange(3)]
        for pid in victims or [run.pid]:  # which has no processes yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.communicate(timeout=120)
        print(f"kill {kills}: {[path.name for path in checkpoints(killed)]}")
        if (killed / "model").exists():  # finished, and killed on its way out
            assert_same(whole, killed)
            shutil.rmtree(killed)
    result = torchrun(*arguments(pair_file, killed, *more), processes=2)
    assert result.returncode == 0, result.stderr
    assert_same(whole, killed)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_loss_that_is_not_finite_on_the_last_rank(pair_file: Path, tmp_path: Path, processes: int) -> None:
    result = torchrun(
        f"nan:{processes - 1}:5", *arguments(pair_file, tmp_path), processes=processes, script="tests/support/faulty.py"
    )
    assert result.returncode == 0, result.stderr
    assert {row["step"]: row["skipped"] for row in rows(tmp_path) if "skipped" in row} == {3: 0, 6: 1, 9: 0, 12: 0}
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "model" / "model.safetensors").values())


def test_four_restarts(pair_file: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert torchrun(*arguments(pair_file, whole), processes=3).returncode == 0
    run = start(*arguments(pair_file, killed), processes=3, options=["--max-restarts", "4"])
    for restart in range(4):
        wait_for(lambda least=2 + 2 * restart: any(int(p.name[-8:]) >= least for p in checkpoints(killed)), "progress")
        before = workers(run)
        os.kill(before[restart % 3], signal.SIGKILL)
        wait_for(lambda gone=before: len(workers(run)) == 3 and not set(gone) & set(workers(run)), "a restart")
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    assert len(re.findall("resumed from", stdout)) >= 4
    assert_same(whole, killed)


def test_three_processes_continue_from_two(pair_file: Path, tmp_path: Path) -> None:
    logs = []
    for processes in (2, 3):
        output = tmp_path / str(processes)
        first = torchrun("kill:1:8", *arguments(pair_file, output), processes=2, script="tests/support/faulty.py")
        assert first.returncode != 0
        second = torchrun(*arguments(pair_file, output, "--log-every", "1"), processes=processes)
        assert second.returncode == 0, second.stderr
        logs.append([row["loss"] for row in rows(output) if "loss" in row])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def documented_launch(option: str) -> list[str]:
    """torchrun's own options in the launch line of docs/clusters.md that has this one."""
    section = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    words = shlex.split(next(line for line in section.splitlines() if option in line))
    return words[words.index("torchrun") + 1 : words.index("-m")]


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.Popen[str]]:
    """Starts one of two torchruns, both here, by the launch line of docs/clusters.md; the first one leads."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    replaced = {"$FIRST_HOST:29500": endpoint, "4": "2"}
    options = [replaced.get(word, word) for word in documented_launch("--rdzv-id mine")]

    def started(*arguments: str) -> subprocess.Popen[str]:
        run = start(*arguments, rendezvous=(), options=options)
        address, port = endpoint.split(":")
        wait_for(lambda: not socket.socket().connect_ex((address, int(port))), "the leading node's store")
        return run

    return started


LONG = ("--steps", "300", "--log-every", "5", "--eval-every", "100", "--save-every", "3")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_node(
    pair_file: Path, tmp_path: Path, node: Callable[..., subprocess.Popen[str]], victim: int
) -> None:
    """A node that follows is started again; after the leading one's death the others end, and all are started again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert torchrun(*arguments(pair_file, whole, *LONG), processes=2).returncode == 0
    nodes = [node(*arguments(pair_file, killed, *LONG)) for _ in range(2)]
    wait_for(lambda: bool(checkpoints(killed)), "a checkpoint")
    nodes[victim].kill()
    nodes[victim].communicate()
    if victim == 0:
        nodes[1].communicate(timeout=60)
        assert nodes[1].returncode > 0
        nodes = [node(*arguments(pair_file, killed, *LONG)) for _ in range(2)]
    else:
        nodes[1] = node(*arguments(pair_file, killed, *LONG))
    for run in nodes:
        _, stderr = run.communicate(timeout=300)
        assert run.returncode == 0, stderr
    assert_same(whole, killed)


@pytest.mark.parametrize("told", [0, 1])
def test_a_stopped_node_stops_both(
    pair_file: Path, tmp_path: Path, node: Callable[..., subprocess.Popen[str]], told: int
) -> None:
    """Within seconds, with a checkpoint; neither reports success; started again they finish."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert torchrun(*arguments(pair_file, whole, *LONG), processes=2).returncode == 0
    nodes = [node(*arguments(pair_file, stopped, *LONG)) for _ in range(2)]
    wait_for(lambda: bool(checkpoints(stopped)), "a checkpoint")
    nodes[told].terminate()
    outputs = [run.communicate(timeout=60) for run in nodes]  # torchrun's barrier takes 300 s
    assert all(run.returncode > 0 for run in nodes)
    assert sum("stopped after step" in stdout for stdout, _ in outputs) == 1
    assert not (stopped / "model").exists()
    nodes = [node(*arguments(pair_file, stopped, *LONG)) for _ in range(2)]
    for run in nodes:
        _, stderr = run.communicate(timeout=300)
        assert run.returncode == 0, stderr
    assert_same(whole, stopped)


def tracebacks(stderr: str) -> int:
    """How many there are, except those of TensorBoard's own thread on a full disk."""
    return stderr.count("Traceback (most recent call last)") - stderr.count("Exception in thread")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("size", ["100k", "400k", "600k"])  # a checkpoint of these runs has about 300 kB
def test_a_full_disk(pair_file: Path, tmp_path: Path, size: str) -> None:
    output = tmp_path / "disk" / "out"
    with small_disk(tmp_path / "disk", size):
        result = torchrun(*arguments(pair_file, output, "--cache", "none"), processes=2)
        assert result.returncode != 0
        assert result.stderr.count("gcrm train:") >= 1
        assert tracebacks(result.stderr) == 1, result.stderr  # torchrun's own
        moved = tmp_path / "moved"
        if output.exists():
            shutil.copytree(output, moved)
    again = torchrun(*arguments(pair_file, moved), processes=2)
    assert again.returncode == 0, again.stderr


def test_a_read_only_disk(pair_file: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "100m"):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        result = torchrun(*arguments(pair_file, disk / "out"), processes=2)
        assert result.returncode != 0
        assert re.search("gcrm train: .*disk/out.*: Read-only file system", result.stderr), result.stderr
        assert tracebacks(result.stderr) == 1, result.stderr


@pytest.mark.parametrize("what", ["filled", "vanished"])
def test_an_output_that_can_no_longer_be_written(pair_file: Path, tmp_path: Path, what: str) -> None:
    output = tmp_path / "disk" / "out"
    with small_disk(tmp_path / "disk", "100m"):
        run = start(*arguments(pair_file, output, "--steps", "100000"), processes=2)
        wait_for(lambda: bool(checkpoints(output)), "a checkpoint")
        if what == "vanished":
            shutil.rmtree(output, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                (tmp_path / "disk" / "filler").write_bytes(bytes(200_000_000))
        _, stderr = run.communicate(timeout=120)
        assert run.returncode != 0
        assert "gcrm train:" in stderr
        assert tracebacks(stderr) == 1, stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_a_server_under_every_kind_of_client(tmp_path: Path) -> None:
    """Every answer is right, memory stays flat, and at the end the server stops in order."""
    folder = write_served_model(tmp_path / "model")
    command = [sys.executable, "-m", "gcrm_fast", "serve", str(folder), "--port", "0", "--timeout", "30"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().partition(",")[0].rpartition(":")[2])
        model = RewardModel.from_pretrained(folder)
        memory = []
        for share in (0.2, 0.8):  # buffers have their size after the first
            soak = Soak(port, model, share * 60 * SOAK_MINUTES)
            asyncio.run(soak.run())
            assert soak.wrong == []
            memory.append(resident_bytes(server.pid))
            print(f"{dict(soak.counts)}, {memory[-1] / 2**20:.0f} MiB")
            assert min(soak.counts[kind] for kind in ("mixed", "slow", "vanished", "malformed", "silent")) > 0
        assert memory[1] < 1.05 * memory[0] + 10 * 2**20
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=60)
    assert server.returncode == 0
    assert errors.count("\n") <= SOAK_MINUTES + 1, errors  # one line per minute
