"""Does a goal steer a policy? Right solutions of arithmetic problems come in two styles; the goal is made of one.

    python experiments/steering.py        # about half an hour of one core

A policy that is right about half the time writes terse and long solutions alike:

    prompt    a=3,b=4,c=0,d=2:b+d+a?
    terse     4+2=1 / 1+3=4 /                    a line per step
    long      b=4,d=2,4+2=1 / a=3,1+3=4 /        the same, each named value restated where it is added

Reward models learn from its right and wrong samples, paired within a style, so that no pair prefers one. A goal state
is the mean over the ends of 20 right solutions of one style. Step beams and best-of-n then write and choose by Q,
next to goals of the other style and of shuffled coordinates. Each finished row is kept in steering.json at once, and a
second call continues with what is missing. Writes steering.md and steering.json.
"""

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

import policies
from gcrm_fast import Policy, RewardModel
from gcrm_fast.common.command_line import run_script
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import Argument, AtLeastOne
from gcrm_fast.common.options import Options as CommandOptions
from gcrm_fast.common.statistics import auroc, ratio
from gcrm_fast.data.arithmetic import SOLUTION, generate, is_correct
from gcrm_fast.data.records import Pair
from gcrm_fast.inference.decoding import Result, decode
from gcrm_fast.inference.generation import Sampling
from gcrm_fast.inference.judging import Goals
from gcrm_fast.inference.methods import Method
from live import POOL, SIZES, UNSTEERED, Found, best_of, difference, interval, level
from own_samples import own_pairs
from summary import COVERAGE, flags, machine, markdown, save_rows, saved_rows, status, trained, write_aside

