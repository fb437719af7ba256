"""``gcrm select``: the prompts to train a policy on next, and their order."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gcrm_fast.commands.options import SelectOptions
from gcrm_fast.commands.output import companion
from gcrm_fast.commands.shared import check_left, load
from gcrm_fast.commands.windows import Row, worked
from gcrm_fast.common.errors import UserError, printable
from gcrm_fast.common.files import output_file, written_aside
from gcrm_fast.common.json_lines import write_lines
from gcrm_fast.common.tables import columns, number
from gcrm_fast.data.records import parse_columns
from gcrm_fast.data.samples import FORMATS, Samples, read_samples
from gcrm_fast.data.sources import STDIN, BadRecords, rows
from gcrm_fast.evaluation.plots import plot_selection
from gcrm_fast.inference.scoring import RewardModel
from gcrm_fast.rlhf.samples import against, rewards_of, task_of, verdicts
from gcrm_fast.rlhf.selection import SMALL, check_order, curriculum, lowest, normalized, pooled, stages
from gcrm_fast.rlhf.verifiers import Verifiers, parse_verifiers, plain

SHOWN = 5  # prompts without an answer that are printed
WHOLE = "all"  # the domain where no field names one


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The prompts [N]: scores, domains and the groups in which they compete, their places there, and which are kept,
    dropped because no sample solves them, or already among the others to train on."""

    scores_N: np.ndarray
    domains: list[str]
    groups: list[str]
    places_N: np.ndarray
    kept_N: np.ndarray
    unsolved_N: np.ndarray
    known_N: np.ndarray


def domain_of(samples: Samples, field: str) -> str:
    """Raises UserError where the field is missing or not a text."""
    if not field:
        return WHOLE
    value = samples.fields.get(field)
    if not isinstance(value, (str, int)) or value == "":
        raise UserError(f"{samples.where}: field '{field}', named by --domain, is missing or not a text")
    return str(value)


def domain_of_merged(record: dict[str, Any], field: str) -> str:
    """Of a record of --merge, which may have none."""
    value = record.get(field)
    return WHOLE if value is None else str(value)


def read(options: SelectOptions) -> list[Samples]:
    """The samples, with what the score needs. Bad records count as such."""
    bad = BadRecords(skip=options.on_bad_record == "skip")
    by_task = parse_verifiers(options.verifier)
    found: list[Samples] = []
    for samples in read_samples(options.data, columns=parse_columns(options.columns, FORMATS), bad=bad):
        try:
            domain_of(samples, options.domain)
            if options.score != "pass-rate" and not samples.references:
                what = "field 'reference' is missing, and so is 'reference_completions': rewards are compared with them"
                raise UserError(f"{samples.where}: {what}")
            if options.score == "pass-rate" and task_of(samples, by_task) is None and samples.correct is None:
                what = "field 'is_correct' is missing, and no --verifier is for its task"
                raise UserError(f"{samples.where}: {what}: pass --verifier, or choose another --score")
        except UserError as error:
            bad.add(error)
        else:
            found.append(samples)
    check_left(len(found), bad, options.data)
    return found


def score_window(
    window: Sequence[Samples], options: SelectOptions, model: RewardModel | None, verifiers: Verifiers
) -> list[Row]:
    """For each record its score; whether a sample is right, and whether one is better than the reference, or null."""
    rewards = rewards_of(window, model) if model is not None and options.score != "pass-rate" else []
    found = []
    for samples, both in itertools.zip_longest(window, rewards):
        right = verdicts(samples, verifiers)
        if both is None:
            assert right is not None  # read() has seen to it
            score = float(np.mean([one.score for one in right]))
        else:
            score = against(*both)[options.score == "proxy"]
        solved = any(one.score for one in right) if right is not None else None
        better = max(both[0]) > max(both[1]) if both else None
        kinds = Counter(one.kind for one in right or ())
        found.append({"score": score, "solved": solved, "better": better, "verdicts": kinds})
    return found


