"""``gcrm generate``: texts of a policy that a reward model chooses or steers while they are written.

Prompts are finished in any order. Each is added at once, with its number, to NAME.partial, whose first line says what
made it; the output is that in the order of the prompts.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gcrm_fast.checkpoints.goals import named_goal
from gcrm_fast.commands.options import GenerateOptions
from gcrm_fast.commands.output import Output
from gcrm_fast.commands.shared import check_left
from gcrm_fast.common.errors import UserError, kept_if_interrupted, printable
from gcrm_fast.common.files import output_file
from gcrm_fast.common.json_lines import compressed, json_line, numbers
from gcrm_fast.common.progress import progress_bar
from gcrm_fast.data.prompts import Prompt, read_prompts
from gcrm_fast.data.sources import STDIN, BadRecords
from gcrm_fast.inference.decoding import Result, Text, decode
from gcrm_fast.inference.generation import Policy, Sampling
from gcrm_fast.inference.judging import Goals
from gcrm_fast.inference.methods import BY_Q, Method
from gcrm_fast.inference.scoring import RewardModel

ADDED = ("text", "reward", "chosen_sample", "samples", "policy_tokens", "reward_tokens", "saved_tokens", "seconds")
UNFILTERED = "unfiltered"
OF_SAME = ("reward", "reward_at_same_tokens")  # fields of UNFILTERED
Record = TypeVar("Record", Method, Sampling)


class Partial:
    """The finished prompts of an output that is not complete: records by the number of their prompt."""

    def __init__(self, path: Path, made_by: dict[str, Any]) -> None:
        self.path, self.header = path.with_name(path.name + ".partial"), {"made_by": made_by}
        self.records: dict[int, dict[str, Any]] = self._read()
        if not self.records:
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[int, dict[str, Any]]:
        if not self.path.is_file():
            return {}
        *whole, torn = self.path.read_bytes().split(b"\n")
        try:
            header, *lines = map(json.loads, whole)
            records = {line["prompt"]: line["record"] for line in lines}
        except (ValueError, KeyError, TypeError):
            print(f"{printable(self.path)}: cannot be resumed: starting over", file=sys.stderr)
            return {}
        other = [name for name, value in self.header["made_by"].items() if header["made_by"].get(name) != value]
        if other:
            print(f"{printable(self.path)}: was made with another {other[0]}: starting over", file=sys.stderr)
            return {}
        if torn:  # of a run that was killed while it wrote
            os.truncate(self.path, self.path.stat().st_size - len(torn))
        return records

    def add(self, prompt: int, record: dict[str, Any]) -> None:
        if not self.records:
            self.path.write_bytes(json_line(self.header))
        self.records[prompt] = record
        with self.path.open("ab") as file:
            file.write(json_line({"prompt": prompt, "record": record}))

    def finish(self, output: Path) -> None:
        lines = b"".join(json_line(self.records[i]) for i in sorted(self.records))
        whole = output.with_name(output.name + ".whole")
        whole.write_bytes(compressed(output, lines))
        os.replace(whole, output)
        self.path.unlink()


def goals_of(options: GenerateOptions, model: RewardModel) -> Goals:
    """The goal states of --goal with their weights, or --control of them. Raises UserError."""
    weighted = []
    for text in options.goal:
        name, colon, last = text.rpartition(":")
        try:
            weight = float(last) if colon else None
        except ValueError:
            weight = None
        name = text if weight is None else name
        state = (
            model.goals[name] if name in model.goals else named_goal(name, model.fingerprint, model.config.state_size)
        )
        weighted.append((state, 1.0 if weight is None else weight))
    goals = Goals.of(weighted or [(model.goal(), 1.0)])
    if options.control == "opposite":
        return goals.opposite()
    return goals.shuffled(options.seed) if options.control == "shuffled" else goals


def of_options(record: type[Record], options: GenerateOptions, **others: Any) -> Record:
    """A record with the options of its fields' names, and ``others``."""
    names = {field.name for field in fields(record)} - others.keys()
    return record(**{name: getattr(options, name) for name in names}, **others)


def sample_record(text: Text) -> dict[str, Any]:
    """One sample: ids of the policy's tokens; texts and Q-values of the reward model's."""
    return {
        "text": text.text,
        "reward": text.reward,
        "ending": text.ending,
        "parent": text.parent,
        "log_p": text.log_p,
        "ids": text.ids,
        "tokens": {"texts": text.texts_n, "q_values": numbers(np.array(text.q_n))},
    }


