"""The benchmarks: contestants agree, a disagreement is reported instead of a time, and numbers have their files."""

import argparse
import dataclasses
import importlib
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gcrm_fast.data.sampling import Sampling
from gcrm_fast.training import accounting, objectives, parallel
from gcrm_fast.training.accounting import forward_flops
from gcrm_fast.training.config import TrainConfig
from gcrm_kernels import launch, reference
from support.small import small_config
from support.training_runs import ROOT

CPU = torch.device("cpu")
MODULES = (
    "contrastive_loss",
    "drawn",
    "measure",
    "fused_projection",
    "train_step",
    "contestants",
    "our_step",
    "step_costs",
    "scoring",
    "padded",
    "records",
    "gpu",
    "gpu_children",
    "gpu_parts",
    "gpu_report",
    "step_model",
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module("contrastive_loss")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def small(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Without torch.compile, which takes a C++ compiler and most of a minute."""
    monkeypatch.setattr(bench.torch, "compile", lambda f: f)
    return bench


@pytest.mark.parametrize("d", [0, 8])
def test_all_contestants_are_measured_on_both_input_forms(small: ModuleType, d: int) -> None:
    rows = [row for case in small.cases(2, 3, 16, d, CPU, torch.float32) for row in small.compare(case, 1e9, 0.0)]
    assert [(r["input"], r["method"]) for r in rows] == [
        (source, method) for source in ("tokens", "rows") for method in ("naive", "compiled", "bmm", "ours")
    ]
    assert all(r["forward+backward ms"] > 0 and r["p10"] <= r["forward+backward ms"] <= r["p90"] for r in rows)
    tokens, compact = rows[0]["compulsory MB"], rows[4]["compulsory MB"]
    assert tokens > compact  # a gradient row for every token
    extra = {r["method"]: r["extra MB"] for r in rows[4:]}
    assert 0 <= extra["ours"] < extra["naive"]
    assert "no verdict" not in small.verdict(rows, (2, 3, 16, d))


def test_a_wrong_contestant_is_not_timed(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = small.naive
    monkeypatch.setattr(small, "naive", lambda *inputs: 1.01 * right(*inputs))
    with pytest.raises(SystemExit) as end:
        small.compare(next(small.cases(2, 3, 16, 0, CPU, torch.float32)), 1e9, 0.0)
    assert end.value.code == 1
    captured = capsys.readouterr()
    assert "not timed" in captured.err
    assert captured.out == ""


def test_what_does_not_fit_in_memory_is_listed(small: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "free_memory", lambda device: 1)
    rows = small.compare(next(small.cases(2, 3, 16, 0, CPU, torch.float32)), 1e9, 0.0)
    assert ["note" in r for r in rows] == [True, True, False, False]
    assert "no verdict" in small.verdict(rows, (2, 3, 16, 0))


def test_dense_contestants_and_the_share_of_a_step(small: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = small.compare_dense(2, 6, 8, CPU, torch.float32, 0.0)
    assert [r["method"] for r in rows] == ["naive", "bmm", "ours"]
    config = small_config(vocab_size=32000)
    monkeypatch.setattr(small, "step_model", lambda device: config)
    shares = small.share_of_step(CPU, torch.float32, 0.0)
    assert all(0 < r["share %"] < 100 for r in shares)


def test_peak_memory_counts_what_lives_at_once(bench: ModuleType) -> None:
    def function() -> torch.Tensor:
        first = torch.ones(1000)
        second = first + 1
        del first
        return second * 2

    assert bench.measure.peak_memory(function, CPU) == pytest.approx(8000, abs=200)


def test_the_commit_is_known_without_git_too(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GCRM_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench.measure.environment(CPU)["commit"] == "unknown"
    monkeypatch.setenv("GCRM_COMMIT", "abc1234")
    assert bench.measure.environment(CPU)["commit"] == "abc1234"


@pytest.mark.skipif(not launch.HAS_TRITON, reason="triton is not installed")
def test_fused_projection_agrees(bench: ModuleType) -> None:
    fused = importlib.import_module("fused_projection")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = next(bench.cases(2, 5, 40, 24, device, torch.float32))
    found = fused.fused_forward(case.hidden, case.rows, case.projection)
    torch.testing.assert_close(found, bench.naive(case.hidden, case.rows, case.projection))


# ------------------------------------------------------------------------------------------------- the training step


@pytest.fixture
def step(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/train_step.py on built-in lengths."""
    monkeypatch.delenv("GCRM_DATA", raising=False)
    return importlib.import_module("train_step")


@pytest.fixture
def our_step(step: ModuleType) -> ModuleType:
    return importlib.import_module("our_step")


@pytest.fixture
def contestants(step: ModuleType) -> ModuleType:
    return importlib.import_module("contestants")


CONFIG = small_config(vocab_size=32_000)
OPTIONS = TrainConfig(global_batch_pairs=8)


def padded_and_batch(
    step: ModuleType, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[Any, list[Any]]:
    """(the padded reference, a global batch of 8 pairs, one a group)"""
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
        # Each lever removed costs what it should, and only that.
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
    finished = [step.finished(r, rows, "gsm8k_pairs", CPU) | {"% matmul": 50.0} for r in rows]
    assert finished[1]["x TRL"] == 5
    assert finished[1]["x TRL shipped"] is None
    assert "5.0 times TRL without checkpointing" in step.verdict(finished)


def test_one_that_does_not_fit_is_a_note(step: ModuleType, contestants: ModuleType, our_step: ModuleType) -> None:
    _, batch = padded_and_batch(step)

    def run(batches: list[Any]) -> list[float]:
        raise torch.OutOfMemoryError

    c = contestants.Contestant("large", [batch], run, run, lambda _: our_step.Work(1, 1.0), {})
    rows = [step.finished(r, [], "gsm8k_pairs", CPU) for r in step.race([c], 1, CPU, torch.float32)]
    assert rows[0]["note"] == "out of memory"
    assert "pairs/s" not in rows[0]


def test_trl_that_cannot_be_imported_is_left_out_with_the_reason(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "trl.py").write_text("raise RuntimeError('half installed')")
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert step.padded.trl_missing() == "TRL cannot be imported (half installed)"
    (tmp_path / "trl.py").write_text("import gcrm_absent")
    importlib.invalidate_caches()
    assert "gcrm_absent is not installed" in step.padded.trl_missing()


def skip_without_trl(step: ModuleType) -> None:
    """`make test` installs it; who only trains has no need of it."""
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


# -------------------------------------------------------------------------------------------------- the model of a step


@pytest.fixture
def step_model(bench: ModuleType) -> ModuleType:
    return importlib.import_module("step_model")


def test_operators_are_charged_for_what_they_read_and_write(step_model: ModuleType) -> None:
    a, b = torch.zeros(4, 8), torch.zeros(8, 2)
    with step_model.Counter(1e3, 10.0, 0.0) as counter:
        (a @ b).t().unsqueeze(0) + 1  # views move nothing
    assert counter.totals == {
        step_model.MATMUL: [2 * 4 * 8 * 2, 4 * (32 + 16 + 8), 4 * (32 + 16 + 8) / 10],
        step_model.REST: [0.0, 4 * (8 + 8), 4 * (8 + 8) / 10],
    }


def test_the_model_of_a_step_has_the_operations_of_the_log(step_model: ModuleType) -> None:
    [pack] = step_model.packs_of(CONFIG, 20, 30, 6, 500)
    assert pack.n_pairs == 6
    counter = step_model.count(CONFIG, pack, 1e12, 1e12)
    operations = {part: total[0] for part, total in counter.totals.items()}
    assert operations[step_model.ATTENTION] > 0
    assert sum(operations.values()) == pytest.approx(accounting.work(pack, CONFIG, "none").model_flops, rel=1e-3)
    assert counter.totals[step_model.KERNELS][1] > 0


def test_the_numbers_of_a_step_add_up(step_model: ModuleType) -> None:
    packs, rates = step_model.packs_of(CONFIG, 20, 30, 9, 320), (1e12, 1e9)
    assert [pack.n_pairs for pack in packs] == [3, 3, 3]
    whole, one = step_model.step(CONFIG, packs, *rates, "step"), step_model.count(CONFIG, packs[-1], *rates)
    for part, (work, moved, seconds) in one.totals.items():
        assert whole.totals[part] == pytest.approx([3 * work, 3 * moved, 3 * seconds])
    weights = CONFIG.parameters()
    gathered, reduced = 10, 6 + 10 + 10 + 16
    assert whole.totals[step_model.FSDP] == pytest.approx(
        [0.0, (gathered + reduced) * weights, (gathered + reduced) * weights / 1e9]
    )
    assert whole.totals[step_model.OPTIMIZER][1] == 28 * weights
    assert whole.seconds == pytest.approx(sum(seconds for _, _, seconds in whole.totals.values()))

    def milliseconds(tokens: int, gather: str) -> float:
        return step_model.predicted_ms(CONFIG, (20, 30), 9, tokens, 1.0, 0.001, gather)

    assert milliseconds(320, "step") == pytest.approx(1e3 * whole.seconds)
    assert milliseconds(320, "step") > milliseconds(480, "step") > milliseconds(1000, "step")
    assert milliseconds(320, "block") > milliseconds(320, "step")


class Moved(TorchDispatchMode):
    """Bytes that copies and additions read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.name()
        if name == "aten::_to_copy":
            self.bytes += args[0].nbytes + result.nbytes
        elif name == "aten::copy_":
            self.bytes += args[0].nbytes + args[1].nbytes
        elif name == "aten::add_.Tensor":
            self.bytes += 2 * args[0].nbytes + args[1].nbytes
        elif name == "fsdp::chunk_cat":
            self.bytes += sum(x.nbytes for x in args[0]) + (kwargs or {})["out"].nbytes
        return result


@pytest.mark.parametrize("gather", ["step", "block"])
@pytest.mark.parametrize("pairs_a_pack", [1, 3])
def test_fsdp_copies_what_the_model_of_a_step_says(
    step_model: ModuleType, our_step: ModuleType, monkeypatch: pytest.MonkeyPatch, gather: str, pairs_a_pack: int
) -> None:
    moved = Moved()
    for name in ("wait_for_unshard", "post_backward"):
        original = getattr(FSDPParamGroup, name)

        def counted(*args: Any, original: Any = original) -> Any:
            with moved:
                return original(*args)

        monkeypatch.setattr(FSDPParamGroup, name, counted)
    config = small_config(vocab_size=32_000, intermediate_size=8192)  # most weights are the blocks'
    packs = step_model.packs_of(config, 20, 30, 3, 80 * pairs_a_pack + 10)
    assert [pack.n_pairs for pack in packs] == 3 // pairs_a_pack * [pairs_a_pack]
    with parallel.process_group() as (mesh, device):
        ours = our_step.Ours(config, TrainConfig(gather=gather), torch.bfloat16, mesh, device)
        ours.accumulate(packs, 3)
    assert moved.bytes == pytest.approx(step_model.fsdp_bytes(config, len(packs), gather), rel=0.01)


# ---------------------------------------------------------------------------------------------------------- make gpu


@pytest.fixture
def gpu(bench: ModuleType) -> ModuleType:
    return importlib.import_module("gpu")


@pytest.fixture
def gpu_report(bench: ModuleType) -> ModuleType:
    return importlib.import_module("gpu_report")


@pytest.mark.parametrize(("name", "part"), [("README.md", "short"), ("docs/performance.md", "full")])
def test_every_number_of_the_gpu_tables_has_its_file(gpu_report: ModuleType, name: str, part: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count(gpu_report.BEGIN) == text.count(gpu_report.END) == 1
    found = gpu_report.newest(ROOT / "bench" / "results")
    expected = getattr(gpu_report, part)(*found) if found else gpu_report.NOT_MEASURED
    written = text.partition(gpu_report.BEGIN)[2].partition(gpu_report.END)[0].strip()
    # The model of a step counts the operators of this torch.
    said, right = (re.split(r"(?<=predicted ms )([0-9.]+)", part) for part in (written, expected))
    assert said[::2] == right[::2], "write it anew: python bench/gpu.py --docs"
    assert [float(n) for n in said[1::2]] == pytest.approx([float(n) for n in right[1::2]], rel=0.02)


def a_call(**about: Any) -> dict[str, Any]:
    """The first line of a call."""
    call = {"part": "", "what": "begin", "device": "NVIDIA H100", "torch": "2.11.0", "triton": "3.6.0", "pairs": 6}
    call |= {"commit": "abc1234", "kernels": "0123456789ab", "date": "2026-01-02"}
    call["config"] = dataclasses.asdict(CONFIG)
    return {**call, **about}


def a_step(pairs_per_second: float, tokens: int = 16_384, **about: Any) -> dict[str, Any]:
    row = {"part": "step", "what": "step", "pairs/s": pairs_per_second, "ms": 6e3 / pairs_per_second, "MFU %": 51.0}
    row |= {"recompute": "none", "shape": "100/225", "tokens per pack": tokens}
    return {**row, **about}


@pytest.fixture
def written(gpu_report: ModuleType, tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """(README.md, docs/performance.md) as they are written from files of rows."""

    def write(**files: list[dict[str, Any]]) -> tuple[str, str]:
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "results").mkdir(exist_ok=True)
        paths = (tmp_path / "README.md", tmp_path / "docs" / "performance.md")
        for path in paths:
            path.write_text(f"before\n{gpu_report.BEGIN}\nold 1\n{gpu_report.END}\nafter\n")
        for name, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "results" / f"gpu-{name.replace('_', '-')}.jsonl").write_text(text)
        gpu_report.write(tmp_path, tmp_path / "results")
        texts = [path.read_text() for path in paths]
        for text in texts:
            assert text.startswith(f"before\n{gpu_report.BEGIN}\n")
            assert text.endswith(f"\n{gpu_report.END}\nafter\n")
            assert "old 1" not in text
        return texts[0], texts[1]

    return write


def test_gpu_tables_are_written_from_the_newest_file(
    gpu_report: ModuleType, written: Callable[..., tuple[str, str]]
) -> None:
    assert all(f"\n{gpu_report.NOT_MEASURED}\n" in text for text in written())
    loss = {"part": "contrastive", "what": "contrastive: ours", "N": 512}
    rows = [
        a_call(),
        {"part": "step", "what": "began", "needs": 30},
        a_step(151.25),
        {"part": "step", "what": "done", "seconds": 3.0},
        {"part": "profile", "what": "kernel", "kernel": "gemm", "ms": 3.0},
        {"part": "baseline", "what": "padded", "pairs/s": 50.0, "pairs per batch": 8},
        {"part": "baseline", "what": "padded", "pairs/s": 75.625, "pairs per batch": 16},
        {"part": "baseline", "what": "padded", "note": "out of memory", "pairs per batch": 32},
        {"part": "wide", "what": "8b shape, 8 layers", "pairs/s": 99.6, "MFU %": 54.4},
        {**loss, "states": "tokens", "forward+backward ms": 9.0},
        {**loss, "states": "rows", "forward+backward ms": 1.234, "x naive": 54.6, "% of copy": 20.4},
        {"part": "tests", "what": "tests", "passed": 31, "failed": 1, "skipped": 2, "right": False, "trace": "why"},
    ]
    readme, docs = written(nvidia_h200_2025_12_31=[a_call(), a_step(99.0)], nvidia_h100_2026_01_02=rows)
    origin = (
        "NVIDIA H100, torch 2.11.0, triton 3.6.0, 2026-01-02, commit abc1234, kernels 0123456789ab; "
        "`bench/results/gpu-nvidia-h100-2026-01-02.jsonl`"
    )
    assert readme.splitlines()[2:-2] == [
        "- step, 1b shape: 151 pairs/s, MFU 51%; 2.0 times padded transformers at its best",
        "- step, 8b shape with 8 of its 32 layers: 100 pairs/s, MFU 54%",
        "- contrastive loss, N=512 S=16 H=4096: 1.23 ms, 55 times naive, 20% of the rate of a copy",
        "- tests on the GPU: 31 passed, 1 failed, 2 skipped",
        f"- {origin}",
    ]
    table = docs.splitlines()[2:-2]
    assert table[0] == origin
    assert table[4] == (
        "| step | step | pairs/s 151.2, ms 39.67, MFU % 51, recompute none, shape 100/225, tokens per pack 16384 |"
    )
    assert table[-1] == "| tests | tests | WRONG: passed 31, failed 1, skipped 2 |"
    assert len(table) == 4 + 8  # neither notes nor a profile's kernels


def test_of_several_calls_the_latest_numbers_count(
    gpu_report: ModuleType, written: Callable[..., tuple[str, str]]
) -> None:
    skipped, tuning = {"what": "skipped", "left": 1.0}, {"part": "tuning", "what": "tuning", "block": 64}
    wide = {"part": "wide", "what": "8b shape, 8 layers"}
    first = [
        *(a_call(), a_step(100.0), a_step(110.0, 36_864), {"part": "step", "what": "done"}),
        *({"part": "tests", **skipped}, {"part": "training", **skipped}),
        *({"part": "wide", "what": "began", "needs": 1}, {"part": "wide", "what": "failed", "why": "lost"}),
        *({**tuning, "ms": 1.0}, {**tuning, "ms": 2.0}, {"part": "tuning", "what": "done"}),
    ]
    second = [
        *(a_call(commit="def5678"), a_step(120.0), {"part": "step", **skipped}),
        *(
            {"part": "tests", "what": "tests", "passed": 3, "failed": 0, "skipped": 0},
            {"part": "tests", "what": "done"},
        ),
        *({**wide, "pairs/s": 9.0, "MFU %": 5.0}, {"part": "wide", "what": "done"}),
        {"part": "tuning", "what": "failed", "why": "hung"},
    ]
    readme, docs = written(h100_2026_01_02=first + second)
    assert "120 pairs/s" in readme
    assert "commit abc1234 and def5678" in readme
    body = [[cell.strip() for cell in line.strip("|").split("|")] for line in docs.splitlines()[6:-2]]
    assert [(part, what, numbers.split(",")[0]) for part, what, numbers in body] == [
        ("step", "step", "pairs/s 120"),
        ("step", "step", "pairs/s 110"),
        ("tests", "tests", "passed 3"),
        ("training", "skipped", "left 1"),
        ("wide", "8b shape, 8 layers", "pairs/s 9"),
        ("tuning", "tuning", "block 64"),
        ("tuning", "tuning", "block 64"),
        ("tuning", "failed", "why hung"),
    ]


def test_measured_steps_stand_beside_predicted_ones(
    gpu_report: ModuleType, step_model: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(step_model.MODELS, "8b", CONFIG)
    rates = [
        {"part": "rates", "what": "matrix product", "n": 8192, "tflops": 2.0},
        {"part": "rates", "what": "matrix product", "n": 4096, "tflops": 5.0},
        {"part": "rates", "what": "copy", "tbps": 0.002},
    ]
    steps = [
        a_step(1.0, 1100, shape="100/225"),
        a_step(1.0, 1100, shape="250/80"),
        a_step(1.0, 1100, recompute="mlp"),
        {"part": "step", "what": "step", "note": "out of memory", "recompute": "none"},
        {"part": "variants", "what": "variant: weights gathered for every pack", "ms": 1.0, "recompute": "none"},
        {"part": "wide", "what": "8b shape, 8 layers", "ms": 1.0, "recompute": "none"},
        {"part": "variants", "what": "variant: as it is", "ms": 1.0, "recompute": "none"},
    ]
    rows = gpu_report.with_prediction(gpu_report.current([a_call(), *rates, *steps]))
    found = [row["predicted ms"] for row in rows if "predicted ms" in row]
    eight = dataclasses.replace(CONFIG, num_hidden_layers=8)
    expected = [
        step_model.predicted_ms(config, shape, 6, tokens, 2.0, 0.002, gather)
        for config, shape, tokens, gather in (
            (CONFIG, (100, 225), 1100, "step"),
            (CONFIG, (250, 80), 1100, "step"),
            (CONFIG, (100, 225), 16_384, "block"),
            (eight, (100, 225), 16_384, "step"),
        )
    ]
    assert found == expected
    assert not any("predicted ms" in row for row in gpu_report.with_prediction(gpu_report.current([a_call(), *steps])))


def test_without_cuda_make_gpu_says_so_in_one_line(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "CUDA" in captured.err


def test_packages_that_cannot_be_imported_are_named_or_taken_from_wheels(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "TOOLS", ("gcrm-half", "gcrm-broken"))
    (tmp_path / "gcrm_half.py").write_text("import gcrm_absent")
    (tmp_path / "gcrm_broken.py").write_text("raise RuntimeError('built for another torch')")
    reasons = ["gcrm-half (No module named 'gcrm_absent')", "gcrm-broken (built for another torch)"]
    assert gpu.not_importable(["numpy", "scikit-learn", "gcrm-half", "gcrm-broken"]) == reasons
    said = gpu.not_ready(None, tmp_path)
    assert all(reason in said for reason in reasons)
    assert "WHEELS=FOLDER" in said
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "gcrm_absent-1.0-py3-none-any.whl", "w") as wheel:
        info = "gcrm_absent-1.0.dist-info"
        wheel.writestr("gcrm_absent.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gcrm-absent\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    said = gpu.not_ready(wheels, tmp_path / "packages")
    assert reasons[0] not in said
    assert reasons[1] in said


FAKE_PARTS = """
import argparse, json, os, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--deadline", type=float)
parser.add_argument("--parts", nargs="+")
options = parser.parse_args()

def put(part, what, **about):
    with open(options.out, "a") as file:
        file.write(json.dumps({"part": part, "what": what, **about}) + "\\n")

put("", "begin", parts=options.parts)
for name in options.parts:
    put(name, "began", needs=0)
    if name in ("hangs", "dies"):
        sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        put(name, "started", pid=sleeping.pid)
    if name == "hangs":
        time.sleep(600)
    if name == "dies":
        with open(options.out, "a") as file:
            file.write('{"part": "dies", "wh')
        os._exit(3)
    if name == "fails":
        put(name, "failed", why="of itself")
        continue
    put(name, "done")
"""


def is_running(pid: int) -> bool:
    """A zombie is not."""
    path = Path(f"/proc/{pid}/cmdline")
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


@pytest.fixture
def fake_parts(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The script in the place of bench/gpu_parts.py."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "GRACE", 2.0)
    monkeypatch.setattr(gpu, "LOOK", 0.02)
    path = tmp_path / "bench" / "gpu_parts.py"
    path.parent.mkdir()
    path.write_text(FAKE_PARTS)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_parts_that_hang_or_die_cost_the_others_nothing(gpu: ModuleType, fake_parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    out.write_text('{"part": "earlier", "what": "done"}')  # of a call that ended before its last line did
    gpu.measure_parts(["fine", "hangs", "fails", "dies", "last"], out, 100, dict(os.environ))
    rows = gpu.lines(out)
    assert [(row["part"], row["what"]) for row in rows] == [
        ("earlier", "done"),
        *(("", "begin"), ("fine", "began"), ("fine", "done")),
        *(("hangs", "began"), ("hangs", "started"), ("hangs", "failed")),
        *(("", "begin"), ("fails", "began"), ("fails", "failed")),
        *(("dies", "began"), ("dies", "started"), ("", "cut off"), ("dies", "failed")),
        *(("", "begin"), ("last", "began"), ("last", "done")),
    ]
    why = [row["why"] for row in rows if row["what"] == "failed"]
    assert why == ["ended: out of time, or it hung", "of itself", "its process ended with 3"]
    assert next(row["text"] for row in rows if row["what"] == "cut off") == '{"part": "dies", "wh'
    assert not any(is_running(row["pid"]) for row in rows if row["what"] == "started")


def test_a_process_that_dies_at_once_is_not_started_again(gpu: ModuleType, fake_parts: Path, tmp_path: Path) -> None:
    out, started = tmp_path / "results.jsonl", tmp_path / "started"
    fake_parts.write_text(f"open({str(started)!r}, 'a').write('x'); raise SystemExit(7)")
    gpu.measure_parts(["one", "two"], out, 100, dict(os.environ))
    assert started.read_text() == "x"
    assert [(row["part"], row["what"], row["why"]) for row in gpu.lines(out)] == [
        ("", "failed", "its process ended with 7"),
        ("one", "skipped", "never begun"),
        ("two", "skipped", "never begun"),
    ]


def test_without_time_no_process_is_started(gpu: ModuleType, fake_parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    gpu.measure_parts(["fine"], out, gpu.LEAST - 1, dict(os.environ))
    assert [(row["part"], row["what"]) for row in gpu.lines(out)] == [("fine", "skipped")]


def test_a_line_that_is_being_written_is_left_to_its_writer(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert gpu.lines(path) == []
    path.write_text('{"part": "a", "what": "x"}\n{"part": "b", ')
    assert gpu.lines(path) == [{"part": "a", "what": "x"}]
    with path.open("a") as file:
        file.write('"what": "y"}\n')
    whole = path.read_text()
    assert [row["part"] for row in gpu.lines(path)] == ["a", "b"]
    gpu.repair(path)
    assert path.read_text() == whole


def test_the_cheap_parts_run_without_a_gpu(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu_parts = importlib.import_module("gpu_parts")
    pairs = gpu_parts.equal_pairs
    monkeypatch.setattr(gpu_parts, "equal_pairs", lambda p, c, *rest: pairs(p // 8 + 1, c // 8 + 1, *rest))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "results.jsonl"
    options = argparse.Namespace(out=out, model="tiny", pairs=2)
    with gpu_parts.laboratory(options) as lab:
        for part in gpu_parts.PARTS:
            if part.name in ("rates", "attention", "no_waiting"):
                lab.part = part.name
                part.run(lab)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    keys = {row["what"]: sorted(row.keys() - {"t", "part", "what"}) for row in rows}
    product = ["dw", "dx", "forward", "tokens"]
    errors = ["backend", "dk", "dq", "dv", "head size", "heads", "kv heads", "out", "right"]
    assert keys == {
        "matrix product": ["n", "tflops"],
        "copy": ["tbps"],
        **{f"matrix product {name}": product for name in ("q", "kv", "up", "gate and up", "down")},
        "attention": errors,
        "model built": ["GB", "seconds"],
        "waits of the host": ["count", "where"],
    }
    assert [row["part"] for row in rows] == 7 * ["rates"] + 3 * ["attention"] + 2 * ["no_waiting"]
    assert all(row["right"] for row in rows if row["what"] == "attention")
    assert all(row[key] > 0 for row in rows for key in keys[row["what"]] if row["part"] == "rates")


@pytest.fixture
def scoring(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """bench/scoring.py on a small model and built-in lengths."""
    module = importlib.import_module("scoring")
    monkeypatch.delenv("GCRM_DATA", raising=False)
    monkeypatch.setattr(module, "MODELS", {"tiny": small_config(vocab_size=32_000, num_hidden_layers=1)})
    monkeypatch.setattr(module, "BATCHES", (1, 4))
    monkeypatch.setattr(module, "EACH", (1, 3, 6))
    monkeypatch.setattr(module.measure, "RESULTS", tmp_path)
    arguments = ["scoring", "--model", "tiny", "--dtype", "float32", "--completions", "6", "--quick"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--data", "hh_pairs_train"])
    return module


def test_scoring_is_raced_and_recorded(scoring: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scoring.main()
    [path] = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())
    assert [(r["a prompt"], r["method"]) for r in rows] == [
        (each, method) for each in scoring.EACH for method in (scoring.PADDED, scoring.SORTED, scoring.OURS)
    ]
    assert all(0 < r["p10"] <= r["completions/s"] <= r["p90"] and r["peak MB"] > 0 for r in rows)
    assert [r["completions"] for r in rows] == [6] * 9
    by_method = {r["method"]: r for r in rows[6:]}
    assert by_method[scoring.OURS]["computed/completion"] < by_method[scoring.SORTED]["computed/completion"]
    assert by_method[scoring.OURS]["least work"] > 1.2
    assert path.with_suffix(".png").exists()
    assert "6 a prompt" in capsys.readouterr().out


def test_scoring_that_differs_is_not_timed(
    scoring: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = scoring.our_rewards
    monkeypatch.setattr(scoring, "our_rewards", lambda *inputs: right(*inputs)[::-1])
    with pytest.raises(SystemExit) as end:
        scoring.main()
    assert end.value.code == 1
    assert "nothing is timed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
