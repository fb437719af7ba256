"""Every case of bad input: exit code 2, one clear line on stderr, nothing left behind."""

import re
from pathlib import Path

import pytest

from gcrm_fast.train import main
from support.bad_checkpoints import CASES as CHECKPOINTS
from support.bad_input import Case
from support.bad_records import CASES as RECORDS

CASES = CHECKPOINTS + RECORDS


def tree(folder: Path) -> dict[Path, bytes | None]:
    """Every path under a folder, with the content of files."""
    return {p: p.read_bytes() if p.is_file() and not p.is_symlink() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = case.build(tmp_path)
    before = tree(tmp_path)
    capfd.readouterr()  # what building the case has printed
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"gcrm train: [^\n]+\n", err), err
    assert re.search(case.message, err), err
    assert tree(tmp_path) == before


def test_cases_are_distinct() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
