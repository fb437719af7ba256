"""Pairs that are held out of the training data by prompt."""

import json
import re
from pathlib import Path

import pytest

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.overlap import overlap, split_by_prompt
from gcrm_fast.data.records import Pair
from support.training_runs import TINY, Gcrm, rows


def pairs(prompts: int) -> list[Pair]:
    """Two of each prompt, which differ in white space."""
    return [Pair(f"{'  ' * i}question {k}", "yes", "no") for k in range(prompts) for i in range(2)]


def test_whole_prompts_are_held_out_in_the_fraction_asked_for() -> None:
    data = pairs(50)
    train, held = split_by_prompt(data, 0.1, 0)
    assert (len(train), len(held)) == (90, 10)
    assert overlap(train, held).prompts == 0
    assert sorted(map(str, train + held)) == sorted(map(str, data))
    again = split_by_prompt(data[::-1], 0.1, 0)[1]
    assert sorted(map(str, again)) == sorted(map(str, held))  # whatever the order
    assert split_by_prompt(data, 0.1, 1)[1] != held
    assert len(split_by_prompt(data, 0.001, 0)[1]) == 2
    with pytest.raises(UserError, match=r"--eval-split 0.5: holds out all prompts"):
        split_by_prompt(pairs(1), 0.5, 0)


def test_a_run_evaluates_the_pairs_that_it_holds_out(tmp_path: Path, gcrm: Gcrm) -> None:
    data = tmp_path / "pairs.jsonl"
    lines = [
        json.dumps({"prompt": f"question {i}", "chosen": f"{i}a", "rejected": "b", "kind": i % 2}) for i in range(40)
    ]
    data.write_text("\n".join(lines))
    few = [*TINY, "--vocab-size", 300, "--steps", 2, "--global-batch-pairs", 8, "--cache", "none"]
    out = ["--data", data, "--output", tmp_path / "run", "--eval-split", 0.2, "--eval-by", "kind"]
    result = gcrm("train", *out, *few)
    assert result.returncode == 0, result.stderr
    assert re.search(r"held-out pairs +8 \(", result.stdout)
    evaluation = [row for row in rows(tmp_path / "run") if "eval/auroc" in row][-1]
    assert evaluation["eval/pairs"] == 8
    assert {"eval/auroc/kind=0", "eval/auroc/kind=1"} <= evaluation.keys()
    both = gcrm("train", *out, "--eval-data", data)
    assert (both.returncode, "--eval-split 0.2: must be omitted with --eval-data" in both.stderr) == (2, True)
