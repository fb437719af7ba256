"""Does it work? The whole chain on the default model, whose data records where each error is: `make evaluate`.

gcrm train (unless the models exist), samples, goals, evaluate, vote; then whether Q drops at the error, compared with
three controls: contrastive weight 0, a shuffled goal, position alone. Writes arithmetic.md and arithmetic.json next to
this file.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch

from gcrm_fast import cli
from gcrm_fast.checkpoints.goals import named_goal
from gcrm_fast.common.command_line import run_script
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import Argument
from gcrm_fast.common.options import Options as CommandOptions
from gcrm_fast.common.statistics import ratio
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.records import Candidate, read_completions
from gcrm_fast.evaluation.measures import ratio_interval
from gcrm_fast.inference.scoring import RewardModel
from gcrm_fast.training.config import parse
from gcrm_fast.training.output_folder import default_output
from summary import machine, markdown, to_json, trained, write_aside

MODELS = {"gcrm": (), "contrastive weight 0": ("--objective", "ranking")}  # options of gcrm train
GOALS = {"right": "is_correct==true", "any": "steps>=1"}  # name: which solutions of training problems it is the mean of
CASES = (("gcrm", "right"), ("gcrm", "any"), ("contrastive weight 0", "right"))
PERMUTATIONS = 10
OFFSETS = range(-2, 9)  # tokens after the error's own
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Runs the chain on the default model; see the top of the script."""

    runs: Path = Path("runs")
    """Folder of the models, as for gcrm train."""
    problems: int = 500
    """Number of held-out problems, and of others for the goals."""
    samples: int = 16
    """Solutions per problem."""
    report: Annotated[Path, Argument(short="-o", metavar="PATH")] = HERE / "arithmetic"
    """Path of the report, without the suffixes .md and .json."""


def done(command: str, *arguments: object) -> None:
    """Runs a gcrm command. Raises UserError if it fails, after it printed its own error."""
    if cli.run(command, [str(argument) for argument in arguments]):
        raise UserError(f"gcrm {command} {' '.join(map(str, arguments))}: failed with the error above")


# ----------------------------------------------------------------------------------------------------- localization


class Located(NamedTuple):
    """A wrong solution, in a problem that also has a right one: values at each token of both, and the error's token.

    Both have the same tokens, and so the same values, before the error.
    """

    problem: int
    wrong_n: np.ndarray
    right_n: np.ndarray
    error: int


def error_token(texts: Sequence[str], char: int) -> int:
    """Index of the token that holds character ``char`` of the completion, given the text of each token."""
    return int(np.searchsorted(np.cumsum([len(text) for text in texts]), char, side="right"))


def drop(values_n: np.ndarray, error: int) -> float:
    """The chance that a token before the error has a higher value than one at or after it, ties counting one half."""
    return float((np.sign(values_n[:error, None] - values_n[error:]) + 1).mean() / 2)


def above(located: Located) -> np.ndarray:
    """At each token 1 where the right solution has the higher value, 0 where the wrong one has, else 0.5, [n]."""
    return (np.sign(located.right_n - located.wrong_n) + 1) / 2


def by_problem(located: Sequence[Located], values: Callable[[Located], Sequence[float]]) -> tuple[float, float, float]:
    """(mean, low, high) of all values of all wrong solutions; the interval draws problems."""
    size = max(one.problem for one in located) + 1
    total_C, count_C = np.zeros(size), np.zeros(size)
    for one in located:
        own = values(one)
        total_C[one.problem] += sum(own)
        count_C[one.problem] += len(own)
    kept = count_C > 0
    total_C, count_C = total_C[kept], count_C[kept]
    return ratio(total_C.sum(), count_C.sum()), *ratio_interval(total_C, count_C)


