"""Do live Q-values help a policy to be right? Methods of ``gcrm generate`` at equal numbers of the policy's tokens.

    python experiments/policies.py; python experiments/live.py

A policy that is right about half the time solves held-out arithmetic problems, where the truth is exact. Reward models,
with and without the contrastive loss, choose or steer: majority, best-of-n, filter, reject, step beams; with goals of
shuffled coordinates as controls. They are trained on pairs that differ in one step, or on pairs of the policy's own
samples, starting from the policy. Each finished row is kept in live.json at once, and a second call continues with what
is missing. Writes experiments/live.md (tables) and live.json (every problem).
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from gcrm_fast import Policy, RewardModel
from gcrm_fast.common.command_line import run_script
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import Argument, AtLeastOne
from gcrm_fast.common.options import Options as CommandOptions
from gcrm_fast.data.arithmetic import generate, is_correct
from gcrm_fast.inference.decoding import Result, decode
from gcrm_fast.inference.generation import Sampling
from gcrm_fast.inference.judging import Goals
from gcrm_fast.inference.methods import Method
from own_samples import own_pairs
from summary import (
    COVERAGE,
    bind,
    change,
    machine,
    markdown,
    mean_interval,
    read_rows,
    save_rows,
    status,
    trained,
    two_way_interval,
    write_aside,
)

HERE = Path(__file__).resolve().parent
OWN = ", own samples"  # trained on the policy's own samples
OBJECTIVES: dict[str, tuple[str, ...]] = {
    name + data: given
    for data in ("", OWN)
    for name, given in (("contrastive", ()), ("ranking", ("--objective", "ranking")))
}
FROM_POLICY = ("--steps", "600", "--global-batch-pairs", "80", "--lr", "1e-3", "--warmup", "0.1")
SAMPLES = 16  # of filter and reject, and rows of beams
POOL = 32  # samples without steering, of which best-of-k and majority of k are expectations
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # k
SUBSETS = 50  # drawn for majority
STEP = 6  # tokens of a step of a solution, such as 4+2=1;
BEAMS = Method(kind="beams", beams=4, per_beam=4, step_tokens=STEP, steps=4)
ARMS: dict[str, Method] = {
    "filter, Q < 0": Method(kind="filter", samples=SAMPLES, threshold=0.0, every=1),
    "filter, Q < 0.3": Method(kind="filter", samples=SAMPLES, threshold=0.3, every=1),
    "filter, Q < 0.6": Method(kind="filter", samples=SAMPLES, threshold=0.6, every=1),
    "reject by halves": Method(kind="reject", samples=SAMPLES, checkpoints=(STEP, 2 * STEP), every=0),
    "beams, alpha 0": replace(BEAMS, alpha=0.0),
    "beams, alpha 0.5": replace(BEAMS, alpha=0.5),
    "beams, alpha 1": replace(BEAMS, alpha=1.0),
    "beams, alpha 4": replace(BEAMS, alpha=4.0),
}
CONTROLS = ("filter, Q < 0", "reject by halves", "beams, alpha 1", "beams, alpha 4")
SHUFFLED = ", shuffled goal"
UNSTEERED = "samples"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Compares methods of generation on arithmetic; see the top of the script."""

    policy: Path = Path("runs/policies/right-50")
    """Policy, as experiments/policies.py writes it."""
    runs: Path = Path("runs/live")
    """Folder of the reward models."""
    problems: AtLeastOne = 200
    """Number of held-out problems."""
    seeds: AtLeastOne = 3
    """Number of reward models per objective; the policy's samples have their seed."""
    report: Annotated[Path, Argument(short="-o", metavar="PATH")] = HERE / "live"
    """Path of the report, without the suffixes .md and .json."""


# ------------------------------------------------------------------------------------------------------- measuring


def answer(text: str) -> str:
    """The last result of a solution; "" where there is none."""
    return text[-2] if text.endswith(";") and len(text) > 1 else ""


def best_of(scores: Sequence[float], right: Sequence[float], k: int) -> float:
    """The chance that the best of ``k`` samples, drawn from all without repeats, is right."""
    n, order = len(scores), np.argsort(scores)[::-1]
    chances = [comb(n - 1 - rank, k - 1) / comb(n, k) for rank in range(n)]
    return float(np.array(chances) @ np.array(right, dtype=float)[order])


