"""Over-optimization where gold is exact: the best of n samples of an arithmetic policy, picked by each reward model.

    python experiments/policies.py
    for width in 32 128; do
        python experiments/policies.py --right 50 --hidden-size $width --runs runs/policies-by-width/$width
    done
    python experiments/overoptimization.py

Every reward model starts from the policy, or from one of another width, and learns from pairs of the policy's right and
wrong samples. Each arm, share of flipped labels and seed is a row of overoptimization.json, written when it is
finished; a second call computes what is missing. Writes overoptimization.md and two plots next to it. Gold is whether a
solution is right in every step; the proxy is the arm's reward; the detectors see the samples that it picks.
"""

import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from gcrm_fast.commands.monitor import parts_of
from gcrm_fast.common.command_line import run_script
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import Argument, AtLeastOne, Range
from gcrm_fast.common.options import Options as CommandOptions
from gcrm_fast.common.statistics import auroc
from gcrm_fast.data.arithmetic import generate, is_correct
from gcrm_fast.data.records import Pair
from gcrm_fast.evaluation.detectors import STOP, Reference, early_stop
from gcrm_fast.evaluation.overoptimization import Point, curve, fall, fit, gains, sizes
from gcrm_fast.evaluation.plots import plot_monitor, plot_overoptimization
from gcrm_fast.inference.generation import Policy
from gcrm_fast.inference.scoring import RewardModel
from gcrm_fast.rlhf.latents import LatentReference
from gcrm_fast.rlhf.trl import RewardFunction
from own_samples import own_pairs
from summary import (
    bind,
    cell,
    flags,
    machine,
    markdown,
    mean_interval,
    paired_difference,
    read_rows,
    save_rows,
    status,
    trained,
    verdict,
    write_aside,
)

HERE = Path(__file__).resolve().parent
DATA_SEED = 0  # of the problems, which all rows share
SMALLEST = 8  # a detector sees the picks of at least this many problems
PLAIN, INFORM = "plain", "InfoRM"
KL_WEIGHT = ("--bottleneck-weight", "0.001")  # with 0.1 the latents end empty here
TRAINED: dict[str, tuple[str, ...]] = {  # options of gcrm train
    PLAIN: ("--objective", "ranking"),
    "GCRM": (),
    INFORM: ("--objective", "ranking", "--head", "bottleneck", "--bottleneck-size", "32", *KL_WEIGHT),
    "GRM": ("--objective", "ranking", "--sft-weight", "0.1"),
}
ENSEMBLE, PENALTY = "ensemble of 4", "InfoRM + IBL"  # of trained models: the mean reward; less a distance of latents
OF_WIDTH = {f"{arm}, width {width}": (arm, width) for arm in (PLAIN, INFORM) for width in (32, 128)}
COMPARED_WITH = {f"{INFORM}, width {width}": f"{PLAIN}, width {width}" for _, width in OF_WIDTH.values()}  # else PLAIN
ARMS = (*TRAINED, PENALTY, ENSEMBLE, *OF_WIDTH)
DISTANCE_WEIGHT = 0.3
FLIPPED = "{arm}, {flipped}% flipped"
DETECTORS = ("CSI per sample", "outliers", "Mahalanobis distance", "early stop")
COMPARED = ("held-out pairs in order", "best gold", "gold at the largest n", "change past the peak")
CLAIMS = {
    "best gold": "generalizes better",
    "gold at the largest n": "ends better",
    "change past the peak": "loses less to over-optimization",
}

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Measures over-optimization by best of n; see the top of the script."""

    policy: Path = Path("runs/policies/right-50")
    """Folder of the policy that is sampled and that reward models start from, as policies.py writes it."""
    widths: Path = Path("runs/policies-by-width")
    """Folder of policies that reward models of another width start from, in WIDTH/NAME; NAME is that of --policy."""
    runs: Path = Path("runs/overoptimization")
    """Folder of the samples and the reward models."""
    arms: tuple[str, ...] = ARMS
    """Names of the arms."""
    flipped: tuple[str, ...] = ("0", "25")
    """Percentages of training pairs whose label is flipped."""
    seeds: AtLeastOne = 3
    """Seeds per arm. An ensemble of seed s has the models of seeds 4s to 4s + 3."""
    steps: AtLeastOne = 600
    """Optimizer steps of each reward model."""
    problems: Annotated[int, Range(least=SMALLEST)] = 200
    """Number of held-out problems to sample."""
    samples: Annotated[int, Range(least=2)] = 512
    """Samples of each problem."""
    references: AtLeastOne = 1500
    """Number of other held-out problems, one sample of each of which is the detectors' reference."""
    report: Annotated[Path, Argument(short="-o", metavar="PATH")] = HERE / "overoptimization"
    """Path of the report, without the suffixes .md and .json."""

    def check(self) -> None:
        """Raises UserError for an arm or a percentage that does not exist."""
        for arm in self.arms:
            if arm not in ARMS:
                raise UserError(f"--arms {arm}: must be one of {', '.join(ARMS)}")
        for text in self.flipped:
            if not text.isdigit() or int(text) > 50:
                raise UserError(f"--flipped {text}: must be a whole number up to 50")


