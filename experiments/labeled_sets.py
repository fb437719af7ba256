"""What a reward model does on real labeled sets, question by question, so that models can be compared.

``files`` draws the sets, ``measured`` is a model on them, ``report`` compares models. Used by real_model.py. Letters as
in gcrm_fast/evaluation/measures.py: N completions, C questions.
"""

import gzip
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arithmetic_chain import drop, error_token
from gcrm_fast.commands import evaluate
from gcrm_fast.common.statistics import auroc, ratio
from gcrm_fast.data.records import Candidate, read_completions
from gcrm_fast.data.sampling import QUANTILES
from gcrm_fast.evaluation.measures import Labeled, within_questions
from gcrm_fast.evaluation.voting import Question, chosen_threshold, filtered, majority, top, weighted
from gcrm_fast.inference.candidates import encoded, judge
from gcrm_fast.inference.scoring import RewardModel
from summary import cell, markdown, paired_difference, write_aside

COMPLETIONS = {
    "GSM8K": "gsm8k_completions_test.jsonl.gz",
    "SVAMP": "svamp_completions.jsonl.gz",
    "ASDiv": "asdiv_completions.jsonl.gz",
    "MAWPS": "mawps_completions.jsonl.gz",
    "MATH": "math_completions.jsonl.gz",
}
PAIRS = {  # file, and the field of its subsets
    "HH": ("hh_pairs_test.jsonl.gz", "subset"),
    "PRMBench": ("math_pairs_injected_test.jsonl.gz", "error_type"),
}
VOTES = "votes"
FILES = {name: file for name, (file, _) in PAIRS.items()} | COMPLETIONS | {VOTES: "gsm8k_vote_samples.jsonl.gz"}
UNNAMED = ("HH",)  # records name no question
FIRST_ERROR = {name: f"{name}: first error" for name in ("MATH", "PRMBench")}  # sets that name the first wrong step
PER_QUESTION = 12  # completions of a question at most
BY_QUESTION = ("reward", "Q at the end", "Q one token before")  # the scores that are kept question by question

Values = list[float | None]  # per question; None where it has none


def read_lines(source: Path) -> list[str]:
    with gzip.open(source, "rt", encoding="utf-8") as file:
        return file.readlines()


def drawn(source: Path, path: Path, questions: int, most: int, trained: Set[str] = frozenset()) -> Path:
    """A file of the records of ``questions`` random questions that are not ``trained`` on, at most ``most`` of each,
    always the same ones."""
    if path.exists():
        return path
    lines = read_lines(source)
    random = np.random.default_rng(0)
    of_question: dict[str, list[str]] = {}
    for i in random.permutation(len(lines)):
        question = json.loads(lines[i])["qid"]
        if question not in trained:
            of_question.setdefault(question, []).append(lines[i])
    chosen = random.permutation(sorted(of_question))[:questions]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, "".join(line for name in chosen for line in of_question[name][:most]))
    return path


def defaults(trained_on: str) -> tuple[str, ...]:
    """The sets for a model trained on one of PAIRS, that one, or else on solutions, all of these."""
    return (trained_on,) if trained_on in PAIRS else (*COMPLETIONS, VOTES)


def files(
    data: Path, folder: Path, questions: int, names: Sequence[str], trained: Set[str] = frozenset()
) -> dict[str, Path]:
    """The files of the sets ``names``, drawn into ``folder``: pairs, one per question, or all where no question is
    named; or solutions. Questions that the model was ``trained`` on are omitted."""
    found: dict[str, Path] = {}
    for name in names:
        source, path = data / FILES[name], folder / f"{name}-{questions}.jsonl"
        count = 10 * questions if name == "MATH" else questions  # few solutions of each
        most = 1 if name in PAIRS else 10**6 if name == VOTES else PER_QUESTION
        found[name] = source if name in UNNAMED else drawn(source, path, count, most, trained)
    return found


def rounded(values: np.ndarray) -> Values:
    return [None if np.isnan(value) else round(float(value), 3) for value in values]


def shares(couples_2C: np.ndarray) -> Values:
    """Of each question the share of its couples of right and wrong that are in order."""
    with np.errstate(invalid="ignore"):
        return rounded(couples_2C[0] / couples_2C[1])


# ------------------------------------------------------------------------------------------------------- measures


