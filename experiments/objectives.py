"""Trains a small model from scratch with every objective and several seeds on the same budget, and compares them on
real completions: held-out GSM8K pairs, labeled solutions of six sets, votes.

    GCRM_DATA=... python experiments/objectives.py

Models and their scores are kept under --runs, one folder each; a second call reuses them. Writes
experiments/objectives.md (tables) and objectives.json (every number).
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np

from gcrm_fast.common.command_line import run_script
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import Argument
from gcrm_fast.common.options import Options as CommandOptions
from gcrm_fast.common.progress import progress_bar
from gcrm_fast.common.statistics import auroc
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.records import Candidate, read_completions
from gcrm_fast.evaluation import voting
from gcrm_fast.evaluation.measures import Labeled, cross_fitted, group_scores, halves, pair_accuracy
from gcrm_fast.inference.scoring import Judged, RewardModel
from summary import COVERAGE, cell, data_folder, machine, markdown, mean_interval, to_json, trained, write_aside

VARIANTS = {
    "ranking": ("--objective", "ranking"),
    "paper": ("--objective-variant", "paper"),
    "repo": ("--objective-variant", "repo"),
    "dense": ("--objective-variant", "dense"),
    "after-divergence": ("--negatives", "after-divergence"),
}
TRAIN_FILE, VOTE_FILE = "gsm8k_pairs.jsonl.gz", "gsm8k_vote_samples.jsonl.gz"
SETS = {
    "GSM8K pairs": "gsm8k_pairs_test.jsonl.gz",
    "GSM8K": "gsm8k_completions_test.jsonl.gz",
    "SVAMP": "svamp_completions.jsonl.gz",
    "ASDiv": "asdiv_completions.jsonl.gz",
    "MAWPS": "mawps_completions.jsonl.gz",
    "MATH": "math_completions.jsonl.gz",
    "SimulEq": "simuleq_completions.jsonl.gz",
}
GROUPS = ("family", "model")
SMALLEST_CLASS = 10  # minimum of right and of wrong completions for a separate AUROC
MAX_LENGTH = 512
PAPER_THRESHOLD = 0.0
TOP = 3
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Compares the objectives on real data; see the top of the script."""

    data: str = ""
    """Folder of the data; default: GCRM_DATA."""
    runs: Path = Path("runs/objectives")
    """Folder of the models."""
    seeds: int = 3
    """Models per objective."""
    steps: int = 300
    """Optimizer steps of 16 pairs."""
    completions: int = 1000
    """Labeled completions per set: whole questions in a fixed random order until there are this many. Those longer than
    the training maximum are then skipped."""
    voted: int = 40
    """Number of questions to vote on, each with four models' samples."""
    report: Annotated[Path, Argument(short="-o", metavar="PATH")] = HERE / "objectives"
    """Path of the report, without the suffixes .md and .json."""


# --------------------------------------------------------------------------------------------------------- training


def train_arguments(variant: str, seed: int, data: Path, steps: int) -> list[str]:
    """The same for all but objective and seed."""
    shape = ("--hidden-size", "64", "--layers", "2", "--intermediate-size", "192", "--vocab-size", "1024")
    budget = ("--steps", str(steps), "--global-batch-pairs", "16", "--max-length", str(MAX_LENGTH), "--lr", "2e-3")
    return [
        "--data",
        str(data / TRAIN_FILE),
        *shape,
        *budget,
        "--log-every",
        "50",
        "--seed",
        str(seed),
        *VARIANTS[variant],
    ]


