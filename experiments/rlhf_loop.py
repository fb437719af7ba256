"""The whole loop on arithmetic: preferences, a reward model, GRPO, and what the policy's samples teach next.

    make loop                                           # one seed: plain, hybrid, rlp-spg, rlp-uml
    make loop ARGS=--full                               # three seeds, also selection of prompts and the curriculum

A policy imitates right solutions until it solves a quarter of the held-out problems; a reward model learns from pairs;
TRL's GRPO trains the policy on prompts of its own. The arms differ in the reward, or in the prompts:

    plain        the reward model
    gcrm         a reward model that also has the contrastive loss; the reward is its score plus the Q of the end token
    hybrid       the verifier on half of the prompts, elsewhere the reward model against the best of 4 samples of the
                 imitating policy
    rlp-spg      plain, then gcrm synthesize on its samples, a reward model of all pairs, and GRPO again from the start
    rlp-uml      plain, then a reward model of the same pairs and its samples (gcrm train --on-policy), and GRPO again
    lowest-10    plain on the tenth of the prompts that gcrm select keeps; lowest-50: on half of them
    random-10    plain on a random tenth
    curriculum   plain, prompts of two steps first

Gold is exact: the probability of the right solution, every step of it, at temperature 1. Finished rows are kept in
rlhf_loop.json, and the same command continues with the others. Needs pip install 'gcrm-fast[trl,datasets]'.
"""

import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import numpy as np
from transformers import LlamaForCausalLM, TrainerCallback

from gcrm_fast import Policy, RewardModel, cli
from gcrm_fast.common.command_line import run_script
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import Argument, AtLeastOne, Options, Range
from gcrm_fast.common.statistics import auroc
from gcrm_fast.data.arithmetic import generate, is_correct
from gcrm_fast.data.records import Pair
from gcrm_fast.rlhf.trl import RewardFunction
from gcrm_fast.training.config import PRESETS
from grpo import grpo as train_policy
from policies import Options as PolicyOptions
from policies import chances, share_right
from policies import train as train_policies
from summary import (
    bind,
    cell,
    change,
    flags,
    machine,
    markdown,
    mean_interval,
    paired_difference,
    read_rows,
    save_rows,
    trained,
    verdict,
    write_aside,
)

HERE = Path(__file__).resolve().parent
PLAIN = "plain"
ARMS = (PLAIN, "hybrid", "rlp-spg", "rlp-uml")  # of make loop
RETRAINED = ("rlp-spg", "rlp-uml")
CLAIMS = (  # paper, the arm that it says is better, and than which
    ("GCRM", "gcrm", PLAIN),
    ("RLP", "rlp-spg", PLAIN),
    ("RLP", "rlp-uml", PLAIN),
    ("RLP", "rlp-spg", "rlp-uml"),
    ("Data scaling", "hybrid", PLAIN),
    ("Data scaling", "lowest-10", PLAIN),
    ("Data scaling", "lowest-10", "lowest-50"),
    ("Data scaling", "lowest-10", "random-10"),
    ("Data scaling", "curriculum", PLAIN),
)
SETTINGS = ("grpo_steps", "prompts", "train_pairs", "rm_steps", "right", "held_out")
STEPS = 2  # of a problem
LENGTH = 6 * STEPS + 2  # maximum tokens of a solution, one per character
SHAPE = (
    *("global_batch_pairs", "vocab_size", "hidden_size", "intermediate_size", "layers", "kv_heads", "head_size"),
    *("lr", "warmup", "weight_decay"),
)  # what the reward model takes from the arithmetic preset
UNLABELED = 3  # one problem in this many, by a hash of its text, is in no pair: a prompt of GRPO
SAMPLES = 10  # per prompt, as in RLP
REFERENCES = 4


Row = dict[str, Any]
Outcome = tuple[Path, Path, list[dict[str, float]], Row]  # policy, reward model, gold and reward by step, more of a row


