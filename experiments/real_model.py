"""Trains a pretrained model (make real-model) with several objectives and seeds on real pairs.

    make real-model; GCRM_DATA=... python experiments/real_model.py

Measured are ``gcrm train``'s own evaluations before and after training, on pairs of other questions, and each model on
the labeled sets of labeled_sets.py; all arms on the same ones. The defaults are for a GPU; on CPUs train the top layers
(--train-layers): the states below them are cached, so that all arms after the first start from these.
Models are kept under --runs; each finished arm is a row in real_model.json at once, and a second call continues with
the arms that are missing. Writes experiments/real_model.md (tables) and real_model.json (every number).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import labeled_sets
from gcrm_fast.common.command_line import run_script
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.options import Argument, AtLeastOne, ZeroOrMore
from gcrm_fast.common.options import Options as CommandOptions
from summary import (
    COVERAGE,
    bind,
    cell,
    data_folder,
    flags,
    machine,
    markdown,
    mean_interval,
    to_json,
    trained,
    write_aside,
)

ARMS: dict[str, dict[str, str]] = {  # options of gcrm train
    "ranking": {"objective": "ranking"},
    "paper": {},
    "after-divergence": {"negatives": "after-divergence"},
    "end_mix": {"sampling": "end_mix"},
    "temperature 0.2": {"temperature": "0.2"},
    "dense": {"objective-variant": "dense"},
    "projection 64": {"projection-size": "64"},
    "ranking, top 10 layers": {"objective": "ranking", "train-layers": "10", "lr": "1e-4"},
    "ranking, LoRA 16": {"objective": "ranking", "lora-rank": "16", "lr": "2e-4"},
    "ranking, first 15 layers": {"objective": "ranking"},
}
CUT = {"ranking, first 15 layers": 15}  # of the model's layers, all of which are trained
SETS = {
    "GSM8K": ("gsm8k_pairs.jsonl.gz", "gsm8k_pairs_test.jsonl.gz"),
    "HH": ("hh_pairs_train.jsonl.gz", "hh_pairs_test.jsonl.gz"),
    "PRMBench": ("math_pairs_injected_train.jsonl.gz", "math_pairs_injected_test.jsonl.gz"),  # MATH, errors put in
}
MEASURES = {  # of the log: their names in the tables
    "eval/accuracy": "pair accuracy",
    "eval/auroc": "AUROC of reward",
    "eval/auroc_q": "AUROC of Q at the end token",
    "eval/auroc_q_at/before_end": "AUROC of Q one token before",
    "eval/auroc_q_at/50": "AUROC of Q at 50%",
    "eval/loss/contrastive": "contrastive loss",
    "eval/similarity/positive": "positive cosine",
    "eval/similarity/negative": "negative cosine",
    "eval/similarity/within": "cosine within a completion",
}
Q_ALONG = {f"eval/q_{side}/{part}": f"{side} {part}%" for side in ("chosen", "rejected") for part in (10, 50, 90, 100)}
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Compares objectives on a pretrained model; see the top of the script."""

    data: str = ""
    """Folder of the data; default: GCRM_DATA."""
    model: str = "runs/smollm2"
    """Pretrained model: a folder, or a name on the Hugging Face Hub."""
    runs: Path = Path("runs/real_model")
    """Folder of the models."""
    seeds: AtLeastOne = 3
    """Models per objective."""
    train_layers: ZeroOrMore = 0
    """Number of layers to train, the top ones; 0 trains all."""
    pairs: AtLeastOne = 6400
    """Number of training pairs."""
    held_out: AtLeastOne = 1500
    """Number of held-out pairs."""
    goal_pairs: AtLeastOne = 512
    """Number of training pairs behind the goal state."""
    epochs: AtLeastOne = 1
    """Number of passes over the training pairs."""
    questions: ZeroOrMore = 100
    """Number of questions of each labeled set; 0 measures held-out pairs alone."""
    labeled: tuple[str, ...] = ()
    """Names of the labeled sets; default: those that suit the training set."""
    lr: float = 5e-5
    """Peak learning rate."""
    dtype: str = "auto"
    """Precision of the computation, as in gcrm train."""
    sets: tuple[str, ...] = tuple(SETS)
    """Names of the sets to train on."""
    only: tuple[str, ...] = ()
    """Names of the objectives to train; default: all."""
    trl_steps: ZeroOrMore = 0
    """Number of steps in which the loss is compared with that of TRL's RewardTrainer; 0 compares none, and keeps what
    the report has. No objective is trained then; --dtype auto is float32."""
    report: Annotated[Path, Argument(short="-o", metavar="PATH")] = HERE / "real_model"
    """Path of the report, without the suffixes .md and .json."""


def chosen_pairs(source: Path, count: int, path: Path) -> Path:
    """A file of ``count`` records of ``source``, the same random ones at every call: neighbors share their question."""
    lines = labeled_sets.read_lines(source)
    order = np.random.default_rng(0).permutation(len(lines))[:count]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, "".join(lines[i] for i in order))
    return path