# -------------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Completions:
    """N completions of one file and their tokens."""

    candidates: list[Candidate]
    encoded: list[Completion]

    def no_longer_than(self, tokens: int) -> "Completions":
        """Without longer completions; a pair is kept or dropped as a whole."""
        fits = [len(ids) <= tokens for ids, _, _ in self.encoded]
        if self.pairs:
            fits = [ok for a, b in zip(fits[::2], fits[1::2], strict=True) for ok in (a and b, a and b)]
        kept = [i for i, ok in enumerate(fits) if ok]
        return Completions([self.candidates[i] for i in kept], [self.encoded[i] for i in kept])

    @property
    def pairs(self) -> bool:
        return self.candidates[0].name == "chosen"

    @property
    def right_N(self) -> np.ndarray:
        return np.array([c.name == "chosen" if self.pairs else c.fields["is_correct"] for c in self.candidates])

    def group_N(self, field: str) -> np.ndarray:
        """The completion's family or model, as text."""
        return np.array(
            [str(c.fields[f"{c.name}_model" if self.pairs and field == "model" else field]) for c in self.candidates]
        )


def read(path: Path, completions: int, questions: int) -> list[Candidate]:
    """Whole questions in a fixed random order until there are this many completions or questions; 0: no limit."""
    by_question: dict[str, list[Candidate]] = {}
    for candidate in read_completions([str(path)], fields=("*",)):
        by_question.setdefault(candidate.prompt, []).append(candidate)
    prompts = sorted(by_question)
    taken: list[Candidate] = []
    for drawn, i in enumerate(np.random.default_rng(0).permutation(len(prompts))):
        if (completions and len(taken) >= completions) or (questions and drawn == questions):
            break
        taken += by_question[prompts[i]]
    return taken