HERE = Path(__file__).resolve().parent
TERSE, LONG = STYLES = ("terse", "long")
RESTATED = re.compile(r"[a-z]=\d,")
LONG_SOLUTION = re.compile(r"([a-z]=\d,){2}\d\+\d=\d\n([a-z]=\d,\d\+\d=\d\n)*")
RIGHT = "50"  # percentage of right samples at which the policy's training stops
STEPS = 600  # of each reward model
LONGEST = 36  # tokens of a solution of three steps in the long style, and some
GOAL_SIZE = 20  # completions of a goal
GOALS: dict[str, dict[str, float]] = {  # weights of goal states
    TERSE: {TERSE: 1.0},
    LONG: {LONG: 1.0},
    "terse less long": {TERSE: 1.0, LONG: -1.0},
    "long less terse": {LONG: 1.0, TERSE: -1.0},
    "default": {"default": 1.0},
}
TOWARD = {goal: next(iter(weights)) for goal, weights in GOALS.items() if goal != "default"}  # the style wanted
OPPOSITE = {TERSE: LONG, LONG: TERSE, "terse less long": "long less terse", "long less terse": "terse less long"}
ALPHAS = (0.25, 1.0, 4.0)
CONTROLLED = 1.0  # the alpha of the controls
SHUFFLED = ", shuffled"
BASE = "no goal, alpha 0"
BEAMS = Method(kind="beams", beams=4, per_beam=4, step_tokens=LONGEST, steps=4)  # a step is a line
DATA = "correctness"  # what the pairs prefer

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Measures how goals steer the style of solutions; see the top of the script."""

    runs: Path = Path("runs/steering")
    """Folder of the policy, its samples and the reward models."""
    problems: AtLeastOne = 150
    """Number of held-out problems."""
    seeds: AtLeastOne = 3
    """Number of reward models; goals, controls and samples have their seed."""
    report: Annotated[Path, Argument(short="-o", metavar="PATH")] = HERE / "steering"
    """Path of the report, without the suffixes .md and .json."""


# ------------------------------------------------------------------------------------------------------------ styles


def in_style(style: str, prompt: str, solution: str) -> str:
    """The text in that style of a solution as gcrm_fast.data.arithmetic writes it."""
    steps = solution.removesuffix(";").split(";")
    if style == TERSE:
        return "".join(f"{step}\n" for step in steps)
    given, question = prompt.removesuffix("?").split(":")
    value_of = {item[0]: item for item in given.split(",")}
    first, *others = (value_of[name] for name in question.split("+"))
    return f"{first}," + "".join(f"{value},{step}\n" for value, step in zip(others, steps, strict=True))


def solution_of(text: str) -> str:
    """The steps alone, as gcrm_fast.data.arithmetic writes them."""
    return RESTATED.sub("", text).replace("\n", ";")


def style_of(text: str) -> str:
    """The style of a text, right or wrong; "" where it is in neither."""
    if LONG_SOLUTION.fullmatch(text):
        return LONG
    return TERSE if ";" not in text and SOLUTION.fullmatch(text.replace("\n", ";")) else ""


def is_right(prompt: str, text: str) -> bool:
    """Whether a text is right in every step, and restates every value or none."""
    solution = solution_of(text)
    return is_correct(prompt, solution) and text in [in_style(style, prompt, solution) for style in STYLES]


# ------------------------------------------------------------------------------------------------------------ models


def policy_of(options: Options) -> Path:
    """The folder of the policy, trained on an even mixture of both styles where there is none. Raises UserError."""
    folder = options.runs / f"right-{RIGHT}"
    if not folder.is_dir():
        given = policies.Options(right=(RIGHT,), runs=options.runs, every=20)
        pairs, held_out = policies.problems(given)
        mixture = [restyled(pair, STYLES[i % 2]) for i, pair in enumerate(pairs)]
        policies.train_on(given, mixture, [restyled(pair, style) for style in STYLES for pair in held_out])
    return folder


def restyled(pair: Pair, style: str) -> Pair:
    """With the chosen solution in that style."""
    return replace(pair, chosen=in_style(style, pair.prompt, pair.chosen))


def pairs_of(options: Options, policy: Policy) -> Path:
    """A file of pairs of right and wrong samples of the policy; a wrong one has the style of the right one, or none."""
    path = options.runs / "pairs.jsonl"
    if not path.exists():
        drawn = own_pairs(policy, options.runs / "own-pairs.jsonl", is_right=is_right, max_new_tokens=LONGEST)
        pairs = map(json.loads, drawn.read_text(encoding="utf-8").splitlines())
        kept = [pair for pair in pairs if style_of(pair["rejected"]) in (style_of(pair["chosen"]), "")]
        write_aside(path, "".join(json.dumps(pair) + "\n" for pair in kept))
    return path


def reward_model(options: Options, policy: Path, data: Path, seed: int) -> RewardModel:
    """Trained from the policy, where there is none."""
    given = {"model": policy, "data": data, "seed": seed, "steps": STEPS, "lr": "1e-3", "warmup": "0.1"}
    given |= {"global-batch-pairs": "80", "cache": options.runs / "cache"}
    return RewardModel.from_pretrained(trained(options.runs / f"reward-model-{seed}", flags(given)))


# --------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Arm:
    """What the beams of a row are steered by."""

    goal: str
    alpha: float
    shuffled: bool = False

    @property
    def name(self) -> str:
        return f"{self.goal}, alpha {self.alpha:g}{SHUFFLED * self.shuffled}"


def arms() -> dict[str, Arm]:
    """All rows with beams of one reward model by name."""
    swept = [Arm(goal, alpha) for goal in TOWARD for alpha in ALPHAS] + [Arm("default", CONTROLLED)]
    swept += [Arm(goal, CONTROLLED, shuffled=True) for goal in TOWARD]
    return {BASE: Arm("default", 0.0)} | {arm.name: arm for arm in swept}


def goal_states(reward: RewardModel, data: Path, seed: int) -> dict[str, Tensor]:
    """The model's own goal state, and of each style that of right samples of training problems, other ones per seed."""
    states = {"default": reward.goal()}
    pairs = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    for style in STYLES:
        right = {pair["prompt"]: pair["chosen"] for pair in pairs if style_of(pair["chosen"]) == style}
        drawn = random.Random(seed).sample(sorted(right.items()), GOAL_SIZE)
        states[style] = reward.goal_state(reward.encode([prompt for prompt, _ in drawn], [text for _, text in drawn]))
    return states


def results(policy: Policy, prompts: Sequence[str], seed: int, **others: Any) -> list[Result]:
    """In the order of the prompts."""
    sampling = Sampling(max_new_tokens=LONGEST, temperature=1.0, seed=seed)
    decoded = decode(policy, prompts, sampling=sampling, rows=256, **others)
    return sorted((one for one in decoded if isinstance(one, Result)), key=lambda one: one.prompt)


def of_beams(prompts: Sequence[str], found: Sequence[Result]) -> dict[str, list[float]]:
    """Values of all problems by name."""
    texts = [one.text for one in found]
    return {
        **{style: [float(style_of(text) == style) for text in texts] for style in STYLES},
        "right": [float(is_right(prompt, text)) for prompt, text in zip(prompts, texts, strict=True)],
        "tokens": [float(one.policy_tokens) for one in found],
    }