def scores_of(labeled: Labeled) -> dict[str, np.ndarray]:
    """What is compared with the labels, [N] each."""
    at = {percent: percent * (QUANTILES - 1) // 100 for percent in (50, 90)}
    return {
        "reward": labeled.reward_NP[:, -1],
        "Q at the end": labeled.q_NP[:, -1],
        "Q one token before": np.array([q[max(len(q) - 2, 0)] for q in labeled.q_N]),
        **{f"reward at {percent}%": labeled.reward_NP[:, p] for percent, p in at.items()},
        **{f"Q at {percent}%": labeled.q_NP[:, p] for percent, p in at.items()},
    }


def on_completions(candidates: Sequence[Candidate], labeled: Labeled) -> dict[str, Any]:
    """AUROC over all, within questions (also of each question) and within authors; that of length and author alone."""
    right_N, number_N = labeled.right_N, labeled.question_N
    author_N = np.unique([c.fields["model"] for c in candidates], return_inverse=True)[1]
    longer = auroc(right_N, labeled.lengths_N)
    found: dict[str, Any] = {
        "completions": len(right_N),
        "length": max(longer, 1 - longer),
        "author": evaluate.identity_auroc(labeled, author_N),
    }
    for name, score_N in scores_of(labeled).items():
        of_question = within_questions(right_N, score_N, number_N)
        found[name] = {
            "all": auroc(right_N, score_N),
            "within questions": ratio(*of_question.sum(1)),
            "within authors": ratio(*within_questions(right_N, score_N, author_N).sum(1)),
        }
        if name in BY_QUESTION:
            found[name]["questions"] = shares(of_question)
    return found


def on_pairs(candidates: Sequence[Candidate], labeled: Labeled, subset: str) -> dict[str, Any]:
    """Of each pair whether the chosen completion is above, a tie counting one half, and the mean over each value of
    the field ``subset``."""
    right_N = labeled.right_N
    subset_N = np.array([c.fields[subset] for c, right in zip(candidates, right_N, strict=True) if right])
    found: dict[str, Any] = {"pairs": len(subset_N)}
    for name, score_N in scores_of(labeled).items():
        above_N = (np.sign(score_N[right_N] - score_N[~right_N]) + 1) / 2
        parts = {"all": above_N} | {str(subset): above_N[subset_N == subset] for subset in np.unique(subset_N)}
        found[name] = {part: float(own_N.mean()) for part, own_N in parts.items()}
        if name in BY_QUESTION:
            found[name]["questions"] = rounded(above_N)
    return found


def steps_before_error(candidate: Candidate, right: bool) -> tuple[str, int] | None:
    """What separates the steps, and how many come before the first wrong one, -1 in a right solution; None where it is
    not known. Pairs list the steps with errors of their rejected side, counted from 1."""
    if "error_steps" in candidate.fields:
        steps = candidate.fields["error_steps"]
        return ("\n", -1 if right else min(steps) - 1) if right or steps else None
    step = candidate.fields.get("first_error_step")
    return None if step is None else ("\n\n", step)


def at_first_error(model: RewardModel, candidates: Sequence[Candidate], labeled: Labeled) -> dict[str, Values]:
    """Of each wrong solution whose first wrong step is known: the chance that Q before it is above Q from there on.

    Two controls: the same at the same part of a right solution, and with a goal of permuted components.
    """
    steps = [steps_before_error(c, bool(right)) for c, right in zip(candidates, labeled.right_N, strict=True)]
    right = [q for q, step in zip(labeled.q_N, steps, strict=True) if step and step[1] == -1]
    wrong = {i: step for i, step in enumerate(steps) if step and step[1] > 0}
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    goal_D = model.goal(None)
    other_D = goal_D[torch.randperm(len(goal_D), generator=generator)]
    chosen = [candidates[i] for i in wrong]
    shuffled = judge(model, chosen, other_D)
    found: dict[str, list[float]] = {"first error": [], "same place of a right solution": [], "shuffled goal": []}
    for i, tokens, other in zip(wrong, encoded(chosen, model), shuffled, strict=True):
        separator, count = wrong[i]
        before = separator.join(candidates[i].completion.split(separator)[:count]) + separator
        error, q = error_token(model.texts(tokens), len(before)), labeled.q_N[i]
        control = right[random.integers(len(right))]
        same = max(1, error * len(control) // len(q))
        if not 0 < error < len(q):
            continue
        found["first error"].append(drop(q, error))
        found["same place of a right solution"].append(drop(control, same))
        found["shuffled goal"].append(drop(other.q_n, error))
    return {name: rounded(np.array(values)) for name, values in found.items()}


def votes(candidates: Sequence[Candidate], labeled: Labeled) -> dict[str, Any]:
    """Whether each vote is right, on the half of the questions that the threshold was not chosen on: means over the
    models that answered a question; and the share of tokens that the filter saves."""
    members: dict[tuple[str, str], list[int]] = {}
    for i, c in enumerate(candidates):
        members.setdefault((c.fields["qid"], c.fields["model"]), []).append(i)
    asked = {
        key: Question(
            expected=candidates[own[0]].fields["expected_answer"],
            answers=[candidates[i].fields["predicted_answer"] or "" for i in own],
            rewards_n=labeled.reward_NP[own, -1],
            q_n=[labeled.q_N[i] for i in own],
        )
        for key, own in members.items()
    }
    taken = {key: labeled.half_N[own[0]] for key, own in members.items()}
    threshold = chosen_threshold([question for key, question in asked.items() if not taken[key]])
    right: dict[str, dict[str, list[float]]] = {}
    saved = whole = 0
    for (qid, _), question in ((key, question) for key, question in asked.items() if taken[key]):
        kept = filtered(question, threshold)
        saved, whole = saved + kept.saved, whole + sum(len(q) for q in question.q_n)
        answers = {
            "majority": majority(question),
            "Q-filtered majority": majority(question, kept.kept_n),
            "reward-weighted": weighted(question),
            "best of n": top(question, 1),
        }
        for name, answer in answers.items():
            right.setdefault(name, {}).setdefault(qid, []).append(float(answer == question.expected))
    means = {name: rounded(np.array([np.mean(v) for v in by.values()])) for name, by in right.items()}
    return {**means, "tokens saved": saved / whole}


def measured(folder: Path, sets: Mapping[str, Path]) -> dict[str, Any]:
    """All measures of the model in ``folder`` on every set."""
    model = RewardModel.from_pretrained(folder)
    found: dict[str, Any] = {}
    for name, path in sets.items():
        candidates = read_completions([str(path)], fields=("*",), tokenizer=model.tokenizer)
        right_N = np.array([evaluate.is_right(c, "is_correct") for c in candidates])
        source = evaluate.Source(
            candidates=candidates, questions=[c.prompt for c in candidates], right_N=right_N, groups={}
        )
        labeled = evaluate.score(model, source, model.goal(None))
        if name in PAIRS:
            found[name] = on_pairs(candidates, labeled, PAIRS[name][1])
        elif name == VOTES:
            found[name] = votes(candidates, labeled)
        else:
            found[name] = on_completions(candidates, labeled)
        if name in FIRST_ERROR:
            found[FIRST_ERROR[name]] = at_first_error(model, candidates, labeled)
    return found


# --------------------------------------------------------------------------------------------------------- report

Rows = Sequence[Mapping[str, Any]]  # of models: arm, seed, and what ``measured`` returns as "labeled"


def at(row: Mapping[str, Any], *path: str) -> Any:
    found: Any = row["labeled"]
    for name in path:
        found = found[name]
    return found


def level(rows: Rows, arm: str, *path: str) -> str:
    """Mean over the arm's seeds, of a number or of the mean over questions."""
    own = [np.array(at(row, *path), dtype=float) for row in rows if row["arm"] == arm]
    return cell([float(np.nanmean(values)) for values in own])


def difference(rows: Rows, arm: str, base: str, *path: str) -> str:
    """The arm less ``base``, paired by seed and question."""
    if arm == base:
        return "-"
    own, other = (
        {row["seed"]: np.array(at(row, *path), dtype=float) for row in rows if row["arm"] == name}
        for name in (arm, base)
    )
    return paired_difference(own, other)


def set_tables(rows: Rows, arms: Sequence[str], base: str, name: str) -> str:
    """Of one set: AUROC or accuracy of each score by arm, and the differences question by question."""
    first = at(rows[0], name)
    parts = [part for part in first["reward"] if part != "questions"]
    scores = [score for score, value in first.items() if isinstance(value, Mapping)]
    levels = [
        [f"{score}, {part}", *(level(rows, arm, name, score, part) for arm in arms)]
        for score in scores
        for part in parts
    ]
    effects = [[arm, *(difference(rows, arm, base, name, s, "questions") for s in BY_QUESTION)] for arm in arms]
    alone = ", ".join(f"{shortcut} {first[shortcut]:.3f}" for shortcut in ("length", "author") if shortcut in first)
    return (
        f"### {name}\n\n{markdown(['', *arms], levels)}\n\n"
        + (f"AUROC of a shortcut alone: {alone}.\n\n" if alone else "")
        + f"Difference from {base}, question by question:\n\n{markdown(['', *BY_QUESTION], effects)}\n\n"
    )


def report(rows: Rows, base: str) -> str:
    """Tables of every set that the models in ``rows``, all trained on the same data, were measured on."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    found = at(rows[0])
    text = "".join(set_tables(rows, arms, base, name) for name in found if "reward" in found[name])
    for name, key in ((name, key) for name, key in FIRST_ERROR.items() if key in found):
        kinds = list(found[key])
        lines = [[arm, *(level(rows, arm, key, kind) for kind in kinds)] for arm in arms]
        effects = [[arm, *(difference(rows, arm, base, key, kind) for kind in kinds)] for arm in arms]
        text += (
            f"### {name}: Q at the first wrong step\n\n"
            "The chance that a token before it has a higher Q than one from there on:\n\n"
            f"{markdown(['', *kinds], lines)}\n\nDifference from {base}, solution by solution:\n\n"
            f"{markdown(['', *kinds], effects)}\n\n"
        )
    if VOTES in found:
        kinds = list(found[VOTES])
        lines = [[arm, *(level(rows, arm, "votes", kind) for kind in kinds)] for arm in arms]
        effects = [
            [arm, *(difference(rows, arm, base, "votes", kind) for kind in kinds if kind != "tokens saved")]
            for arm in arms
        ]
        text += (
            "### Votes (GSM8K)\n\nAccuracy, with a threshold that was chosen on other questions:\n\n"
            f"{markdown(['', *kinds], lines)}\n\nDifference from {base}, question by question:\n\n"
            f"{markdown(['', *kinds[:-1]], effects)}\n\n"
        )
    return text
