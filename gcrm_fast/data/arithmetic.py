"""Generated preference pairs: sums of named values modulo 5, with step-by-step solutions.

    prompt    a=3,b=4,c=0,d=2:b+d+a?
    chosen    4+2=1;1+3=4;
    rejected  4+2=3;3+3=1;        one step is wrong, and the solution goes on from it

Whether a step is right can be known only by doing it: both sides have the same length, and each digit is as likely in a
wrong solution as in a right one. The named values make thousands of problems of a few sums.

``gcrm samples`` writes many labelled solutions of a problem, as if drawn from a model, with the place of the error.
"""

import gzip
import json
import random
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import exit_code, output_file, parse_options, written_aside
from gcrm_fast.data.records import Pair

MODULUS = 5
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HELD_OUT_SHARE = 10  # one problem in this many, by a hash of its text, is never trained on
PATIENCE = 100_000  # draws without a new held-out problem after which there are taken to be no more


def _solution(values: list[int], wrong_step: int, offset: int) -> str:
    """The steps that add up ``values``; the result of ``wrong_step`` (1-based, 0 for none) is off by ``offset``."""
    total, text = values[0], ""
    for number, value in enumerate(values[1:], start=1):
        result = (total + value + (offset if number == wrong_step else 0)) % MODULUS
        text += f"{total}+{value}={result};"
        total = result
    return text


def is_held_out(prompt: str) -> bool:
    """Whether a problem belongs to the held-out side: a property of its text alone."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def _values(prompt: str) -> list[int]:
    """The values that a problem adds up, in order."""
    given, question = prompt.removesuffix("?").split(":")
    value_of = {name: int(value) for name, value in (item.split("=") for item in given.split(","))}
    return [value_of[name] for name in question.split("+")]


def is_correct(prompt: str, completion: str) -> bool:
    """Whether a completion solves the problem with every step right, judged from the texts alone."""
    return completion == _solution(_values(prompt), 0, 0)


def generate(pairs: int, eval_pairs: int, seed: int, max_steps: int) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs) over disjoint problems of 1 to ``max_steps`` steps, n steps with weight 1 / n.

    A problem names max_steps + 1 values. Fields of a pair: ``steps`` and ``error_step`` (1-based). Training problems
    may come again with another error; held-out problems are distinct, so there are fewer than ``eval_pairs`` if no
    more exist.
    """
    rng = random.Random(seed)
    lengths = range(1, max_steps + 1)
    train: list[Pair] = []
    held_out: dict[str, Pair] = {}
    fruitless = 0
    while len(train) < pairs or (len(held_out) < eval_pairs and fruitless < PATIENCE):
        fruitless += 1
        steps = rng.choices(lengths, [1 / n for n in lengths])[0]
        value_of = {name: rng.randrange(MODULUS) for name in LETTERS[: max_steps + 1]}
        names = rng.sample(sorted(value_of), steps + 1)
        prompt = ",".join(f"{name}={value}" for name, value in value_of.items()) + f":{'+'.join(names)}?"
        values = [value_of[name] for name in names]
        error_step = rng.randint(1, steps)
        chosen = _solution(values, 0, 0)
        rejected = _solution(values, error_step, rng.randrange(1, MODULUS))
        fields = {"steps": steps, "error_step": error_step}
        if is_held_out(prompt):
            if len(held_out) < eval_pairs and prompt not in held_out:
                where = f"arithmetic:held-out:{len(held_out) + 1}"
                held_out[prompt] = Pair(prompt, chosen, rejected, 0.0, where, fields)
                fruitless = 0
        elif len(train) < pairs:
            train.append(Pair(prompt, chosen, rejected, 0.0, f"arithmetic:train:{len(train) + 1}", fields))
    return train, list(held_out.values())


# ---------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Writes labelled solutions of generated problems as JSON lines, which the other commands read. A wrong solution
    has one wrong step, any with equal chance, and goes on from it."""

    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """File of JSON lines, gzipped if its name ends in .gz; - for stdout."""
    side: Literal["held-out", "train"] = "held-out"
    """Problems that gcrm train never trains on, or others."""
    problems: int = 500
    """Different problems."""
    samples: int = 16
    """Solutions of each. They come again, as a model's do."""
    right: float = 0.25
    """Chance of a right solution. With little more than what each wrong answer has, a majority is often wrong."""
    arithmetic_steps: int = 3
    """Longest problem, in solution steps."""
    seed: int = 0
    """Of problems and solutions."""


def distinct_problems(options: SampleOptions) -> list[str]:
    """Raises UserError where there are fewer than asked for."""
    if options.side == "held-out":
        prompts = [pair.prompt for pair in generate(0, options.problems, options.seed, options.arithmetic_steps)[1]]
    else:  # training problems may come again
        pairs = generate(2 * options.problems + 1000, 0, options.seed, options.arithmetic_steps)[0]
        prompts = list(dict.fromkeys(pair.prompt for pair in pairs))[: options.problems]
    if len(prompts) < options.problems:
        raise UserError(
            f"--problems {options.problems}: found {len(prompts)} of at most {options.arithmetic_steps} steps: ask for "
            "fewer, or for longer ones with --arithmetic-steps"
        )
    return prompts


def samples(prompts: Sequence[str], per_problem: int, right: float, seed: int) -> Iterator[dict[str, Any]]:
    """Records of ``per_problem`` solutions of each problem, right with probability ``right``.

    Fields beside those of labelled completions: ``steps``; ``error_step`` (1-based) and ``error_char``, the place of
    the first wrong digit among the characters of the completion (0-based); 0 and -1 in a right solution.
    """
    rng = random.Random(seed)
    for number, prompt in enumerate(prompts):
        values = _values(prompt)
        solution = _solution(values, 0, 0)
        for sample in range(per_problem):
            error_step = 0 if rng.random() < right else rng.randrange(1, len(values))
            completion = _solution(values, error_step, rng.randrange(1, MODULUS))
            differing = (i for i, (a, b) in enumerate(zip(completion, solution, strict=True)) if a != b)
            yield {
                "prompt": prompt,
                "completion": completion,
                "is_correct": not error_step,
                "predicted_answer": completion[-2],
                "expected_answer": solution[-2],
                "qid": f"arithmetic-{number}",
                "sample": sample,
                "steps": len(values) - 1,
                "error_step": error_step,
                "error_char": next(differing, -1),
            }


def run(options: SampleOptions) -> None:
    """Writes the file. Raises UserError."""
    for name in ("problems", "samples", "arithmetic_steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if not 0 <= options.right <= 1:
        raise UserError(f"--right {options.right}: must be between 0 and 1")
    if options.arithmetic_steps >= len(LETTERS):
        raise UserError(f"--arithmetic-steps {options.arithmetic_steps}: must be less than {len(LETTERS)}")
    records = samples(distinct_problems(options), options.samples, options.right, options.seed)
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    if options.output == "-":
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        return
    path = output_file(options.output, ())
    with written_aside(path) as partial:
        partial.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr for an error that the user can mend."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code("gcrm samples", lambda: run(parse_options(SampleOptions, arguments, "gcrm samples")))
