"""``gcrm samples``: labeled solutions of generated problems, as if drawn from a model, with the place of the error."""

import gzip
import json
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import output_file, written_aside
from gcrm_fast.common.options import Options
from gcrm_fast.data.arithmetic import LETTERS, generate, samples


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Options):
    """Writes labeled solutions of generated problems as JSON lines, which the other commands read. A wrong solution has
    one wrong step, each equally likely, and continues from it."""

    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """File of JSON lines, gzipped if its name ends in .gz; - for stdout."""
    side: Literal["held-out", "train"] = "held-out"
    """Problems that gcrm train never trains on (held-out), or may train on (train)."""
    problems: int = 500
    """Number of different problems."""
    samples: int = 16
    """Solutions per problem; some repeat, as a model's do."""
    right: float = 0.25
    """Probability of a right solution. When it is little more than that of each wrong answer, the majority is often
    wrong."""
    arithmetic_steps: int = 3
    """Maximum number of solution steps of a problem."""
    seed: int = 0
    """Seed of problems and solutions."""


def distinct_problems(options: SampleOptions) -> list[str]:
    """Raises UserError where there are too few."""
    if options.side == "held-out":
        prompts = [pair.prompt for pair in generate(0, options.problems, options.seed, options.arithmetic_steps)[1]]
    else:  # training problems may come again
        pairs = generate(2 * options.problems + 1000, 0, options.seed, options.arithmetic_steps)[0]
        prompts = list(dict.fromkeys(pair.prompt for pair in pairs))[: options.problems]
    if len(prompts) < options.problems:
        raise UserError(
            f"--problems {options.problems}: only {len(prompts)} have up to {options.arithmetic_steps} steps: ask for "
            "fewer, or for longer ones with --arithmetic-steps"
        )
    return prompts


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