def chosen(samples: Sequence[Samples], found: Sequence[Row], known: set[str], options: SelectOptions) -> Selection:
    scores_N = np.array([row["score"] for row in found])
    unsolved_N = np.array([row["solved"] is False for row in found])
    known_N = np.array([prompt_key(one.prompt) in known for one in samples]) & ~unsolved_N
    domains = [domain_of(one, options.domain) for one in samples]
    free = np.flatnonzero(~unsolved_N & ~known_N).tolist()
    if not free:
        raise UserError(
            f"{' '.join(options.data)}: no prompt is left: {unsolved_N.sum()} are solved by no sample, "
            f"{known_N.sum()} are among those of --merge"
        )
    prompts = [plain(samples[i].prompt) for i in free]
    groups = pooled([domains[i] for i in free])
    places_N, kept_N = np.full(len(samples), np.nan), np.zeros(len(samples), dtype=bool)
    places_N[free] = normalized(scores_N[free], groups, prompts, options.normalize)
    kept_N[free] = lowest(places_N[free], options.keep, prompts, options.normalize)
    return Selection(
        scores_N=scores_N,
        domains=domains,
        groups=groups,
        places_N=places_N,
        kept_N=kept_N,
        unsolved_N=unsolved_N,
        known_N=known_N,
    )


def prompt_key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)


def originals(options: SelectOptions) -> list[dict[str, Any]]:
    """The records of --merge. Raises UserError for one without a prompt."""
    found = []
    for source in options.merge:
        for where, raw in rows(source, BadRecords()):
            if not isinstance(raw, dict) or raw.get("prompt") is None:
                raise UserError(f"{where}: field 'prompt' is missing: --merge takes prompts to train on")
            found.append(raw)
    return found


def records_of(samples: Sequence[Samples], found: Selection, options: SelectOptions) -> list[dict[str, Any]]:
    """The prompts that are kept, with their scores."""
    records = []
    for i in np.flatnonzero(found.kept_N).tolist():
        added = {"score": found.scores_N[i], options.normalize: found.places_N[i]}
        records.append({**samples[i].rest, "selection": {**added, "source": samples[i].where}})
    return records


def table(found: Selection) -> str:
    lines = []
    for domain in dict.fromkeys(found.domains):
        own = np.array([name == domain for name in found.domains])
        counts = [own.sum(), (own & found.kept_N).sum(), (own & found.unsolved_N).sum(), (own & found.known_N).sum()]
        low, mean, high = (number(value) for value in np.quantile(found.scores_N[own], [0.1, 0.5, 0.9]))
        lines.append([domain, *map(str, counts), low, mean, high])
    head = ["domain", "prompts", "kept", "solved by no sample", "in --merge", "10% of scores", "median", "90%"]
    return columns(head, lines)


def small_domains(found: Selection) -> str:
    """What is done with domains of few prompts; "" where there are none."""
    free = ~found.unsolved_N & ~found.known_N
    counts = Counter(d for d, f in zip(found.domains, free, strict=True) if f)
    small = sorted(name for name, count in counts.items() if count < SMALL)
    if not small:
        return ""
    what = "are compared with one another as one domain" if len(small) > 1 else "is still compared only within itself"
    return f"fewer than {SMALL} prompts: {', '.join(small)}: {what}; places among so few say little"


def suspects(rows_: Sequence[Row], found: Selection) -> tuple[str, list[int]]:
    """Prompts that may be broken or have no answer, the lowest first, and what they are: those that were dropped
    because no sample solves them; without verdicts those kept of which no sample is better than its reference."""
    judged = any(row["solved"] is not None for row in rows_)
    if judged:
        own = np.flatnonzero(found.unsolved_N).tolist()
        words = "solved by no sample: dropped"
    else:
        own = [i for i in np.flatnonzero(found.kept_N).tolist() if rows_[i]["better"] is False]
        words = "kept, but no sample is better than the reference: look whether they have an answer"
    return words, sorted(own, key=lambda i: found.scores_N[i])


