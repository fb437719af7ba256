"""Trains a goal-conditioned reward model: ``torchrun gcrm_fast/train.py`` or ``gcrm train``.

Read ``train`` at the bottom first: it is the whole program in the order in which it happens.
"""

import os
import sys

# torchrun gcrm_fast/train.py puts this folder first on sys.path, where data/, model/ ... would hide packages so named.
if os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import contextlib
import ctypes
import math
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

PARENT = os.getppid()  # torchrun may end while all of the following is imported, which takes seconds

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from gcrm_fast.checkpoints.saving import save_model
from gcrm_fast.common import processes
from gcrm_fast.common.errors import RankError, UserError, one_line
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.options import exit_code
from gcrm_fast.common.tables import table
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.training import parallel
from gcrm_fast.training.accounting import Meter, memory_limit, peak_flops, peak_memory
from gcrm_fast.training.config import TrainConfig, parse, to_toml
from gcrm_fast.training.curves import plot_curves
from gcrm_fast.training.held_out import breakdown, goal_state, metrics, score_pairs, shortcuts
from gcrm_fast.training.interrupts import Interrupts, Wish, end_with_the_parent
from gcrm_fast.training.loader import Steps, load
from gcrm_fast.training.metrics_log import MetricsLog
from gcrm_fast.training.model_card import Rows, model_card
from gcrm_fast.training.objectives import STATISTICS, Objective, Statistics, losses
from gcrm_fast.training.optimizer import Updater, cast_weights
from gcrm_fast.training.prepare import (
    Prepared,
    check_unfinished,
    compute_dtype,
    data_rows,
    describe,
    fastest_dtype,
    memory_plan,
    objective_of,
    prepare,
    steps_of,
)
from gcrm_fast.training.resume import RunState, Window, facts, find, with_dtype
from gcrm_fast.training.snapshots import Checkpoints, checkpoints, first_whole

EVALUATION_GOAL_PAIRS = 512  # training pairs behind the goal state of the evaluations during a run
LOCK_WAIT = 10.0  # seconds: longer than the processes of a killed torchrun take to notice
LOST_PEER = re.compile(r"[Cc]onnection (closed|reset|refused)|[Tt]imed out|[Bb]roken pipe|Socket closed")  # gloo