class Data:
    """The files, each read on first use and tokenized once: models trained on the same text share their tokenizer."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.options = folder, options
        self._drawn: dict[str, tuple[str, Completions, float]] = {}

    def drawn(self, file: str, model: RewardModel) -> tuple[Completions, float]:
        """The completions that are not longer than the training maximum, and their share of all that were drawn.

        Samples for votes are kept whatever their length.
        """
        tokenizer = model.tokenizer.backend_tokenizer.to_str()
        if file not in self._drawn or self._drawn[file][0] != tokenizer:
            voted = file == VOTE_FILE
            found = read(self.folder / file, *((0, self.options.voted) if voted else (self.options.completions, 0)))
            encoded = model.encode([c.prompt for c in found], [c.completion for c in found])
            kept = Completions(found, encoded) if voted else Completions(found, encoded).no_longer_than(MAX_LENGTH)
            self._drawn[file] = tokenizer, kept, len(kept.candidates) / len(found)
        return self._drawn[file][1:]


# ------------------------------------------------------------------------------------------------------- measuring


def by_group(right_N: np.ndarray, score_N: np.ndarray, group_N: np.ndarray) -> dict[str, float]:
    """AUROC of each group with at least SMALLEST_CLASS right and as many wrong completions."""
    found = {}
    for group in np.unique(group_N):
        own = group_N == group
        right = int(right_N[own].sum())
        if min(right, own.sum() - right) >= SMALLEST_CLASS:
            found[str(group)] = auroc(right_N[own], score_N[own])
    return found


def labeled(completions: Completions, judged: Sequence[Judged]) -> Labeled:
    prompts = [c.prompt for c in completions.candidates]
    return Labeled(
        right_N=completions.right_N,
        question_N=np.unique(prompts, return_inverse=True)[1],
        half_N=halves(prompts),
        lengths_N=np.array([len(ids) - start for ids, start, _ in completions.encoded]),
        reward_NP=np.array([[one.reward] for one in judged]),
        q_N=[one.q_Gn[0] for one in judged if one.q_Gn is not None],
        pairs=completions.pairs,
    )


def measured(completions: Completions, judged: Sequence[Judged]) -> dict[str, float]:
    """Numbers of one set. ``..._within_family`` and ``..._within_model`` are mean AUROCs within such groups, which
    knowing the group cannot raise, and ``..._auroc:model=NAME`` is that of one group; ``length`` takes the
    better sign of the two on the set itself."""
    of = labeled(completions, judged)
    right_N, sign = of.right_N, 1 if auroc(of.right_N, of.lengths_N) >= 0.5 else -1
    scores = {"reward": of.reward_NP[:, 0], "q": np.array([q[-1] for q in of.q_N]), "length": sign * of.lengths_N}
    found = {"completions": float(len(right_N)), "right": float(right_N.mean())}
    if of.pairs:
        found["pair_accuracy"] = pair_accuracy(of).value
    groups = {field: completions.group_N(field) for field in GROUPS}
    for name, score_N in scores.items():
        found[f"{name}_auroc"] = auroc(right_N, score_N)
        for field, group_N in groups.items():
            aurocs = by_group(right_N, score_N, group_N)
            found[f"{name}_within_{field}"] = float(np.mean([*aurocs.values()])) if aurocs else float("nan")
            found |= {f"{name}_auroc:{field}={group}": value for group, value in aurocs.items()}
    for field, group_N in groups.items():
        [known] = cross_fitted(of, partial(group_scores, np.unique(group_N, return_inverse=True)[1], right_N))
        found[f"identity_{field}"] = known
    return found


def vote(completions: Completions, judged: Sequence[Judged]) -> dict[str, float]:
    """Accuracy over (question, model), on the half of the questions on which the automatic threshold was not chosen."""
    by_question: dict[tuple[str, str], list[int]] = {}
    for i, candidate in enumerate(completions.candidates):
        by_question.setdefault((candidate.prompt, candidate.fields["model"]), []).append(i)
    chosen_on: list[voting.Question] = []
    questions: list[voting.Question] = []
    for (prompt, _), members in by_question.items():
        fields = [completions.candidates[i].fields for i in members]
        question = voting.Question(
            expected=str(fields[0]["expected_answer"]),
            answers=[str(f["predicted_answer"] or "") for f in fields],
            rewards_n=np.array([judged[i].reward for i in members], dtype=np.float64),
            q_n=[q_Gn[0] for i in members if (q_Gn := judged[i].q_Gn) is not None],
        )
        (questions if halves([prompt])[0] else chosen_on).append(question)
    found = {"questions": float(len(questions)), "samples": float(sum(len(q.answers) for q in questions))}
    ways: dict[str, Callable[[voting.Question], str]] = {
        "majority": voting.majority,
        "weighted": voting.weighted,
        f"top_{TOP}": lambda question: voting.top(question, TOP),
        "best_of_n": lambda question: voting.top(question, 1),
    }
    for name, way in ways.items():
        found[name] = float(np.mean([way(question) == question.expected for question in questions]))
    for name, threshold in (("paper", PAPER_THRESHOLD), ("auto", voting.chosen_threshold(chosen_on))):
        saving = voting.saving(questions, threshold)
        found |= {
            f"filtered_{name}": saving.accuracy,
            f"filtered_{name}_dropped": saving.dropped,
            f"filtered_{name}_saved": saving.saved,
            f"filtered_{name}_threshold": threshold,
        }
    return found


def evaluated(model_folder: Path, data: Data) -> dict[str, dict[str, float]]:
    """Numbers of a model on every set and on the votes; kept next to the model, redone for other weights or sizes."""
    model = RewardModel.from_pretrained(model_folder)
    key = {"fingerprint": model.fingerprint, "completions": data.options.completions, "voted": data.options.voted}
    path = model_folder.parent / "evaluation.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept["found"]
    goal_GD = model.goal()[None]
    found = {}
    for name, file in progress_bar({**SETS, "votes": VOTE_FILE}.items(), desc=model_folder.parent.name, brief=True):
        completions, kept = data.drawn(file, model)
        judged = model.judge(completions.encoded, goals_GD=goal_GD)
        found[name] = vote(completions, judged) if file == VOTE_FILE else measured(completions, judged) | {"kept": kept}
    write_aside(path, to_json({"key": key, "found": found}))
    return json.loads(to_json(found))  # as it is read back


# --------------------------------------------------------------------------------------------------------- report

Found = dict[str, list[dict[str, dict[str, float]]]]  # by variant, of each seed: set -> measure -> value


def values(found: Found, variant: str, name: str, measure: str) -> list[float]:
    """One measure per seed, NaN where it is undefined."""
    return [float("nan") if (v := of_seed[name][measure]) is None else v for of_seed in found[variant]]


def with_mean(columns: Sequence[Sequence[float]]) -> list[list[float]]:
    """The columns, and the mean per seed of all but the first, which holds pairs of the training distribution."""
    return [*map(list, columns), np.nanmean(np.array(columns[1:]), axis=0).tolist()]


def set_table(found: Found, measure: str, baselines: dict[str, str]) -> str:
    """Objectives in rows, sets in columns; baselines do not depend on the objective."""
    lines = []
    for variant in found:
        columns = with_mean([values(found, variant, name, measure) for name in SETS])
        lines.append([variant, *(cell(column) for column in columns)])
    for label, key in baselines.items():
        columns = with_mean([values(found, "ranking", name, key)[:1] for name in SETS])
        lines.append([f"*{label}*", *(cell(column) for column in columns)])
    return markdown(["", *SETS, "mean of the six"], lines)


def group_table(found: Found, field: str) -> str:
    """The AUROC of the reward for each group of each set that has one; objectives in columns, then length."""
    lines = []
    prefix = f"reward_auroc:{field}="
    for name in SETS:
        for key in found["ranking"][0][name]:
            if key.startswith(prefix):
                length = values(found, "ranking", name, key.replace("reward", "length", 1))[:1]
                cells = [cell(values(found, variant, name, key)) for variant in found]
                lines.append([name, key.removeprefix(prefix), *cells, cell(length)])
    return markdown(["set", field, *found, "*length*"], lines)


def differences(found: Found, measure: str) -> tuple[str, list[str]]:
    """Each objective minus plain ranking with the same seed, and those whose interval excludes 0."""
    lines, apart = [], []
    names = [*SETS, "the mean of the six"]
    for variant in list(found)[1:]:
        own, other = (with_mean([values(found, v, name, measure) for name in SETS]) for v in (variant, "ranking"))
        columns = [np.subtract(a, b).tolist() for a, b in zip(own, other, strict=True)]
        lines.append([variant, *(cell(column, "+") for column in columns)])
        for name, column in zip(names, columns, strict=True):
            mean, half = mean_interval(column)
            if abs(mean) > half:
                apart.append(f"{variant} on {name} ({cell(column, '+')})")
    return markdown(["", *SETS, "mean of the six"], lines), apart


def vote_table(found: Found) -> str:
    head = [
        "",
        "majority",
        "reward-weighted",
        f"majority of the top {TOP}",
        "best of n",
        "filtered, threshold 0",
        "tokens saved",
        "filtered, threshold chosen",
        "tokens saved",
    ]
    measures = [
        "majority",
        "weighted",
        f"top_{TOP}",
        "best_of_n",
        "filtered_paper",
        "filtered_paper_saved",
        "filtered_auto",
        "filtered_auto_saved",
    ]
    lines = [[variant, *(cell(values(found, variant, "votes", m)) for m in measures)] for variant in found]
    return markdown(head, lines)


def report(found: Found, options: Options) -> str:
    """The text of objectives.md; every number and claim in it comes from ``found``."""
    first = found["ranking"][0]
    sizes = [
        [name, f"{of['completions']:.0f}", f"{100 * of['right']:.0f}%", f"{100 * (1 - of['kept']):.0f}%"]
        for name, of in first.items()
        if name != "votes"
    ]
    who = {"which family wrote it": "identity_family", "which model wrote it": "identity_model"}
    all_table = set_table(found, "reward_auroc", {"length": "length_auroc", **who})
    within_model, within_family = (
        set_table(found, f"reward_within_{field}", {"length": f"length_within_{field}"}) for field in reversed(GROUPS)
    )
    overall, within = (differences(found, measure) for measure in ("reward_auroc", "reward_within_model"))
    apart = [
        f"- {kind}: {text}" for kind, (_, those) in (("overall", overall), ("within models", within)) for text in those
    ]
    intervals = 2 * (len(found) - 1) * (len(SETS) + 1)
    votes = first["votes"]
    accuracy = ", ".join(f"{v} {cell(values(found, v, 'GSM8K pairs', 'pair_accuracy'))}" for v in found)
    return f"""# Objectives on real completions

