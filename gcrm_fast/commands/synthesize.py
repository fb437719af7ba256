"""``gcrm synthesize``: preference pairs from samples of a policy without labels."""

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from gcrm_fast.commands.options import SynthesizeOptions
from gcrm_fast.commands.output import companion
from gcrm_fast.commands.shared import check_left, load
from gcrm_fast.commands.windows import Row, worked
from gcrm_fast.common.errors import UserError, printable
from gcrm_fast.common.files import output_file, written_aside
from gcrm_fast.common.json_lines import json_line, write_lines
from gcrm_fast.common.tables import number
from gcrm_fast.data.records import parse_columns
from gcrm_fast.data.samples import FORMATS, Samples, read_samples
from gcrm_fast.data.sources import STDIN, BadRecords
from gcrm_fast.inference.scoring import RewardModel
from gcrm_fast.rlhf.entailment import Entailment
from gcrm_fast.rlhf.samples import encode_samples, task_of, verdicts
from gcrm_fast.rlhf.synthesis import PAIR, Accuracy, Outcome, accuracy, by_answer, synthesized
from gcrm_fast.rlhf.verifiers import WITHOUT_REFERENCE, Verifiers, parse_verifiers, plain


def read(options: SynthesizeOptions) -> list[Samples]:
    """The samples, which must have answers where nothing else clusters them. Bad records count as such."""
    bad, by_task = BadRecords(skip=options.on_bad_record == "skip"), parse_verifiers(options.verifier)
    found: list[Samples] = []
    for samples in read_samples(options.data, columns=parse_columns(options.columns, FORMATS), bad=bad):
        if options.entailment or samples.answers is not None or task_of(samples, by_task) is not None:
            found.append(samples)
        else:
            what = "field 'answers' is missing, and no --verifier is for its task: pass one that reads the answers"
            bad.add(UserError(f"{samples.where}: {what}, or --entailment"))
    check_left(len(found), bad, options.data)
    return found


def clusters_of(samples: Samples, verifiers: Verifiers, entailment: Entailment | None) -> tuple[list[int], int]:
    """The cluster of each sample, and the number of answers that cannot be read."""
    if entailment is not None:
        return entailment.clusters(plain(samples.prompt), [plain(text) for text in samples.completions]), 0
    answers, task = samples.answers, task_of(samples, verifiers.by_task)
    if answers is None:
        assert task is not None  # read() has seen to it
        answers = [verifiers.read(task, samples.prompt, text) for text in samples.completions]
    return by_answer(answers), answers.count(None)


def judged(samples: Samples, verifiers: Verifiers) -> list[float] | None:
    """What a verifier or labels say of each sample, where they can: most verifiers need the right answer."""
    task = task_of(samples, verifiers.by_task)
    if task is not None and samples.reference is None and verifiers.by_task[task] != WITHOUT_REFERENCE:
        return None
    found = verdicts(samples, verifiers)
    return None if found is None else [one.score for one in found]


def work_window(
    window: Sequence[Samples], model: RewardModel, verifiers: Verifiers, entailment: Entailment | None
) -> list[Row]:
    """For each record the clusters, rewards, lengths in tokens and, where known, scores of its samples."""
    tokens = [encode_samples(samples, model) for samples in window]
    rewards = iter(model.judge([one for own in tokens for one in own]))
    found = []
    for samples, own in zip(window, tokens, strict=True):
        clusters, unreadable = clusters_of(samples, verifiers, entailment)
        found.append(
            {
                "clusters": clusters,
                "unreadable": unreadable,
                "rewards": [next(rewards).reward for _ in own],
                "lengths": [len(one.ids) - one.start for one in own],
                "scores": judged(samples, verifiers),
            }
        )
    return found


def outcome_of(samples: Samples, row: Row, threshold: float, seed: int) -> Outcome:
    """A pure function of the record and the seed."""
    rng = np.random.default_rng((seed, zlib.crc32(json_line(samples.fields))))
    return synthesized(row["clusters"], row["rewards"], samples.completions, threshold, rng)


def pair_of(samples: Samples, row: Row, outcome: Outcome) -> dict[str, Any]:
    """The record of a pair."""
    both = {"chosen": outcome.chosen, "rejected": outcome.rejected}
    answers = {name: samples.answers[i] for name, i in both.items()} if samples.answers is not None else None
    about = {
        "confidence": outcome.confidence,
        "clusters": outcome.clusters,
        "rewards": {name: row["rewards"][i] for name, i in both.items()},
        "source": samples.where,
    }
    return {
        **samples.rest,
        **{name: samples.completions[i] for name, i in both.items()},
        **{f"{name}_cut": True for name, i in both.items() if samples.cuts[i]},
        "synthesis": about if answers is None else {**about, "answers": answers},
    }