# ------------------------------------------------------------------------------------------------- pieces of the loop


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of returning it to the kernel: without it page faults made
    the training steps of a small model on the CPU about twice as long."""
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # <malloc.h>
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 2**30)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def accumulate(
    model: LlamaRewardModel, packs: list[Pack], n_pairs: int, objective: Objective, device: torch.device
) -> Statistics:
    """Gradients of the mean loss over the GLOBAL batch, from this rank's packs, of which there is at least one; returns
    the statistics of their pairs.

    FSDP averages gradients over ranks, hence the factor world size; they are reduced once, at the last pack.
    """
    together: Statistics | None = None
    for i, pack in enumerate(packs):
        parallel.last_backward(model, i == len(packs) - 1)
        on_device = pack.to(device)
        total, statistics = losses(model(on_device), on_device.pairs, objective)
        (total * (dist.get_world_size() / n_pairs)).backward()
        together = statistics if together is None else together + statistics
    assert together is not None
    return together


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Holds the output folder for this run."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=LOCK_WAIT):
            yield
    except Timeout:
        raise UserError(f"{output}: another run is using this folder: wait for it or choose another --output") from None


def list_skipped(prepared: Prepared) -> None:
    """Bad records, a line each, to skipped_records.txt; no such file where there are none."""
    path = prepared.output / "skipped_records.txt"
    path.unlink(missing_ok=True)
    if prepared.bad.skipped:
        lines = "".join(line + "\n" for line in prepared.bad.skipped)
        path.write_text(lines, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8


# ----------------------------------------------------------------------------------------------------- one run's parts


class Whole(NamedTuple):
    """A model as it is saved: weights on the CPU of rank 0 (elsewhere none), the goal state, and of how many pairs."""

    weights: dict[str, Tensor]
    goal: Tensor
    goal_count: int


@dataclass
class Run:
    """What a run consists of; ``train`` at the bottom puts it together. Only rank 0 has a log."""

    config: TrainConfig
    prepared: Prepared
    device: torch.device
    objective: Objective
    state: RunState
    checkpoints: Checkpoints
    steps: Steps
    meter: Meter
    log: MetricsLog | None

    def goal(self, most: int | None = None) -> tuple[Tensor, int]:
        """Goal state of the model as it is now, and of how many (at most ``most``) training pairs it is the mean."""
        whole = [pair for pair in self.prepared.train if not pair.chosen_cut]
        pairs = whole[: self.config.goal_pairs or None][:most]
        budget, sampling = self.prepared.budget, self.prepared.sampling
        goal = goal_state(self.state.model, pairs, budget, sampling, self.device)
        parallel.reshard(self.state.model)
        return goal, len(pairs)

    def evaluate(self, step: int, goal: Tensor) -> dict[str, float]:
        """Logs the held-out metrics and returns them; empty without held-out pairs."""
        prepared = self.prepared
        if not prepared.held_out:
            return {}
        scores = score_pairs(
            self.state.model, prepared.held_out, goal, self.objective, prepared.budget, prepared.sampling, self.device
        )
        parallel.reshard(self.state.model)
        row = metrics(scores)
        if step == prepared.steps:
            row |= {f"eval/auroc/{k}": v for k, (v, _) in breakdown(scores, self.config.eval_by).items()}
        if self.log:
            self.log.write(step, row)
        return row

    def log_row(self, step: int, norm: Tensor, learning_rate: Tensor) -> dict[str, float]:
        """Means since the last row, on every rank; the only place of the loop that waits for the device.

        Raises:
            UserError: more than ``--max-skipped`` updates in a row were left out, or than a quarter of the run's.
        """
        row, skipped = self.state.window.read()
        row |= {"grad_norm": norm.item(), "lr": learning_rate.item(), "skipped": len(skipped)} | self.meter.read()
        if self.log:
            for number in skipped:
                pairs = [pair for group in self.steps.groups(number - 1)[1] for pair in group]
                self.log.note(step, {"skipped_step": number, "records": [pair.where for pair in pairs]})
            self.log.write(step, row)
        in_a_row = int(self.state.updater.skipped_in_row)
        if in_a_row > min(self.config.max_skipped, self.prepared.steps // 4):
            self.checkpoints.wait()
            raise UserError(
                f"loss or gradient is not finite at {in_a_row} steps in a row, up to step {step}: lower --lr, or mend "
                f"--model's weights or the records that metrics.jsonl names; {self.whereabouts()}"
            )
        return row

    def save(self, step: int, evaluation: dict[str, float]) -> None:
        """Starts a checkpoint; ``evaluation``: metrics of this very step, if there are any."""
        if self.config.keep:
            about = facts(step, self.config, self.prepared.data_key, self.state.window, evaluation)
            stall = self.checkpoints.save(step, self.state.tensors(), about)
            if self.log:
                self.log.write(step, {"checkpoint_stall_s": stall})

    def whereabouts(self) -> str:
        """What there is to go on from."""
        present = checkpoints(self.prepared.output)
        if not present:
            return "there is no checkpoint"
        return f"the last checkpoint is {present[-1]}: without --resume never the same command goes on from it"

    def whole(self) -> Whole:
        """The model as it is now, with the help of every rank."""
        weights = parallel.full_state(self.state.model, compute_dtype(self.config, self.device))
        return Whole(weights, *self.goal())

    def write_model(self, name: str, model: Whole, rows: Rows, evaluation: Mapping[str, float]) -> None:
        """Saves a model, with its card, to the output folder; on rank 0."""
        prepared = self.prepared
        card = model_card(self.config, data_rows(prepared, self.config), rows, evaluation, dist.get_world_size())
        with written_aside(prepared.output / name) as partial:
            save_model(
                partial, model.weights, prepared.model_config, prepared.tokenizer, model.goal.cpu(), model.goal_count
            )
            (partial / "README.md").write_text(card, encoding="utf-8")


def set_up(config: TrainConfig, prepared: Prepared, mesh: DeviceMesh, device: torch.device) -> tuple[Run, int]:
    """The run, and the step after which it goes on (0 for a new one)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout))
    found, notes = find(config, prepared.output, prepared.data_key, group)
    config = with_dtype(config, found, fastest_dtype(device), group)
    dtype = compute_dtype(config, device)
    start = found.facts["step"] if found else 0

    least = torch.tensor(memory_limit(device))
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    plan = memory_plan(prepared, config, world_size, device, int(least))
    with torch.device("meta"):
        model = LlamaRewardModel(prepared.model_config, config.attention, plan.recompute)
    cast_weights(model, config.optimizer)
    if config.compile:
        model.compile_blocks()
    parallel.shard(model, mesh, dtype, gather=plan.gather)
    parallel.materialize(model, mesh, device, prepared.weights.rows)
    state = RunState(model, Updater(model, config, prepared.steps, device), Window(STATISTICS, device))
    if found:
        state.load(found, group)
    saved = Checkpoints(prepared.output, config.keep, config.keep_best, group)
    saved.start(after=start, remove=config.resume == "never")

    peak, source = peak_flops(device, dtype)
    log = MetricsLog(prepared.output, start) if rank == 0 else None
    if log:
        list_skipped(prepared)
        if found:
            notes.append(f"resumed from {found.path} after step {start}")
        notes += [
            table(data_rows(prepared, config)),
            f"MFU and HFU refer to {peak / 1e12:.4g} TFLOP/s per process ({source})",
            f"predicted memory {plan}",
        ]
        print(*notes, sep="\n", flush=True)
    meter = Meter(prepared.model_config, plan.recompute, device, peak)
    steps = steps_of(prepared, config, rank, world_size)
    return Run(config, prepared, device, objective_of(config), state, saved, steps, meter, log), start


