"""Every arm of the paper's ablations, and ours, on generated problems whose errors are known: five seeds each.

    python experiments/ablations.py
    make real-model; python experiments/ablations.py --model runs/smollm2 --seeds 3 --steps 150 --problems 100 \
        -o experiments/ablations_pretrained     # the main arms on a pretrained model

Each trained arm is a row of ablations.json, written when it is finished; a second call trains what is missing, so it
can be stopped at any time. Writes ablations.md next to it. An effect counts where its interval over seeds and problems
excludes 0.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from arithmetic_chain import Located, above, done, drop, wrong_solutions
from gcrm_fast.checkpoints.goals import named_goal
from gcrm_fast.common.command_line import run_script
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import Argument, AtLeastOne
from gcrm_fast.common.options import Options as CommandOptions
from gcrm_fast.common.statistics import couples
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.records import Candidate, read_completions
from gcrm_fast.evaluation.measures import correlations
from gcrm_fast.evaluation.voting import Question, filtered, majority
from gcrm_fast.inference.scoring import Judged, RewardModel
from summary import cell, machine, markdown, paired_difference, save_rows, saved_rows, trained, write_aside

HERE = Path(__file__).resolve().parent
BASE = "random"  # the arm that the others are compared with: the default run
ARMS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "ranking": ("--objective", "ranking"),
    "late goal": ("--sampling", "late_goal"),
    "late both": ("--sampling", "late_both"),
    "avg": ("--sampling", "avg"),
    "rs": ("--sampling", "rs"),
    "end": ("--sampling", "end"),
    "end mix": ("--sampling", "end_mix"),
    "one sample": ("--samples", "1"),
    "after divergence": ("--negatives", "after-divergence"),
    "repo": ("--objective-variant", "repo"),
    "dense": ("--objective-variant", "dense"),
    "MLP head": ("--head", "mlp"),
    "dot product": ("--distance", "dot"),
    "Euclidean": ("--distance", "euclidean"),
}
SWEEPS: dict[str, tuple[str, ...]] = {
    **{f"temperature {t}": ("--temperature", str(t)) for t in (0.1, 0.3, 0.5)},
    **{f"weight {w}": ("--contrastive-weight", str(w)) for w in (0.5, 1.0, 4.0)},
}
SWEEP_SEEDS = 3
PRETRAINED = {  # options of gcrm train with --model, instead of those of the default run
    "--train-layers": "10",
    "--lr": "2e-4",
    "--contrastive-weight": "0.5",
    "--train-pairs": "4800",
    "--eval-pairs": "300",
    "--global-batch-pairs": "32",
    "--max-length": "128",
}
PRETRAINED_ARMS: dict[str, dict[str, str]] = {
    BASE: {},
    "ranking": {"--objective": "ranking"},
    "weight 2.0": {"--contrastive-weight": "2"},
    "end mix": {"--sampling": "end_mix"},
    "projection 64": {"--projection-size": "64"},
    "after divergence": {"--negatives": "after-divergence"},
    "weight 0.1": {"--contrastive-weight": "0.1"},
    "dense": {"--objective-variant": "dense"},
}
RANDOM_GOAL = "goal of random tokens"  # the models of BASE, judged with another goal without training again
SINGLE_GOAL = "goal of one completion"
PAPER = {  # (arm, other): the sign of the arm's difference from the other, as GCRM reports it
    ("ranking", BASE): -1,  # main results
    ("late goal", BASE): -1,  # ablation of the sampling: random is best on average
    ("late both", BASE): -1,
    ("avg", BASE): -1,
    ("rs", BASE): -1,
    ("rs", "ranking"): -1,  # out of distribution
}
PLACES = (20, 40, 60, 80)  # percent of a completion at which Q and reward are correlated
BY_PROBLEM = {
    "right above wrong, reward": "reward",
    "right above wrong, Q at the end": "q",
    "right above wrong, Q at the error": "error",
    "Q before above Q after the error": "drop",
    "filtered vote": "filtered",
    "majority vote": "majority",
    "tokens saved": "saved",
}

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Trains and compares the arms; see the top of the script."""

    runs: Path = Path("runs/ablations")
    """Folder of the runs; each is removed when its row is written."""
    model: str = ""
    """Pretrained model, a folder or a name on the Hugging Face Hub, whose top 10 layers are trained; by default a model
    from scratch."""
    seeds: AtLeastOne = 5
    """Seeds per arm (of the sweeps at most 3)."""
    steps: AtLeastOne = 600
    """Optimizer steps per run; 600 is the default run."""
    problems: AtLeastOne = 200
    """Number of held-out problems, and of others for the goals, with 16 solutions each."""
    arms: tuple[str, ...] = ()
    """Names of the arms to train, the first words of a row in the report; all without any."""
    report: Annotated[Path, Argument(short="-o", metavar="PATH")] = HERE / "ablations"
    """Path of the report, without the suffixes .md and .json."""