def most_common(answers: Sequence[str]) -> str:
    """The first of the most common answers."""
    return Counter(answers).most_common(1)[0][0]


def majority_of(answers: Sequence[str], expected: str, k: int) -> float:
    """The chance that the most common answer of ``k`` samples is right, over SUBSETS draws."""
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(len(answers))[:k] for _ in range(SUBSETS)]
    return float(np.mean([most_common([answers[i] for i in own]) == expected for own in drawn]))


Values = dict[str, Any]


def of_samples(prompt: str, expected: str, result: Result) -> Values:
    """One problem without steering: what k of its samples give, and their mean length."""
    texts = [one.text for one in result.texts]
    answers = [answer(text) for text in texts]
    # Among those that ended by themselves, as best-of-n chooses.
    scores = [one.reward if one.ending == "stop" and one.reward is not None else -np.inf for one in result.texts]
    right = [float(own == expected) for own in answers]
    return {
        "length": float(np.mean([len(one.ids) for one in result.texts])),
        "best": [best_of(scores, right, k) for k in SIZES],
        "majority": [majority_of(answers, expected, k) for k in SIZES],
        "solved": float(np.mean([is_correct(prompt, text) for text in texts])),
        "reward_tokens": result.reward_tokens,
    }


def of_method(prompt: str, expected: str, result: Result) -> Values:
    """One problem with steering: whether its answer, and the majority of the samples that are kept, are right."""
    kept = [answer(one.text) for one in result.texts if one.ending != "dropped"]
    return {
        "right": float(answer(result.text) == expected),
        "vote": float(most_common(kept) == expected),
        "solved": float(is_correct(prompt, result.text)),
        "tokens": result.policy_tokens,
        "reward_tokens": result.reward_tokens,
    }


def measured(
    policy: Policy, reward: RewardModel, goals: Goals, method: Method, seed: int, problems: Sequence[tuple[str, str]]
) -> dict[str, list[Any]]:
    """Values of all problems, given as (prompt, right solution), by name."""
    unsteered = method.kind == "best-of-n"
    sampling = Sampling(max_new_tokens=24, temperature=1.0, seed=seed)
    prompts = [prompt for prompt, _ in problems]
    decoded = decode(policy, prompts, reward=reward, method=method, sampling=sampling, goals=goals)
    found: dict[int, Values] = {}
    for one in decoded:
        if isinstance(one, Result):
            prompt, solution = problems[one.prompt]
            found[one.prompt] = (of_samples if unsteered else of_method)(prompt, answer(solution), one)
    return {name: [rounded(found[i][name]) for i in range(len(problems))] for name in found[0]}


def rounded(value: Any) -> Any:
    return [round(one, 4) for one in value] if isinstance(value, list) else round(value, 4)


def wanted() -> dict[str, Method]:
    """All rows of one reward model by name."""
    controls = {name + SHUFFLED: ARMS[name] for name in CONTROLS}
    return {UNSTEERED: Method(kind="best-of-n", samples=POOL, every=0), **ARMS, **controls}


# ---------------------------------------------------------------------------------------------------------- report


class Found:
    """The rows of one objective, by arm and value: [S, P] of the seeds that have all arms, and problems."""

    def __init__(self, rows: Sequence[Row], objective: str, seeds: Sequence[int]) -> None:
        self.seeds = seeds
        self.rows = {(row["arm"], row["seed"]): row["problems"] for row in rows if row["objective"] == objective}

    def values(self, arm: str, name: str) -> np.ndarray:
        return np.array([self.rows[arm, seed][name] for seed in self.seeds], dtype=float)

    def at_tokens(self, name: str, tokens_S: np.ndarray) -> np.ndarray:
        """What as many tokens per problem give without steering, [S, P]: ``best`` or ``majority`` of samples."""
        sizes_S = tokens_S / self.values(UNSTEERED, "length").mean(1)
        values_SPK = self.values(UNSTEERED, name)
        return np.stack(
            [
                [np.interp(size, SIZES, values_K) for values_K in values_PK]
                for size, values_PK in zip(sizes_S, values_SPK, strict=True)
            ]
        )


def interval(values_SP: np.ndarray) -> tuple[float, float]:
    """(mean, half the width of its interval), over problems and, where there are several, seeds."""
    return two_way_interval(values_SP) if len(values_SP) > 1 else mean_interval(list(values_SP[0]))