Written by `GCRM_DATA=... python experiments/objectives.py --steps {options.steps} --seeds {options.seeds} \
--completions {options.completions} --voted {options.voted}`; numbers and claims are those of this run. {machine()}.

A model from scratch (width 64, two layers, 1024 tokens) is trained on `gsm8k_pairs` with each objective and
{options.seeds} seeds: {options.steps} steps of 16 pairs of at most {MAX_LENGTH} tokens, learning rate 2e-3. Nothing
else differs; models of one seed start from the same weights and see the same pairs in the same order. ± is half of the
{COVERAGE:.0%} t-interval over seeds: it reflects the randomness of training, not of the questions, which are the same
for all models. Completions of more than {MAX_LENGTH} tokens including their question are skipped, as in training.

{markdown(["set", "completions", "right", "skipped: too long"], sizes)}

## AUROC of the reward, all completions

{all_table}

The sign of length is the better one for each set. Family and model are scored by their share of right answers on the
other half of the questions; the two sides of a pair can be of different models. A reward model that only knows who
wrote a completion reaches the last row, so the next table is the one that counts.

## Mean AUROC of the reward within one model's completions

Groups with at least {SMALLEST_CLASS} right and {SMALLEST_CLASS} wrong completions. Knowing only the model gives 0.5.

