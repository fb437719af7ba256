"""Verifiers of a user, which tests name as support.checks:NAME."""

import os
import time
from typing import Any

import numpy as np


def contains(prompt: str, completion: str, reference: Any) -> float | None:
    """The share of the reference's words that a completion has; one without any letter cannot be read."""
    if not any(c.isalpha() for c in completion):
        return None
    words = str(reference).split()
    return sum(word in completion for word in words) / len(words)


def misbehaves(prompt: str, completion: str, reference: Any) -> Any:
    """Does what the completion says."""
    if completion == "raise":
        raise RuntimeError("no sandbox\nsecond line")
    if completion == "exit":
        os._exit(3)
    if completion == "sleep":
        time.sleep(60)
    return {"text": "yes", "many": 7}.get(completion, True)


def of_numpy(prompt: str, completion: str, reference: Any) -> Any:
    """The value that the completion names, as NumPy has it."""
    kind, value = completion.split()
    return getattr(np, kind)(float(value))
