"""Does live Q help on real text? SmolLM2 answers questions of Anthropic's HH, steered by reward models of HH pairs.

    make real-model
    python experiments/live_text.py                    # needs GCRM_DATA; hours on two cores

The dialogues of the helpful subsets are split into halves by their first question. Reward models with the contrastive
loss, one per seed, learn from one half and steer; another, with the ranking loss and another seed, learns from the
other half and judges every answer. The judge never steers. Each finished row is kept in live_text.json at once, and a
second call continues with what is missing. Writes live_text.md (tables) and live_text.json (every question).
"""

import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from gcrm_fast import Policy, RewardModel
from gcrm_fast.common.command_line import run_script
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import Argument, AtLeastOne, Range
from gcrm_fast.common.options import Options as CommandOptions
from gcrm_fast.inference.decoding import Result, Text, decode
from gcrm_fast.inference.generation import Sampling
from gcrm_fast.inference.judging import Goals
from gcrm_fast.inference.methods import Method
from labeled_sets import read_lines
from live import best_of, difference
from summary import (
    bind,
    cell,
    data_folder,
    flags,
    machine,
    markdown,
    read_rows,
    save_rows,
    status,
    trained,
    write_aside,
)

HERE = Path(__file__).resolve().parent
TRAIN, TEST = "hh_pairs_train.jsonl.gz", "hh_pairs_test.jsonl.gz"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
LONGEST = 300  # characters of a question that is answered
TURNS = 2  # maximum number of questions of a dialogue that is trained on
SAMPLES = 8
SIZES = (1, 2, 3, 4, 6, 8)  # samples of which the best is taken
STEP = 16  # tokens
BEAMS = Method(kind="beams", beams=2, per_beam=SAMPLES // 2, step_tokens=STEP)
ARMS: dict[str, Method] = {
    "filter, Q < 0": Method(kind="filter", samples=SAMPLES, threshold=0.0, every=4),
    "reject by halves": Method(kind="reject", samples=SAMPLES, checkpoints=(STEP, 2 * STEP), every=0),
    "beams, alpha 0": replace(BEAMS, alpha=0.0),
    "beams, alpha 1": replace(BEAMS, alpha=1.0),
    "beams, alpha 4": replace(BEAMS, alpha=4.0),
}
CONTROLS = ("reject by halves", "beams, alpha 4")
SHUFFLED = ", shuffled goal"
UNSTEERED = "samples"
WANTED = {**ARMS, **{name + SHUFFLED: ARMS[name] for name in CONTROLS}}
JUDGE_SEED = 100
JUDGE = "hh-judge"  # names of folders
SETTINGS = ("model", "train_layers", "pairs", "judge_pairs", "questions", "new_tokens", "lr")

Row = dict[str, Any]
Dialogue = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Compares methods of generation on real questions; see the top of the script."""

    data: str = ""
    """Folder of the data; default: GCRM_DATA."""
    model: str = "runs/smollm2"
    """Folder of the pretrained model: the policy, and the start of all reward models."""
    runs: Path = Path("runs/live_text")
    """Folder of the reward models."""
    train_layers: AtLeastOne = 10
    """Number of top layers that the reward models train."""
    pairs: AtLeastOne = 640
    """Pairs of each steering reward model."""
    judge_pairs: AtLeastOne = 1280
    """Pairs of the judge."""
    lr: Annotated[float, Range(above=0)] = 2e-4
    """Peak learning rate of the reward models."""
    questions: Annotated[int, Range(least=2)] = 24
    """Number of held-out questions to answer."""
    new_tokens: Annotated[int, Range(least=3 * STEP)] = 64
    """Maximum tokens of an answer."""
    seeds: AtLeastOne = 3
    """Number of steering reward models."""
    report: Annotated[Path, Argument(short="-o", metavar="PATH")] = HERE / "live_text"
    """Path of the report, without the suffixes .md and .json."""


# ------------------------------------------------------------------------------------------------------------- data


def messages_of(text: str) -> Dialogue:
    """The turns of an HH prompt, which starts with a human's turn and ends where the assistant's begins."""
    turns = text.removesuffix(ASSISTANT).split(HUMAN)[1:]
    dialogue: Dialogue = []
    for turn in turns:
        question, marker, answer = turn.partition(ASSISTANT)
        dialogue.append({"role": "user", "content": question.strip()})
        if marker:
            dialogue.append({"role": "assistant", "content": answer.strip()})
    return dialogue


def answer_of(text: str) -> Dialogue:
    return [{"role": "assistant", "content": text.strip()}]


def half_of(dialogue: Dialogue) -> int:
    """0 or 1, by the first question: a question is in one half alone."""
    return zlib.crc32(dialogue[0]["content"].encode()) % 2


def helpful(path: Path) -> list[Row]:
    """Records of the helpful subsets with prompt, chosen and rejected as messages, shuffled the same at every call."""
    records = [json.loads(line) for line in read_lines(path)]
    records = [record for record in records if record["kind"] == "helpful"]
    order = np.random.default_rng(0).permutation(len(records))
    found = []
    for record in (records[i] for i in order):
        one = {"prompt": messages_of(record["prompt"])}
        one |= {name: answer_of(record[name]) for name in ("chosen", "rejected")}
        if all(turn["content"] for turn in [*one["prompt"], *one["chosen"], *one["rejected"]]):
            found.append(one)
    return found


def pairs_of(folder: Path, half: int, count: int, path: Path) -> Path:
    """A file of ``count`` pairs of one half. Raises UserError where there are fewer."""
    own = [one for one in helpful(folder / TRAIN) if half_of(one["prompt"]) == half]
    own = [one for one in own if len(one["prompt"]) < 2 * TURNS][:count]
    if len(own) < count:
        raise UserError(f"{folder / TRAIN}: half {half} has {len(own)} pairs, fewer than {count}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, "".join(json.dumps(one) + "\n" for one in own))
    return path


def questions_of(folder: Path, count: int) -> list[Dialogue]:
    """Held-out questions that start a dialogue, each once."""
    first = [one["prompt"] for one in helpful(folder / TEST) if len(one["prompt"]) == 1]
    texts = dict.fromkeys(prompt[0]["content"] for prompt in first)
    return [[{"role": "user", "content": text}] for text in texts if len(text) <= LONGEST][:count]


def reward_model(options: Options, name: str, seed: int, *, half: int, count: int, objective: str) -> RewardModel:
    """Trained on pairs of the half, unless its folder is there."""
    data = pairs_of(data_folder(options.data), half, count, options.runs / f"{name}.jsonl")
    values: dict[str, Any] = {
        "model": options.model,
        "data": data,
        "seed": seed,
        "objective": objective,
        "train-layers": options.train_layers,
        "lr": options.lr,
        "epochs": 1,
        "eval-split": 0.1,
        "global-batch-pairs": 16,
        "max-length": 512,
        "goal-pairs": 256,
        "template-date": "2026-01-01",
    }
    if objective != "ranking":
        values["sampling"] = "end_mix"
    return RewardModel.from_pretrained(trained(options.runs / f"{name}-{seed}", [*flags(values), "--cache-states"]))


# -------------------------------------------------------------------------------------------------------- measuring


def written(
    options: Options, policy: Policy, questions: Sequence[Dialogue], method: Method, **more: Any
) -> list[Result]:
    """The result of each question. The samples' random numbers are the same for all reward models."""
    sampling = Sampling(max_new_tokens=options.new_tokens, temperature=1.0, top_p=0.95)
    found = {}
    for one in decode(policy, questions, method=method, sampling=sampling, **more):
        if isinstance(one, Result):
            found[one.prompt] = one
    return [found[i] for i in range(len(questions))]


def scores_of(model: RewardModel, questions: Sequence[Dialogue], texts: Sequence[str]) -> list[float]:
    """The reward of each text, one per question; of a text without words the least of the others."""
    kept = [i for i, text in enumerate(texts) if text.strip()]
    rewards = model.score([questions[i] for i in kept], [answer_of(texts[i]) for i in kept]).tolist()
    values = dict(zip(kept, rewards, strict=True))
    return [round(values.get(i, min(rewards, default=0.0)), 4) for i in range(len(texts))]


def of_samples(steering: RewardModel, judge: RewardModel, questions: Sequence[Dialogue], pool: list[list[Text]]) -> Row:
    """What the best of k samples gives, and the scale of the judge's rewards."""
    repeated = [question for question, own in zip(questions, pool, strict=True) for _ in own]
    texts = [one.text for own in pool for one in own]
    rewards_QN, judged_QN = (
        np.reshape(scores_of(model, repeated, texts), (len(pool), -1)) for model in (steering, judge)
    )
    order_QN = np.argsort(rewards_QN, axis=1)
    concordant = [np.corrcoef(a, b)[0, 1] for a, b in zip(rewards_QN, judged_QN, strict=True) if a.std() and b.std()]
    return {
        "best": [
            [round(best_of(own.tolist(), judged.tolist(), k), 4) for k in SIZES]
            for own, judged in zip(rewards_QN, judged_QN, strict=True)
        ],
        "spread": float(judged_QN.std()),
        "agreement": float(np.mean(concordant)),
        "length": float(np.mean([len(one.ids) for own in pool for one in own])),
        "answer_tokens": float(np.mean([len(pool[i][order_QN[i, -1]].ids) for i in range(len(pool))])),
    }


def of_method(judge: RewardModel, questions: Sequence[Dialogue], results: Sequence[Result]) -> Row:
    return {
        "judged": scores_of(judge, questions, [result.text for result in results]),
        "tokens": [result.policy_tokens for result in results],
        "reward_tokens": [result.reward_tokens for result in results],
        "answer_tokens": float(np.mean([len(result.texts[result.chosen].ids) for result in results])),
    }


# ----------------------------------------------------------------------------------------------------------- report


def at_tokens(samples: Row, tokens: float) -> np.ndarray:
    """The judge's reward [Q] of the best of as many samples as have these tokens on average."""
    return np.array([np.interp(tokens / samples["length"], SIZES, best) for best in samples["best"]])


def less(own: Mapping[int, np.ndarray], base: Mapping[int, np.ndarray]) -> str:
    """The mean difference over the seeds of both and the questions."""
    seeds = sorted(own.keys() & base.keys())
    return difference(np.stack([own[seed] - base[seed] for seed in seeds])) if seeds else "-"


def table(rows: Sequence[Row]) -> str:
    """Each method by seed and question, in units of the judge's standard deviation over samples."""
    samples = {row["seed"]: row for row in rows if row["arm"] == UNSTEERED}
    lines = []
    for arm in WANTED:
        own = {row["seed"]: row for row in rows if row["arm"] == arm and row["seed"] in samples}
        if not own:
            continue
        judged, one, best = {}, {}, {}
        for seed, row in own.items():
            spread = samples[seed]["spread"]
            judged[seed] = np.array(row["judged"]) / spread
            one[seed] = at_tokens(samples[seed], 0) / spread
            best[seed] = at_tokens(samples[seed], float(np.mean(row["tokens"]))) / spread
        control = {row["seed"]: row for row in rows if row["arm"] == arm + SHUFFLED and row["seed"] in samples}
        shuffled = {seed: np.array(row["judged"]) / samples[seed]["spread"] for seed, row in control.items()}
        lines.append([arm, str(len(own))])
        lines[-1] += [f"{np.mean([row[name] for row in own.values()]):.0f}" for name in ("tokens", "reward_tokens")]
        lines[-1] += [f"{np.mean([row['answer_tokens'] for row in own.values()]):.0f}"]
        lines[-1] += [less(judged, other) for other in (one, best, shuffled)]
    head = ["", "seeds", "policy tokens", "reward model tokens", "answer tokens"]
    return markdown([*head, "less one sample", "less best-of-n of as many tokens", "less shuffled goal"], lines)


def best_of_n(rows: Sequence[Row]) -> str:
    """The gain of the best of k samples over one, by the judge."""
    samples = [row for row in rows if row["arm"] == UNSTEERED]
    if not samples:
        return "-"
    gain_SQK = np.stack([np.array(row["best"]) / row["spread"] for row in samples])
    gain_SQK -= gain_SQK[:, :, :1]
    line = [difference(gain_SQK[:, :, i]) for i in range(1, len(SIZES))]
    return markdown(["samples", *map(str, SIZES[1:])], [["less one sample", *line]])


def report(options: Options, rows: Sequence[Row]) -> str:
    samples = [row for row in rows if row["arm"] == UNSTEERED]
    wanted = {(arm, seed) for arm in (UNSTEERED, *WANTED) for seed in range(options.seeds)}
    left = len(wanted - {(row["arm"], row["seed"]) for row in rows})
    held_out = cell([row["accuracy"] for row in samples])
    return f"""# Q while SmolLM2 answers real questions

Written by `python experiments/live_text.py`. {status(rows, left)}

`{options.model}` answers {options.questions} held-out questions of HH's helpful subsets with up to
{options.new_tokens} tokens, temperature 1, top-p 0.95. It is steered by reward models with the contrastive loss (top
{options.train_layers} layers, {options.pairs} pairs of one half of the questions, `--sampling end_mix`); on a tenth of
their own pairs, not trained on, {held_out} are in order. Another one (ranking loss, {options.judge_pairs} pairs of the
other half, another seed) judges: {cell([row["judge_accuracy"] for row in samples[:1]])} of its own. Within a question
its rewards of {SAMPLES} samples have a correlation of {cell([row["agreement"] for row in samples])} with those of a
steering model.

Differences of the judge's reward, in units of its standard deviation over samples; the 95% interval is over seeds and
questions (over questions alone with one seed), * where it excludes 0. A longer answer may please the judge: a sample
has {np.mean([row["length"] for row in samples]):.0f} tokens on average, the one of {SAMPLES} with the greatest reward
{np.mean([row["answer_tokens"] for row in samples]):.0f}.

## Best of n

{best_of_n(rows)}

## While the text is written

All methods start from {SAMPLES} samples or keep as many beams; best-of-n is interpolated in n.

{table(rows)}
"""


# ------------------------------------------------------------------------------------------------------------- rows


def settings(options: Options) -> Row:
    """What rows of one report share."""
    return {name: getattr(options, name) for name in SETTINGS}


def accuracy(folder: Path) -> float:
    """Of the pairs that a run held out, at its end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return float([line["eval/accuracy"] for line in lines if "eval/accuracy" in line][-1])


def save(options: Options, rows: list[Row]) -> None:
    order = [UNSTEERED, *WANTED]
    rows.sort(key=lambda row: (order.index(row["arm"]), row["seed"]))
    save_rows(options.report, rows)
    write_aside(options.report.with_suffix(".md"), report(options, rows))


def run(options: Options) -> None:
    """Raises UserError."""
    rows = read_rows(options.report, settings(options))
    questions = questions_of(data_folder(options.data), options.questions)
    if len(questions) < options.questions:
        raise UserError(f"--questions {options.questions}: there are {len(questions)}")
    bind(options.runs, {"model": options.model, "pairs": options.pairs, "judge_pairs": options.judge_pairs})
    policy = Policy.from_pretrained(options.model)
    judge = reward_model(options, JUDGE, JUDGE_SEED, half=1, count=options.judge_pairs, objective="ranking")
    pool: list[list[Text]] = []
    for seed in range(options.seeds):
        todo = [arm for arm in (UNSTEERED, *WANTED) if (arm, seed) not in {(row["arm"], row["seed"]) for row in rows}]
        if not todo:
            continue
        steering = reward_model(options, "hh-steering", seed, half=0, count=options.pairs, objective="gcrm")
        goals = Goals.of([(steering.goal(), 1.0)])
        for arm in todo:
            named = {"arm": arm, "seed": seed, **settings(options), "machine": machine()}
            if arm == UNSTEERED:
                if not pool:
                    plain = written(options, policy, questions, Method(kind="sample", samples=SAMPLES))
                    pool = [list(result.texts) for result in plain]
                named["accuracy"] = accuracy(options.runs / f"hh-steering-{seed}")
                named["judge_accuracy"] = accuracy(options.runs / f"{JUDGE}-{JUDGE_SEED}")
                named |= of_samples(steering, judge, questions, pool)
            else:
                own = goals.shuffled(seed) if arm.endswith(SHUFFLED) else goals
                results = written(options, policy, questions, WANTED[arm], reward=steering, goals=own)
                named |= of_method(judge, questions, results)
            rows.append(named)
            save(options, rows)
            print(f"seed {seed}: {arm}", flush=True)
    save(options, rows)
    print(f"wrote {options.report}.md and {options.report}.json")


def main(argv: list[str] | None = None) -> int:
    return run_script("live_text.py", Options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
