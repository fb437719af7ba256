"""``gcrm samples``: labeled solutions of generated problems, as if drawn from a model, with the place of the error."""

import gzip
import json
import sys

from gcrm_fast.commands.options import SampleOptions
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import output_file, written_aside
from gcrm_fast.data.arithmetic import generate, samples


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
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    if options.output == "-":
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        return
    path = output_file(options.output, ())
    with written_aside(path) as partial:
        partial.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
