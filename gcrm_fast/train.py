"""Trains a goal-conditioned reward model: ``torchrun gcrm_fast/train.py`` or ``gcrm train``.

Read ``train`` first: it is the whole run in the order in which things happen.
"""

import os
import sys

# torchrun gcrm_fast/train.py puts this folder first on sys.path, where data/, model/ ... would hide packages so named.
if os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import contextlib
import ctypes
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

PARENT = os.getppid()  # noted first: torchrun may end during the imports below, which take seconds

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.distributed.device_mesh import DeviceMesh

from gcrm_fast.common import processes
from gcrm_fast.common.command_line import exit_code
from gcrm_fast.common.errors import RankError, UserError, kept_if_interrupted, one_line
from gcrm_fast.common.progress import progress_bar
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.training import parallel
from gcrm_fast.training.config import TrainConfig, parse
from gcrm_fast.training.describe import describe
from gcrm_fast.training.finishing import finish
from gcrm_fast.training.hub import create_repository, upload
from gcrm_fast.training.interrupts import Interrupts, Request, end_with_parent
from gcrm_fast.training.loader import load
from gcrm_fast.training.lora import seed_dropout
from gcrm_fast.training.objectives import Objective, Statistics, losses
from gcrm_fast.training.option_checks import ARITHMETIC
from gcrm_fast.training.output_folder import check_unfinished, default_output
from gcrm_fast.training.prepare import Prepared, prepare
from gcrm_fast.training.resume import with_template_date
from gcrm_fast.training.run import resume_hint, set_up

# Without tqdm's own seconds per step, which have evaluations and checkpoints in them: log_row's have not.
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
LOCK_WAIT = 10.0  # seconds: longer than the processes of a killed torchrun take to notice
LONE_ERROR_WAIT = 20.0  # seconds in which torchrun ends this process where its machine's first one has failed alike
LOST_PEER = re.compile(r"[Cc]onnection (closed|reset|refused)|[Tt]imed out|[Bb]roken pipe|Socket closed")  # gloo


def train(config: TrainConfig, prepared: Prepared, mesh: DeviceMesh, device: torch.device) -> dict[str, float]:
    """The whole run: build or resume, loop, evaluate, save. Every rank runs it; rank 0 writes. Returns the metrics of
    the last evaluation.

    Raises:
        SystemExit: a signal stopped the run; the code is that of a process that it ended.
        UserError: a checkpoint or log cannot be written, too many updates in a row are not finite, or the checkpoint
            to resume from is damaged or belongs to another run.
    """
    run, start = set_up(config, prepared, mesh, device)
    if not start:
        run.evaluate(0)
    workers = config.workers if config.workers >= 0 else 2 if device.type == "cuda" else 0
    interrupts = Interrupts(parallel.cpu_group(config.timeout))
    step, end = start, start if run.stopping.is_over else prepared.steps
    numbers = range(start + 1, end + 1)
    bar = progress_bar(numbers, initial=start, total=prepared.steps, shown=run.log is not None, bar_format=BAR)
    with contextlib.closing(run.checkpoints):
        with load(run.steps, start, prepared.steps, workers, device) as steps, interrupts.handled():
            run.state.model.train()
            run.meter.restart()
            for step in bar:
                n_pairs, packs = run.meter.fetch(steps)
                if config.lora_dropout:
                    seed_dropout(config.seed, step)
                statistics = accumulate(run.state.model, packs, n_pairs, run.objective_at(step), device)
                run.meter.add(packs)
                made, norm, learning_rate = run.state.updater.update(step, statistics["loss"])
                run.state.window.add(step, statistics, sum(pack.n_pairs for pack in packs), made)

                if run.is_logged(step):
                    bar.set_postfix(run.log_row(step, norm, learning_rate), refresh=False)
                evaluation = run.evaluate(step) if run.is_due(step, config.eval_every) else {}
                run.stopping.add(evaluation)
                request = interrupts.agree(Request.FAIL if run.checkpoints.failed() else Request.NONE)
                if request == Request.FAIL:
                    run.checkpoints.wait()
                if run.is_due(step, config.save_every) or request or (config.keep_best and evaluation):
                    run.save(step, evaluation)
                if request == Request.STOP:
                    run.checkpoints.wait()
                    bar.close()
                    if run.log:
                        hint = resume_hint(prepared.output, config)
                        print(f"stopped after step {step} of {prepared.steps}; {hint}", flush=True)
                    interrupts.stop(PARENT if under_torchrun() and processes.local_rank() == 0 else None)
                if run.stopping.is_over:
                    bar.close()
                    break
            run.checkpoints.wait()
        return finish(run, step)


