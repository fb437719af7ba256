"""bench/contrastive_loss.py and measure.py: contestants agree before any is timed, memory and commit are recorded."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gcrm_kernels import launch
from support.small import small_config

CPU = torch.device("cpu")


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
