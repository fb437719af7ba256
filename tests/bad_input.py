"""What a case of bad input is; the cases are in bad_records.py and bad_checkpoints.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """``build(folder)`` writes the bad input and returns the arguments of ``gcrm train``; ``message`` is a regular
    expression for the one line that the program must say."""

    name: str
    build: Callable[[Path], list[str]]
    message: str