def accumulate(
    model: LlamaRewardModel, packs: list[Pack], n_pairs: int, objective: Objective, device: torch.device
) -> Statistics:
    """Gradients of the mean loss over the GLOBAL batch, from this rank's packs, of which there is at least one; returns
    the statistics of their pairs.

    FSDP averages gradients over ranks, hence the factor world size; they are reduced once, at the last pack.
    """
    total: Statistics | None = None
    for i, pack in enumerate(packs):
        parallel.last_backward(model, i == len(packs) - 1)
        on_device = pack.to(device)
        loss, statistics = losses(model(on_device), on_device.pairs, objective)
        (loss * (dist.get_world_size() / n_pairs)).backward()
        total = statistics if total is None else total + statistics
    assert total is not None
    return total


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of returning it to the kernel: without it page faults made
    the training steps of a small model on the CPU about twice as long."""
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold = -1, -3  # <malloc.h>
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Holds the output folder for this run."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=LOCK_WAIT):
            yield
    except Timeout:
        raise UserError(f"{output}: another run is using this folder: wait for it or choose another --output") from None


def run_ranks(config: TrainConfig, prepared: Prepared) -> dict[str, float]:
    """Trains in this rank of the process group. Raises UserError, also for out-of-memory errors and lost processes."""
    is_first = processes.rank() == 0
    with locked(prepared.output) if is_first else contextlib.nullcontext():
        if is_first:
            check_unfinished(prepared.output, config)  # again: another run may have finished since
            if config.push_to_hub:
                create_repository(config.push_to_hub)
        try:
            with parallel.process_group(replicas=config.replicas, timeout=config.timeout) as (mesh, device):
                return train(config, prepared, mesh, device)
        except (RuntimeError, MemoryError) as error:
            message = str(error)
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in message:
                raise RankError(
                    f"out of memory ({one_line(error)}): lower --tokens-per-batch {config.tokens_per_batch}, or use "
                    "--recompute block, --optimizer adamw-8bit or more processes"
                ) from None
            if isinstance(error, dist.DistError) or LOST_PEER.search(message):
                raise UserError(
                    f"another process of this run has ended or does not answer ({one_line(error)}): see its own error "
                    f"message; checkpoints are in {prepared.output / 'checkpoints'}"
                ) from None
            raise


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run: its folder, the model in it, the best one with ``keep_best``, metrics of the last evaluation."""

    folder: Path
    model: Path
    best: Path | None
    metrics: dict[str, float]


def train_reward_model(config: TrainConfig) -> TrainResult | None:
    """Trains as ``gcrm train`` does: checks all inputs on every rank before the process group starts, then trains.
    Returns None after ``dry_run``. Raises UserError."""
    config.check()
    world_size = processes.world_size()
    if world_size % config.replicas:
        raise UserError(f"--replicas {config.replicas}: must divide the number of processes, {world_size}")
    if under_torchrun():
        end_with_parent(PARENT)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):  # --resume was obeyed before the restart
        config = replace(config, resume="auto")
    config = with_template_date(config)
    folder = Path(config.output or default_output(config))

    def kept() -> str:
        return resume_hint(folder, config)

    try:
        with kept_if_interrupted(kept):
            prepared = prepare(config)
    except UserError as error:
        if processes.local_rank() == 0:
            raise
        time.sleep(LONE_ERROR_WAIT)
        raise RankError(str(error)) from None
    if processes.rank() == 0:
        print(*prepared.weights.notes, sep="\n", end="\n" if prepared.weights.notes else "", flush=True)
        if config.dry_run:
            print(describe(prepared, config, world_size))
    if config.dry_run:
        return None
    if processes.rank() == 0:
        sources = "generated sums (your own: --data)" if config.data == (ARITHMETIC,) else " ".join(config.data)
        print(f"{folder}: trains {config.model or 'a model from scratch'} on {sources}", flush=True)
    keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with kept_if_interrupted(kept):
        metrics = run_ranks(config, prepared)
    if config.push_to_hub and processes.rank() == 0:
        print(f"  uploaded to {upload(folder / 'model', config.push_to_hub)}", flush=True)
    best = folder / "model_best" if config.keep_best else None
    return TrainResult(folder=folder, model=folder / "model", best=best, metrics=metrics)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr for an error that the user can fix; SystemExit for a stopped run."""

    def work() -> None:
        train_reward_model(parse(sys.argv[1:] if argv is None else argv))

    return exit_code("gcrm train", work)


if __name__ == "__main__":
    sys.exit(main())