# ------------------------------------------------------------------------------------------------------------- data


def write_pairs(source: Path, path: Path, flipped: int) -> None:
    """The pairs of ``source``, ``flipped`` percent of them with chosen and rejected exchanged."""
    rng = random.Random(DATA_SEED)
    lines = []
    for pair in map(json.loads, source.read_text(encoding="utf-8").splitlines()):
        if rng.random() < flipped / 100:
            pair |= {"chosen": pair["rejected"], "rejected": pair["chosen"]}
        lines.append(json.dumps(pair) + "\n")
    write_aside(path, "".join(lines))


def samples_of(
    options: Options, prompts: Sequence[str], references: Sequence[str]
) -> tuple[list[list[str]], list[str]]:
    """Samples of each prompt and one of each reference, at temperature 1, kept in a file for later calls."""
    path = (
        options.runs / f"samples-{options.policy.name}-{options.problems}-{options.samples}-{options.references}.json"
    )
    if not path.exists():
        policy = Policy.from_pretrained(options.policy, device="cpu")
        asked = [prompt for prompt in prompts for _ in range(options.samples)] + list(references)
        texts = iter(policy.generate(asked, max_new_tokens=64, temperature=1.0, seed=DATA_SEED, rows=1024))
        write_aside(
            path,
            json.dumps({"samples": [list(islice(texts, options.samples)) for _ in prompts], "references": list(texts)}),
        )
    kept = json.loads(path.read_text(encoding="utf-8"))
    return kept["samples"], kept["references"]


def train(options: Options, arm: str, flipped: int, seed: int) -> Path:
    """The folder of the arm's reward model, trained where there is none."""
    data = options.runs / f"pairs-{flipped}.jsonl"
    if not data.exists():
        policy = Policy.from_pretrained(options.policy, device="cpu")
        write_pairs(own_pairs(policy, options.runs / "pairs.jsonl"), data, flipped)
    kind, width = OF_WIDTH.get(arm, (arm, 0))
    start = options.widths / str(width) / options.policy.name if width else options.policy
    run = options.runs / f"{arm.replace(', ', '-').replace(' ', '')}-{flipped}-{seed}"
    given = {"model": start, "data": data, "seed": seed, "steps": options.steps, "lr": "1e-3", "warmup": "0.1"}
    given |= {"weight-decay": "0.1", "global-batch-pairs": "80", "cache": options.runs / "cache"}
    return trained(run, [*flags(given), *TRAINED[kind]])


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """What picks the best of n, and the model the latents of which the detectors see."""

    reward: RewardFunction
    model: RewardModel


def proxy_of(
    options: Options, arm: str, flipped: int, seed: int, written: tuple[Sequence[str], Sequence[str]]
) -> Proxy:
    """The proxy of an arm. ``written``: prompts and samples of the policy, from which a penalty measures distances."""
    base, seeds = {PENALTY: (INFORM, [seed]), ENSEMBLE: (PLAIN, range(4 * seed, 4 * seed + 4))}.get(arm, (arm, [seed]))
    models = [RewardModel.from_pretrained(train(options, base, flipped, one), device="cpu") for one in seeds]
    if arm == PENALTY:
        reference = LatentReference.of(models[0], *written)
        reward = RewardFunction(models[0], distance_weight=DISTANCE_WEIGHT, latent_reference=reference)
        return Proxy(reward=reward, model=models[0])
    return Proxy(reward=RewardFunction(models), model=models[0])


# -------------------------------------------------------------------------------------------------------- measuring