def of_samples(
    reward: RewardModel, states: dict[str, Tensor], prompts: Sequence[str], found: Sequence[Result]
) -> tuple[dict[str, list[Any]], dict[str, float]]:
    """(values of all problems by name, what the states at the ends know). Of the POOL samples of a problem: mean
    length, shares, and for each goal the expected style and correctness of the best of k by Q at the end."""
    asked = [prompt for prompt, one in zip(prompts, found, strict=True) for _ in one.texts]
    texts = [text.text for one in found for text in one.texts]
    style_N = np.array([style_of(text) for text in texts])
    right_N = np.array([is_right(prompt, text) for prompt, text in zip(asked, texts, strict=True)])
    ended_N = np.array([text.ending == "stop" for one in found for text in one.texts])
    judged = reward.judge(reward.encode(asked, texts), goals_GD=torch.stack([*states.values()]))
    cosine_N = dict(zip(states, np.array([one.q_Gn[:, -1] for one in judged if one.q_Gn is not None]).T, strict=True))
    q_N = {goal: sum(w * cosine_N[name] for name, w in weights.items()) for goal, weights in GOALS.items()}
    values: dict[str, np.ndarray] = {
        "length": np.array([len(text.ids) for one in found for text in one.texts]),
        "right": right_N,
        **{style: style_N == style for style in STYLES},
        **{f"{style}, right": (style_N == style) & right_N for style in STYLES},
    }
    by_problem = {name: value.reshape(len(prompts), -1).mean(1).round(4).tolist() for name, value in values.items()}
    for goal in TOWARD:
        score_PN = np.where(ended_N, q_N[goal], -np.inf).reshape(len(prompts), -1)
        for name in (TOWARD[goal], "right"):
            value_PN = values[name].reshape(len(prompts), -1)
            both = zip(score_PN.tolist(), value_PN.tolist(), strict=True)
            best = [[best_of(scores, own, k) for k in SIZES] for scores, own in both]
            by_problem[f"{goal}: {name}"] = np.round(best, 4).tolist()
    known = {"cosine of the goals": float(torch.cosine_similarity(states[TERSE], states[LONG], dim=0))}
    for goal, style in TOWARD.items():
        known[f"{goal}: AUROC of its style"] = auroc(style_N[right_N] == style, q_N[goal][right_N])
    for goal in q_N:
        known[f"{goal}: AUROC of right"] = auroc(right_N, q_N[goal])
    return by_problem, known


# ----------------------------------------------------------------------------------------------------------- report


def verdict(values_SP: np.ndarray) -> str:
    """A difference, and whether it is shown to be above 0."""
    mean, half = interval(values_SP)
    word = "shown" if mean > half else "refuted" if mean < -half else "not distinguished"
    return f"{difference(values_SP)}: {word}"


def steered(found: Found) -> str:
    """Every row with beams, and its differences from beams without a goal."""
    lines = []
    for name, arm in arms().items():
        cells = [level(found.values(name, value)) for value in (*STYLES, "right")]
        for value in (TOWARD.get(arm.goal, ""), "right"):
            compared = value and name != BASE
            cells.append(difference(found.values(name, value) - found.values(BASE, value)) if compared else "-")
        lines.append([name, f"{found.values(name, 'tokens').mean():.0f}", *cells])
    head = ["", "policy tokens", *STYLES, "right", "its style less alpha 0", "right less alpha 0"]
    return markdown(head, lines)


def claims(found: Found) -> str:
    """Whether each goal, at the alpha of the controls, gives more of its style and more right answers."""
    lines = []
    for goal, style in TOWARD.items():
        name, opposite = (Arm(one, CONTROLLED).name for one in (goal, OPPOSITE[goal]))
        tokens_S = found.values(name, "tokens").mean(1)
        for value in (style, "right"):
            others = [found.values(other, value) for other in (BASE, opposite, name + SHUFFLED)]
            others.append(found.at_tokens(f"{goal}: {value}", tokens_S))
            own = found.values(name, value)
            lines.append([goal, value, level(own), level(others[-1]), *(verdict(own - other) for other in others)])
    head = ["goal", "share that is", "beams", "best-of-n", "beams more than alpha 0", "than the opposite goal"]
    return markdown([*head, "than the shuffled goal", "than best-of-n"], lines)