def select(options: SelectOptions) -> None:
    """Reads and scores the samples, then writes all files. Raises UserError."""
    if options.output == STDIN:
        raise UserError("--output -: several files are written next to it: name a file")
    output = output_file(options.output, [name for name in (*options.data, *options.merge) if name != STDIN])
    samples, before = read(options), originals(options)
    of_before = [domain_of_merged(one, options.domain) for one in before]
    if options.order:
        check_order(options.order, of_before + [domain_of(one, options.domain) for one in samples])
    verifiers = Verifiers(parse_verifiers(options.verifier))
    model = load(options) if options.model else None
    made_by = {
        "model": model.fingerprint if model else "",
        "--score": options.score,
        "--verifier": list(options.verifier),
        "--end": options.end,
        "--special-tokens": options.special_tokens,
        "--dtype": options.dtype,
        "--tokens-per-batch": options.tokens_per_batch,
        "--columns": options.columns,
    }

    def work(window: Sequence[Samples]) -> list[Row]:
        return score_window(window, options, model, verifiers)

    with worked("select", output, made_by, samples, work) as found:
        selection = chosen(samples, found, {prompt_key(one["prompt"]) for one in before}, options)
        kept = records_of(samples, selection, options)
        words, listed = suspects(found, selection)
        after, counts = [*before, *kept], sum((Counter(row["verdicts"]) for row in found), Counter[str]())
        if options.order:
            domains = of_before + [selection.domains[i] for i in np.flatnonzero(selection.kept_N).tolist()]
            order = curriculum(stages(options.order, domains), options.steps * options.prompts_per_step, options.seed)
            write_lines(companion(output, ".curriculum.jsonl"), [{**after[i], "stage": stage} for i, stage in order])
        write_lines(
            companion(output, ".unanswerable.jsonl"),
            [{"prompt": samples[i].prompt, "score": found[i]["score"], "source": samples[i].where} for i in listed],
        )
        about = {
            **made_by,
            "data": list(options.data),
            "merge": list(options.merge),
            "domain": options.domain,
            "keep": options.keep,
            "normalize": options.normalize,
            "order": options.order,
            "steps": options.steps,
            "prompts_per_step": options.prompts_per_step,
            "seed": options.seed,
            "prompts": len(samples),
            "kept": len(kept),
            "unsolved": int(selection.unsolved_N.sum()),
            "unanswerable": len(listed),
            "merged": len(before),
            "verdicts": counts,
            "small_domains": small_domains(selection),
        }
        with written_aside(companion(output, ".json")) as partial:
            partial.write_text(json.dumps(about, indent=1) + "\n")
        plot(selection, options, companion(output, ".png"))
        write_lines(output, after)
    report(options, selection, samples, words, listed, counts, len(before))


def plot(found: Selection, options: SelectOptions, path: Path) -> None:
    names = {"reward": "r(sample) - r(reference)", "proxy": "sigmoid of that", "pass-rate": "share of right samples"}
    domains = np.array(found.domains)
    panels = {name: (found.scores_N[domains == name], found.kept_N[domains == name]) for name in dict.fromkeys(domains)}
    with written_aside(path) as partial:
        plot_selection(panels, names[options.score], partial)


def report(
    options: SelectOptions,
    found: Selection,
    samples: Sequence[Samples],
    words: str,
    listed: Sequence[int],
    counts: Counter[str],
    merged: int,
) -> None:
    print(table(found))
    if said := small_domains(found):
        print(printable(said))
    if counts:
        print("samples: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    if listed:
        print(f"{len(listed)} prompts {words} ({companion(Path(options.output), '.unanswerable.jsonl')})")
        for i in listed[:SHOWN]:
            print(printable(f"  {number(found.scores_N[i])}  {plain(samples[i].prompt)[:80]!r}"))
    print(f"{printable(options.output)}: {found.kept_N.sum()} prompts, after {merged} of --merge")
