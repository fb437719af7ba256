"""Which reward resists the best of n: a verifier, a judge that sees the truth, or a judge that sees the best of 4.

    python experiments/policies.py
    python experiments/policies.py --right 50 --hidden-size 128 --runs runs/policies-by-width/128
    python experiments/judges.py

The order of resistance to hacking that arXiv 2503.22230 reports for its rewards: verifiers (RTV), a generative reward
model (GenRM) with the true answer as reference, GenRM with the best of N imitated answers. Here each picks among the
policy's samples of held-out arithmetic problems; gold is whether a solution is right in every step, which is also the
verifier. A judge is a policy trained on to say which of two solutions is right, at two widths; the best of 4 samples is
that of the laboratory's plain reward model. Each reward and seed is a row of judges.json, written when it is finished;
a second call computes what is missing. Needs pip install 'gcrm-fast[trl,datasets]'.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
from transformers import AutoTokenizer, LlamaForCausalLM

import overoptimization as laboratory
from gcrm_fast import Policy, RewardModel
from gcrm_fast.common.command_line import run_script
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.options import Argument, AtLeastOne, Options, Range
from gcrm_fast.data.arithmetic import generate, is_correct
from gcrm_fast.evaluation.overoptimization import gains, sizes
from gcrm_fast.rlhf.generative import GenerativeJudge
from gcrm_fast.rlhf.trl import RewardFunction
from own_samples import own_pairs
from policies import fine_tune
from summary import bind, cell, machine, markdown, paired_difference, read_rows, save_rows, status, write_aside

HERE = Path(__file__).resolve().parent
TEMPLATE, VERDICTS = "{prompt}{first}?{second}?", ("a", "b")  # within the tokens and positions of the policies
OF_POLICY = 64  # width of --policy
WIDTHS = (OF_POLICY, 128)
REFERENCES = 4  # samples, the best of which is a reference
VERIFIER, REWARD, TRUTH, BEST = "verifier", "reward model", "judge, truth", f"judge, best of {REFERENCES}"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(Options):
    """Compares rewards by best of n; see the top of the script."""

    policy: Path = Path("runs/policies/right-50")
    """Folder of the policy that is sampled, as policies.py writes it."""
    widths: Path = Path("runs/policies-by-width")
    """Folder of the wider policy that judges start from, 128/NAME; NAME is that of --policy."""
    runs: Path = Path("runs/overoptimization")
    """Folder of samples and reward models, as overoptimization.py writes it, and of the judges."""
    seeds: AtLeastOne = 3
    """Judges per width."""
    steps: AtLeastOne = 600
    """Optimizer steps of each judge, of 64 verdicts each."""
    problems: Annotated[int, Range(least=2)] = 200
    """Number of held-out problems."""
    samples: Annotated[int, Range(least=2)] = 128
    """Number of samples of each problem to pick from."""
    report: Annotated[Path, Argument(short="-o", metavar="PATH")] = HERE / "judges"
    """Path of the report, without the suffixes .md and .json."""

    def laboratory(self) -> laboratory.Options:
        """Options of the script whose samples and reward models these are."""
        return laboratory.Options(policy=self.policy, runs=self.runs, problems=self.problems)


# ----------------------------------------------------------------------------------------------------------- judges


def verdict_texts(source: Path, seed: int) -> list[dict[str, str]]:
    """Questions and verdicts on the pairs of ``source``, the right solution first in half of them."""
    rng = random.Random(seed)
    texts = []
    for pair in map(json.loads, source.read_text(encoding="utf-8").splitlines()):
        right = rng.randrange(2)
        first, second = (pair["chosen"], pair["rejected"]) if right == 0 else (pair["rejected"], pair["chosen"])
        question = TEMPLATE.format(prompt=pair["prompt"], first=first, second=second)
        texts.append({"prompt": question, "completion": VERDICTS[right]})
    return texts


def judge_folder(options: JudgeOptions, width: int, seed: int) -> Path:
    """The folder of a judge, trained from the policy of that width where there is none."""
    folder = options.runs / f"judge-{width}-{seed}-{options.steps}"
    if not folder.exists():
        start = options.policy if width == OF_POLICY else options.widths / str(width) / options.policy.name
        if not start.is_dir():
            raise UserError(f"{start}: no such folder: train the policy of width {width} with policies.py")
        pairs = own_pairs(Policy.from_pretrained(options.policy, device="cpu"), options.runs / "pairs.jsonl")
        tokenizer, model = AutoTokenizer.from_pretrained(start), LlamaForCausalLM.from_pretrained(start)
        fine_tune(model, tokenizer, verdict_texts(pairs, seed), steps=options.steps, seed=seed)
        with written_aside(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return folder


# -------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Held-out problems with a right and a wrong solution, the policy's samples to pick from and those that references
    are chosen from, and gold [M] of the M samples of each."""

    prompts: list[str]
    right: list[str]
    wrong: list[str]
    texts: list[list[str]]
    imitated: list[list[str]]
    gold: list[np.ndarray]

    @staticmethod
    def of(options: JudgeOptions) -> "Problems":
        lab = options.laboratory()
        pairs = generate(0, lab.problems + lab.references, laboratory.DATA_SEED, 3)[1]
        prompts = [pair.prompt for pair in pairs]
        sampled, _ = laboratory.samples_of(lab, prompts[: lab.problems], prompts[lab.problems :])
        own = pairs[: lab.problems]
        texts = [samples[: options.samples] for samples in sampled]
        return Problems(
            prompts=prompts[: lab.problems],
            right=[pair.chosen for pair in own],
            wrong=[pair.rejected for pair in own],
            texts=texts,
            imitated=[samples[-REFERENCES:] for samples in sampled],
            gold=[np.array([float(is_correct(p, t)) for t in some]) for p, some in zip(prompts, texts, strict=False)],
        )


