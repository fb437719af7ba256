"""One run: its set-up, and what it does between steps. ``gcrm_fast/train.py`` is its loop, finishing.py its end."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gcrm_fast.common.devices import compute_dtype
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.tables import table
from gcrm_fast.data.encoding import preferred
from gcrm_fast.model.reward_model import LlamaRewardModel, goal_state
from gcrm_fast.training import parallel
from gcrm_fast.training.accounting import Meter, peak_flops
from gcrm_fast.training.agreement import check_agreement
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.training.describe import data_rows
from gcrm_fast.training.early_stopping import EarlyStopping
from gcrm_fast.training.held_out import (
    NOT_FINITE_REMEDY,
    Scores,
    breakdown,
    end_states,
    intervals,
    metrics,
    score_pairs,
)
from gcrm_fast.training.held_out_completions import completion_metrics
from gcrm_fast.training.loader import Steps
from gcrm_fast.training.lora import Lora
from gcrm_fast.training.lower_states import with_lower_states
from gcrm_fast.training.manifest import checkpoints
from gcrm_fast.training.memory import MemoryPlan, check_model_fits, memory_limit, memory_plan
from gcrm_fast.training.metrics_log import MetricsLog
from gcrm_fast.training.objectives import Objective, statistics_of
from gcrm_fast.training.optimizer import Updater, cast_weights
from gcrm_fast.training.prepare import Prepared, lora_of, objective_of, steps_of, trained_layers
from gcrm_fast.training.resume import RunState, Window, facts, find_checkpoint, with_dtype
from gcrm_fast.training.snapshots import Checkpoints

LEAST_DIVERGENCE = 1e-3  # weight at the start of --views-ramp
EVALUATION_GOAL_PAIRS = 512  # training pairs behind the goal state of the evaluations during a run


@dataclass(kw_only=True)
class Run:
    """One run. Only rank 0 has a log."""

    config: TrainConfig
    prepared: Prepared
    device: torch.device
    objective: Objective
    lora: Lora | None
    state: RunState
    checkpoints: Checkpoints
    stopping: EarlyStopping
    steps: Steps
    meter: Meter
    log: MetricsLog | None
    scores: Scores | None = None  # of the last evaluation

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens every ``every`` steps (0: eight times per run) happens after ``step``; never after the
        last one, which ``finish`` follows."""
        return step % (every or -(-self.prepared.steps // 8)) == 0 and step != self.prepared.steps

    def is_logged(self, step: int) -> bool:
        """Whether the loop logs a row at ``step``: also where it may end, with --early-stopping at every evaluation."""
        may_stop = self.stopping.patience > 0 and self.is_due(step, self.config.eval_every)
        every = self.config.log_every or min(10, -(-self.prepared.steps // 10))
        return step % every == 0 or step == self.prepared.steps or may_stop

    def objective_at(self, step: int) -> Objective:
        """The objective with the weight of the views' divergences at a step (--views-ramp)."""
        ramp = self.config.views_ramp * self.prepared.steps
        return replace(self.objective, divergence_weight=LEAST_DIVERGENCE ** max(0.0, 1 - step / ramp) if ramp else 1.0)

    def goal(self, maximum: int | None = None) -> tuple[Tensor, int]:
        """Goal state of the current model, and over how many training pairs (up to ``maximum``) it is the mean."""
        pairs = preferred(self.prepared.train)[: self.config.goal_pairs or None][:maximum]
        states = end_states(self.state.model, pairs, self.prepared.budget, self.device)
        return goal_state(states, len(pairs), remedy=NOT_FINITE_REMEDY, all_ranks=True), len(pairs)

    def evaluate(self, step: int, final_goal: Tensor | None = None) -> dict[str, float]:
        """Logs the held-out metrics and returns them; empty without held-out pairs. ``final_goal``: goal state of the
        run's last evaluation, which has more metrics."""
        prepared = self.prepared
        if not prepared.held_out:
            return {}
        with self.meter.paused():
            goal = self.goal(EVALUATION_GOAL_PAIRS)[0] if final_goal is None else final_goal
            scores = score_pairs(
                self.state.model,
                prepared.held_out,
                goal,
                self.objective,
                prepared.budget,
                prepared.sampling,
                self.device,
            )
        self.scores = scores
        final = final_goal is not None
        if self.config.loss != "ranking":
            row = completion_metrics(scores, self.config.loss, self.config.eval_by, final=final)
        else:
            row = metrics(scores)
        if final and self.config.loss == "ranking":
            row |= {f"eval/auroc/{k}": v for k, v in breakdown(scores, self.config.eval_by).items()}
            row |= intervals(scores)
        if self.log:
            self.log.write(step, row)
        return row

    def log_row(self, step: int, norm: Tensor, learning_rate: Tensor) -> dict[str, str]:
        """Logs the means since the last row, over all ranks, and returns what the progress bar shows; the only place of
        the loop that waits for the device.

        Raises:
            UserError: more than ``--max-skipped`` updates in a row were skipped, or more than a quarter of the run's.
        """
        row, skipped = self.state.window.read()
        row |= {"grad_norm": norm.item(), "lr": learning_rate.item(), "skipped": len(skipped)} | self.meter.read()
        if self.log:
            for number in skipped:
                pairs = [pair for group in self.steps.groups(number - 1)[1] for pair in group]
                records = [pair.where for pair in pairs] + [view.where for view in self.steps.views(number - 1)]
                self.log.note(step, {"skipped_step": number, "records": records})
            self.log.write(step, row)
        in_a_row = int(self.state.updater.skipped_in_row)
        if in_a_row > min(self.config.max_skipped, self.prepared.steps // 4):
            self.checkpoints.wait()
            hint = resume_hint(self.prepared.output, self.config)
            raise UserError(
                f"loss or gradient is not finite at {in_a_row} steps in a row, up to step {step}: lower --lr, or fix "
                f"--model's weights or the records that metrics.jsonl names; {hint}"
            )
        pairs_per_step = min(self.config.global_batch_pairs, len(self.prepared.train))  # steps end with the epoch
        per_step = pairs_per_step / row["pairs_per_s"]  # without evaluations and checkpoints
        shown = {"s/step": f"{per_step:.3g}", "loss": f"{row['loss']:.3f}"}
        if self.log and self.prepared.held_out:
            metric, name = ("spearman", "Spearman") if self.config.loss == "mse" else ("auroc", "AUROC")
            shown[f"held-out {name}"] = f"{self.log.series(f'eval/{metric}')[-1]:.3f}"
        return shown

    def save(self, step: int, evaluation: dict[str, float]) -> None:
        """Starts a checkpoint; ``evaluation``: metrics of this very step, if there are any."""
        if self.config.keep:
            about = facts(step, self.config, self.prepared.data_key, self.state.window, evaluation)
            about["early_stopping"] = self.stopping.facts()
            with self.meter.paused():
                stall = self.checkpoints.save(step, self.state.tensors(), about)
            if self.log:
                self.log.write(step, {"checkpoint_stall_s": stall})


def resume_hint(output: Path, config: TrainConfig) -> str:
    """How to continue from the newest checkpoint, if there is one."""
    present = checkpoints(output)
    if not present:
        return "there is no checkpoint: the same command starts over"
    changed = " without --resume never" if config.resume == "never" else ""
    return f"the last checkpoint is {present[-1]}: to continue from it, run the same command again{changed}"


def set_up(config: TrainConfig, prepared: Prepared, mesh: DeviceMesh, device: torch.device) -> tuple[Run, int]:
    """The run, and the step after which it continues (0 for a new one)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = parallel.cpu_group(config.timeout)
    check_agreement(config, prepared, group)
    checkpoint, notes = find_checkpoint(config, prepared.output, prepared.data_key, group)
    config = with_dtype(config, checkpoint, device, group)
    dtype = compute_dtype(config.dtype, device)
    layers, lora = trained_layers(config, prepared.model_config), lora_of(config, prepared.model_config)
    first = prepared.model_config.num_hidden_layers - layers
    if config.cache_states and first:
        prepared = with_lower_states(prepared, config, first, dtype, device)
    else:
        first = 0
    start = checkpoint.facts["step"] if checkpoint else 0

    plan = planned_memory(prepared, config, device, group)
    model = sharded_model(config, prepared, plan, first, lora, mesh, device)
    stopping = EarlyStopping(metric=config.keep_best, patience=config.early_stopping)
    names = statistics_of(
        config.head, sft=config.sft_weight > 0, loss=config.loss, views=prepared.on_policy is not None
    )
    window = Window(names, device)
    state = RunState(model, Updater(model, config, prepared.steps, device), window)
    if checkpoint:
        state.load(checkpoint, group)
        stopping.resume(checkpoint.facts.get("early_stopping", {}))
        notes.append(f"resumed from {checkpoint.path} after step {start}")
    saved = Checkpoints(prepared.output, config.keep, config.keep_best, group)
    saved.start(after=start, remove=config.resume == "never")

    peak, source = peak_flops(device, dtype)
    if rank == 0:
        list_skipped(prepared)
        notes += [
            table(data_rows(prepared, config)),
            f"MFU and HFU refer to {peak / 1e12:.4g} TFLOP/s per process ({source})",
            f"predicted memory {plan}",
        ]
        print(*notes, sep="\n", flush=True)
    log = MetricsLog(prepared.output, start, report_to=config.report_to, options=asdict(config)) if rank == 0 else None
    run = Run(
        config=config,
        prepared=prepared,
        device=device,
        objective=objective_of(config),
        lora=lora,
        state=state,
        checkpoints=saved,
        stopping=stopping,
        steps=steps_of(prepared, config, rank, world_size),
        meter=Meter(prepared.model_config, plan.recompute, layers, lora, device, peak),
        log=log,
    )
    return run, start


def planned_memory(
    prepared: Prepared, config: TrainConfig, device: torch.device, group: dist.ProcessGroup
) -> MemoryPlan:
    """What is recomputed and gathered within the memory of the smallest device, as all gather weights together. Raises
    UserError where the model does not fit."""
    limit = torch.tensor(memory_limit(device))
    dist.all_reduce(limit, dist.ReduceOp.MIN, group=group)
    check_model_fits(prepared, config, dist.get_world_size(), int(limit))
    return memory_plan(prepared, config, dist.get_world_size(), device, int(limit))


def sharded_model(
    config: TrainConfig,
    prepared: Prepared,
    plan: MemoryPlan,
    first: int,
    lora: Lora | None,
    mesh: DeviceMesh,
    device: torch.device,
) -> LlamaRewardModel:
    """The model with its initial weights, from the layer ``first`` on."""
    with torch.device("meta"):
        model = LlamaRewardModel(
            prepared.model_config,
            config.attention,
            plan.recompute,
            first,
            lm_head=config.sft_weight > 0,
            views=prepared.on_policy is not None,
        )
        model.model.train_top(trained_layers(config, prepared.model_config))
        if lora:
            lora.inject(model)
    cast_weights(model, config.optimizer)
    if config.compile:
        model.compile_blocks()
    parallel.shard(model, mesh, compute_dtype(config.dtype, device), gather=plan.gather)
    rows = prepared.weights.rows
    parallel.materialize(model, mesh, device, lora.rows(rows, config.seed) if lora else rows)
    return model


def list_skipped(prepared: Prepared) -> None:
    """Bad records, one line each, in skipped_records.txt; no such file where there are none."""
    path = prepared.output / "skipped_records.txt"
    path.unlink(missing_ok=True)
    if prepared.bad.skipped:
        lines = "".join(line + "\n" for line in prepared.bad.skipped)
        path.write_text(lines, encoding="utf-8", errors="backslashreplace")  # file names need not be UTF-8
