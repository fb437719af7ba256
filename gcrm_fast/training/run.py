"""One run: its set-up, what it does between steps, its end. ``gcrm_fast/train.py`` is its loop."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gcrm_fast.checkpoints.reading import Q_VALUES
from gcrm_fast.checkpoints.saving import save_model, write_adapter
from gcrm_fast.checkpoints.weights import parameter_shapes
from gcrm_fast.common.devices import compute_dtype
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.tables import table
from gcrm_fast.data.encoding import preferred
from gcrm_fast.model.reward_model import LM_HEAD, VIEWS, LlamaRewardModel, goal_state
from gcrm_fast.training import parallel
from gcrm_fast.training.accounting import Meter, peak_flops, peak_memory
from gcrm_fast.training.agreement import check_agreement
from gcrm_fast.training.config import TrainConfig, to_toml
from gcrm_fast.training.curves import plot_curves
from gcrm_fast.training.describe import beaten_rows, blind_rows, data_rows, held_out_rows, q_verdict, unlearned_rows
from gcrm_fast.training.early_stopping import EarlyStopping
from gcrm_fast.training.held_out import (
    NOT_FINITE_REMEDY,
    Scores,
    breakdown,
    end_states,
    intervals,
    metrics,
    score_pairs,
    score_tokens,
    shortcuts,
)
from gcrm_fast.training.held_out_completions import completion_metrics
from gcrm_fast.training.loader import Steps
from gcrm_fast.training.lora import Lora
from gcrm_fast.training.lower_states import with_lower_states
from gcrm_fast.training.manifest import checkpoints, first_intact
from gcrm_fast.training.memory import check_model_fits, memory_limit, memory_plan
from gcrm_fast.training.metrics_log import MetricsLog
from gcrm_fast.training.model_card import Rows, example_of, model_card
from gcrm_fast.training.objectives import Objective, statistics_of
from gcrm_fast.training.optimizer import Updater, cast_weights
from gcrm_fast.training.prepare import Prepared, lora_of, objective_of, steps_of, trained_layers
from gcrm_fast.training.report import shown_pairs, write_report
from gcrm_fast.training.resume import RunState, Window, facts, find_checkpoint, with_dtype
from gcrm_fast.training.snapshots import Checkpoints

LEAST_DIVERGENCE = 1e-3  # weight at the start of --views-ramp
EVALUATION_GOAL_PAIRS = 512  # training pairs behind the goal state of the evaluations during a run


class FullModel(NamedTuple):
    """A model to save: all weights on the CPU of rank 0 (none on other ranks), with adapters merged, and the adapters;
    its goal state, and over how many pairs that is the mean."""

    weights: dict[str, Tensor]
    adapters: dict[str, Tensor]
    goal: Tensor
    goal_count: int


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

    def full_model(self) -> FullModel:
        """The current model; every rank must call it."""
        dtype = compute_dtype(self.config.dtype, self.device)
        adapters: dict[str, Tensor] = {}
        if self.lora:
            state = parallel.full_state(self.state.model, torch.float32)
            adapters, weights = self.lora.adapters(state), self.lora.merged(state, dtype)
        else:
            weights = parallel.full_state(self.state.model, dtype)
        # A reward model has no use for what only losses read.
        weights = {name: weight for name, weight in weights.items() if name != LM_HEAD and not name.startswith(VIEWS)}
        if weights:  # on rank 0: with cached states the layers below are not in the model
            shapes = parameter_shapes(self.prepared.model_config)
            for name in shapes.keys() - weights.keys():
                weights[name] = self.prepared.weights.whole(name, shapes[name]).to(dtype)
        return FullModel(weights, adapters, *self.goal())

    def write_report(self, goal: Tensor) -> None:
        """Writes inspect.html, from the last evaluation; every rank must call it. Nothing without held-out pairs."""
        if not self.scores or self.config.loss != "ranking":
            return
        prepared, scores = self.prepared, self.scores
        pairs = [scores.pairs[i] for indices in shown_pairs(scores).values() for i in indices]
        values = score_tokens(self.state.model, pairs, goal, prepared.budget, prepared.sampling, self.device)
        if self.log:
            write_report(prepared.output / "inspect.html", prepared.output.name, scores, values, prepared.tokenizer)

    def about_q(self, evaluation: Mapping[str, float], name: str) -> dict[str, str]:
        """Whether Q-values can be trusted, under a name; empty without held-out pairs."""
        return {name: q_verdict(evaluation)} if evaluation and self.config.loss == "ranking" else {}

    def write_model(self, name: str, model: FullModel, rows: Rows, evaluation: Mapping[str, float]) -> None:
        """Saves a model, with its card, to the output folder; on rank 0."""
        prepared = self.prepared
        card = model_card(
            self.config,
            data_rows(prepared, self.config),
            rows,
            evaluation,
            dist.get_world_size(),
            example_of(preferred(prepared.held_out) or preferred(prepared.train), prepared.tokenizer),
            chats=bool(prepared.tokenizer.chat_template),
        )
        if self.lora:
            settings = self.lora.configuration(prepared.model_config, self.config.model)
            with written_aside(prepared.output / name.replace("model", "adapter")) as partial:
                write_adapter(
                    partial, settings, model.adapters, model.weights, prepared.model_config, prepared.tokenizer
                )
        with written_aside(prepared.output / name) as partial:
            save_model(
                partial,
                model.weights,
                prepared.model_config,
                prepared.tokenizer,
                model.goal.cpu(),
                model.goal_count,
                self.about_q(evaluation, Q_VALUES),
            )
            (partial / "README.md").write_text(card, encoding="utf-8")


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

    limit = torch.tensor(memory_limit(device))
    dist.all_reduce(limit, dist.ReduceOp.MIN, group=group)  # all gather weights together
    check_model_fits(prepared, config, world_size, int(limit))
    plan = memory_plan(prepared, config, world_size, device, int(limit))
    with torch.device("meta"):
        regularized = config.sft_weight > 0
        model = LlamaRewardModel(
            prepared.model_config,
            config.attention,
            plan.recompute,
            first,
            lm_head=regularized,
            views=prepared.on_policy is not None,
        )
        model.model.train_top(layers)
        if lora:
            lora.inject(model)
    cast_weights(model, config.optimizer)
    if config.compile:
        model.compile_blocks()
    parallel.shard(model, mesh, dtype, gather=plan.gather)
    rows = prepared.weights.rows
    parallel.materialize(model, mesh, device, lora.rows(rows, config.seed) if lora else rows)
    stopping = EarlyStopping(metric=config.keep_best, patience=config.early_stopping)
    names = statistics_of(config.head, sft=regularized, loss=config.loss, views=prepared.on_policy is not None)
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


def list_skipped(prepared: Prepared) -> None:
    """Bad records, one line each, in skipped_records.txt; no such file where there are none."""
    path = prepared.output / "skipped_records.txt"
    path.unlink(missing_ok=True)
    if prepared.bad.skipped:
        lines = "".join(line + "\n" for line in prepared.bad.skipped)
        path.write_text(lines, encoding="utf-8", errors="backslashreplace")  # file names need not be UTF-8


def finish(run: Run, step: int) -> dict[str, float]:
    """Last evaluation, which it returns, curves, models and summary, after the last ``step``. ``model``, which marks
    the run as finished, is written last, and then the checkpoints are removed."""
    prepared, log, output = run.prepared, run.log, run.prepared.output
    last = run.full_model()
    evaluation = run.evaluate(step, last.goal)
    peak, size = run.state.updater.peak, f"{run.config.global_batch_pairs} {run.config.unit}"
    rows = [("optimizer steps", f"{step} of {size}, peak learning rate {peak:g}")]
    warnings: list[tuple[str, str]] = []
    if run.stopping.is_over:
        rows.append(("stopped early", stopped_early(run, step)))
    if log:
        if evaluation and run.config.loss != "mse":
            baselines = shortcuts(prepared.train, prepared.held_out, prepared.model_config.vocab_size)
            log.write(step, baselines)
            warnings += beaten_rows(evaluation, baselines)
            rows += [
                ("shortcut: length only", f"{baselines['baseline/auroc_length']:.3f}"),
                ("shortcut: bag of tokens", f"{baselines['baseline/auroc_bag_of_tokens']:.3f}"),
            ]
        plot_curves(log.rows, output / "curves.png")
        (output / "config.toml").write_text(to_toml(run.config), encoding="utf-8")
    run.write_report(last.goal)
    if run.config.keep_best:
        rows.append(write_best(run, step, last, evaluation, rows))
    if log:
        if evaluation and run.config.loss == "ranking":
            warnings += unlearned_rows(log.series("eval/loss/ranking"), peak)
            warnings += blind_rows(q_verdict(evaluation), run.config)
        rows += [*held_out_rows(log, evaluation), *run.about_q(evaluation, "Q-values").items(), *warnings]
        run.write_model("model", last, rows, evaluation)
        log.close(evaluation)
        run.checkpoints.remove_all()
        rows.append(("peak memory", f"{peak_memory(run.device) / 2**30:.2f} GiB per process"))
        files = {"model": "model", "model card": "model/README.md", "curves": "curves.png"}
        if run.scores and run.config.loss == "ranking":
            files["held-out pairs"] = "inspect.html"
        print(f"\n{table([*rows, *((name, str(output / file)) for name, file in files.items())])}", flush=True)
    dist.barrier()
    return evaluation


def stopped_early(run: Run, step: int) -> str:
    """Why a run stopped after ``step``, for its summary."""
    stopping, steps = run.stopping, run.prepared.steps
    return (
        f"after step {step} of {steps}: {stopping.metric} did not improve in {stopping.without_improvement} evaluations"
    )


def write_best(run: Run, step: int, last: FullModel, evaluation: dict[str, float], rows: Rows) -> tuple[str, str]:
    """Saves the model that is best by ``--keep-best``, from its checkpoint or the last one, of ``step``; returns a
    summary row."""
    metric = run.config.keep_best
    best, notes = first_intact(run.checkpoints.ranked(evaluation[metric]), run.checkpoints.group)
    model, of_best = last, evaluation
    if best:
        run.state.load(best, run.checkpoints.group)
        model, step, of_best = run.full_model(), best.facts["step"], best.facts["metrics"]
    folder = run.prepared.output / "model_best"
    row = (f"best {metric}", f"{of_best[metric]:.3f} at step {step}, saved {folder}")
    if run.log:
        print(*notes, sep="\n", end="\n" if notes else "", flush=True)
        results = [*rows, row, *held_out_rows(run.log, of_best), *run.about_q(of_best, "Q-values").items()]
        run.write_model(folder.name, model, results, of_best)
    return row
