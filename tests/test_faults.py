"""Planted faults (mutants.py) fit the code as it is now."""

from pathlib import Path

import pytest

import mutants


@pytest.mark.parametrize("name", mutants.planted())
def test_a_fault_can_be_planted(name: str) -> None:
    file, text, replacement, test = mutants.planted()[name]
    assert (mutants.ROOT / file).read_text(encoding="utf-8").count(text) == 1
    assert replacement != text
    assert Path(mutants.ROOT, test.partition(" -k ")[0]).is_file()