def with_result(prompt: Prompt, result: Result) -> dict[str, Any]:
    """The record with its answer and samples."""
    reward = result.texts[result.chosen].reward
    samples = [sample_record(text) for text in result.texts]
    costs = result.policy_tokens, result.reward_tokens, result.saved_tokens, round(result.seconds, 3)
    return prompt.fields | dict(zip(ADDED, (result.text, reward, result.chosen, samples, *costs), strict=True))


def unfiltered_record(result: Result, policy_tokens: int) -> dict[str, Any]:
    """What the same samples give when none is dropped: the best of all, and the best of those that the policy writes
    with as many tokens."""
    lengths = np.cumsum([len(text.ids) for text in result.texts])
    first = max(1, int((lengths <= policy_tokens).sum()))
    rewards = [text.reward if text.reward is not None and text.ending == "stop" else None for text in result.texts]
    whole = [reward for reward in rewards[:first] if reward is not None]
    return {
        "text": result.text,
        "reward": result.texts[result.chosen].reward,
        "policy_tokens": result.policy_tokens,
        "reward_tokens": result.reward_tokens,
        "reward_at_same_tokens": max(whole, default=None),
    }


def ended(record: dict[str, Any]) -> bool:
    """Whether the answer ended by itself, as well as one of the samples that the policy writes with as many tokens."""
    answer = record["samples"][record["chosen_sample"]]
    return answer["ending"] == "stop" and record[UNFILTERED]["reward_at_same_tokens"] is not None


def summary(records: Sequence[dict[str, Any]], options: GenerateOptions, seconds: dict[str, str]) -> list[str]:
    """Lines about all prompts; ``seconds`` are those of this run."""
    tokens = {name: sum(record[name] for record in records) for name in ADDED[4:7]}
    written, saved = tokens["policy_tokens"], tokens["saved_tokens"]
    lines = [
        f"{len(records)} prompts, {options.method}: {written} tokens by the policy, {tokens['reward_tokens']} by the "
        f"reward model, {seconds['']}",
    ]
    if options.method in ("filter", "reject"):
        lines.append(f"saved about {saved} tokens, {saved / max(1, saved + written):.0%}: if the dropped samples had")
        lines[-1] += " become as long as the others"
    rewards = [record["reward"] for record in records if record["reward"] is not None]
    if rewards:
        lines.append(f"mean reward of the answers {np.mean(rewards):.4f}")
    if options.compare:
        others = [record[UNFILTERED] for record in records]
        lines.append(
            f"without dropping any: {sum(other['policy_tokens'] for other in others)} tokens by the policy, "
            f"{sum(other['reward_tokens'] for other in others)} by the reward model, {seconds[UNFILTERED]}"
        )
        both = [record for record in records if ended(record)]
        if both:
            means = [np.mean([record["reward"] for record in both])]
            means += [np.mean([record[UNFILTERED][name] for record in both]) for name in OF_SAME]
            lines.append(
                f"mean reward of the {len(both)} prompts whose answers ended: {options.method} {means[0]:.4f}, without "
                f"dropping any {means[1]:.4f}, with as many tokens of the policy {means[2]:.4f}"
            )
        else:
            lines.append("rewards are not compared: no prompt has answers that ended in both")
    return lines


def read(options: GenerateOptions) -> list[Prompt]:
    """Raises UserError."""
    bad = BadRecords(skip=options.on_bad_record == "skip")
    prompts = read_prompts(options.data, field=options.prompt_field, bad=bad)
    found = list(itertools.islice(prompts, options.limit or None))
    for prompt in found:
        if taken := sorted(prompt.fields.keys() & {*ADDED, UNFILTERED}):
            raise UserError(f"{prompt.where}: field '{taken[0]}' already exists and would be overwritten: rename it")
    check_left(len(found), bad, options.data)
    return found


@contextlib.contextmanager
def said_what_is_kept(partial: Partial, count: int) -> Iterator[None]:
    """After an error or an interrupt, a line about the prompts that are finished."""

    def kept() -> str:
        if not partial.records:
            return "no prompt is finished, nothing is kept"
        done = f"{len(partial.records)} of {count} prompts are finished and kept in {partial.path}"
        return f"{done}: the same command resumes"

    try:
        with kept_if_interrupted(kept):
            yield
    except Exception:
        print(f"gcrm generate: {printable(kept())}", file=sys.stderr, flush=True)
        raise


