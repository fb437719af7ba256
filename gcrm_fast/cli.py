"""The ``gcrm`` console program: one subcommand a task."""

import argparse
import importlib
import sys
from typing import NoReturn

from gcrm_fast import __version__

COMMANDS = {  # name: (module with a main(argv), what it does)
    "train": ("gcrm_fast.train", "train a reward model on preference pairs"),
    "score": ("gcrm_fast.commands.score", "rewards of completions, and Q-values of their tokens"),
    "goals": ("gcrm_fast.commands.goals", "a goal state from preferred completions"),
    "evaluate": ("gcrm_fast.commands.evaluate", "AUROC over completions known to be right or wrong, beside shortcuts"),
    "vote": ("gcrm_fast.commands.vote", "answers by many samples of a question, filtered and weighed"),
    "inspect": ("gcrm_fast.commands.inspect", "a web page of a record, its tokens coloured by Q and reward"),
    "export": ("gcrm_fast.commands.export", "write a model as other programs read it"),
    "serve": ("gcrm_fast.commands.serve", "rewards and Q-values over HTTP"),
    "samples": ("gcrm_fast.commands.samples", "labelled solutions of generated problems, with the place of the error"),
}


class _OneLineParser(argparse.ArgumentParser):
    """Reports a wrong call in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see gcrm --help)\n")


def main() -> int:
    """Runs ``gcrm COMMAND ...``; the command reads its own options (``gcrm train --help``). Returns the exit code."""
    width = max(map(len, COMMANDS))
    parser = _OneLineParser(
        prog="gcrm",
        usage="gcrm [--help | --version] COMMAND [OPTIONS]",
        description="Goal-conditioned reward models for Llama-family language models.",
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gcrm {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below; gcrm COMMAND --help lists its options")
    # Only the first word is ours: everything after it belongs to the command, --help included.
    command = parser.parse_args(sys.argv[1:2]).command
    if command not in COMMANDS:
        parser.error(f"unknown command '{command}'")
    module = importlib.import_module(COMMANDS[command][0])  # here, so that --help and --version need no torch
    return module.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