def first_layers(model: str, count: int, folder: Path) -> Path:
    """A copy of the model that ends after ``count`` layers."""
    if not folder.exists():
        whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        whole.model.layers = whole.model.layers[:count]
        whole.config.num_hidden_layers = count
        with written_aside(folder) as partial:
            whole.save_pretrained(partial)
            AutoTokenizer.from_pretrained(model).save_pretrained(partial)
    return folder


def arguments(options: Options, arm: str, name: str, seed: int) -> list[str]:
    """Of gcrm train, without --output."""
    folder, (train, held_out) = data_folder(options.data), SETS[name]
    values: dict[str, Any] = {
        "model": options.model,
        "data": chosen_pairs(folder / train, options.pairs, options.runs / f"{name}-train.jsonl"),
        "eval-data": chosen_pairs(folder / held_out, options.held_out, options.runs / f"{name}-held-out.jsonl"),
        "train-layers": options.train_layers,
        "epochs": options.epochs,
        "lr": options.lr,
        "dtype": options.dtype,
        "seed": seed,
        "global-batch-pairs": 16,
        "max-length": 512,
        "goal-pairs": options.goal_pairs,
        "eval-every": 10**6,
        "log-every": 10,
        "keep": 1,
        "template-date": "2026-01-01",
    } | ARMS[arm]
    if arm in CUT:
        values["model"] = first_layers(options.model, CUT[arm], options.runs / f"first-{CUT[arm]}-layers")
    return [*flags(values), *(["--cache-states"] if options.train_layers else [])]


def evaluations(folder: Path) -> dict[str, Any]:
    """The first and the last evaluation of a run, and what length and a bag of tokens reach on the same pairs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "eval/auroc" in line]
    speeds = [line["pairs_per_s"] for line in lines if "pairs_per_s" in line]
    return {
        "before": {key: value for key, value in held_out[0].items() if key.startswith("eval/")},
        "after": {key: value for key, value in held_out[-1].items() if key.startswith("eval/")},
        "shortcuts": {k: v for line in lines for k, v in line.items() if k.startswith("baseline/")},
        "pairs_per_s": float(np.median(speeds)),
    }


def budget(options: Options) -> dict[str, Any]:
    """What all rows of a report have in common."""
    names = ("model", "train_layers", "pairs", "held_out", "goal_pairs", "questions", "epochs", "lr", "dtype")
    return {name: getattr(options, name) for name in names} | {"labeled": list(options.labeled)}


def earlier(options: Options) -> dict[str, Any]:
    """The report so far. Raises UserError where its rows are of another budget."""
    path = options.report.with_suffix(".json")
    if not path.exists():
        return {"budget": budget(options), "rows": []}
    report: dict[str, Any] = json.loads(path.read_text())
    if not options.trl_steps and report["budget"] != budget(options):
        raise UserError(f"{path}: its rows are of another budget ({report['budget']}): choose another --report")
    return report


# ------------------------------------------------------------------------------------------------------- the report


def values(rows: list[dict[str, Any]], name: str, arm: str, key: str) -> dict[int, float]:
    """By seed."""
    return {row["seed"]: row["after"][key] for row in rows if (row["set"], row["arm"]) == (name, arm)}


def difference(ours: dict[int, float], ranking: dict[int, float]) -> str:
    """Mean difference over the seeds of both, with its interval, and whether it is an effect."""
    paired = [ours[seed] - ranking[seed] for seed in sorted(ours.keys() & ranking.keys())]
    if len(paired) < 2:
        return "-"
    mean, half = mean_interval(paired)
    verdict = "effect over seeds" if abs(mean) > half else "no effect shown"
    return f"{cell(paired, '+')} ({verdict})"


def tables(rows: list[dict[str, Any]], name: str) -> str:
    """What training does to each measure, by arm, and the differences from the ranking loss."""
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    before = rows[0]["before"]
    seeds = {arm: len(values(rows, name, arm, "eval/auroc")) for arm in arms}
    along = {**MEASURES, **{key: f"Q, {what}" for key, what in Q_ALONG.items()}}
    lines = [
        [what, f"{before.get(key, float('nan')):.3f}"]
        + [cell([*values(rows, name, arm, key).values()]) if seeds[arm] else "-" for arm in arms]
        for key, what in along.items()
    ]
    head = ["", "before training", *(f"{arm} ({seeds[arm]})" for arm in arms)]
    compared = [
        [arm, *(difference(values(rows, name, arm, k), values(rows, name, "ranking", k)) for k in list(MEASURES)[:5])]
        for arm in arms
        if arm != "ranking"
    ]
    differences = ""
    if compared:
        differences = f"\nDifference from the ranking loss, same seeds, {COVERAGE:.0%} t-interval over seeds:\n\n"
        differences += markdown(["", *list(MEASURES.values())[:5]], compared) + "\n"
    shortcut = rows[0]["shortcuts"]
    return (
        f"## {name}\n\n{markdown(head, lines)}\n\n"
        f"AUROC of what needs no understanding, on the same pairs: length {shortcut['baseline/auroc_length']:.3f}, bag "
        f"of tokens {shortcut['baseline/auroc_bag_of_tokens']:.3f}.\n"
        f"{differences}"
        + ("\n" + labeled_sets.report(rows, "ranking") if all("labeled" in row for row in rows) else "")
    )


def trl_section(found: dict[str, Any]) -> str:
    """The losses of both trainers, every few steps, their largest difference, and their speeds."""
    shown = range(0, len(found["ours"]), 5)
    rows = [[str(i + 1), f"{found['ours'][i]:.6f}", f"{found['trl'][i]:.6f}"] for i in (*shown, len(found["ours"]) - 1)]
    speed = ""
    if "trl_pairs_per_s" in found:  # not where other work ran
        speed = f" Pairs/s of a median step: {found['our_pairs_per_s']:.2f} and {found['trl_pairs_per_s']:.2f}."
    return (
        f"\n## The same as TRL's RewardTrainer, {found['dtype']}\n\nThe whole of `{found['model']}`, ranking loss, "
        f"{len(found['ours'])} steps of the same pairs ({found['pairs']} in all, {found['tokens']} tokens) in the same "
        f"order, learning rate {found['lr']:g} with a cosine decay, one seed. Machine: {found['machine']}. Largest "
        f"difference of the loss at any step: {found['largest_difference']:.1e}.{speed}\n\n"
        f"{markdown(['step', 'gcrm train', 'RewardTrainer'], rows)}\n"
    )


def write_report(options: Options, report: dict[str, Any]) -> None:
    common, rows, of = (report[name] for name in ("budget", "rows", "machine"))
    layers = f"The top {common['train_layers']}" if common["train_layers"] else "All"
    text = f"""# Objectives on a pretrained model

