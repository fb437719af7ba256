"""Generated preference pairs: sums of named values modulo 5, with step-by-step solutions.

    prompt    a=3,b=4,c=0,d=2:b+d+a?
    chosen    4+2=1;1+3=4;
    rejected  4+2=3;3+3=1;        one step is wrong, and the solution continues from it

Only doing a step shows whether it is right: both sides have the same length, and each digit is as likely in a wrong
solution as in a right one. The named values turn a few sums into thousands of problems.

``samples`` are labeled solutions of a problem, as if drawn from a model, with the place of the error.
"""

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from gcrm_fast.data.records import Pair

MODULUS = 5
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HELD_OUT_SHARE = 10  # one problem in this many, by a hash of its text, is never trained on
SOLUTION = re.compile(r"(\d\+\d=\d;)+")
PATIENCE = 100_000  # draws without a new held-out problem, after which no more are expected


def _solution(values: list[int], wrong_step: int, offset: int) -> str:
    """The steps that sum ``values``; the result of ``wrong_step`` (1-based, 0 for none) is off by ``offset``."""
    total, text = values[0], ""
    for number, value in enumerate(values[1:], start=1):
        result = (total + value + (offset if number == wrong_step else 0)) % MODULUS
        text += f"{total}+{value}={result};"
        total = result
    return text


def is_held_out(prompt: str) -> bool:
    """Whether a problem is held out: a property of its text alone."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def _values(prompt: str) -> list[int]:
    """The values that a problem sums, in order. Raises ValueError for a text that is no such problem."""
    try:
        given, question = prompt.removesuffix("?").split(":")
        value_of = {name: int(value) for name, value in (item.split("=") for item in given.split(","))}
        return [value_of[name] for name in question.split("+")]
    except (ValueError, KeyError):
        raise ValueError("the prompt is not a sum of the form a=3,b=4:a+b?") from None


def is_correct(prompt: str, completion: str) -> bool:
    """Whether a completion solves the problem with every step right, judged from the texts alone."""
    return completion == _solution(_values(prompt), 0, 0)


def final_answer(completion: str) -> str | None:
    """The last result of a solution, right or wrong; None for what is not a solution."""
    return completion[-2] if SOLUTION.fullmatch(completion) else None


def generate(pairs: int, eval_pairs: int, seed: int, max_steps: int) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs) over disjoint problems of 1 to ``max_steps`` steps, n steps with weight
    1 / sqrt(n).

    A training problem comes with one rejected solution per step, wrong at that step, and may repeat; a held-out problem
    comes once, wrong at a random step, so there are fewer than ``eval_pairs`` if there are fewer problems. A problem
    names max_steps + 1 values. Fields of a pair: ``steps`` and ``error_step`` (1-based).
    """
    rng = random.Random(seed)
    lengths = range(1, max_steps + 1)
    train: list[Pair] = []
    held_out: dict[str, Pair] = {}
    fruitless = 0
    while len(train) < pairs or (len(held_out) < eval_pairs and fruitless < PATIENCE):
        fruitless += 1
        steps = rng.choices(lengths, [n**-0.5 for n in lengths])[0]
        value_of = {name: rng.randrange(MODULUS) for name in LETTERS[: max_steps + 1]}
        names = rng.sample(sorted(value_of), steps + 1)
        prompt = ",".join(f"{name}={value}" for name, value in value_of.items()) + f":{'+'.join(names)}?"
        values = [value_of[name] for name in names]
        if not is_held_out(prompt):
            for error_step in range(1, steps + 1):
                train.append(_pair(prompt, values, error_step, rng, f"arithmetic:train:{len(train) + 1}"))
        elif len(held_out) < eval_pairs and prompt not in held_out:
            where = f"arithmetic:held-out:{len(held_out) + 1}"
            held_out[prompt] = _pair(prompt, values, rng.randint(1, steps), rng, where)
            fruitless = 0
    return train[:pairs], list(held_out.values())


def _pair(prompt: str, values: list[int], error_step: int, rng: random.Random, where: str) -> Pair:
    """The right solution, and one that is wrong at ``error_step``."""
    chosen, rejected = _solution(values, 0, 0), _solution(values, error_step, rng.randrange(1, MODULUS))
    return Pair(prompt, chosen, rejected, where=where, fields={"steps": len(values) - 1, "error_step": error_step})


# ---------------------------------------------------------------------------------------------------------- samples


def samples(prompts: Sequence[str], per_problem: int, right: float, seed: int) -> Iterator[dict[str, Any]]:
    """Records of ``per_problem`` solutions of each problem, right with probability ``right``.

    Fields next to those of labeled completions: ``steps``; ``error_step`` (1-based) and ``error_char``, the place of
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
