"""From a command line to the options of a command, and from errors to one line and an exit code."""

import argparse
import contextlib
import difflib
import inspect
import os
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import docstring_parser

from gcrm_fast.common import processes
from gcrm_fast.common.errors import RankError, UserError, printable
from gcrm_fast.common.options import Argument, Options, Range, flag, kinds_of

T = TypeVar("T", bound=Options)
LIKENESS = 0.8  # of a name to the option that it misspells: unrelated options share up to 0.78 with their two dashes


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def parse_options(kind: type[T], argv: list[str], prog: str) -> T:
    """``argv`` as an instance of ``kind``; ``--help`` prints the docstrings of its fields and exits.

    Raises:
        UserError: an option that does not exist or is missing, a value that its field does not accept, or fields that
            contradict one another.
    """
    namespace, unknown = _parser(kind, prog, []).parse_known_intermixed_args(_normalized(argv))
    given = vars(namespace)
    asks_help = given.pop("help")
    if unknown and not asks_help:
        raise UserError(f"{_unknown(unknown[0], kind)} (see {prog} --help)")
    kinds = kinds_of(kind)
    given = {
        name: _converted(text, kinds[name])
        for name, text in given.items()
        if text or not _argument(kinds[name]).positional
    }
    layers = kind.defaults(given)
    if asks_help:
        _parser(kind, prog, layers).print_help()
        raise SystemExit(0)
    values = {name: value for _, layer in layers for name, value in layer.items()} | given
    for field in fields(kind):
        if field.name not in values and field.default is MISSING:
            raise UserError(f"{name_of(field.name, kinds[field.name])} is missing (see {prog} --help)")
    options = kind(**values)
    options.check()
    return options