def generate(options: GenerateOptions) -> None:
    """Raises UserError."""
    output = output_file(options.output, [name for name in options.data if name != STDIN])
    prompts = read(options)
    policy = Policy.from_pretrained(
        options.policy,
        dtype=options.dtype,
        tokens_per_batch=options.tokens_per_batch,
        cache_tokens=options.cache_tokens,
    )
    reward = goals = None
    if options.reward:
        reward = RewardModel.from_pretrained(
            options.reward, dtype=options.dtype, tokens_per_batch=options.tokens_per_batch
        )
        goals = goals_of(options, reward)
        for note in reward.q_notes if options.method in BY_Q else ():
            print(note, flush=True)
    ignored = {"output", "compare", "rows", "cache_tokens", "tokens_per_batch", "data", "limit", "on_bad_record"}
    made_by = {name: value for name, value in asdict(options).items() if name not in ignored}
    made_by |= {"policy": policy.fingerprint, "reward": reward.fingerprint if reward is not None else ""}
    made_by["goal"] = goals.fingerprint if goals is not None else ""
    made_by["prompts"] = hashlib.sha256(b"".join(json_line(prompt.fields) for prompt in prompts)).hexdigest()
    with Output(output).held():
        partial = Partial(output, json.loads(json_line(made_by)))
        method = of_options(Method, options, kind=options.method)
        longest = method.longest(options.max_new_tokens)  # the comparison's too
        sampling, seconds = of_options(Sampling, options, max_new_tokens=longest), {}
        bad = BadRecords(skip=options.on_bad_record == "skip")

        def results(kind: Method, todo: Sequence[int], name: str, bad: BadRecords) -> Iterator[tuple[int, Result]]:
            asked, started = [prompts[i].prompt for i in todo], time.monotonic()
            decoded = decode(
                policy,
                asked,
                reward=reward,
                method=kind,
                sampling=sampling,
                goals=goals,
                rows=options.rows,
                names=[prompts[i].where for i in todo],
                bad=bad,
            )
            most, written, finished = kind.rows * kind.longest(sampling.max_new_tokens), [0] * len(todo), 0
            with progress_bar(total=most * len(todo), desc=name or "generating", unit="token") as bar:
                for one in decoded:
                    if isinstance(one, Result):
                        yield todo[one.prompt], one
                        finished += 1
                        bar.total -= most - one.policy_tokens  # will not be written
                    bar.set_postfix_str(f"{finished} of {len(todo)} prompts", refresh=False)
                    bar.update(one.policy_tokens - written[one.prompt])
                    written[one.prompt] = one.policy_tokens
            seconds[name] = f"{time.monotonic() - started:.1f} s"
            if len(todo) < len(prompts):  # others were finished by an interrupted run
                seconds[name] += f" for {len(todo)} of them"

        with said_what_is_kept(partial, len(prompts)):
            todo = [i for i in range(len(prompts)) if i not in partial.records]
            for i, result in results(method, todo, "", bad):
                partial.add(i, with_result(prompts[i], result))
            if options.compare:
                todo = [i for i, record in partial.records.items() if UNFILTERED not in record]
                kind = replace(method, kind="best-of-n", samples=method.rows)
                for i, result in results(kind, todo, UNFILTERED, BadRecords()):
                    record = partial.records[i]
                    partial.add(i, record | {UNFILTERED: unfiltered_record(result, record["policy_tokens"])})
        check_left(len(partial.records), bad, options.data)
        if not options.compare:  # an interrupted run may have had it, and only some of its records the field
            for record in partial.records.values():
                record.pop(UNFILTERED, None)
        partial.finish(output)
    records = [partial.records[i] for i in sorted(partial.records)]
    if not any(sample["ending"] == "stop" for record in records for sample in record["samples"]):
        limit = f"no sample reached its end within {options.max_new_tokens} tokens"
        remedy = "raise --max-new-tokens, or name with --stop what ends a text"
        print(f"gcrm generate: warning: {limit}: {remedy}", file=sys.stderr, flush=True)
    for line in [*summary(records, options, seconds), f"wrote {output}"]:
        print(line)
