"""The benchmarks: contestants agree, a disagreement is reported instead of a time, and numbers have their files."""

import importlib
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, small_config
from gcrm_kernels import launch, reference
from torch.utils.flop_counter import FlopCounterMode

from gcrm_fast.data.sampling import Sampling
from gcrm_fast.training import accounting, objectives, parallel
from gcrm_fast.training.accounting import forward_flops
from gcrm_fast.training.config import TrainConfig

CPU = torch.device("cpu")
MODULES = ("contrastive_loss", "drawn", "measure", "fused_projection", "train_step", "contestants", "our_step",
           "step_costs", "scoring", "padded", "records", "gpu", "step_model")  # fmt: skip


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
    rows = [{"method": name, "pairs/s": speed, "peak": 1}
            for name, speed in ((contestants.TRL, 2.0), (contestants.OURS, 10.0))]  # fmt: skip
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
    pack = step_model.pack_of(20, 30, 500)
    assert pack.n_pairs == 6
    counter = step_model.count(CONFIG, pack, 1e12, 1e12)
    operations = {part: total[0] for part, total in counter.totals.items()}
    assert operations[step_model.ATTENTION] > 0
    assert sum(operations.values()) == pytest.approx(accounting.work(pack, CONFIG, "none").model_flops, rel=1e-3)
    assert counter.totals[step_model.KERNELS][1] > 0


# ---------------------------------------------------------------------------------------------------------- make gpu


@pytest.fixture
def gpu(bench: ModuleType) -> ModuleType:
    return importlib.import_module("gpu")


STEP = {"device": "NVIDIA H200", "date": "2026-01-02", "commit": "abc1234", "kernels": "0123456789ab", "model": "1b",
        "dtype": "bfloat16", "data": "gsm8k_pairs", "method": "ours", "pairs/s": 151.25, "MFU %": 51.0,
        "peak MB": 12_000.0}  # fmt: skip


def test_every_number_of_readmes_gpu_table_has_its_file(gpu: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(gpu.BEGIN) == text.count(gpu.END) == 1
    part = text.partition(gpu.BEGIN)[2].partition(gpu.END)[0].strip()
    assert part == gpu.readme_part(gpu.RESULTS), "write it anew: python bench/gpu.py --readme"


def test_readmes_table_is_written_from_the_newest_files(gpu: ModuleType, tmp_path: Path) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    readme.write_text(f"before\n{gpu.BEGIN}\nold 1\n{gpu.END}\nafter\n")
    for date, speed in (("2026-01-02", 151.25), ("2025-12-31", 99.0)):
        rows = [{**STEP, "date": date, "pairs/s": speed}]
        (results / f"train_step-1b-bfloat16-nvidia-h200-{date}.json").write_text(json.dumps(rows))
    (results / "train_step-cpu-2026-01-02.json").write_text(json.dumps([{**STEP, "device": "CPU, 2 threads"}]))
    gpu.write_readme(readme, results)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "CPU" not in text
    line = next(line for line in text.splitlines() if "ours" in line)
    for part in ("NVIDIA H200", "151.2 pairs/s", "2026-01-02", "abc1234", "0123456789ab",
                 "`train_step-1b-bfloat16-nvidia-h200-2026-01-02.json`"):  # fmt: skip
        assert part in line
    for path in results.glob("*.json"):
        path.unlink()
    gpu.write_readme(readme, results)
    assert gpu.NOT_MEASURED in readme.read_text()
    assert "151" not in readme.read_text()


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


def test_missing_packages_are_named_or_taken_from_wheels(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.unsatisfied(["torch>=2.11", "numpy"]) == []
    assert gpu.unsatisfied(["torch<2", "gcrm-absent>=1"]) == [
        f"torch<2 (found {torch.__version__})", "gcrm-absent>=1 (not installed)"
    ]  # fmt: skip
    wheels, target = tmp_path / "wheels", tmp_path / "packages"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "gcrm_absent-1.0-py3-none-any.whl", "w") as wheel:
        info = "gcrm_absent-1.0.dist-info"
        wheel.writestr("gcrm_absent.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gcrm-absent\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (wheels / "torch-1.0-py3-none-any.whl").touch()  # installed already: never touched
    assert gpu.install_wheels(wheels, target) == ["gcrm-absent"]
    monkeypatch.syspath_prepend(str(target))
    assert gpu.unsatisfied(["gcrm-absent>=1"]) == []


def test_a_stage_that_fails_or_takes_too_long_says_why(gpu: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert gpu.run_stage([sys.executable, "-c", "print('fine')"], 60, {}, log) == "ok"
    failing = [sys.executable, "-c", "print('why'); raise SystemExit(3)"]
    assert gpu.run_stage(failing, 60, {}, log) == "exit code 3: why"
    assert "stopped" in gpu.run_stage([sys.executable, "-c", "import time; time.sleep(60)"], 0.5, {}, log)
    xml = tmp_path / "tests.xml"
    xml.write_text('<testsuites name="x"><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10">')
    assert gpu.tests_row(xml) == {"passed": 4, "failed": 3, "skipped": 3}


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
