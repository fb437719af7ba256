"""The ``gcrm`` console program: one subcommand a task."""

import argparse
import sys

from gcrm_fast import __version__


def main() -> int:
    """Runs ``gcrm COMMAND ...``; the command reads its own options (``gcrm train --help``). Returns the exit code."""
    parser = argparse.ArgumentParser(prog="gcrm", description="Goal-conditioned reward models for Llama models.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=["train"], help="train: train a reward model on preference pairs")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the command, see gcrm COMMAND --help")
    arguments = parser.parse_args(sys.argv[1:2])
    assert arguments.command == "train"
    from gcrm_fast import train

    return train.main(sys.argv[2:])