def accuracies(samples: Sequence[Samples], found: Sequence[Row], options: SynthesizeOptions) -> dict[str, Accuracy]:
    """Of the pairs, of those without a threshold, and of the highest against the lowest reward, where scores are."""
    pairs: dict[str, list[tuple[float, float]]] = {"pairs": [], "without threshold": [], "by reward": []}
    for one, row in zip(samples, found, strict=True):
        scores, rewards = row["scores"], row["rewards"]
        if scores is None:
            continue
        for name, threshold in (("pairs", options.threshold), ("without threshold", 0.0)):
            outcome = outcome_of(one, row, threshold, options.seed)
            if outcome.kind == PAIR:
                pairs[name].append((scores[outcome.chosen], scores[outcome.rejected]))
        pairs["by reward"].append((scores[int(np.argmax(rewards))], scores[int(np.argmin(rewards))]))
    return {name: accuracy(own) for name, own in pairs.items() if own}


def summary(
    samples: Sequence[Samples], found: Sequence[Row], outcomes: Sequence[Outcome], options: SynthesizeOptions
) -> dict[str, Any]:
    """The numbers of FILE.json, which are also printed."""
    pairs = [(outcome, row) for outcome, row in zip(outcomes, found, strict=True) if outcome.kind == PAIR]
    lengths = {
        name: float(np.mean([row["lengths"][getattr(outcome, name)] for outcome, row in pairs])) if pairs else None
        for name in ("chosen", "rejected")
    }
    return {
        "records": len(samples),
        "outcomes": dict(Counter(outcome.kind for outcome in outcomes)),
        "coverage": len(pairs) / len(samples),
        "unreadable": sum(row["unreadable"] for row in found),
        "tokens": lengths,
        "accuracy": {
            name: one._asdict() | {"share": one.share} for name, one in accuracies(samples, found, options).items()
        },
    }


def synthesize(options: SynthesizeOptions) -> None:
    """Reads and scores the samples, then writes the pairs. Raises UserError."""
    if options.output == STDIN:
        raise UserError("--output -: the summary is written next to it: name a file")
    output = output_file(options.output, [name for name in options.data if name != STDIN])
    samples = read(options)
    verifiers = Verifiers(parse_verifiers(options.verifier))
    entailment = Entailment(options.entailment) if options.entailment else None
    model = load(options)
    made_by = {
        "model": model.fingerprint,
        "--verifier": list(options.verifier),
        "--entailment": options.entailment,
        "--end": model.end.kind,
        "--special-tokens": options.special_tokens,
        "--dtype": options.dtype,
        "--tokens-per-batch": options.tokens_per_batch,
        "--columns": options.columns,
    }

    def work(window: Sequence[Samples]) -> list[Row]:
        return work_window(window, model, verifiers, entailment)

    with worked("synthesize", output, made_by, samples, work) as found:
        outcomes = [
            outcome_of(one, row, options.threshold, options.seed) for one, row in zip(samples, found, strict=True)
        ]
        numbers = summary(samples, found, outcomes, options)
        pairs = [pair_of(*three) for three in zip(samples, found, outcomes, strict=True) if three[2].kind == PAIR]
        if not pairs:
            listed = ", ".join(f"{count} {kind}" for kind, count in numbers["outcomes"].items())
            raise UserError(f"{' '.join(options.data)}: no record gives a pair: {listed}")
        about = {**made_by, "data": list(options.data), "threshold": options.threshold, "seed": options.seed, **numbers}
        with written_aside(companion(output, ".json")) as partial:
            partial.write_bytes(json_line(about))
        write_lines(output, pairs)
    report(numbers, options.output)


def report(numbers: dict[str, Any], output: str) -> None:
    others = ", ".join(f"{count} {kind}" for kind, count in sorted(numbers["outcomes"].items()) if kind != PAIR)
    print(
        f"{printable(output)}: {numbers['outcomes'][PAIR]} pairs of {numbers['records']} records "
        f"({numbers['coverage']:.0%})" + (f"; no pair: {others}" if others else "")
    )
    if numbers["unreadable"]:
        print(f"{numbers['unreadable']} answers cannot be read: each is a cluster of its own")
    chosen, rejected = numbers["tokens"]["chosen"], numbers["tokens"]["rejected"]
    print(f"tokens: chosen {chosen:.1f}, rejected {rejected:.1f} ({chosen / rejected - 1:+.0%})")
    for name, one in numbers["accuracy"].items():
        print(
            f"accuracy, {name}: {number(one['share'])} "
            f"({one['right']} right, {one['wrong']} wrong, {one['equal']} equal)"
        )