def localization(located: Sequence[Located]) -> dict[str, tuple[float, float, float]]:
    """Every measure as (mean, low, high); of an ``offset`` the mean alone.

    ``drop`` is ``drop`` of wrong solutions, and ``drop_right`` that of the right solution at the same place; ``after``
    the share of tokens at or after the error at which the right solution is above, ``error`` and ``end`` of the
    error's own and the last token, ``offset`` n of the token n after the error.
    """
    found = {
        "drop": by_problem(located, lambda one: [drop(one.wrong_n, one.error)]),
        "drop_right": by_problem(located, lambda one: [drop(one.right_n, one.error)]),
        "after": by_problem(located, lambda one: above(one)[one.error :].tolist()),
        "error": by_problem(located, lambda one: [above(one)[one.error]]),
        "end": by_problem(located, lambda one: [above(one)[-1]]),
    }
    for offset in OFFSETS:
        there = [one for one in located if 0 <= one.error + offset < len(one.wrong_n)]
        values = [above(one)[one.error + offset] for one in there]
        found[f"offset {offset}"] = float(np.mean(values)) if values else nan, nan, nan
    return found


class Wrong(NamedTuple):
    """A wrong solution: its index among all, that of a right one of the same problem, the error's token."""

    problem: int
    own: int
    right: int
    error: int


def wrong_solutions(model: RewardModel, candidates: Sequence[Candidate], encoded: Sequence[Completion]) -> list[Wrong]:
    """All wrong solutions of problems that also have a right one."""
    numbers: dict[str, int] = {}
    right: dict[str, int] = {}
    for i, candidate in enumerate(candidates):
        numbers.setdefault(candidate.prompt, len(numbers))
        if candidate.fields["is_correct"]:
            right[candidate.prompt] = i
    return [
        Wrong(numbers[c.prompt], i, right[c.prompt], error_token(model.texts(encoded[i]), c.fields["error_char"]))
        for i, c in enumerate(candidates)
        if not c.fields["is_correct"] and c.prompt in right
    ]


