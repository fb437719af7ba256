"""The end of a run: its last evaluation, its models with their cards, its pages and its summary."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gcrm_fast.checkpoints.reading import Q_VALUES
from gcrm_fast.checkpoints.saving import save_model, write_adapter
from gcrm_fast.checkpoints.weights import parameter_shapes
from gcrm_fast.common.devices import compute_dtype
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.tables import table
from gcrm_fast.data.encoding import preferred
from gcrm_fast.model.reward_model import LM_HEAD, VIEWS
from gcrm_fast.training import parallel
from gcrm_fast.training.accounting import peak_memory
from gcrm_fast.training.config import to_toml
from gcrm_fast.training.curves import plot_curves
from gcrm_fast.training.describe import beaten_rows, blind_rows, data_rows, held_out_rows, q_verdict, unlearned_rows
from gcrm_fast.training.held_out import score_tokens, shortcuts
from gcrm_fast.training.manifest import first_intact
from gcrm_fast.training.model_card import Rows, example_of, model_card
from gcrm_fast.training.report import shown_pairs, write_report
from gcrm_fast.training.run import Run


class FullModel(NamedTuple):
    """A model to save: all weights on the CPU of rank 0 (none on other ranks), with adapters merged, and the adapters;
    its goal state, and over how many pairs that is the mean."""

    weights: dict[str, Tensor]
    adapters: dict[str, Tensor]
    goal: Tensor
    goal_count: int


def finish(run: Run, step: int) -> dict[str, float]:
    """Last evaluation, which it returns, curves, models and summary, after the last ``step``. ``model``, which marks
    the run as finished, is written last, and then the checkpoints are removed."""
    prepared, log, output = run.prepared, run.log, run.prepared.output
    last = full_model(run)
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
    write_inspect_page(run, last.goal)
    if run.config.keep_best:
        rows.append(write_best(run, step, last, evaluation, rows))
    if log:
        if evaluation and run.config.loss == "ranking":
            warnings += unlearned_rows(log.series("eval/loss/ranking"), peak)
            warnings += blind_rows(q_verdict(evaluation), run.config)
        rows += [*held_out_rows(log, evaluation), *about_q(run, evaluation, "Q-values").items(), *warnings]
        write_model(run, "model", last, rows, evaluation)
        log.close(evaluation)
        run.checkpoints.remove_all()
        rows.append(("peak memory", f"{peak_memory(run.device) / 2**30:.2f} GiB per process"))
        files = {"model": "model", "model card": "model/README.md", "curves": "curves.png"}
        if run.scores and run.config.loss == "ranking":
            files["held-out pairs"] = "inspect.html"
        print(f"\n{table([*rows, *((name, str(output / file)) for name, file in files.items())])}", flush=True)
    dist.barrier()
    return evaluation


def full_model(run: Run) -> FullModel:
    """The current model; every rank must call it."""
    dtype = compute_dtype(run.config.dtype, run.device)
    adapters: dict[str, Tensor] = {}
    if run.lora:
        state = parallel.full_state(run.state.model, torch.float32)
        adapters, weights = run.lora.adapters(state), run.lora.merged(state, dtype)
    else:
        weights = parallel.full_state(run.state.model, dtype)
    # A reward model has no use for what only losses read.
    weights = {name: weight for name, weight in weights.items() if name != LM_HEAD and not name.startswith(VIEWS)}
    if weights:  # on rank 0: with cached states the layers below are not in the model
        shapes = parameter_shapes(run.prepared.model_config)
        for name in shapes.keys() - weights.keys():
            weights[name] = run.prepared.weights.whole(name, shapes[name]).to(dtype)
    return FullModel(weights, adapters, *run.goal())


def write_inspect_page(run: Run, goal: Tensor) -> None:
    """Writes inspect.html, from the last evaluation; every rank must call it. Nothing without held-out pairs."""
    if not run.scores or run.config.loss != "ranking":
        return
    prepared, scores = run.prepared, run.scores
    pairs = [scores.pairs[i] for indices in shown_pairs(scores).values() for i in indices]
    values = score_tokens(run.state.model, pairs, goal, prepared.budget, prepared.sampling, run.device)
    if run.log:
        write_report(prepared.output / "inspect.html", prepared.output.name, scores, values, prepared.tokenizer)


def about_q(run: Run, evaluation: Mapping[str, float], name: str) -> dict[str, str]:
    """Whether Q-values can be trusted, under a name; empty without held-out pairs."""
    return {name: q_verdict(evaluation)} if evaluation and run.config.loss == "ranking" else {}


def write_model(run: Run, name: str, model: FullModel, rows: Rows, evaluation: Mapping[str, float]) -> None:
    """Saves a model, with its card, to the output folder; on rank 0."""
    prepared = run.prepared
    card = model_card(
        run.config,
        data_rows(prepared, run.config),
        rows,
        evaluation,
        dist.get_world_size(),
        example_of(preferred(prepared.held_out) or preferred(prepared.train), prepared.tokenizer),
        chats=bool(prepared.tokenizer.chat_template),
    )
    if run.lora:
        settings = run.lora.configuration(prepared.model_config, run.config.model)
        with written_aside(prepared.output / name.replace("model", "adapter")) as partial:
            write_adapter(partial, settings, model.adapters, model.weights, prepared.model_config, prepared.tokenizer)
    with written_aside(prepared.output / name) as partial:
        save_model(
            partial,
            model.weights,
            prepared.model_config,
            prepared.tokenizer,
            model.goal.cpu(),
            model.goal_count,
            about_q(run, evaluation, Q_VALUES),
        )
        (partial / "README.md").write_text(card, encoding="utf-8")


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
        model, step, of_best = full_model(run), best.facts["step"], best.facts["metrics"]
    folder = run.prepared.output / "model_best"
    row = (f"best {metric}", f"{of_best[metric]:.3f} at step {step}, saved {folder}")
    if run.log:
        print(*notes, sep="\n", end="\n" if notes else "", flush=True)
        results = [*rows, row, *held_out_rows(run.log, of_best), *about_q(run, of_best, "Q-values").items()]
        write_model(run, folder.name, model, results, of_best)
    return row
