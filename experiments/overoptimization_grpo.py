"""Over-optimization by GRPO, where gold is exact: the laboratory of overoptimization.py with a policy that is trained.

    python experiments/policies.py; python experiments/overoptimization.py; python experiments/overoptimization_grpo.py

TRL's GRPO trains the policy against each reward model of the laboratory, without a KL penalty. Every few steps: gold,
the exact probability of the right solutions of held-out problems; the proxy's reward of a sample of each, the KL
divergence from the policy at the start, and the detectors on those samples. Each arm, share of flipped labels and seed
is a row of overoptimization_grpo.json, written when it is finished; a second call computes what is missing. Writes
overoptimization_grpo.md and a plot next to it. Needs pip install 'gcrm-fast[trl,datasets]'.
"""

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
from transformers import LlamaForCausalLM

from gcrm_fast.common.command_line import run_script
from gcrm_fast.common.options import Argument, AtLeastOne
from gcrm_fast.data.arithmetic import generate
from gcrm_fast.data.records import Pair
from gcrm_fast.evaluation.detectors import STOP
from gcrm_fast.evaluation.measures import ratio_interval
from gcrm_fast.evaluation.overoptimization import Point, fall
from gcrm_fast.evaluation.plots import plot_overoptimization
from gcrm_fast.inference.generation import Policy
from gcrm_fast.inference.scoring import RewardModel
from grpo import Meter, grpo
from overoptimization import (
    DATA_SEED,
    DETECTORS,
    ENSEMBLE,
    PENALTY,
    TRAINED,
    Proxy,
    Row,
    claims,
    compared,
    detected,
    mean_auroc,
    missing,
    name_of,
    past_peak,
    proxy_of,
    samples_of,
    write_rows,
)
from overoptimization import Options as LaboratoryOptions
from summary import bind, machine, markdown, read_rows, status, write_aside

HERE = Path(__file__).resolve().parent
LENGTH = 24  # maximum tokens of a sample; a solution of three steps has 19
LR, KL_WEIGHT = 1e-4, 0.0
DRAWS = 100  # samples of each problem by the policy at the start: a detector warns above its greatest value on them
KL = "KL, no detector"
COMPARED = ("best gold", "mean gold over the steps", "last gold", "change past the peak")
CLAIMS = {
    "best gold": "generalizes better",
    "last gold": "ends better",
    "change past the peak": "loses less to over-optimization",
}


@dataclass(frozen=True, kw_only=True)
class Options(LaboratoryOptions):
    """Measures over-optimization by GRPO; see the top of the script."""

    arms: tuple[str, ...] = (*TRAINED, PENALTY, ENSEMBLE)
    """Names of the arms."""
    grpo_steps: AtLeastOne = 120
    """Optimizer steps of GRPO, of 8 prompts with 8 samples each."""
    every: AtLeastOne = 5
    """Steps between two measurements."""
    prompts: AtLeastOne = 2000
    """Number of training problems that GRPO samples."""
    report: Annotated[Path, Argument(short="-o", metavar="PATH")] = HERE / "overoptimization_grpo"
    """Path of the report, without the suffixes .md and .json."""


# -------------------------------------------------------------------------------------------------------- measuring


def first_past(gold_CT: np.ndarray, step_T: Sequence[int]) -> float:
    """The first step after the peak at which gold is lower, with an interval over problems that excludes 0; NaN if it
    never is. The peak is one of half of the problems, as in ``fall``."""
    peak, half_C = int(gold_CT.mean(0).argmax()), np.arange(len(gold_CT)) % 2 == 0
    for t in range(peak + 1, len(step_T)):
        kept = [*range(peak + 1), t]
        if fall(gold_CT[:, kept], [step_T[k] for k in kept], half_C).shown:
            return float(step_T[t])
    return math.nan


def measured(
    model: RewardModel, meter: Meter, draws: Sequence[Sequence[str]], references: tuple[Sequence[str], Sequence[str]]
) -> Row:
    """What a row holds apart from its name. ``draws``: samples of the policy at the start, a list for each draw."""
    prompts = [pair.prompt for pair in meter.held_out]
    gold_CT = np.stack(meter.gold, axis=1)
    gain_CT = gold_CT - gold_CT[:, :1]
    bounds = [ratio_interval(gain_C, np.ones(len(gain_C))) for gain_C in gain_CT.T]
    points = [
        Point(step, kl, float(gain), low, high, reward - meter.rewards[0])
        for step, kl, gain, (low, high), reward in zip(
            meter.steps, meter.kl, gain_CT.mean(0), bounds, meter.rewards, strict=True
        )
    ]
    values, null = detected(model, prompts, meter.texts, references)
    drawn, _ = detected(model, prompts, draws, references)
    return {
        "points": [list(point) for point in points],
        "rewards": meter.rewards,
        "tokens": meter.tokens,
        "fall": list(fall(gold_CT, meter.steps, np.arange(len(prompts)) % 2 == 0)),
        "first past": first_past(gold_CT, meter.steps),
        "detectors": [[*own, kl] for own, kl in zip(values, meter.kl, strict=True)],
        "reference": null,
        "alarms": [*np.max([own[:3] for own in drawn], axis=0).tolist(), STOP],
        "gold": np.round(gold_CT, 3).tolist(),
    }


