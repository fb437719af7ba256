"""What a case of bad input is. The cases themselves are in bad_*.py, their one test in test_bad_input.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """Bad input: ``build(folder)`` writes it and returns the arguments of ``gcrm train``; ``message`` is a regular
    expression that the one line on stderr must match: what is wrong, in which file, line and field."""

    name: str
    build: Callable[[Path], list[str]]
    message: str