{layers} layers of `{common["model"]}`, {common["epochs"]} epochs, 16 pairs per step,
learning rate {common["lr"]:g}. {common["pairs"]} training pairs and {common["held_out"]} held-out pairs of other
questions were drawn; those over the maximum length are dropped. In brackets: number of seeds; ± is the {COVERAGE:.0%}
t-interval over seeds. Machine: {of}. Written by
`python experiments/real_model.py`.

"""
    names = [name for name in SETS if any(row["set"] == name for row in rows)]
    text += "\n".join(tables([row for row in rows if row["set"] == name], name) for name in names)
    text += "".join(trl_section(found) for found in report.get("trl", {}).values())
    write_aside(options.report.with_suffix(".md"), text)
    write_aside(options.report.with_suffix(".json"), to_json(report))


def row_of(options: Options, name: str, arm: str, seed: int) -> dict[str, Any]:
    """Trains a model, unless its folder is there, and measures it."""
    print(f"{name}, {arm}, seed {seed}", flush=True)
    folder = options.runs / f"{name}-{arm}-seed{seed}".replace(" ", "-").replace(",", "")
    model = trained(folder, arguments(options, arm, name, seed))
    row = {"set": name, "arm": arm, "seed": seed, **evaluations(folder)}
    if options.questions:
        data, names = data_folder(options.data), options.labeled or labeled_sets.defaults(name)
        trained_on = {json.loads(line).get("qid") for line in labeled_sets.read_lines(data / SETS[name][0])}
        sets = labeled_sets.files(data, options.runs / "sets" / name, options.questions, names, trained_on)
        row["labeled"] = labeled_sets.measured(model, sets)
    return row


def run(options: Options) -> None:
    """Trains what is missing, seed by seed, and writes the report after each. Raises UserError."""
    choices = (("--only", options.only, ARMS), ("--sets", options.sets, SETS))
    for option, given, known in (*choices, ("--labeled", options.labeled, labeled_sets.FILES)):
        if unknown := set(given) - set(known):
            raise UserError(f"{option} {' '.join(sorted(unknown))}: must be one of {', '.join(known)}")
    report = earlier(options)
    bind(options.runs, {"pairs": options.pairs, "held_out": options.held_out})
    rows: list[dict[str, Any]] = report["rows"]
    if options.trl_steps:
        from same_as_trl import compare  # here: the rest needs no TRL

        source = data_folder(options.data) / SETS["GSM8K"][0]
        dtype = "float32" if options.dtype == "auto" else options.dtype
        found = compare(options.model, source, options.trl_steps, options.lr, dtype, options.runs)
        both = {**report.get("trl", {}), dtype: {"machine": machine(), **found}}
        write_report(options, {"machine": machine(), **report, "trl": both})
        return
    for seed in range(options.seeds):
        for name in options.sets:
            for arm in options.only or ARMS:
                if any((row["set"], row["arm"], row["seed"]) == (name, arm, seed) for row in rows):
                    continue
                rows.append(row_of(options, name, arm, seed))
                write_report(options, {**report, "machine": machine()})


def main(argv: list[str] | None = None) -> int:
    return run_script("real_model.py", Options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
