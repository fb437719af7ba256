"""``gcrm samples``: labeled solutions of generated problems, as if drawn from a model, with the place of the error."""

import sys

from gcrm_fast.commands.options import SampleOptions
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import output_file
from gcrm_fast.common.json_lines import json_line, write_lines
from gcrm_fast.data.arithmetic import generate, samples
from gcrm_fast.data.sources import STDIN


def distinct_problems(options: SampleOptions) -> list[str]:
    """Raises UserError where there are too few."""
    if options.side == "held-out":
        prompts = [pair.prompt for pair in generate(0, options.problems, options.seed, options.arithmetic_steps)[1]]
    else:  # training problems may come again
        pairs = generate(
            2 * options.arithmetic_steps * options.problems + 1000, 0, options.seed, options.arithmetic_steps
        )[0]
        prompts = list(dict.fromkeys(pair.prompt for pair in pairs))[: options.problems]
    if len(prompts) < options.problems:
        raise UserError(
            f"--problems {options.problems}: only {len(prompts)} have up to {options.arithmetic_steps} steps: ask for "
            "fewer, or for longer ones with --arithmetic-steps"
        )
    return prompts


def run(options: SampleOptions) -> None:
    """Writes the file. Raises UserError."""
    records = samples(distinct_problems(options), options.samples, options.right, options.seed)
    if options.output == STDIN:
        sys.stdout.buffer.write(b"".join(map(json_line, records)))
        sys.stdout.buffer.flush()
        return
    write_lines(output_file(options.output, ()), records)