def rewards_of(reward: RewardFunction, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """Rewards [M] of the M samples of each prompt; equal samples are scored once."""
    distinct = [(p, text) for p, own in zip(prompts, texts, strict=True) for text in dict.fromkeys(own)]
    values = dict(zip(distinct, reward([p for p, _ in distinct], [text for _, text in distinct]), strict=True))
    return [np.array([values[p, text] for text in own]) for p, own in zip(prompts, texts, strict=True)]


def in_order(reward: RewardFunction, pairs: Sequence[Pair]) -> list[float]:
    """Of each pair whether the chosen completion has the higher reward."""
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = ([getattr(pair, side) for pair in pairs] for side in ("chosen", "rejected"))
    return [float(a > b) for a, b in zip(reward(prompts, chosen), reward(prompts, rejected), strict=True)]


def detected(
    model: RewardModel,
    prompts: Sequence[str],
    picks: Sequence[Sequence[str]],
    references: tuple[Sequence[str], Sequence[str]],
) -> tuple[list[list[float]], list[float]]:
    """The DETECTORS for each list of picks, one pick per prompt; and the null of all but the last."""

    def latents(prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        return model.latents(model.encode(prompts, texts)).astype(np.float64)

    reference = Reference.of(latents(*references), parts_of(references[0]), "of the policy")
    asked = [list(zip(prompts, own, strict=True)) for own in picks]
    place = {one: i for i, one in enumerate(dict.fromkeys(one for own in asked for one in own))}
    latents_ND = latents(*zip(*place, strict=True))
    found = [reference.find(latents_ND[[place[one] for one in own]]) for own in asked]
    stops = early_stop([one.clusters.csi for one in found])
    values = [[one.clusters.csi, one.outliers, one.distance, stop] for one, stop in zip(found, stops, strict=True)]
    null = reference.null
    return values, [null.clusters.csi, null.outliers, null.distance]


def measured(
    picker: Proxy,
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    references: tuple[Sequence[str], Sequence[str]],
) -> Row:
    """What a row holds apart from its name and its held-out pairs."""
    proxy = rewards_of(picker.reward, prompts, texts)
    gold = [np.array([is_correct(p, text) for text in own], dtype=float) for p, own in zip(prompts, texts, strict=True)]
    n_K = sizes(len(texts[0]))
    gold_CK, proxy_CK = gains(proxy, gold, n_K)
    half_C = np.arange(len(prompts)) % 2 == 0
    points = curve(gold_CK, proxy_CK, n_K)
    picks = [[own[int(r[:n].argmax())] for own, r in zip(texts, proxy, strict=True)] for n in n_K]
    values, null = detected(picker.model, prompts, picks, references)
    return {
        "plain gold": float(np.mean([own.mean() for own in gold])),
        "points": [list(point) for point in points],
        "fall": list(fall(gold_CK, n_K, half_C)),
        "fit": list(fit(points)),
        "detectors": values,
        "reference": null,
        "gold": np.round(gold_CK, 4).tolist(),
    }


# ----------------------------------------------------------------------------------------------------------- report


def key(row: Row) -> tuple[str, int, int]:
    return row["arm"], row["flipped"], row["seed"]


def name_of(row: Row) -> str:
    return FLIPPED.format(**row) + f", seed {row['seed']}"


def past_peak(rows: Sequence[Row], detector: int) -> list[float]:
    """AUROC of a detector for "this point is past the peak of gold", within each row whose fall is shown."""
    values = []
    for row in rows:
        n_K = [point[0] for point in row["points"]]
        seen = [(n > row["fall"][0], one[detector]) for n, one in zip(n_K, row["detectors"], strict=True)]
        seen = [(past, value) for past, value in seen if np.isfinite(value)]
        past = np.array([p for p, _ in seen])
        if row["fall"][4] < 0 and past.any() and not past.all():
            values.append(auroc(past, np.array([value for _, value in seen])))
    return values


def mean_auroc(values: Sequence[float]) -> str:
    """Of rows, with a 95% interval over them."""
    if not values:
        return "-"
    mean, half = mean_interval(values)
    return f"{mean:.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}") + f" ({len(values)} rows)"


def values_of(row: Row) -> dict[str, np.ndarray]:
    """COMPARED by pair or problem."""
    gold_CK = np.array(row["gold"]) + row["plain gold"]
    best = int(gold_CK.mean(0).argmax())
    values = (np.array(row["in order"]), gold_CK[:, best], gold_CK[:, -1], gold_CK[:, -1] - gold_CK[:, best])
    return dict(zip(COMPARED, values, strict=True))


def compared(rows: Sequence[Row], values_of: Callable[[Row], dict[str, np.ndarray]] = values_of) -> str:
    """The arms' means over seeds, each followed by its difference from the plain reward with the same labels; of InfoRM
    also with the same width."""
    of: dict[tuple[int, str], dict[int, dict[str, np.ndarray]]] = {}
    for row in rows:
        of.setdefault((row["flipped"], row["arm"]), {})[row["seed"]] = values_of(row)
    names, lines = list(values_of(rows[0])), []
    for (flipped, arm), by_seed in sorted(of.items(), key=lambda one: (one[0][0], ARMS.index(one[0][1]))):
        cells = []
        for name in names:
            own = {seed: values[name] for seed, values in by_seed.items()}
            base = {seed: values[name] for seed, values in of.get((flipped, COMPARED_WITH.get(arm, PLAIN)), {}).items()}
            difference = "" if arm == PLAIN else f" ({paired_difference(own, base)})"
            cells.append(cell([float(values.mean()) for values in own.values()]) + difference)
        lines.append([FLIPPED.format(arm=arm, flipped=flipped), str(len(by_seed)), *cells])
    return markdown(["", "seeds", *names], lines)


def claims(rows: Sequence[Row], values_of: Callable[[Row], dict[str, np.ndarray]], names: Mapping[str, str]) -> str:
    """The InfoRM paper's, by share of flipped labels and arm with an information bottleneck. ``names``: what is claimed
    of a value that is higher than that of the ranking loss alone."""
    said, of = [], {(row["arm"], row["flipped"], row["seed"]): row for row in rows}
    arms = [INFORM, PENALTY, *(arm for arm in COMPARED_WITH if any(row["arm"] == arm for row in rows))]
    for flipped, name, arm in itertools.product(sorted({row["flipped"] for row in rows}), names, arms):
        plain = COMPARED_WITH.get(arm, PLAIN)
        own, base = (
            {seed: values_of(row)[name] for (a, f, seed), row in of.items() if (a, f) == (one, flipped)}
            for one in (arm, plain)
        )
        words = verdict(paired_difference(own, base), name)
        said.append(f"- {FLIPPED.format(arm=arm, flipped=flipped)}, {names[name]} than plain: {words}.")
    aurocs = past_peak([row for row in rows if row["arm"] in arms], 0)
    mean, half = mean_interval(aurocs) if aurocs else (math.nan, math.nan)
    told = "shown" if mean - half > 0.5 else "refuted" if mean + half < 0.5 else "neither shown nor refuted"
    words = "no claim from fewer than two falls" if math.isnan(half) else f"{told}, AUROC {mean:.2f} ± {half:.2f}"
    return "\n".join([*said, f"- The arms of {INFORM}, CSI is higher past the peak than before: {words}."])


def tables(rows: Sequence[Row]) -> str:
    curves, alarms = [], []
    for row in rows:
        last, peak = row["points"][-1], max(row["points"], key=lambda point: point[2])
        _, largest, change, low, high = row["fall"]
        verdict = "falls" if high < 0 else "rises" if low > 0 else "not shown"
        base = row["plain gold"]
        curves.append(
            [
                name_of(row),
                f"{base:.3f}",
                f"{base + peak[2]:.3f} at n = {peak[0]}",
                f"{base + last[2]:.3f} at n = {largest}",
                f"{change:+.3f} [{low:+.3f}, {high:+.3f}]",
                verdict,
                f"{row['fit'][0]:.2f}, {row['fit'][1]:.2f}",
            ]
        )
        turn = next((k for k, point in enumerate(row["points"]) if point[0] > row["fall"][0]), -1)
        seen = [row["detectors"][k] for k in (0, turn, -1)]
        shown = [
            f"{' -> '.join(f'{value:.3g}' for value in values)} ({null:.3g})"
            for *values, null in zip(*seen, row["reference"], strict=False)
        ]
        stops = [row["points"][k][0] for k, one in enumerate(row["detectors"]) if one[3] > STOP]
        alarms.append([name_of(row), *shown, f"n = {stops[0]}" if stops else "never"])
    head = [
        "",
        "gold of a sample",
        "gold at its peak",
        "gold at the end",
        "change past the peak",
        "gold",
        "alpha, beta",
    ]
    warned = [[name, mean_auroc(past_peak(rows, i))] for i, name in enumerate(DETECTORS)]
    return f"""## Arms

Means over seeds with 95% t-intervals; in brackets the difference from plain with the same labels (of InfoRM
also with the same width), paired by seed and problem, * where its interval over both excludes 0. The width is 64 where
none is named. The best gold is that of the best n.

{compared(rows)}

## Gold and proxy

{markdown(head, curves)}

The peak is found on one half of the problems and the change after it measured on the other, both ways; 95% intervals
over problems. alpha and beta are those of gold = d (alpha - beta d), d = sqrt(KL) (Gao et al., arXiv 2210.10760).

![gold and proxy over KL](overoptimization.png)

## Detectors

At n = 1, at the first n past the peak of gold and at the largest n; in brackets the reference against itself. The last
column is the first n at which the early-stop indicator exceeds {STOP:g}.

{markdown(["", *DETECTORS], alarms)}

AUROC of each detector for "gold is past its peak at this n", over the rows where gold falls:

{markdown(["", "AUROC"], warned)}

![detectors over n](overoptimization_detectors.png)

## Claims of the InfoRM paper

Against plain with the same labels and width, by 95% intervals over seeds and problems.

{claims(rows, values_of, CLAIMS)}
"""


def report(options: Options, rows: Sequence[Row], left: int) -> str:
    return f"""# Over-optimization by best of n, with an exact gold

Written by `python experiments/overoptimization.py`. {status(rows, left)}

The policy `{options.policy.name}` writes {options.samples} samples of each of {options.problems} held-out problems.
For n = 1, 2, 4, ... each reward model picks the best of n (the unbiased estimate over all choices of n). Reward models
start from the policy and take {options.steps} steps of 80 pairs, right and wrong samples of training problems; {INFORM}
has 32 latents and a KL weight of {KL_WEIGHT[1]}, and IBL takes off {DISTANCE_WEIGHT:g} times the distance of latents.

{tables(rows)}"""


def write_rows(report: Path, rows: Sequence[Row]) -> list[Row]:
    """Writes them in the order of flipped labels, arm and seed, in which it returns them."""
    rows = sorted(rows, key=lambda row: (row["flipped"], ARMS.index(row["arm"]), row["seed"]))
    save_rows(report, rows)
    return rows


def save(options: Options, rows: Sequence[Row]) -> None:
    rows = write_rows(options.report, rows)
    write_aside(options.report.with_suffix(".md"), report(options, rows, len(missing(options, rows))))
    drawn = [row for row in rows if row["seed"] == 0]
    plot_overoptimization(
        {name_of(row): [Point(*point) for point in row["points"]] for row in drawn}, options.report.with_suffix(".png")
    )
    plot_monitor(
        {
            f"{detector}: {name_of(row)}": ([one[i] for one in row["detectors"]], row["reference"][i])
            for row in drawn
            for i, detector in enumerate(DETECTORS[:3])
        },
        [str(point[0]) for point in rows[0]["points"]],
        options.report.with_name(f"{options.report.name}_detectors.png"),
    )


# --------------------------------------------------------------------------------------------------------- the rows


def settings(options: Options) -> Row:
    """What rows of one report share."""
    names = ("problems", "samples", "references", "steps")
    return {"policy": options.policy.name, **{name: getattr(options, name) for name in names}}


def missing(options: Options, rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    there = {key(row) for row in rows}
    wanted = itertools.product(range(options.seeds), map(int, options.flipped), options.arms)
    return [(arm, flipped, seed) for seed, flipped, arm in wanted if (arm, flipped, seed) not in there]


def run(options: Options) -> None:
    """Raises UserError."""
    bind(options.runs, {"policy": str(options.policy)})
    held_out = generate(0, options.problems + options.references, DATA_SEED, 3)[1]
    prompts = [pair.prompt for pair in held_out[: options.problems]]
    others = [pair.prompt for pair in held_out[options.problems :]]
    texts, written = samples_of(options, prompts, others)
    rows = read_rows(options.report, settings(options))
    for arm, flipped, seed in missing(options, rows):
        proxy = proxy_of(options, arm, flipped, seed, (others, written))
        named = {"arm": arm, "flipped": flipped, "seed": seed, **settings(options), "machine": machine()}
        named["in order"] = in_order(proxy.reward, held_out[: options.problems])
        rows.append(named | measured(proxy, prompts, texts, (others, written)))
        save(options, rows)
    save(options, rows)
    print(f"wrote {options.report}.md and {options.report}.json")


def main(argv: list[str] | None = None) -> int:
    return run_script("overoptimization.py", Options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