def position_only(candidates: Sequence[Candidate], values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each value replaced by the mean over right solutions at the same token number."""
    right = [own for c, own in zip(candidates, values, strict=True) if c.fields["is_correct"]]
    positions = np.concatenate([np.arange(len(own)) for own in right])
    mean = np.bincount(positions, np.concatenate(right)) / np.bincount(positions)
    return [mean[: len(own)] for own in values]  # wrong solutions are not longer than right ones


Measures = dict[str, tuple[float, float, float]]


def located_cases(models: Mapping[str, Path], goals: Mapping[str, Path], file: Path) -> dict[str, list[Measures]]:
    """Measures of Q and of the running reward for every model and control; several for shuffled goals."""
    cases: dict[str, list[Measures]] = {}
    for name, folder in models.items():
        model = RewardModel.from_pretrained(folder)
        candidates = read_completions([str(file)], fields=("*",), tokenizer=model.tokenizer)
        generator = torch.Generator().manual_seed(0)
        goal, alike = (
            named_goal(f"{goals[name]}:{kind}", model.fingerprint, model.config.state_size) for kind in GOALS
        )
        shuffled = [goal[torch.randperm(len(goal), generator=generator)] for _ in range(PERMUTATIONS)]
        encoded = model.encode([c.prompt for c in candidates], [c.completion for c in candidates])
        judged = model.judge(encoded, goals_GD=torch.stack([goal, alike, *shuffled]), per_token=True)
        q = [one.q_Gn for one in judged if one.q_Gn is not None]
        rewards = [one.rewards_n for one in judged if one.rewards_n is not None]

        wrong = wrong_solutions(model, candidates, encoded)
        by_case = {
            "Q": [[q_Gn[0] for q_Gn in q]],
            "Q, goal of right and wrong solutions alike": [[q_Gn[1] for q_Gn in q]],
            "Q, goal with shuffled coordinates": [[q_Gn[2 + i] for q_Gn in q] for i in range(PERMUTATIONS)],
            "Q by position alone": [position_only(candidates, [q_Gn[0] for q_Gn in q])],
            "running reward": [rewards],
        }
        for case, several in by_case.items():
            cases[f"{name}: {case}"] = [
                localization([Located(one.problem, values[one.own], values[one.right], one.error) for one in wrong])
                for values in several
            ]
    return cases


def right_by_hand(folder: Path) -> list[bool]:
    """Whether the model scores the right solution above the wrong one, for each pair of by_hand.jsonl."""
    model = RewardModel.from_pretrained(folder)
    pairs = [json.loads(line) for line in (HERE / "by_hand.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = (model.score(prompts, [pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    return (chosen > rejected).tolist()


# ---------------------------------------------------------------------------------------------------------- report

Rows = dict[tuple[str, str], tuple[float | None, float | None, float | None]]  # (group, measure): value, low, high


def read_rows(folder: Path) -> Rows:
    """The rows of a results.json of gcrm evaluate or gcrm vote."""
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    return {(row["group"], row["measure"]): (row["value"], row["low"], row["high"]) for row in rows}


def text(value: Sequence[float | None]) -> str:
    """Such as '0.883 [0.871, 0.894]', or the value alone."""
    first, low, high = value
    if first is None or first != first:
        return "-"
    return f"{first:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None and low == low else "")


def spread(measures: Sequence[Measures], name: str) -> str:
    """One measure; for several shuffles their mean and range."""
    values = [found[name][0] for found in measures]
    if len(values) == 1:
        return text(measures[0][name])
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def localization_table(cases: dict[str, list[Measures]]) -> str:
    head = [
        "",
        "before above after the error",
        "the same place in a right solution",
        "right above wrong, from the error on",
        "at the error",
        "at the end",
    ]
    names = ("drop", "drop_right", "after", "error", "end")
    return markdown(head, [[case, *(spread(found, name) for name in names)] for case, found in cases.items()])


def offset_table(cases: dict[str, list[Measures]]) -> str:
    lines = [
        [case, *(f"{found[0][f'offset {k}'][0]:.3f}" for k in OFFSETS)]
        for case, found in cases.items()
        if len(found) == 1 and "position" not in case
    ]
    return markdown(["tokens after the error", *map(str, OFFSETS)], lines)


def evaluation_table(found: Mapping[tuple[str, str], Rows]) -> str:
    names = {
        "auroc_reward": "AUROC of reward",
        "auroc_q": "AUROC of Q at the end",
        "baseline_position_q@100": "Q by position alone",
        "baseline_length": "length alone",
    }
    lines = []
    for (model, goal), rows in found.items():
        for group in sorted({group for group, _ in rows}):
            cells = [text(rows[group, name]) for name in names]
            lines.append([f"{model}, goal of {goal} solutions" if group == "all" else f"- {group}", *cells])
    return markdown(["", *names.values()], lines)


def vote_table(found: Mapping[tuple[str, str, str], Rows]) -> str:
    ways = {
        "majority": "majority",
        "Q-filtered majority": "filtered",
        "reward-weighted": "reward-weighted",
        "majority of the top 5": "majority of the top 5",
        "best of n": "best of n",
    }
    lines = []
    for (model, goal, threshold), rows in found.items():
        share = {name: f"{100 * (rows['all', name][0] or 0):.1f}%" for name in ("dropped", "tokens_saved")}
        lines.append(
            [
                f"{model}, goal of {goal} solutions, threshold {threshold}",
                f"{rows['all', 'questions'][0]:.0f}",
                f"{rows['all', 'threshold'][0]:.3f}",
                *(text(rows["all", f"accuracy:{way}"]) for way in ways),
                share["dropped"],
                share["tokens_saved"],
            ]
        )
    return markdown(["", "problems", "threshold", *ways.values(), "samples dropped", "tokens saved"], lines)


def report(
    options: Options,
    cases: dict[str, list[Measures]],
    evaluations: Mapping[tuple[str, str], Rows],
    votes: Mapping[tuple[str, str, str], Rows],
    by_hand: Mapping[str, Sequence[bool]],
) -> str:
    """The text of arithmetic.md; every number in it is of this run."""
    return f"""# Does it work? The default model on problems whose errors are known

Written by `python experiments/arithmetic_chain.py --problems {options.problems} --samples {options.samples}` \
(`make evaluate`). {machine()}.

The default model (`gcrm train`) and the same trained without the contrastive loss judge {options.samples} solutions of
each of {options.problems} problems that are never trained on. A quarter of the solutions are right; each of the others
has one wrong step and continues from it, so up to its error it has the tokens of a right one. The goal is the mean end
state of right solutions of other problems (`gcrm goals`). One model each: how early such a model learns to add is a
matter of chance.

## Does Q drop at the error?

{localization_table(cases)}

First column: the probability that in a wrong solution a token before its error has a higher value than one at or after
it. Second: the same at the same place of a right solution of the problem, where nothing is wrong. The other columns
compare the two solutions token by token: the share of tokens at which the right one is higher (chance: 0.5). The 95%
intervals draw problems; for goals with shuffled coordinates the mean of {PERMUTATIONS} and their range are given. By
position alone the two solutions are equal.

Share of wrong solutions below the right one, by distance from the error's token (before it both have the same tokens,
hence 0.5):