@dataclass(frozen=True, kw_only=True)
class LoopOptions(Options):
    """Runs the loop; see the top of the script."""

    full: bool = False
    """Three seeds and all arms, instead of one seed of four arms."""
    runs: Path = Path("runs/rlhf-loop")
    """Folder of models and samples."""
    report: Annotated[Path, Argument(short="-o", metavar="PATH")] = HERE / "rlhf_loop"
    """Path of the report, without the suffixes .md and .json."""
    grpo_steps: AtLeastOne = 100
    """Optimizer steps of GRPO, of 8 prompts with 8 samples each."""
    prompts: Annotated[int, Range(least=20)] = 400
    """Number of prompts of GRPO."""
    train_pairs: AtLeastOne = 16_000
    """Preference pairs of the reward model."""
    rm_steps: AtLeastOne = 400
    """Optimizer steps of the reward model."""
    right: Annotated[int, Range(least=1, greatest=99)] = 25
    """Percentage of held-out problems that the imitating policy solves."""
    held_out: AtLeastOne = 300
    """Number of held-out problems."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What the arms of a seed share: problems, the imitating policy, and the reward model."""

    seed: int
    options: LoopOptions
    folder: Path
    prompts: list[str]
    held_out: list[Pair]
    policy: Path
    pairs: Path
    reward_model: Path
    ends: list[int]

    def reward(self, model: Path, q_weight: float = 0.0) -> RewardFunction:
        """Of a reward model alone; its Q-value too where ``q_weight`` is above 0."""
        return RewardFunction(model, ends=self.ends, q_weight=q_weight)


def lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    write_aside(path, "".join(json.dumps(record) + "\n" for record in records))
    return path


def command(name: str, *arguments: object) -> None:
    """``gcrm NAME ARGUMENTS``. Raises UserError where it fails."""
    if cli.run(name, [*map(str, arguments)]):
        raise UserError(f"gcrm {name} failed with the error above")


def reward_model(
    folder: Path,
    name: str,
    sources: Sequence[Path],
    seed: int,
    options: LoopOptions,
    on_policy: Path | None = None,
    objective: Literal["gcrm", "ranking"] = "ranking",
) -> Path:
    """Trained on the pairs of all sources, with the shape and learning rate of the arithmetic preset."""
    preset = {key: value for key, value in PRESETS["arithmetic"].items() if key in SHAPE}
    chosen = {**preset, "steps": options.rm_steps, "seed": seed, "eval_split": 0.02, "objective": objective}
    chosen |= {"dtype": "float32", **({"on_policy": on_policy} if on_policy else {})}
    return trained(folder / name, ["--data", *map(str, sources), *flags(chosen)])


def prepare(seed: int, options: LoopOptions) -> World:
    folder = options.runs / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    pairs, held_out = generate(2 * options.train_pairs, options.held_out, seed, STEPS)
    labeled = [pair for pair in pairs if zlib.crc32(pair.prompt.encode()) % UNLABELED][: options.train_pairs]
    unlabeled = dict.fromkeys(p.prompt for p in pairs if not zlib.crc32(p.prompt.encode()) % UNLABELED)
    data = lines(
        folder / "pairs.jsonl", [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in labeled]
    )
    policy = folder / "policies" / f"right-{options.right}"
    if not policy.is_dir():
        train_policies(
            PolicyOptions(
                right=(str(options.right),),
                runs=policy.parent,
                seed=seed,
                arithmetic_steps=STEPS,
                held_out=options.held_out,
            )
        )
    return World(
        seed=seed,
        options=options,
        folder=folder,
        prompts=list(unlabeled)[: options.prompts],
        ends=sorted(Policy.from_pretrained(policy, device="cpu").stop_ids),
        held_out=held_out,
        policy=policy,
        pairs=data,
        reward_model=reward_model(folder, "reward-model", [data], seed, options),
    )


# --------------------------------------------------------------------------------------------------------------- GRPO