def known(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """What the states know, by seed."""
    own = {row["seed"]: row["states"] for row in rows if row["arm"] == UNSTEERED}
    lines = [[name, *(f"{own[seed][name]:.3f}" for seed in seeds)] for name in own[seeds[0]]]
    return markdown(["", *(f"seed {seed}" for seed in seeds)], lines)


def report(options: Options, rows: Sequence[Row], left: int) -> str:
    counts = Counter(row["seed"] for row in rows)
    found = Found(rows, DATA, [seed for seed in range(options.seeds) if counts[seed] == 1 + len(arms())])
    text = f"""# Does a goal steer the style of what a policy writes?

Written by `python experiments/steering.py --problems {options.problems} --seeds {options.seeds}`. {status(rows, left)}

A policy writes right and wrong solutions in two styles, terse (`4+2=1`, a line per step) and long
(`b=4,d=2,4+2=1`: the values restated). The reward models start from it and take {STEPS} steps of 80 pairs: its
right over its wrong samples of the same style, so that no pair prefers a style. A goal is the mean state at the ends of
{GOAL_SIZE} right samples of one style, of training problems; "terse less long" weighs the goals 1 and -1. Beams keep 4
with 4 samples each, a step is a line, and the score is log p / tokens + alpha Q; right is right in every step.
"""
    if not found.seeds:
        return text
    right, terse, long = (found.values(UNSTEERED, name).mean() for name in ("right", *STYLES))
    both = [found.values(UNSTEERED, f"{style}, right").mean() for style in STYLES]
    return f"""{text}
## The samples and the states at their ends

Of all samples {right:.3f} are right; {terse:.3f} are terse, of which {ratio(both[0], terse):.3f} are right, and \
{long:.3f} long, of which {ratio(both[1], long):.3f} are right; the rest follow neither style.

{known(rows, found.seeds)}

AUROCs are those of Q at the end. Of its style: right samples in the goal's style against right samples in the other.
Of right: right samples against wrong ones.

## Claims

At alpha {CONTROLLED:g}, over the seeds that are complete, {len(found.seeds)} of them. ± is a {COVERAGE:.0%} interval
over problems and seeds (over problems alone with one seed), paired by both; * and "shown" or "refuted" where it
excludes 0. The opposite of a goal is that of the other style. Best-of-n is ranked by the same Q at the end and has as
many tokens of the policy.

{claims(found)}

## Every row

{steered(found)}

## Claims by seed, intervals over problems
""" + "".join(f"\nSeed {seed}:\n\n{claims(Found(rows, DATA, [seed]))}\n" for seed in found.seeds)


# ------------------------------------------------------------------------------------------------------------ rows


def read_rows(options: Options) -> list[Row]:
    """Rows so far. Raises UserError where they are of other problems."""
    rows = saved_rows(options.report)
    if rows and len(rows[0]["problems"]["right"]) != options.problems:
        path = options.report.with_suffix(".json")
        raise UserError(f"{path}: its rows are of another number of problems: choose another --report")
    return rows


def save(options: Options, rows: Sequence[Row]) -> None:
    left = options.seeds * (1 + len(arms())) - len([row for row in rows if row["seed"] < options.seeds])
    save_rows(options.report, rows)
    write_aside(options.report.with_suffix(".md"), report(options, rows, left))


def add_rows(options: Options, rows: list[Row], seed: int) -> None:
    """Adds the rows of one reward model that are missing."""
    there = {row["arm"] for row in rows if row["seed"] == seed}
    if not {UNSTEERED, *arms()} - there:
        return
    folder = policy_of(options)
    policy = Policy.from_pretrained(folder)
    data = pairs_of(options, policy)
    reward = reward_model(options, folder, data, seed)
    states = goal_states(reward, data, seed)
    prompts = [pair.prompt for pair in generate(0, options.problems, 1, 3)[1]]
    named = {"objective": DATA, "seed": seed, "machine": machine()}
    if UNSTEERED not in there:
        found = results(policy, prompts, seed, method=Method(kind="sample", samples=POOL))
        values, facts = of_samples(reward, states, prompts, found)
        rows.append({**named, "arm": UNSTEERED, "states": facts, "problems": values})
        save(options, rows)
    for name, arm in arms().items():
        if name not in there:
            print(f"seed {seed}: {name}", flush=True)
            goals = Goals.of([(states[one], weight) for one, weight in GOALS[arm.goal].items()])
            goals, method = goals.shuffled(seed) if arm.shuffled else goals, replace(BEAMS, alpha=arm.alpha)
            found = results(policy, prompts, seed, method=method, reward=reward, goals=goals)
            rows.append({**named, "arm": name, "problems": of_beams(prompts, found)})
            save(options, rows)


def run(options: Options) -> None:
    """Raises UserError."""
    rows = read_rows(options)
    for seed in range(options.seeds):
        add_rows(options, rows, seed)
    save(options, rows)
    print(f"wrote {options.report}.md and {options.report}.json")


def main(argv: list[str] | None = None) -> int:
    return run_script("steering.py", Options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