def finish(run: Run) -> None:
    """Last evaluation, curves, the models and the summary; ``model``, which says that the run is finished, comes last,
    and then the checkpoints go."""
    prepared, log, output, metric = run.prepared, run.log, run.prepared.output, run.config.keep_best
    last = run.whole()
    evaluation = run.evaluate(prepared.steps, last.goal)
    rows = [("optimizer steps", f"{prepared.steps} of {run.config.global_batch_pairs} pairs")]
    if log:
        if evaluation:
            baselines = shortcuts(prepared.train, prepared.held_out, prepared.model_config.vocab_size)
            log.write(prepared.steps, baselines)
            rows += [
                ("shortcut: length only", f"{baselines['baseline/auroc_length']:.3f}"),
                ("shortcut: bag of tokens", f"{baselines['baseline/auroc_bag_of_tokens']:.3f}"),
            ]
        plot_curves(log.rows, output / "curves.png")
        (output / "config.toml").write_text(to_toml(run.config))
    if metric:
        best, notes = first_whole(run.checkpoints.ranked(evaluation[metric]), run.checkpoints.group)
        if log:
            print(*notes, sep="\n", end="\n" if notes else "", flush=True)
        model, step, of_best = last, prepared.steps, evaluation
        if best:
            run.state.load(best, run.checkpoints.group)
            model, step, of_best = run.whole(), best.facts["step"], best.facts["metrics"]
        rows.append((f"best {metric}", f"{of_best[metric]:.3f} at step {step}, saved {output / 'model_best'}"))
        if log:
            run.write_model("model_best", model, rows + held_out_rows(log, of_best), of_best)
    if log:
        rows += held_out_rows(log, evaluation)
        run.write_model("model", last, rows, evaluation)
        log.close()
        run.checkpoints.remove_all()
        memory = f"{peak_memory(run.device) / 2**30:.2f} GiB a process"
        rows += [("peak memory", memory), ("saved", str(output / "model"))]
        print(f"\n{table(rows)}", flush=True)
    dist.barrier()


def held_out_rows(log: MetricsLog, evaluation: Mapping[str, float]) -> list[tuple[str, str]]:
    """Lines of a table: an evaluation (empty without held-out data) beside the first one."""
    names = {
        "AUROC": "auroc",
        "pair accuracy": "accuracy",
        "ranking loss": "loss/ranking",
        "contrastive loss": "loss/contrastive",
    }
    rows = [
        (f"held-out {name}", f"{log.series(f'eval/{key}')[0]:.3f} -> {evaluation.get(f'eval/{key}', math.nan):.3f}")
        for name, key in names.items()
        if evaluation
    ]
    groups = {
        key.removeprefix("eval/auroc/"): value for key, value in evaluation.items() if key.startswith("eval/auroc/")
    }
    return rows + [(f"  AUROC {name}", f"{value:.3f}") for name, value in groups.items()]


# ------------------------------------------------------------------------------------------------------- the program