# ------------------------------------------------------------------------------------------------------- measuring


def problems_of(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Indices of the solutions of each problem, which are adjacent."""
    return [list(own) for _, own in groupby(range(len(candidates)), key=lambda i: candidates[i].prompt)]


def votes(candidates: Sequence[Candidate], judged: Sequence[Judged], own: Sequence[int]) -> dict[str, float]:
    """Of one problem: whether the majority and the majority filtered at Q >= 0 are right, and the tokens saved."""
    question = Question(
        expected=candidates[own[0]].fields["expected_answer"],
        answers=[candidates[i].fields["predicted_answer"] for i in own],
        rewards_n=np.array([judged[i].reward for i in own]),
        q_n=[q_of(judged[i]) for i in own],
    )
    kept = filtered(question, 0.0)
    return {
        "filtered": float(majority(question, kept.kept_n) == question.expected),
        "majority": float(majority(question) == question.expected),
        "saved": kept.saved / sum(len(q) for q in question.q_n),
    }


def q_of(judged: Judged) -> np.ndarray:
    assert judged.q_Gn is not None
    return judged.q_Gn[0]


def by_problem(
    model: RewardModel, candidates: Sequence[Candidate], encoded: Sequence[Completion], judged: Sequence[Judged]
) -> dict[str, list[float]]:
    """The measures of BY_PROBLEM, one value per problem; NaN where a problem has no right or no wrong solution."""
    right_N = np.array([c.fields["is_correct"] for c in candidates])
    scores = {"reward": [one.reward for one in judged], "q": [q_of(one)[-1] for one in judged]}
    values: dict[str, list[float]] = {name: [] for name in BY_PROBLEM.values()}
    for own in problems_of(candidates):
        for name, score in scores.items():
            above_wrong, n = couples(right_N[own], np.array(score)[own])
            values[name].append(above_wrong / n if n else np.nan)
        for name, value in votes(candidates, judged, own).items():
            values[name].append(value)
    located: list[list[Located]] = [[] for _ in values["reward"]]
    for one in wrong_solutions(model, candidates, encoded):
        q, q_right = q_of(judged[one.own]), q_of(judged[one.right])
        located[one.problem].append(Located(one.problem, q, q_right, one.error))
    values["error"] = [float(np.mean([above(x)[x.error] for x in own])) if own else np.nan for own in located]
    values["drop"] = [float(np.mean([drop(x.wrong_n, x.error) for x in own])) if own else np.nan for own in located]
    return {name: [round(v, 4) for v in own] for name, own in values.items()}


def coupling(judged: Sequence[Judged]) -> dict[str, float]:
    """Pearson correlation of the reward with Q at PLACES of the completions."""
    rewards = np.array([one.reward for one in judged])
    at = {place: np.array([q_of(one)[max(len(q_of(one)) * place // 100 - 1, 0)] for one in judged]) for place in PLACES}
    return {f"correlation at {place}%": correlations(rewards, q)[0] for place, q in at.items()}


def measured(folder: Path, goals: Sequence[str], held_out: Path) -> list[dict[str, Any]]:
    """All measures of one model with each of the goals."""
    model = RewardModel.from_pretrained(folder)
    candidates = read_completions([str(held_out)], fields=("*",), tokenizer=model.tokenizer)
    encoded = model.encode([c.prompt for c in candidates], [c.completion for c in candidates])
    result = []
    for goal in goals:
        goal_D = named_goal(goal, model.fingerprint, model.config.state_size)
        judged = model.judge(encoded, goals_GD=goal_D[None], per_token=True)
        result.append({"scalars": coupling(judged), "problems": by_problem(model, candidates, encoded, judged)})
    return result


def last_evaluation(run: Path) -> dict[str, float]:
    """AUROCs, similarity within completions and training loss of the run's last evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [row for row in rows if "eval/auroc" in row][-1]
    names = ("auroc", "auroc_q", "auroc_q_at/50", "auroc_q_at/90", "auroc_q_at/before_end", "similarity/within")
    return {name: last[f"eval/{name}"] for name in names}


# -------------------------------------------------------------------------------------------------------- training


def arms_of(options: Options) -> dict[str, tuple[str, ...]]:
    """Of each arm the options of gcrm train."""
    if not options.model:
        return {**ARMS, **SWEEPS}
    common = {"--model": options.model, **PRETRAINED}
    both = {name: common | own for name, own in PRETRAINED_ARMS.items()}
    return {
        name: ("--cache-states", *(word for pair in given.items() for word in pair)) for name, given in both.items()
    }


def train_arm(options: Options, arm: str, seed: int, held_out: Path, other: Path) -> list[Row]:
    """The rows of one arm and seed: of BASE also those of its model with other goals."""
    run = options.runs / f"{arm.replace(' ', '-')}-{seed}"
    model = trained(run, ["--seed", str(seed), "--steps", str(options.steps), *arms_of(options)[arm]])
    goals = run / "goals.safetensors"
    goals.unlink(missing_ok=True)
    wanted: dict[str, tuple[str, ...]] = {arm: ()}
    if arm == BASE:
        wanted |= {RANDOM_GOAL: ("--token", "random", "--seed", str(seed)), SINGLE_GOAL: ("--limit", "1")}
    for name, how in wanted.items():
        done("goals", model, other, "-o", goals, "--name", name, "--where", "is_correct==true", *how)
    rows = []
    for name, found in zip(wanted, measured(model, [f"{goals}:{name}" for name in wanted], held_out), strict=True):
        scalars = found["scalars"] | (last_evaluation(run) if name == arm else {})
        known = {"arm": name, "seed": seed, "model": options.model, "steps": options.steps, "machine": machine()}
        rows.append(known | {"scalars": scalars, "problems": found["problems"]})
    shutil.rmtree(run)
    return rows


def earlier(options: Options) -> list[Row]:
    """Rows so far. Raises UserError where they are of other settings."""
    rows = saved_rows(options.report)
    for row in rows:
        found = {"model": row.get("model", ""), "steps": row["steps"], "problems": len(row["problems"]["reward"])}
        for name, value in found.items():
            if value != getattr(options, name):
                what = f"--{name} {value}, not {getattr(options, name)}"
                raise UserError(f"{options.report.with_suffix('.json')}: holds rows of {what}: choose another --report")
    return rows


def missing(options: Options, rows: Sequence[Row]) -> list[tuple[int, str]]:
    """(seed, arm) still to be trained, all arms of a seed before the next seed."""
    there = {(row["seed"], row["arm"]) for row in rows}
    arms = arms_of(options)
    wanted = [(seed, arm) for seed in range(options.seeds) for arm in arms if arm not in SWEEPS or seed < SWEEP_SEEDS]
    chosen = options.arms or arms
    return [(seed, arm) for seed, arm in wanted if (seed, arm) not in there and arm in chosen]


# ---------------------------------------------------------------------------------------------------------- report


def values_of(rows: Sequence[Row], arm: str, name: str) -> dict[int, np.ndarray]:
    """By seed: one value per problem."""
    return {row["seed"]: np.array(row["problems"][name], dtype=float) for row in rows if row["arm"] == arm}


def differences(rows: Sequence[Row], arms: Sequence[str], base: str) -> str:
    """A table of the arms less ``base``, paired by seed and problem."""
    lines = []
    for arm in arms:
        pairs = [(values_of(rows, arm, name), values_of(rows, base, name)) for name in BY_PROBLEM.values()]
        shared = str(len(pairs[0][0].keys() & pairs[0][1].keys()))
        lines.append([arm, shared, *("-" if arm == base else paired_difference(*both) for both in pairs)])
    return markdown(["", "seeds", *BY_PROBLEM], lines)


def verdict(rows: Sequence[Row], arm: str, other: str, name: str, sign: int) -> str:
    """The arm less the other, and whether its sign is the paper's."""
    text = paired_difference(values_of(rows, arm, name), values_of(rows, other, name))
    if not text.endswith("*"):
        return text if text == "-" else f"{text}: no difference shown"
    return f"{text}: {'same' if (text[0] == '-') == (sign < 0) else 'other'} sign"


def against_the_paper(rows: Sequence[Row]) -> str:
    names = [name for name, key in BY_PROBLEM.items() if key in ("reward", "q")]
    lines = [
        [arm, other, "below" if sign < 0 else "above", *(verdict(rows, arm, other, BY_PROBLEM[n], sign) for n in names)]
        for (arm, other), sign in PAPER.items()
        if {arm, other} <= {row["arm"] for row in rows}
    ]
    return markdown(["", "against", "paper", *names], lines)


def tables(rows: Sequence[Row]) -> str:
    known_arms = dict.fromkeys((*ARMS, RANDOM_GOAL, SINGLE_GOAL, *SWEEPS, *PRETRAINED_ARMS))
    arms = [arm for arm in known_arms if any(row["arm"] == arm for row in rows)]
    levels, scalars = [], []
    names = sorted({name for row in rows for name in row["scalars"]})
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        by_name = {name: list(values_of(rows, arm, name).values()) for name in BY_PROBLEM.values()}
        levels.append(
            [arm, str(len(own)), *(cell([float(np.nanmean(v)) for v in by_name[n]]) for n in BY_PROBLEM.values())]
        )
        known = {name: [row["scalars"][name] for row in own if name in row["scalars"]] for name in names}
        scalars.append([arm, *(cell(values) if values else "-" for values in known.values())])
    return f"""## Levels

Means over seeds with 95% t-intervals over seeds.

{markdown(["", "seeds", *BY_PROBLEM], levels)}

## Differences from {BASE}

Paired by seed and problem; 95% intervals from the variance over seeds and over problems.
* where the interval excludes 0.

{differences(rows, arms, BASE)}

## Differences from the ranking loss alone

{differences(rows, arms, "ranking")}

## Compared with the paper

What the paper says of the same arms, on language models and mathematics, and the sign here.

{against_the_paper(rows)}

## Held-out pairs and coupling

{markdown(["", *names], scalars)}
"""


def report(options: Options, rows: Sequence[Row], left: int, machines: Mapping[str, int]) -> str:
    still = f"{left} runs are still missing; call it again to train them." if left else "Every run is finished."
    base, model = "the default run (`gcrm train`)", ""
    if options.model:
        model = f" --model {options.model}"
        base = f"a run (`gcrm train` with {' '.join(word for pair in PRETRAINED.items() for word in pair)})"
    return f"""# Ablations: every arm on problems whose errors are known

Written by `python experiments/ablations.py{model} --seeds {options.seeds} --steps {options.steps} --problems \
{options.problems}`. {still} Machines: {"; ".join(f"{name} ({n} rows)" for name, n in machines.items())}.

Each arm is {base} with one option changed. {options.problems} held-out problems with 16
solutions each, a quarter of them right; the goal is the mean end state of right solutions of as many other problems. Q
is the cosine to the goal in every arm, whatever distance was trained.

{tables(rows)}"""


# --------------------------------------------------------------------------------------------------------- the runs


def save(options: Options, rows: Sequence[Row]) -> None:
    left = len(missing(replace(options, arms=()), rows))
    machines: dict[str, int] = {}
    for row in rows:
        machines[row["machine"]] = machines.get(row["machine"], 0) + 1
    save_rows(options.report, rows)
    write_aside(options.report.with_suffix(".md"), report(options, rows, left, machines))


def run(options: Options) -> None:
    """Raises UserError."""
    if unknown := set(options.arms) - arms_of(options).keys():
        raise UserError(f"--arms {' '.join(sorted(unknown))}: must be one of {', '.join(arms_of(options))}")
    rows = earlier(options)
    options.runs.mkdir(parents=True, exist_ok=True)
    held_out, other = options.runs / "held_out.jsonl", options.runs / "train.jsonl"
    sizes = ("--problems", options.problems, "--samples", 16)
    done("samples", "-o", held_out, *sizes)
    done("samples", "-o", other, *sizes, "--side", "train", "--right", 0.5)
    for seed, arm in missing(options, rows):
        rows += train_arm(options, arm, seed, held_out, other)
        save(options, rows)
    save(options, rows)
    print(f"wrote {options.report}.md and {options.report}.json")


def main(argv: list[str] | None = None) -> int:
    return run_script("ablations.py", Options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