# ----------------------------------------------------------------------------------------------------------- report


def values_of(row: Row) -> dict[str, np.ndarray]:
    """COMPARED by problem."""
    gold_CT = np.array(row["gold"])
    best_C, last_C = gold_CT[:, gold_CT.mean(0).argmax()], gold_CT[:, -1]
    change_C = last_C - best_C
    return dict(zip(COMPARED, (best_C, gold_CT.mean(1), last_C, change_C), strict=True))


def warnings(row: Row) -> list[float]:
    """The first step at which each of the DETECTORS exceeds its alarm; NaN if it never does."""
    seen = [(float(point[0]), own) for point, own in zip(row["points"], row["detectors"], strict=True)]
    alarms = enumerate(row["alarms"])
    return [next((at for at, own in seen if own[i] > alarm), math.nan) for i, alarm in alarms]


def step(value: float) -> str:
    return "never" if math.isnan(value) else f"{value:.0f}"


def curves(rows: Sequence[Row]) -> str:
    head = ["", "gold before", "gold at its peak", "gold at the end", "change past the peak", "first step past it"]
    lines = []
    for row in rows:
        points, base = [Point(*point) for point in row["points"]], float(np.mean(row["gold"], axis=0)[0])
        peak, last = max(points, key=lambda point: point.gold), points[-1]
        *_, change, low, high = row["fall"]
        lines.append([name_of(row), f"{base:.3f}"])
        lines[-1] += [
            f"{base + peak.gold:.3f} at step {peak.n}, KL {peak.kl:.2f}",
            f"{base + last.gold:.3f}, KL {last.kl:.2f}",
        ]
        lines[-1] += [f"{change:+.3f} [{low:+.3f}, {high:+.3f}]", step(row["first past"])]
        lines[-1] += [f"{row[name][0]:.2f} -> {row[name][-1]:.2f}" for name in ("rewards", "tokens")]
    return markdown([*head, "reward", "tokens"], lines)