{within_model}

## Mean AUROC of the reward within one family's completions

{within_family}

## AUROC of the reward, by the model that wrote the completions

{group_table(found, "model")}

## AUROC of the reward, by family

{group_table(found, "family")}

## AUROC of Q at the last token, all completions

{set_table(found, "q_auroc", {})}

## Against plain ranking, seed by seed

All completions:

{overall[0]}

Within models:

{within[0]}

Of these {intervals} intervals {len(apart)} exclude 0; chance alone would give about {(1 - COVERAGE) * intervals:.0f}.

{chr(10).join(apart)}

## Pair accuracy and votes

Pair accuracy on held-out GSM8K pairs: {accuracy}.

{votes["questions"]:.0f} votes of one model's samples on a GSM8K question, {votes["samples"] / votes["questions"]:.1f} \
samples each; the other half of the questions
chose the threshold. The samples are one answer for each of 13 sub-question policies, so they are not independent.
Tokens saved are a share of all completion tokens.

{vote_table(found)}
"""


def run(options: Options) -> None:
    folder = data_folder(options.data)
    for name, least in (("seeds", 1), ("steps", 1), ("completions", 1), ("voted", 2)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least {least}")
    for file in (TRAIN_FILE, VOTE_FILE, *SETS.values()):
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: no such file: set --data or GCRM_DATA to the folder that holds it")
    models = {
        (v, seed): trained(options.runs / f"{v}-seed{seed}", train_arguments(v, seed, folder, options.steps))
        for seed in range(options.seeds)
        for v in VARIANTS
    }
    data = Data(folder, options)
    found: Found = {v: [evaluated(models[v, seed], data) for seed in range(options.seeds)] for v in VARIANTS}
    about = {name: value for name, value in asdict(options).items() if isinstance(value, int)}
    write_aside(options.report.with_suffix(".json"), to_json({"machine": machine(), **about, "found": found}))
    write_aside(options.report.with_suffix(".md"), report(found, options))
    print(f"wrote {options.report}.md and {options.report}.json")


def main(argv: list[str] | None = None) -> int:
    return run_script("objectives.py", Options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