def run_script(prog: str, kind: type[T], work: Callable[[T], None], argv: list[str] | None = None) -> int:
    """Does the work with the options of ``argv``, by default of the command line. Returns its exit code, see below."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code(prog, lambda: work(parse_options(kind, arguments, prog)))


def exit_code(prog: str, work: Callable[[], None]) -> int:
    """Does the work. Returns 0; 2 after one line on stderr, from the first process of each machine, for an error that
    the user can fix; 1 if the output is a closed pipe; 130 after Ctrl-C, with a line that says what is kept."""
    try:
        work()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more can be written there
        return 1
    except KeyboardInterrupt as interrupt:
        if processes.local_rank() == 0:
            kept = printable(interrupt) or "nothing is kept: the same command starts over"
            print(f"\n{prog}: interrupted; {kept}", file=sys.stderr, flush=True)
        return 130
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        if isinstance(error, RankError):
            message = f"rank {processes.rank()}: {error}"
        if isinstance(error, RankError) or processes.local_rank() == 0:
            print(f"{prog}: {printable(message)}", file=sys.stderr, flush=True)
        return 2
    return 0


# ------------------------------------------------------------------------------------------------------- the parser


def _parser(kind: type[Options], prog: str, layers: list[tuple[str, dict[str, Any]]]) -> argparse.ArgumentParser:
    """Values stay text here, and options that are not given absent; ``layers`` are the defaults that help names."""
    kinds = kinds_of(kind)
    width = shutil.get_terminal_size().columns - 2
    places = [_argument(one).metavar for one in kinds.values() if _argument(one).positional]
    paragraphs = (inspect.getdoc(kind) or "").split("\n\n")
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, "[OPTIONS]", *places]),
        add_help=False,
        allow_abbrev=False,
        description="\n\n".join(textwrap.fill(" ".join(text.split()), width) for text in paragraphs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    documented = [docstring_parser.parse_from_object(base).params for base in reversed(kind.__mro__[:-1])]
    texts = {one.arg_name: one.description for params in documented for one in params}
    titles = {first: title for title, first in kind.GROUPS.items()}
    positional, group = parser.add_argument_group("arguments"), parser.add_argument_group("options")
    group.add_argument("-h", "--help", action="store_true", help="Show this text.")
    for field in fields(kind):
        if field.name in titles:
            group = parser.add_argument_group(titles[field.name])
        annotated = kinds[field.name]
        argument, plain = _argument(annotated), _plain(annotated)
        words = " ".join((texts.get(field.name) or "").split()).replace("%", "%%")
        words += _limits(field, annotated, layers, said="default" in words)
        more: dict[str, Any] = {"help": words, "default": argparse.SUPPRESS}
        if plain is bool:
            more["action"] = argparse.BooleanOptionalAction
        else:
            more["metavar"] = argument.metavar or _metavar(plain)
        if typing.get_origin(plain) is tuple:
            more |= {"nargs": "*", "action": "extend"}
        if argument.positional:
            positional.add_argument(field.name, **{"nargs": "?"} | more)
        else:
            group.add_argument(*filter(None, (argument.short, flag(field.name))), dest=field.name, **more)
    return parser


def _argument(kind: Any) -> Argument:
    return next((one for one in typing.get_args(kind)[1:] if isinstance(one, Argument)), Argument())


def _plain(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def name_of(name: str, kind: Any) -> str:
    """A field as a command line names it: METAVAR or --its-name. ``kind``: its type."""
    argument = _argument(kind)
    return argument.metavar if argument.positional else flag(name)


def _metavar(plain: Any) -> str:
    if typing.get_origin(plain) is Literal:
        return "{" + ",".join(filter(None, typing.get_args(plain))) + "}"
    if typing.get_origin(plain) is tuple:
        return _metavar(_plain(typing.get_args(plain)[0]))
    return {int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "PATH"}.get(plain, "VALUE")


def _limits(field: Field[Any], kind: Any, layers: list[tuple[str, dict[str, Any]]], said: bool) -> str:
    """The range of a field and its defaults, in words; no default that is empty where the help has ``said`` it."""
    limits = [str(one) for one in typing.get_args(kind)[1:] if isinstance(one, Range)]
    if field.default is not MISSING and not (said and field.default in ("", ())):
        limits.append(f"default: {_in_words(field.default)}")
    limits += [
        f"with {words}: {_in_words(layer[field.name])}" for words, layer in layers if words and field.name in layer
    ]
    return f" ({'; '.join(limits)})" if limits else ""


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (" ".join(map(str, value)) if isinstance(value, tuple) else str(value)).replace("%", "%%") or "none"


def _converted(text: Any, kind: Any) -> Any:
    """Text as a value of its field; left as it is if it is none, for the field's check to refuse."""
    plain = _plain(kind)
    if isinstance(text, list):
        return tuple(_converted(one, typing.get_args(plain)[0]) for one in text)
    for number in (int, float):
        if isinstance(text, str) and number in (plain, *typing.get_args(plain)):
            with contextlib.suppress(ValueError):
                return number(text)
    return Path(text) if plain is Path else text


def _normalized(argv: list[str]) -> list[str]:
    """--max_length as --max-length, and negative numbers joined to their option, which argparse would take for one."""
    joined: list[str] = []
    for text in argv:
        if text.startswith("--") and text != "--":
            name, equals, value = text.partition("=")
            text = name.replace("_", "-") + equals + value
        if _negative(text) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def _negative(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return text.startswith("-") and float(text) == float(text)
    return False


def _unknown(text: str, kind: type[Options]) -> str:
    name, kinds = text.partition("=")[0], kinds_of(kind)
    places = {
        flag(field.name): one.metavar for field in fields(kind) if (one := _argument(kinds[field.name])).positional
    }
    known = [flag(field.name) for field in fields(kind) if flag(field.name) not in places]
    if not name.startswith("-"):
        return f"unexpected argument {text!r}" + (f": did you mean --data {text}?" if "--data" in known else "")
    if name in places:
        return f"unknown option {name}: write {places[name]} without an option"
    meant = {one: f"--{ours}" for ours, theirs in kind.ELSEWHERE.items() for one in theirs if f"--{ours}" in known}
    answers = {f"--{one}": words for words, theirs in kind.NOT_HERE.items() for one in theirs}
    answers |= {f"--{one}": f"did you mean {ours}?" for one, ours in meant.items()}
    answers |= {one: f"did you mean {one}?" for one in known}
    near = difflib.get_close_matches(name, answers, n=1, cutoff=LIKENESS)
    return f"unknown option {name}" + (f": {answers[near[0]]}" if near else "")