class Gold(TrainerCallback):
    """The exact share of right solutions of held-out problems, every tenth of the run."""

    def __init__(self, world: World, tokenizer: Any) -> None:
        self.world, self.tokenizer = world, tokenizer
        self.every = max(1, world.options.grpo_steps // 10)
        self.gold: dict[int, float] = {}

    def measure(self, policy: Any, step: int) -> None:
        self.gold[step] = share_right(policy.eval(), self.tokenizer, self.world.held_out)
        policy.train()

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step % self.every == 0:
            self.measure(objects["model"], state.global_step)


def grpo(
    world: World, name: str, reward: RewardFunction, records: Sequence[dict[str, Any]], shuffle: bool = True
) -> tuple[Path, list[dict[str, float]]]:
    """Trains the imitating policy; its folder, and gold and reward by step."""
    folder = world.folder / name
    if (folder / "trajectory.json").exists():
        return folder, json.loads((folder / "trajectory.json").read_text())
    policy = LlamaForCausalLM.from_pretrained(world.policy)
    tokenizer = Policy.from_pretrained(world.policy, device="cpu").tokenizer
    gold = Gold(world, tokenizer)
    gold.measure(policy, 0)
    log = train_policy(
        policy,
        tokenizer,
        reward,
        records,
        steps=world.options.grpo_steps,
        length=LENGTH,
        lr=3e-4,
        kl_weight=0.1,
        seed=world.seed,
        scratch=world.folder / "scratch",
        callbacks=[gold],
        shuffle=shuffle,
    )
    rewards = [row["rewards/gcrm/mean"] for row in log if "rewards/gcrm/mean" in row]
    near = [rewards[max(0, step - gold.every) : max(1, step)] for step in gold.gold]
    rows = [
        {"step": step, "gold": value, "reward": float(np.mean(own))}
        for (step, value), own in zip(gold.gold.items(), near, strict=True)
    ]
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_aside(folder / "trajectory.json", json.dumps(rows))
    return folder, rows


def samples_of(policy: Path, prompts: Sequence[str], each: int, seed: int) -> list[dict[str, Any]]:
    """Records of gcrm synthesize and select."""
    writer = Policy.from_pretrained(policy, device="cpu")
    asked = writer.encode([prompt for prompt in prompts for _ in range(each)])
    ids = writer.generate_ids(asked, max_new_tokens=LENGTH, temperature=1.0, seed=seed)
    texts = [str(writer.tokenizer.decode(one, skip_special_tokens=True)) for one in ids]
    cuts = [one[-1] not in writer.stop_ids for one in ids]
    parts = [slice(each * i, each * (i + 1)) for i in range(len(prompts))]
    return [
        {"prompt": prompt, "completions": texts[own], "completions_cut": cuts[own]}
        for prompt, own in zip(prompts, parts, strict=True)
    ]


# --------------------------------------------------------------------------------------------------------------- arms


def plain(world: World) -> Outcome:
    policy, rows = grpo(world, "plain", world.reward(world.reward_model), [{"prompt": p} for p in world.prompts])
    return policy, world.reward_model, rows, {}


def gcrm(world: World) -> Outcome:
    own = reward_model(world.folder, "reward-model-gcrm", [world.pairs], world.seed, world.options, objective="gcrm")
    policy, rows = grpo(world, "gcrm", world.reward(own, q_weight=1.0), [{"prompt": p} for p in world.prompts])
    return policy, own, rows, {}


def hybrid(world: World) -> Outcome:
    checked = world.prompts[::2]
    others = samples_of(world.policy, world.prompts[1::2], REFERENCES, world.seed)
    records: list[dict[str, Any]] = [{"prompt": p, "task": "sums", "reference_completions": None} for p in checked]
    records += [{"prompt": one["prompt"], "task": None, "reference_completions": one["completions"]} for one in others]
    reward = RewardFunction(verifiers={"sums": "arithmetic"}, otherwise=world.reward_model, ends=world.ends)
    policy, rows = grpo(world, "hybrid", reward, records)
    return policy, world.reward_model, rows, {}


def rlp_spg(world: World) -> Outcome:
    first, *_ = plain(world)
    sampled = lines(world.folder / "spg-samples.jsonl", samples_of(first, world.prompts, SAMPLES, world.seed))
    pairs = world.folder / "spg-pairs.jsonl"
    command("synthesize", world.reward_model, sampled, "--verifier", "arithmetic", "-o", pairs)
    retrained = reward_model(world.folder, "reward-model-spg", [world.pairs, pairs], world.seed, world.options)
    policy, rows = grpo(world, "rlp-spg", world.reward(retrained), [{"prompt": p} for p in world.prompts])
    about = json.loads(pairs.with_name(pairs.name + ".json").read_text())
    shown = {name: about[name] for name in ("coverage", "outcomes", "accuracy", "tokens")}
    return policy, retrained, rows, {"spg": shown, "retrained": before_and_after(world, first, retrained)}


def rlp_uml(world: World) -> Outcome:
    first, *_ = plain(world)
    sampled = lines(world.folder / "uml-samples.jsonl", samples_of(first, world.prompts, SAMPLES, world.seed))
    retrained = reward_model(world.folder, "reward-model-uml", [world.pairs], world.seed, world.options, sampled)
    policy, rows = grpo(world, "rlp-uml", world.reward(retrained), [{"prompt": p} for p in world.prompts])
    return policy, retrained, rows, {"retrained": before_and_after(world, first, retrained)}


def before_and_after(world: World, first: Path, retrained: Path) -> dict[str, float]:
    """AUROC of both reward models on samples of the ``first`` policy, of held-out problems."""
    records = samples_of(first, [pair.prompt for pair in world.held_out], 4, world.seed + 7)
    return {"auroc_before": auroc_on(world.reward_model, records), "auroc_after": auroc_on(retrained, records)}


def selected(world: World, keep: float) -> Outcome:
    own = samples_of(world.policy, world.prompts, SAMPLES, world.seed)
    others = samples_of(world.policy, world.prompts, REFERENCES, world.seed + 1)
    records = [{**one, "reference_completions": other["completions"]} for one, other in zip(own, others, strict=True)]
    name = f"lowest-{round(100 * keep)}"
    output = world.folder / f"{name}.jsonl"
    sampled = lines(world.folder / f"{name}-samples.jsonl", records)
    command("select", sampled, "--model", world.reward_model, "--keep", keep, "-o", output)
    kept = [{"prompt": json.loads(line)["prompt"]} for line in output.read_text().splitlines()]
    policy, rows = grpo(world, name, world.reward(world.reward_model), kept)
    return policy, world.reward_model, rows, {"prompts": len(kept)}


def random_tenth(world: World) -> Outcome:
    drawn = np.random.default_rng(world.seed).permutation(len(world.prompts))[: len(world.prompts) // 10]
    records = [{"prompt": world.prompts[i]} for i in drawn.tolist()]
    policy, rows = grpo(world, "random-10", world.reward(world.reward_model), records)
    return policy, world.reward_model, rows, {"prompts": len(records)}


def early_hard(world: World) -> Outcome:
    hard = [p for p in world.prompts if p.count("+") == STEPS]
    rng = np.random.default_rng(world.seed)
    half = 8 * world.options.grpo_steps // 2
    order = [hard[i] for i in rng.integers(len(hard), size=half)]
    order += [world.prompts[i] for i in rng.integers(len(world.prompts), size=half)]
    records = [{"prompt": prompt} for prompt in order]
    policy, rows = grpo(world, "curriculum", world.reward(world.reward_model), records, shuffle=False)
    return policy, world.reward_model, rows, {}


Arm = Callable[[World], Outcome]
RUN: dict[str, Arm] = {
    "plain": plain,
    "gcrm": gcrm,
    "hybrid": hybrid,
    "rlp-spg": rlp_spg,
    "rlp-uml": rlp_uml,
    "lowest-10": lambda world: selected(world, 0.1),
    "lowest-50": lambda world: selected(world, 0.5),
    "random-10": random_tenth,
    "curriculum": early_hard,
}


# ------------------------------------------------------------------------------------------------------------ numbers


def auroc_on(model: Path, records: Sequence[dict[str, Any]]) -> float:
    """How well a reward model separates right from wrong samples; NaN where all are alike."""
    prompts = [one["prompt"] for one in records for _ in one["completions"]]
    texts = [text for one in records for text in one["completions"]]
    right_N = np.array([is_correct(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])
    return auroc(right_N, RewardModel.from_pretrained(model, device="cpu").score(prompts, texts))


def gold_of(policy: Path, held_out: Sequence[Pair]) -> np.ndarray:
    """The exact probability of each held-out problem's right solution."""
    return chances(
        LlamaForCausalLM.from_pretrained(policy), Policy.from_pretrained(policy, device="cpu").tokenizer, held_out
    )


def row_of(world: World, arm: str) -> Row:
    policy, model, trajectory, more = RUN[arm](world)
    records = samples_of(policy, [pair.prompt for pair in world.held_out], 8, world.seed + 7)
    entropies = []
    for one in records:
        shares = np.array(list(Counter(one["completions"]).values())) / len(one["completions"])
        entropies.append(float(-(shares * np.log2(shares)).sum()))
    return {
        "arm": arm,
        "seed": world.seed,
        **settings(world.options),
        "machine": machine(),
        "trajectory": trajectory,
        "distinct": float(np.mean([len(set(one["completions"])) for one in records])),
        "entropy": float(np.mean(entropies)),
        "auroc_on_own_samples": auroc_on(model, records),
        **more,
        "gold": np.round(gold_of(policy, world.held_out), 4).tolist(),
    }


# ------------------------------------------------------------------------------------------------------------- report


def difference(rows: Sequence[Row], arm: str, base: str) -> str:
    """Of gold after GRPO, paired by seed and problem."""
    own, other = ({row["seed"]: np.array(row["gold"]) for row in rows if row["arm"] == one} for one in (arm, base))
    return paired_difference(own, other)


def compared(rows: Sequence[Row]) -> str:
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        lines.append([arm, str(len(own)), cell([row["trajectory"][0]["gold"] for row in own])])
        lines[-1] += [cell([float(np.mean(row["gold"])) for row in own])]
        lines[-1] += ["" if arm == PLAIN else difference(rows, arm, PLAIN)]
        lines[-1] += [cell([row[name] for row in own]) for name in ("distinct", "entropy", "auroc_on_own_samples")]
    head = ["", "seeds", "gold before", "gold after", "less plain", "distinct of 8", "entropy, bits"]
    return markdown([*head, "AUROC on its samples"], lines)


def over_steps(rows: Sequence[Row]) -> str:
    """Reward and gold of each row, at up to six steps."""
    last = len(rows[0]["trajectory"]) - 1
    shown = sorted({round(i * last / 5) for i in range(6)})
    points = [[row["trajectory"][i] for i in shown] for row in rows]
    head = ["", "seed", *(f"step {point['step']}" for point in points[0])]
    lines = [
        [row["arm"], str(row["seed"]), *(f"{point['reward']:.2f} / {point['gold']:.3f}" for point in own)]
        for row, own in zip(rows, points, strict=True)
    ]
    return markdown(head, lines)


def learned(rows: Sequence[Row]) -> str:
    """What retraining on the policy's samples did to the reward model."""
    lines = []
    for row in rows:
        if row["arm"] in RETRAINED:
            about, spg = row["retrained"], row.get("spg")
            lines.append([row["arm"], str(row["seed"])])
            lines[-1] += [f"{about[name]:.3f}" for name in ("auroc_before", "auroc_after")]
            lines[-1] += ["", "", ""] if spg is None else synthetic(spg)
    head = [
        "",
        "seed",
        "AUROC before",
        "AUROC after",
        "coverage",
        "pairs that are right",
        "tokens, chosen and rejected",
    ]
    return markdown(head, lines)


def synthetic(about: dict[str, Any]) -> list[str]:
    """Coverage, accuracy and lengths of synthetic pairs, as gcrm synthesize wrote them."""
    tokens = about["tokens"]
    return [
        f"{about['coverage']:.0%}",
        f"{about['accuracy']['pairs']['share']:.0%}",
        f"{tokens['chosen']:.1f}, {tokens['rejected']:.1f}",
    ]


def claims(rows: Sequence[Row]) -> str:
    said = []
    for paper, arm, base in CLAIMS:
        if {arm, base} <= {row["arm"] for row in rows}:
            said.append(
                f"- {paper}: gold after {arm} is higher than after {base}: {verdict(difference(rows, arm, base))}."
            )
    for arm in RETRAINED:
        about = {row["seed"]: row["retrained"] for row in rows if row["arm"] == arm}
        gains = [one["auroc_after"] - one["auroc_before"] for one in about.values()]
        told = verdict(change(*mean_interval(gains)) if gains else "-")
        said.append(f"- RLP: {arm} separates right from wrong samples of the new policy better, AUROC: {told}.")
    return "\n".join(said)


def report(options: LoopOptions, rows: Sequence[Row]) -> str:
    wanted = [(seed, arm) for seed in range(3) for arm in RUN]
    left = len(set(wanted) - {(row["seed"], row["arm"]) for row in rows})
    still = f"{left} rows of three seeds and all arms are missing: the same with `ARGS=--full` adds them."
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    return f"""# The loop on arithmetic

Written by `make loop`. {still if left else "Every row is finished."} Machines: {machines}.

A policy that imitates solutions until {options.right}% of its samples are right; a reward model that learned from
{options.train_pairs} pairs in {options.rm_steps} steps; {options.grpo_steps} steps of GRPO, 8 samples of each of 8
prompts, on {options.prompts} prompts without labels. The [script](rlhf_loop.py) explains the arms. Gold is the exact
probability of the right solution, over {options.held_out} held-out problems.

## Arms

Means over seeds with 95% t-intervals. The difference from plain is paired by seed and problem, with * where its
interval over both excludes 0. AUROC: right from wrong samples of the policy after GRPO, by the arm's reward model.

{compared(rows)}

## Reward and gold over the steps

Mean reward of the samples of the steps before (at 0 of the first step) / gold after the step.

{over_steps(rows)}

## Learning on policy

AUROC on samples of the plain arm's policy, of held-out problems, before and after the reward model learned from its
samples.

{learned(rows)}

## Claims

Of the papers, each by a difference with its 95% interval; of so many, one may be marked by chance.

{claims(rows)}
"""


# --------------------------------------------------------------------------------------------------------------- rows


def settings(options: LoopOptions) -> Row:
    """What rows of one report share."""
    return {name: getattr(options, name) for name in SETTINGS}


def run(options: LoopOptions) -> None:
    datasets.disable_progress_bars()
    path = options.report
    rows = read_rows(path, settings(options))
    bind(options.runs, settings(options))
    for seed in range(3 if options.full else 1):
        for arm in RUN if options.full else ARMS:
            if any((row["seed"], row["arm"]) == (seed, arm) for row in rows):
                continue
            row = row_of(prepare(seed, options), arm)
            rows.append(row)
            rows.sort(key=lambda row: (list(RUN).index(row["arm"]), row["seed"]))
            save_rows(path, rows)
            write_aside(path.with_suffix(".md"), report(options, rows))
            print(f"seed {seed}, {arm}: gold {np.mean(row['gold']):.3f}", flush=True)
    write_aside(path.with_suffix(".md"), report(options, rows))


def main(argv: list[str] | None = None) -> int:
    return run_script("rlhf_loop.py", LoopOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