def level(values_SP: np.ndarray) -> str:
    mean, half = interval(values_SP)
    return f"{mean:.3f} ± {half:.3f}"


def difference(values_SP: np.ndarray) -> str:
    """Such as '+0.013 ± 0.021'; with * where the interval excludes 0."""
    return change(*interval(values_SP))


def steered(found: Found) -> str:
    """Every method, and best-of-n and majority at the same number of the policy's tokens."""
    lines = []
    for arm in wanted():
        if arm == UNSTEERED:
            continue
        tokens_S = found.values(arm, "tokens").mean(1)
        control = arm + SHUFFLED if arm in CONTROLS else ""
        right_SP = found.values(arm, "right")
        lines.append(
            [
                arm,
                f"{tokens_S.mean():.0f}",
                f"{found.values(arm, 'reward_tokens').mean():.0f}",
                level(right_SP),
                f"{found.values(arm, 'solved').mean():.3f}",
                difference(right_SP - found.at_tokens("best", tokens_S)),
                difference(right_SP - found.at_tokens("majority", tokens_S)),
                difference(right_SP - found.values(control, "right")) if control else "-",
            ]
        )
    head = ["", "policy tokens", "reward model tokens", "right answer", "every step right"]
    return markdown([*head, "less best-of-n", "less majority", "less shuffled goal"], lines)


def unsteered(found: Found) -> str:
    length = found.values(UNSTEERED, "length").mean()
    names = {"best": "best-of-n", "majority": "majority"}
    sizes = [k for k in SIZES if k <= 2 * SAMPLES]
    lines = [
        [what, *(level(found.values(UNSTEERED, name)[:, :, SIZES.index(k)]) for k in sizes)]
        for name, what in names.items()
    ]
    return markdown(["samples", *map(str, sizes)], [["policy tokens", *(f"{k * length:.0f}" for k in sizes)], *lines])


def saved(found: Found) -> str:
    """What the filter saves of SAMPLES whole samples, and what that costs."""
    whole = found.values(UNSTEERED, "length") * SAMPLES
    place = SIZES.index(SAMPLES)
    lines = []
    for arm in wanted():
        if not arm.startswith(("filter", "reject")):
            continue
        share = 1 - found.values(arm, "tokens").mean() / whole.mean()
        best, vote = (
            found.values(arm, own) - found.values(UNSTEERED, name)[:, :, place]
            for own, name in (("right", "best"), ("vote", "majority"))
        )
        lines.append([arm, f"{share:.1%}", difference(best), difference(vote)])
    head = ["", "policy tokens saved", f"answer less best of {SAMPLES}", f"vote of the kept less majority of {SAMPLES}"]
    return markdown(head, lines)


def compared(ours: Found, base: Found) -> str:
    """The contrastive loss less ranking alone, same seeds and problems."""
    lines = [
        [arm, difference(ours.values(arm, "right") - base.values(arm, "right"))]
        for arm in wanted()
        if arm != UNSTEERED and SHUFFLED not in arm
    ]
    best = [found.values(UNSTEERED, "best")[:, :, SIZES.index(SAMPLES)] for found in (ours, base)]
    lines.append([f"best of {SAMPLES}", difference(best[0] - best[1])])
    return markdown(["", "right answer: contrastive less ranking"], lines)


