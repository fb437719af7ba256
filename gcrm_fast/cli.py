"""The ``gcrm`` console program: its commands, one entry each."""

import argparse
import difflib
import importlib
import sys
from typing import Any, NamedTuple, NoReturn

from gcrm_fast import __version__


class Command(NamedTuple):
    """A command: ``function(options)`` runs it. Both are named MODULE:NAME and imported when it is called, so that
    ``gcrm --help`` needs no torch."""

    help: str
    options: str
    function: str


COMMANDS = {
    "train": Command(
        "train a reward model on preference pairs", "training.config:TrainConfig", "train:train_reward_model"
    ),
    "score": Command("write the rewards of completions", "commands.options:ScoreOptions", "commands.score:score"),
    "goals": Command("make a goal state for Q-values", "commands.options:GoalOptions", "commands.goals:goals"),
    "evaluate": Command(
        "compare rewards with labels (AUROC)", "commands.options:EvaluateOptions", "commands.evaluate:evaluate"
    ),
    "vote": Command("answer questions by votes among samples", "commands.options:VoteOptions", "commands.vote:vote"),
    "overoptimize": Command(
        "show whether a reward is over-optimized (best of n)",
        "commands.options:OveroptimizeOptions",
        "commands.overoptimize:overoptimize",
    ),
    "monitor": Command(
        "watch a policy drift from its reference", "commands.options:MonitorOptions", "commands.monitor:monitor"
    ),
    "select": Command(
        "choose the prompts that a policy learns most from", "commands.options:SelectOptions", "commands.select:select"
    ),
    "synthesize": Command(
        "write preference pairs from unlabeled samples",
        "commands.options:SynthesizeOptions",
        "commands.synthesize:synthesize",
    ),
    "generate": Command(
        "write texts that a reward model chooses or steers",
        "commands.options:GenerateOptions",
        "commands.generate:generate",
    ),
    "inspect": Command(
        "show records token by token as a web page", "commands.options:InspectOptions", "commands.inspect:inspect"
    ),
    "export": Command("convert a model for other programs", "commands.options:ExportOptions", "commands.export:export"),
    "serve": Command("serve rewards and Q-values over HTTP", "commands.options:ServeOptions", "commands.serve:serve"),
    "samples": Command(
        "generate labeled solutions of arithmetic problems", "commands.options:SampleOptions", "commands.samples:run"
    ),
}


def imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"gcrm_fast.{module}"), name)


def run(name: str, argv: list[str]) -> int:
    """Runs one command with its own arguments. Returns the exit code."""
    from gcrm_fast.common.command_line import exit_code, parse_options  # `gcrm --help` needs none of it

    command, prog = COMMANDS[name], f"gcrm {name}"

    def work() -> None:
        options = parse_options(imported(command.options), argv, prog)
        imported("commands.paths:check_paths")(options)
        imported(command.function)(options)

    return exit_code(prog, work)


class _OneLineParser(argparse.ArgumentParser):
    """Reports a wrong call in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see gcrm --help)\n")


def main(argv: list[str] | None = None) -> int:
    """``gcrm COMMAND ...``, by default of this process's arguments. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    width = max(map(len, COMMANDS))
    parser = _OneLineParser(
        prog="gcrm",
        usage="gcrm [--help | --version] COMMAND [OPTIONS]",
        description="Goal-conditioned reward models for Llama-family language models.",
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gcrm {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below; gcrm COMMAND --help lists its options")
    if not argv:
        parser.print_help()
        return 2
    # Only the first word is read here: everything after it belongs to the command, --help included.
    name = parser.parse_args(argv[:1]).command
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        parser.error(f"unknown command '{name}'" + (f": did you mean {near[0]}?" if near else ""))
    return run(name, argv[1:])


if __name__ == "__main__":
    sys.exit(main())
