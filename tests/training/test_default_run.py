"""The default run, whole: pairs that were written by hand, which it must judge right."""

import json
from pathlib import Path

import pytest

from gcrm_fast import RewardModel
from gcrm_fast.data.arithmetic import is_correct, is_held_out
from support.training_runs import ROOT, start

BY_HAND = [json.loads(line) for line in (ROOT / "experiments" / "by_hand.jsonl").read_text().splitlines()]


def test_pairs_by_hand_are_what_they_should_be() -> None:
    assert len({pair["prompt"] for pair in BY_HAND}) == 20
    for pair in BY_HAND:
        assert is_correct(pair["prompt"], pair["chosen"])
        assert not is_correct(pair["prompt"], pair["rejected"])
        assert pair["chosen"].count(";") == pair["rejected"].count(";") >= 2
    assert all(is_held_out(pair["prompt"]) for pair in BY_HAND[1:])  # the first is the example of the docs


@pytest.mark.slow
def test_the_default_run_judges_pairs_of_two_and_three_steps(tmp_path: Path) -> None:
    run = start("--output", str(tmp_path / "run"), "--dtype", "float32")
    _, stderr = run.communicate(timeout=1800)
    assert run.returncode == 0, stderr[-2000:]
    model = RewardModel.from_pretrained(tmp_path / "run" / "model")
    assert model.config.head_dim == 32  # the smallest that vLLM and Triton take
    prompts = [pair["prompt"] for pair in BY_HAND]
    chosen, rejected = (model.score(prompts, [pair[side] for pair in BY_HAND]) for side in ("chosen", "rejected"))
    above = (chosen > rejected).tolist()
    assert above[0]
    assert sum(above) >= 19, [pair for pair, right in zip(BY_HAND, above, strict=True) if not right]