def picked(proxy: Sequence[np.ndarray], gold: Sequence[np.ndarray]) -> Row:
    """Gold [C, K] of the best of each n by ``proxy``, both of each sample of each problem."""
    gold_CK, _ = gains(proxy, gold, sizes(len(gold[0])))
    plain_C = np.array([own.mean() for own in gold])
    return {"gold": np.round(gold_CK + plain_C[:, None], 4).tolist()}


def best_of(model: RewardModel, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> list[str]:
    """Of each problem the text of the highest reward."""
    rewards = laboratory.rewards_of(RewardFunction(model), prompts, texts)
    return [own[int(r.argmax())] for own, r in zip(texts, rewards, strict=True)]


def judged(
    judge: GenerativeJudge, prompts: Sequence[str], texts: Sequence[Sequence[str]], references: Sequence[str]
) -> list[np.ndarray]:
    """Scores of the samples of each problem against its reference; equal samples are judged once."""
    distinct = [
        (p, text, r) for p, own, r in zip(prompts, texts, references, strict=True) for text in dict.fromkeys(own)
    ]
    values = dict(zip([one[:2] for one in distinct], judge.scores(*zip(*distinct, strict=True)), strict=True))
    return [np.array([values[p, text] for text in own]) for p, own in zip(prompts, texts, strict=True)]


# ----------------------------------------------------------------------------------------------------------- report


def at_end(rows: Sequence[Row], name: str) -> dict[int, np.ndarray]:
    """Gold of the best of the largest n by problem, by seed."""
    return {row["seed"]: np.array(row["gold"])[:, -1] for row in rows if row["reward"] == name}


def report(options: JudgeOptions, rows: Sequence[Row], left: int) -> str:
    names = [*dict.fromkeys(row["reward"] for row in rows)]
    n_K = sizes(options.samples)
    lines = []
    for name in names:
        own = [row for row in rows if row["reward"] == name]
        shown = [cell([float(np.array(row["gold"])[:, k].mean()) for row in own]) for k in range(len(n_K))]
        right = [row["in order"] for row in own if "in order" in row]
        lines.append([name, cell(right) if right else "-", *shown])
    seeds = sorted({row["seed"] for row in rows})
    ends = {name: at_end(rows, name) for name in names}
    ends[VERIFIER] = {seed: own for own in ends.get(VERIFIER, {}).values() for seed in seeds}
    compared = [
        [f"{better} - {worse}", paired_difference(ends[better], ends[worse])]
        for width in WIDTHS
        for better, worse in (
            (VERIFIER, f"{TRUTH}, width {width}"),
            (f"{TRUTH}, width {width}", f"{BEST}, width {width}"),
            (f"{BEST}, width {width}", REWARD),
        )
        if better in ends and worse in ends
    ]
    return f"""# Verifier, judge and reward model under best of n

Written by `python experiments/judges.py`. {status(rows, left)}

Share of right solutions among the best of n of {options.samples} samples of the policy `{options.policy.name}`, over
{options.problems} held-out problems; means over seeds with 95% t-intervals. A judge learns from {options.steps} steps
of 64 verdicts on the policy's samples of other problems; "in order" is how often it prefers the right solution of a
held-out pair.

{markdown(["", "in order", *(f"n = {n}" for n in n_K)], lines)}

Differences at n = {n_K[-1]}, paired by seed and problem, * where the 95% interval over both excludes 0:

{markdown(["", "difference"], compared)}
"""


def save(options: JudgeOptions, rows: Sequence[Row]) -> None:
    save_rows(options.report, rows)
    write_aside(options.report.with_suffix(".md"), report(options, rows, len(missing(options, rows))))


# --------------------------------------------------------------------------------------------------------- the rows


def settings(options: JudgeOptions) -> Row:
    """What rows of one report share."""
    names = ("problems", "samples", "steps")
    return {"policy": options.policy.name, **{name: getattr(options, name) for name in names}}


def missing(options: JudgeOptions, rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    """Kind, width (0 for none) and seed of the rewards that have no row."""
    there = {(row["reward"], row["seed"]) for row in rows}
    wanted = [(VERIFIER, 0, 0)]
    for seed in range(options.seeds):
        wanted += [(REWARD, 0, seed), *((kind, width, seed) for width in WIDTHS for kind in (TRUTH, BEST))]
    return [(kind, width, seed) for kind, width, seed in wanted if (name_of(kind, width), seed) not in there]


def name_of(kind: str, width: int) -> str:
    return f"{kind}, width {width}" if width else kind


def row_of(options: JudgeOptions, kind: str, width: int, seed: int, problems: Problems) -> Row:
    """What a reward's picks are worth."""
    if kind == VERIFIER:
        return picked(problems.gold, problems.gold)
    lab, prompts = options.laboratory(), problems.prompts
    model = RewardModel.from_pretrained(laboratory.train(lab, laboratory.PLAIN, 0, seed), device="cpu")
    if kind == REWARD:
        return picked(laboratory.rewards_of(RewardFunction(model), prompts, problems.texts), problems.gold)
    judge = GenerativeJudge(judge_folder(options, width, seed), template=TEMPLATE, verdicts=VERDICTS)
    references = problems.right if kind == TRUTH else best_of(model, prompts, problems.imitated)
    scores = judge.scores(prompts, problems.right, problems.wrong)
    in_order = {"in order": float(np.mean([score > 0.5 for score in scores]))}
    return in_order | picked(judged(judge, prompts, problems.texts, references), problems.gold)


def run(options: JudgeOptions) -> None:
    """Raises UserError."""
    datasets.disable_progress_bars()
    bind(options.runs, {"policy": str(options.policy)})
    problems = Problems.of(options)
    rows = read_rows(options.report, settings(options))
    jobs = missing(options, rows)
    for kind, width, seed in jobs:
        named = {"reward": name_of(kind, width), "seed": seed, **settings(options), "machine": machine()}
        rows.append(named | row_of(options, kind, width, seed, problems))
        save(options, rows)
        print(f"{named['reward']}, seed {seed}", flush=True)
    save(options, rows)
    print(f"wrote {options.report}.md and {options.report}.json")


def main(argv: list[str] | None = None) -> int:
    return run_script("judges.py", JudgeOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