def report(options: Options, rows: Sequence[Row], left: int) -> str:
    by_objective = {name: complete(options, rows, name) for name in OBJECTIVES}
    seeds = max(len(found.seeds) for found in by_objective.values())
    text = f"""# Does it help to look at Q while a policy writes?

Written by `python experiments/live.py --problems {options.problems} --seeds {options.seeds}`. {status(rows, left)}

The policy of `experiments/policies.py` solves {options.problems} held-out problems at temperature 1. Answers are right
or wrong by the arithmetic itself. Reward models: the default run of `gcrm train` (contrastive) and the same with
`--objective ranking`, {seeds} seed{"s" * (seeds != 1)} each; the samples have the reward model's seed. "Own samples":
trained instead on pairs of right and wrong samples of the policy itself, of training problems, starting from the
policy. Filter and reject start from {SAMPLES} samples, beams keep 4 with 4 samples each, in steps of
{STEP} tokens.

Best-of-n and majority, to which each method is compared at the same number of policy tokens per problem, are
expectations over subsets of {POOL} samples, interpolated in n. ± is a {COVERAGE:.0%} interval over problems and seeds
(over problems alone with one seed); * marks a difference whose interval excludes 0. Differences are paired by problem
and seed. With this many comparisons, one in twenty is marked by chance.
"""
    for name, found in by_objective.items():
        if not found.seeds:
            continue
        text += f"""
## {name.capitalize()}

One sample: right answer {level(found.values(UNSTEERED, "best")[:, :, 0])}, every step right \
{found.values(UNSTEERED, "solved").mean():.3f}.

{unsteered(found)}

{steered(found)}

{saved(found)}
"""
    for data in ("", OWN):
        both = [by_objective[name + data] for name in ("contrastive", "ranking")]
        if shared := [seed for seed in both[0].seeds if seed in both[1].seeds]:
            ours, base = (Found(rows, name + data, shared) for name in ("contrastive", "ranking"))
            text += f"\n## With less without the contrastive loss{data}\n\n{compared(ours, base)}\n"
    return text


def complete(options: Options, rows: Sequence[Row], objective: str) -> Found:
    """The rows of the seeds that have all arms."""
    counts = Counter(row["seed"] for row in rows if row["objective"] == objective)
    return Found(rows, objective, [seed for seed in range(options.seeds) if counts[seed] == len(wanted())])


# ------------------------------------------------------------------------------------------------------------ rows


def rows_so_far(options: Options) -> list[Row]:
    """Raises UserError where they are of another policy or other problems."""
    rows = read_rows(options.report, {"policy": options.policy.name})
    if rows and len(rows[0]["problems"]["reward_tokens"]) != options.problems:
        path = options.report.with_suffix(".json")
        raise UserError(f"{path}: its rows are of another number of problems: choose another --report")
    return rows


def save(options: Options, rows: Sequence[Row]) -> None:
    left = options.seeds * len(OBJECTIVES) * len(wanted()) - len([row for row in rows if row["seed"] < options.seeds])
    save_rows(options.report, rows)
    write_aside(options.report.with_suffix(".md"), report(options, rows, left))


def add_rows(options: Options, rows: list[Row], objective: str, seed: int, policy: Policy) -> None:
    """Adds the rows of one reward model that are missing."""
    there = {row["arm"] for row in rows if (row["objective"], row["seed"]) == (objective, seed)}
    todo = {arm: method for arm, method in wanted().items() if arm not in there}
    if not todo:
        return
    arguments = [*OBJECTIVES[objective], "--seed", str(seed)]
    if objective.endswith(OWN):
        arguments += [
            "--model",
            str(options.policy),
            "--data",
            str(own_pairs(policy, options.runs / "own-pairs.jsonl")),
            *FROM_POLICY,
        ]
    reward = RewardModel.from_pretrained(
        trained(options.runs / f"{objective}-{seed}".replace(", ", "-").replace(" ", "-"), arguments)
    )
    goals = Goals.of([(reward.goal(), 1.0)])
    pairs = generate(0, options.problems, 1, 3)[1]
    problems = [(pair.prompt, pair.chosen) for pair in pairs]
    for arm, method in todo.items():
        print(f"{objective}, seed {seed}: {arm}", flush=True)
        own = goals.shuffled(seed) if arm.endswith(SHUFFLED) else goals
        values = measured(policy, reward, own, method, seed, problems)
        named = {"objective": objective, "seed": seed, "arm": arm, "policy": options.policy.name, "machine": machine()}
        rows.append(named | {"problems": values})
        save(options, rows)


def run(options: Options) -> None:
    """Raises UserError."""
    if not options.policy.is_dir():
        raise UserError(f"--policy {options.policy}: is not a folder: run python experiments/policies.py first")
    rows = rows_so_far(options)
    bind(options.runs, {"policy": str(options.policy)})
    policy = Policy.from_pretrained(options.policy)
    for seed in range(options.seeds):
        for objective in OBJECTIVES:
            add_rows(options, rows, objective, seed, policy)
    save(options, rows)
    print(f"wrote {options.report}.md and {options.report}.json")


def main(argv: list[str] | None = None) -> int:
    return run_script("live.py", Options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
