"""Goal files: equal for equal goals, read from older versions, refused where they cannot be used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gcrm_fast.checkpoints.goals import GOAL_FILE, named_goal, read_goals, write_goals
from gcrm_fast.checkpoints.reading import POLICIES
from gcrm_fast.common.errors import UserError
from gcrm_fast.inference.scoring import RewardModel
from support import models


def test_goal_files_of_equal_goals_are_equal(tmp_path: Path) -> None:
    """In processes of their own, as the order of safetensors' metadata differs from process to process."""
    code = (
        "import sys, torch, pathlib; from gcrm_fast.checkpoints.goals import write_goals;"
        "write_goals(pathlib.Path(sys.argv[1]), {'b': torch.ones(3), 'a': torch.zeros(3)}, {'a': 1, 'b': 2}, 'abc')"
    )
    for name in ("one", "two", "three"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_older_goal_files_are_read(tmp_path: Path) -> None:
    old = {"fingerprint": "abc", "counts": '{"default": 7}', "end_policy": POLICIES["eos"]}
    save_file({"default": torch.ones(3)}, tmp_path / GOAL_FILE, metadata=old)
    write_goals(tmp_path / "new", {"default": torch.ones(3)}, {"default": 7}, "abc")
    assert read_goals(tmp_path / GOAL_FILE, "abc", 3)[1] == read_goals(tmp_path / "new", "abc", 3)[1] == {"default": 7}


@pytest.mark.parametrize(
    ("name", "goal", "message"),
    [
        ("", torch.ones(32), "goal '': a goal's name must be visible text without a colon"),
        ("a:b", torch.ones(32), "goal 'a:b': a goal's name"),
        ("\x1b[31m", torch.ones(32), r"goal '\\x1b\[31m': a goal's name"),
        ("wide", torch.ones(33), r"'wide' is torch.float32 of shape \(33,\), not 32 finite numbers"),
        ("table", torch.ones(1, 32), r"'table' is torch.float32 of shape \(1, 32\)"),
        ("whole", torch.ones(32, dtype=torch.int64), "'whole' is torch.int64"),
        ("nan", torch.full((32,), torch.nan), "'nan' is torch.float32 .* not 32 finite numbers"),
    ],
)
def test_goals_that_cannot_be_used(name: str, goal: Tensor, message: str, tmp_path: Path) -> None:
    """In a model's folder, or named by an option."""
    models.save(tmp_path / "m")
    model = RewardModel.from_pretrained(tmp_path / "m", device="cpu")
    file = tmp_path / "m" / GOAL_FILE
    facts = {"fingerprint": model.fingerprint, "end_policy": POLICIES["eos"]}
    save_file({name: goal}, file, metadata={"gcrm": json.dumps(facts)})
    with pytest.raises(UserError, match=message):
        RewardModel.from_pretrained(tmp_path / "m", device="cpu")
    with pytest.raises(UserError, match=message):
        named_goal(str(file), model.fingerprint, 32)


@pytest.mark.parametrize("metadata", ["{", "7", '{"fingerprint": "abc", "counts": "[1]"}', "[" * 10_000])
def test_goal_files_with_damaged_metadata(metadata: str, tmp_path: Path) -> None:
    save_file({"default": torch.ones(3)}, tmp_path / "g", metadata={"gcrm": metadata})
    with pytest.raises(UserError, match="g: not a readable goal file"):
        read_goals(tmp_path / "g", "abc", 3)
    save_file({}, tmp_path / "empty", metadata={"fingerprint": "abc"})
    with pytest.raises(UserError, match=r"empty: not a goal file .*no goal"):
        read_goals(tmp_path / "empty", "abc", 3)


def test_a_name_after_the_colon_is_needed(tmp_path: Path) -> None:
    write_goals(tmp_path / "g", {"default": torch.ones(3)}, {}, "abc")
    assert named_goal(f"{tmp_path}/g:default", "abc", 3).tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="goal '': a goal's name"):
        named_goal(f"{tmp_path}/g:", "abc", 3)
    with pytest.raises(UserError, match="goal 'a:b': a goal's name"):
        write_goals(tmp_path / "g", {"a:b": torch.ones(3)}, {}, "abc")
