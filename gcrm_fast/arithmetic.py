"""Generated preference pairs: last-digit arithmetic with step-by-step solutions.

    prompt    47+35-28?          keep the last digit of every result
    chosen    47+35=2;2-28=4;
    rejected  47+35=9;9-28=1;    one step is wrong, and the solution goes on from it

Whether a step is right can be known only by doing it: both sides have the same length, and each digit is as likely in a
wrong solution as in a right one. Numbers have two digits, so that even problems of one step are too many to memorise.
"""

import random
import re
import zlib

from gcrm_fast.data import Pair

MODULUS = 10
OPERANDS = range(10, 100)
HELD_OUT_SHARE = 10  # one problem in this many, by a hash of its text, is never trained on
PATIENCE = 100_000  # draws without a new held-out problem after which there are taken to be no more


def _apply(value: int, operator: str, operand: int) -> int:
    return (value + operand if operator == "+" else value - operand) % MODULUS


def _solution(start: int, operations: list[tuple[str, int]], wrong_step: int, offset: int) -> str:
    """The steps; the result of step ``wrong_step`` (1-based, 0 for none) is off by ``offset``."""
    value, text = start, ""
    for number, (operator, operand) in enumerate(operations, start=1):
        result = _apply(value, operator, operand)
        if number == wrong_step:
            result = (result + offset) % MODULUS
        text += f"{value}{operator}{operand}={result};"
        value = result
    return text


def is_held_out(prompt: str) -> bool:
    """Whether a problem belongs to the held-out side: a property of its text alone."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def is_correct(prompt: str, completion: str) -> bool:
    """Whether a completion solves the problem with every step right, judged from the texts alone."""
    numbers = re.findall(r"[+-]?\d+", prompt)
    value = numbers[0]
    steps = completion.split(";")
    if steps.pop() != "" or len(steps) != len(numbers) - 1:
        return False
    for step, operation in zip(steps, numbers[1:], strict=True):
        result = str((int(value) + int(operation)) % MODULUS)
        if step != f"{value}{operation}={result}":
            return False
        value = result
    return True


def generate(pairs: int, eval_pairs: int, seed: int, max_steps: int) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs) over disjoint problems of 1 to ``max_steps`` steps, n steps with weight 1 / n.

    Fields of a pair: ``steps`` and ``error_step`` (1-based). Training problems may come again with another error;
    held-out problems are distinct, so there are fewer than ``eval_pairs`` if no more exist (about 1600 of one step).
    """
    rng = random.Random(seed)
    lengths = range(1, max_steps + 1)
    train: list[Pair] = []
    held_out: dict[str, Pair] = {}
    fruitless = 0
    while len(train) < pairs or (len(held_out) < eval_pairs and fruitless < PATIENCE):
        fruitless += 1
        steps = rng.choices(lengths, [1 / n for n in lengths])[0]
        start = rng.choice(OPERANDS)
        operations = [(rng.choice("+-"), rng.choice(OPERANDS)) for _ in range(steps)]
        prompt = f"{start}{''.join(f'{operator}{operand}' for operator, operand in operations)}?"
        error_step = rng.randint(1, steps)
        chosen = _solution(start, operations, 0, 0)
        rejected = _solution(start, operations, error_step, rng.randrange(1, MODULUS))
        fields = {"steps": steps, "error_step": error_step}
        if is_held_out(prompt):
            if len(held_out) < eval_pairs and prompt not in held_out:
                where = f"arithmetic:held-out:{len(held_out) + 1}"
                held_out[prompt] = Pair(prompt, chosen, rejected, 0.0, where, fields)
                fruitless = 0
        elif len(train) < pairs:
            train.append(Pair(prompt, chosen, rejected, 0.0, f"arithmetic:train:{len(train) + 1}", fields))
    return train, list(held_out.values())
