"""bench/train_step.py: padded, TRL and ours compute the same, and their speeds are over all of their steps."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gcrm_fast.data.sampling import Sampling
from gcrm_fast.training import objectives, parallel
from gcrm_fast.training.accounting import forward_flops
from gcrm_fast.training.config import TrainConfig
from gcrm_kernels import reference
from support.small import small_config

CPU = torch.device("cpu")
CONFIG = small_config(vocab_size=32_000)


OPTIONS = TrainConfig(global_batch_pairs=8)


def padded_and_batch(
    step: ModuleType, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[Any, list[Any]]:
    """(the padded reference, a global batch of 8 pairs, one per group)"""
    pairs = step.records.records("gsm8k_pairs", 8)
    model = step.padded.Padded(CONFIG, OPTIONS, objectives.Objective(), Sampling(), dtype, device)
    return model, [[pair] for pair in pairs]


def test_sampled_records_have_the_lengths_that_were_measured(step: ModuleType) -> None:
    pairs = step.records.records("gsm8k_pairs", 48)
    assert len(pairs) == 48
    assert len({p.prompt_key for p in pairs}) == 4
    lengths = {(chosen, rejected) for _, chosen, rejected in step.records.LENGTHS["gsm8k_pairs"]}
    for pair in pairs:
        assert (len(pair.chosen_ids) - pair.chosen_start, len(pair.rejected_ids) - pair.rejected_start) in lengths
        assert pair.chosen_ids[0] == pair.rejected_ids[0] == step.records.BOS
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == step.records.EOS
    mates = [p for p in pairs if p.prompt_key == 0]
    assert all(np.array_equal(p.chosen_ids[: p.chosen_start], mates[0].chosen_ids[: p.chosen_start]) for p in mates)
    assert step.group_sizes(pairs) == [1, 4, 16]
    assert step.group_sizes(step.records.records("hh_pairs_train", 8)) == [1]


def test_naive_contrastive_loss_is_the_default_objective(step: ModuleType) -> None:
    hidden, rows = torch.randn(9, 6), torch.randint(9, (4, 3, 5))
    has_positive = torch.tensor([True, False, True])
    found = step.padded.naive_contrastive(hidden, rows, has_positive)
    torch.testing.assert_close(found, reference.goal_contrastive_loss(hidden, rows, has_positive_N=has_positive)[0])


def test_padded_and_ours_agree_with_every_lever(
    step: ModuleType, contestants: ModuleType, our_step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step.padded, "trl_missing", lambda: "not asked for")
    with parallel.process_group() as (mesh, device):
        model, batch = padded_and_batch(step, device=device)
        ours = our_step.Ours(CONFIG, OPTIONS, torch.float32, mesh, device)
        expected = contestants.references(model, step.flat(batch))
        assert contestants.check(ours, expected, batch, 1e-4)
        # Removing a lever costs what it should, and nothing else.
        work = {without: our_step.packed_work(CONFIG, ours.packs(batch, without)) for without in ("", *our_step.LEVERS)}
        assert len(ours.packs(batch)) == 1
        assert len(ours.packs(batch, "packing")) == 8
    prompts = sum(pair.chosen_start for pair in step.flat(batch))
    assert work["packing"] == work["fused loss"] == work[""]
    assert work["sharing"].tokens == work[""].tokens + prompts
    assert work["read rows"].tokens == work[""].tokens
    assert work["read rows"].flops > work[""].flops
    loss, gradients = expected["naive"]
    for wrong in ((loss * 1.001, gradients), (loss, {**gradients, "score.weight": gradients["score.weight"] * 1.001})):
        assert not contestants.agrees("wrong", wrong, expected["naive"], 1e-4)


def test_nothing_is_timed_where_contestants_differ(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = step.padded.ranking_loss
    monkeypatch.setattr(step.padded, "ranking_loss", lambda *inputs: 1.01 * right(*inputs))
    monkeypatch.setattr(step.padded, "trl_missing", lambda: "not asked for")
    monkeypatch.setattr(step, "race", lambda *_: pytest.fail("timed"))
    with parallel.process_group() as (mesh, device), pytest.raises(SystemExit) as end:
        step.compare(["gsm8k_pairs"], CONFIG, OPTIONS, 1, 1, torch.float32, mesh, device)
    assert end.value.code == 1


def test_flops_are_those_that_torch_counts(step: ModuleType, contestants: ModuleType) -> None:
    model, batch = padded_and_batch(step)
    model.model.set_attn_implementation("eager")  # the counter knows matrix products
    pairs = step.flat(batch)
    with FlopCounterMode(display=False) as counter:
        model.loss(pairs).backward()
    tokens = contestants.padded_work(CONFIG, [pairs]).tokens
    length = tokens // 16
    full = 3 * forward_flops(CONFIG, tokens, tokens * length, tokens)
    assert counter.get_total_flops() == pytest.approx(full, rel=0.01)
    half = contestants.padded_work(CONFIG, [pairs]).flops
    attention = full - 3 * forward_flops(CONFIG, tokens, 0, tokens)
    assert full - half == pytest.approx(attention / 2, rel=1 / length)


def test_speed_is_all_pairs_over_the_sum_of_median_step_times(
    step: ModuleType, contestants: ModuleType, our_step: ModuleType
) -> None:
    _, batch = padded_and_batch(step)
    work = our_step.Work(tokens=100, flops=3e9)
    c = contestants.Contestant("x", [batch, batch], lambda _: [], lambda _: 0, lambda _: work, {})
    row = step.summary(c, np.array([[1.0, 2.0], [1.0, 4.0], [3.0, 3.0]]), 3e9, CPU)
    assert row["pairs/s"] == 16 / (1 + 3)
    assert row["computed/pair"] == 200 / 16
    assert (row["GFLOP/s"], row["% matmul"]) == (6 / 4, 50)
    rows = [
        {"method": name, "pairs/s": speed, "peak": 1}
        for name, speed in ((contestants.TRL, 2.0), (contestants.OURS, 10.0))
    ]
    finished = [step.finished(r, rows, "gsm8k_pairs") | {"% matmul": 50.0} for r in rows]
    assert finished[1]["x TRL"] == 5
    assert finished[1]["x TRL shipped"] is None
    assert "5.0 times TRL without checkpointing" in step.verdict(finished)


def test_one_that_does_not_fit_is_a_note(step: ModuleType, contestants: ModuleType, our_step: ModuleType) -> None:
    _, batch = padded_and_batch(step)

    def run(batches: list[Any]) -> list[float]:
        raise torch.OutOfMemoryError

    c = contestants.Contestant("large", [batch], run, run, lambda _: our_step.Work(1, 1.0), {})
    rows = [step.finished(r, [], "gsm8k_pairs") for r in step.race([c], 1, CPU, torch.float32)]
    assert rows[0]["note"] == "out of memory"
    assert "pairs/s" not in rows[0]


def test_trl_that_cannot_be_imported_is_skipped_with_the_reason(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "trl.py").write_text("raise RuntimeError('half installed')")
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert step.padded.trl_missing() == "TRL cannot be imported (half installed)"
    (tmp_path / "trl.py").write_text("import gcrm_not_installed")
    importlib.invalidate_caches()
    assert "gcrm_not_installed is not installed" in step.padded.trl_missing()


def skip_without_trl(step: ModuleType) -> None:
    """`make test` installs it; training does not need it."""
    if missing := step.padded.trl_missing():
        pytest.skip(missing)


def test_trl_runs_its_own_trainer_and_computes_the_same_ranking_loss(step: ModuleType, contestants: ModuleType) -> None:
    skip_without_trl(step)
    model, batch = padded_and_batch(step)
    pairs = step.flat(batch)
    assert contestants.references(model, pairs).keys() >= {"naive", "TRL"}
    half = [pairs[:4], pairs[4:]]
    shipped = step.padded.trl_steps(model, half, 2, True)
    off = step.padded.trl_steps(model, half, 2, False, with_memory=True)
    assert (len(shipped.seconds), len(off.seconds)) == (2, 2)
    assert (shipped.checkpointing, off.checkpointing) == (True, False)
    assert all(peak.bytes > 0 for peak in off.peaks)


def test_trl_computes_in_the_dtype_that_is_timed_each_time(step: ModuleType) -> None:
    skip_without_trl(step)
    model, batch = padded_and_batch(step, torch.bfloat16)
    seen = []
    model.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda layer, x, out: seen.append(out.dtype))
    for as_shipped in (False, True):
        step.padded.trl_steps(model, [step.flat(batch)[:2]], 2, as_shipped)
        assert set(seen) == {torch.bfloat16}
        seen.clear()
