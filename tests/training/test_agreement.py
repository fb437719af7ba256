"""Processes that read different data or options end before the first step, in one line that names them."""

import gzip
import re
from pathlib import Path

import pytest

from support.training_runs import TINY, torchrun

IN_ITS_OWN_FOLDER = """
import os, sys
rank = os.environ["LOCAL_RANK"]
os.chdir(os.path.join(os.path.dirname(__file__), rank))
from gcrm_fast.train import main
sys.exit(main([*sys.argv[2:], *(sys.argv[1].split() if rank == "1" else [])]))
"""
COUNTS = r"is 21 pairs \(fingerprint \w{12}\) on rank 0, 20 pairs \(fingerprint \w{12}\) on rank 1"


@pytest.mark.parametrize(
    ("shorter", "more", "message"),
    [
        (
            "train",
            "--lr 0.02",
            f"do not agree: training data {COUNTS}; .*; --lr is 0.01 on rank 0, 0.02 on rank 1: give",
        ),
        pytest.param("test", "", f"do not agree: held-out data {COUNTS}: give", marks=pytest.mark.slow),
        pytest.param("", "--eval-by family", r"rank 1: test.jsonl:1: field 'family'", marks=pytest.mark.slow),
    ],
)
def test_processes_that_do_not_agree(pair_file: Path, tmp_path: Path, shorter: str, more: str, message: str) -> None:
    with gzip.open(pair_file, "rt") as file:
        lines = file.readlines()
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        for name in ("train", "test"):
            kept = lines[:-1] if rank == 1 and name == shorter else lines
            (tmp_path / str(rank) / f"{name}.jsonl").write_text("".join(kept))
    script = tmp_path / "script.py"
    script.write_text(IN_ITS_OWN_FOLDER)
    options = [
        "--data",
        "train.jsonl",
        "--eval-data",
        "test.jsonl",
        "--allow-overlap",
        "--output",
        str(tmp_path / "out"),
    ]
    result = torchrun(more, *options, *TINY, "--vocab-size", "300", "--lr", "0.01", processes=2, script=str(script))
    [line] = [line for line in result.stderr.splitlines() if line.startswith("gcrm train:")]
    assert result.returncode != 0
    assert re.search(message, line), line
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