def alarms(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        first, last = row["detectors"][0], row["detectors"][-1]
        shown = [
            f"{a:.3g} -> {b:.3g} ({alarm:.3g}), {step(at)}"
            for a, b, alarm, at in zip(first[:3], last[:3], row["alarms"], warnings(row), strict=False)
        ]
        lines.append([name_of(row), step(row["first past"]), *shown, step(warnings(row)[3])])
    return markdown(["", "gold is past its peak", *DETECTORS], lines)


def warned(rows: Sequence[Row]) -> str:
    """How often each detector warns in time where gold falls, and how often where it does not."""
    falls = [row["fall"][4] < 0 for row in rows]
    lines = []
    for i, name in enumerate(DETECTORS):
        at = [warnings(row)[i] for row in rows]
        late = [w - row["first past"] for w, row, down in zip(at, rows, falls, strict=True) if down]
        counts = [sum(t <= 0 for t in late), sum(t > 0 for t in late), sum(math.isnan(t) for t in late)]
        counts.append(sum(not down and not math.isnan(w) for w, down in zip(at, falls, strict=True)))
        lines.append([name, mean_auroc(past_peak(rows, i)), *map(str, counts)])
    lines.append([KL, mean_auroc(past_peak(rows, len(DETECTORS))), *"----"])
    return markdown(["", "AUROC", "warns in time", "warns later", "never warns", "warns without a fall"], lines)


def report(options: Options, rows: Sequence[Row], left: int) -> str:
    return f"""# Over-optimization by GRPO, with an exact gold

Written by `python experiments/overoptimization_grpo.py`. {status(rows, left)}

TRL's GRPO trains the policy `{options.policy.name}` for {options.grpo_steps} steps of 8 samples of 8 prompts against
each reward model of [best of n](overoptimization.md): learning rate {LR:g}, decreasing linearly to 0, and a KL weight
of {KL_WEIGHT:g}, so that over-optimization can show. Every {options.every} steps one sample of each of
{options.problems} held-out problems is measured; gold is the exact probability of the right solution.

## Arms

Means over seeds with 95% t-intervals; in brackets the difference from plain with the same labels, paired by seed and
problem, * where its interval over both excludes 0. A seed is that of the reward model and of GRPO.

{compared(rows, values_of)}

## Gold, KL and reward

{curves(rows)}

KL in nats per solution. The peak is found on one half of the problems and the change after it measured on the other,
both ways; 95% intervals over problems. The first step past the peak is the first one after the highest gold to which
such a change has an interval below 0.

![gold and proxy over KL]({options.report.name}.png)

## Detectors

Before the first step and after the last; in brackets the alarm, the greatest value on {DRAWS} draws of the policy's
samples of the same problems before GRPO ({STOP:g} for the early-stop indicator); then the first step above it.

{alarms(rows)}

AUROC for "gold is past its peak at this step", over the rows where gold falls; in how many of them the detector warns
up to the first step past the peak, later or never; and in how many others it warns. KL, which grows with nearly every
step, is what a detector must beat.

{warned(rows)}

## Claims of the InfoRM paper

{claims(rows, values_of, CLAIMS)}
"""


def save(options: Options, rows: Sequence[Row]) -> None:
    rows = write_rows(options.report, rows)
    write_aside(options.report.with_suffix(".md"), report(options, rows, len(missing(options, rows))))
    plot_overoptimization(
        {
            name_of(row): sorted((Point(*point) for point in row["points"]), key=lambda point: point.kl)
            for row in rows
            if row["seed"] == 0
        },
        options.report.with_suffix(".png"),
    )


# --------------------------------------------------------------------------------------------------------- the rows


def settings(options: Options) -> Row:
    """What rows of one report share."""
    names = ("problems", "references", "steps", "grpo_steps", "every", "prompts")
    return {"policy": options.policy.name, **{name: getattr(options, name) for name in names}}


def trained_policy(options: Options, proxy: Proxy, held_out: Sequence[Pair], seed: int) -> Meter:
    """Trains a policy against the proxy; what was measured on the way."""
    policy, start = (LlamaForCausalLM.from_pretrained(options.policy) for _ in range(2))
    writer = Policy.from_pretrained(options.policy, device="cpu")
    proxy.reward.ends = writer.stop_ids
    problems = dict.fromkeys(pair.prompt for pair in generate(4 * options.prompts, 0, DATA_SEED, 3)[0])
    records = [{"prompt": prompt} for prompt in [*problems][: options.prompts]]
    with tempfile.TemporaryDirectory() as scratch:
        meter = Meter(
            folder=Path(scratch) / "policy",
            start=start.eval(),
            tokenizer=writer.tokenizer,
            held_out=held_out,
            reward=proxy.reward,
            length=LENGTH,
            every=options.every,
        )
        meter.measure(policy, 0)
        grpo(
            policy,
            writer.tokenizer,
            proxy.reward,
            records,
            steps=options.grpo_steps,
            length=LENGTH,
            lr=LR,
            kl_weight=KL_WEIGHT,
            seed=seed,
            scratch=Path(scratch),
            callbacks=[meter],
        )
    return meter


def run(options: Options) -> None:
    """Raises UserError."""
    datasets.disable_progress_bars()
    bind(options.runs, {"policy": str(options.policy)})
    held_out = generate(0, options.problems + options.references, DATA_SEED, 3)[1]
    asked, others = held_out[: options.problems], [pair.prompt for pair in held_out[options.problems :]]
    texts, written = samples_of(options, [pair.prompt for pair in asked], others)
    draws = list(zip(*texts, strict=True))[:DRAWS]
    rows = read_rows(options.report, settings(options))
    for arm, flipped, seed in missing(options, rows):
        proxy = proxy_of(options, arm, flipped, seed, (others, written))
        named = {"arm": arm, "flipped": flipped, "seed": seed, **settings(options), "machine": machine()}
        meter = trained_policy(options, proxy, asked, seed)
        rows.append(named | measured(proxy.model, meter, draws, (others, written)))
        save(options, rows)
        print(f"{name_of(rows[-1])}: gold {meter.gold[0].mean():.3f} -> {meter.gold[-1].mean():.3f}", flush=True)
    save(options, rows)
    print(f"wrote {options.report}.md and {options.report}.json")


def main(argv: list[str] | None = None) -> int:
    return run_script("overoptimization_grpo.py", Options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