def train(config: TrainConfig, prepared: Prepared, mesh: DeviceMesh, device: torch.device) -> None:
    """The whole run: build or resume, loop, evaluate, save. Every rank runs it; rank 0 writes.

    Raises:
        UserError: a checkpoint or log cannot be written, too many updates in a row are not finite, or see ``find``.
    """
    run, start = set_up(config, prepared, mesh, device)
    eval_every, save_every = (every or -(-prepared.steps // 8) for every in (config.eval_every, config.save_every))
    if not start:
        run.evaluate(0, run.goal(EVALUATION_GOAL_PAIRS)[0])
    workers = config.workers if config.workers >= 0 else 2 if device.type == "cuda" else 0
    interrupts = Interrupts(dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout)))
    bar = tqdm(
        range(start + 1, prepared.steps + 1),
        initial=start,
        total=prepared.steps,
        disable=run.log is None,
        unit="step",
        dynamic_ncols=True,
    )
    with contextlib.closing(run.checkpoints):
        with load(run.steps, start, prepared.steps, workers, device) as steps, interrupts.handled():
            run.meter.restart()
            for step in bar:
                n_pairs, packs = run.meter.fetch(steps)
                statistics = accumulate(run.state.model, packs, n_pairs, run.objective, device)
                run.meter.add(packs)
                made, norm, learning_rate = run.state.updater.update(step, statistics["loss"])
                run.state.window.add(step, statistics, sum(pack.n_pairs for pack in packs), made)

                if step % config.log_every == 0 or step == prepared.steps:
                    row = run.log_row(step, norm, learning_rate)
                    if run.log:
                        auroc = run.log.series("eval/auroc")
                        bar.set_postfix(loss=f"{row['loss']:.3f}", **({"auroc": f"{auroc[-1]:.3f}"} if auroc else {}))
                evaluation: dict[str, float] = {}
                if step % eval_every == 0 and step != prepared.steps:
                    with run.meter.paused():
                        evaluation = run.evaluate(step, run.goal(EVALUATION_GOAL_PAIRS)[0])

                wish = interrupts.agree(Wish.FAIL if run.checkpoints.failed() else Wish.NONE)
                if wish == Wish.FAIL:
                    run.checkpoints.wait()
                due = step % save_every == 0 and step != prepared.steps
                if due or wish != Wish.NONE or (config.keep_best and evaluation):
                    run.save(step, evaluation)
                if wish == Wish.STOP:
                    run.checkpoints.wait()
                    bar.close()
                    if run.log:
                        print(f"stopped after step {step} of {prepared.steps}; {run.whereabouts()}", flush=True)
                    return
            run.checkpoints.wait()
        finish(run)


def run_ranks(config: TrainConfig, prepared: Prepared) -> None:
    """Trains in this rank of the process group. Raises UserError, also for what other libraries say of memory and of
    lost processes."""
    is_first = processes.rank() == 0
    with locked(prepared.output) if is_first else contextlib.nullcontext():
        if is_first:
            check_unfinished(prepared.output, config)  # again: another run may have finished since
        try:
            with parallel.process_group(replicas=config.replicas, timeout=config.timeout) as (mesh, device):
                train(config, prepared, mesh, device)
        except (RuntimeError, MemoryError) as error:
            message = str(error)
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in message:
                raise RankError(
                    f"out of memory ({one_line(error)}): lower --tokens-per-batch {config.tokens_per_batch}, or take "
                    "--recompute block, --optimizer adamw-8bit or more processes"
                ) from None
            if isinstance(error, dist.DistError) or LOST_PEER.search(message):
                raise UserError(
                    f"another process of this run has ended or does not answer ({one_line(error)}): see its own "
                    f"message; checkpoints are in {prepared.output / 'checkpoints'}"
                ) from None
            raise


def run(config: TrainConfig) -> None:
    """Checks all inputs on every rank before any process group work, then trains. Raises UserError."""
    world_size = processes.world_size()
    is_first = processes.rank() == 0
    if world_size % config.replicas:
        raise UserError(f"--replicas {config.replicas}: must divide the number of processes, {world_size}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_the_parent(PARENT)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):  # what was asked for has been done
        config = replace(config, resume="auto")
    prepared = prepare(config)
    if is_first and prepared.weights.notes:
        print(*prepared.weights.notes, sep="\n", flush=True)
    if config.dry_run:
        if is_first:
            print(describe(prepared, config, world_size))
        return
    keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    run_ranks(config, prepared)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr for an error that the user can mend."""
    return exit_code("gcrm train", lambda: run(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