{offset_table(cases)}

## AUROC

{evaluation_table(evaluations)}

## Pairs written by hand

Problems of two and three steps with one wrong step (`by_hand.jsonl`): the right solution scores above the wrong one in
{", ".join(f"{sum(right)} of {len(right)} ({name})" for name, right in by_hand.items())}.

## Votes and what filtering saves

A solution is dropped once its Q falls below the threshold, and the tokens after that are saved. Threshold auto is the
best on one half of the problems; the numbers are those of the other half.

{vote_table(votes)}
"""


# ------------------------------------------------------------------------------------------------------- the chain


def run(options: Options) -> None:
    models = {
        name: trained(options.runs / Path(default_output(parse(list(arguments)))).name, arguments)
        for name, arguments in MODELS.items()
    }
    folder = options.runs / "arithmetic-chain"
    folder.mkdir(parents=True, exist_ok=True)
    held_out, other = folder / "held_out.jsonl", folder / "train.jsonl"
    sizes = ("--problems", options.problems, "--samples", options.samples)
    done("samples", "-o", held_out, *sizes)
    done("samples", "-o", other, *sizes, "--side", "train", "--right", 0.5)
    goal_files = {name: folder / f"goals-{number}.safetensors" for number, name in enumerate(models)}
    for name, model in models.items():
        goal_files[name].unlink(missing_ok=True)
        for goal, condition in GOALS.items():
            done("goals", model, other, "-o", goal_files[name], "--name", goal, "--where", condition)
    evaluations, votes = {}, {}
    for number, (name, goal) in enumerate(CASES):
        common = (models[name], held_out, "--goal", f"{goal_files[name]}:{goal}", "--overwrite")
        done("evaluate", *common, "-o", folder / f"evaluate-{number}", "--by", "steps")
        evaluations[name, goal] = read_rows(folder / f"evaluate-{number}")
        for threshold in ("0", "auto"):
            output = folder / f"vote-{number}-{threshold}"
            done("vote", *common, "-o", output, "--threshold", threshold)
            votes[name, goal, threshold] = read_rows(output)
    cases = located_cases(models, goal_files, held_out)
    by_hand = {name: right_by_hand(model) for name, model in models.items()}
    numbers = {
        "machine": machine(),
        "options": {k: v for k, v in asdict(options).items() if isinstance(v, int)},
        "localization": cases,
        "by hand": by_hand,
        "evaluate": {", ".join(key): {" ".join(k): v for k, v in rows.items()} for key, rows in evaluations.items()},
        "vote": {
            ", ".join(key): {" ".join(k): v for k, v in rows.items() if "@" not in k[1]} for key, rows in votes.items()
        },
    }
    write_aside(options.report.with_suffix(".json"), to_json(numbers))
    write_aside(options.report.with_suffix(".md"), report(options, cases, evaluations, votes, by_hand))
    print(f"wrote {options.report}.md and {options.report}.json")


def main(argv: list[str] | None = None) -> int:
    return run_script("arithmetic_chain.py", Options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
