"""The GPU tables of README.md and docs/: each number from a file of bench/results, the latest call first."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.small import small_config
from support.training_runs import ROOT

CONFIG = small_config(vocab_size=32_000)


@pytest.mark.parametrize(("name", "part"), [("README.md", "short"), ("docs/performance.md", "full")])
def test_every_number_of_the_gpu_tables_has_its_file(gpu_report: ModuleType, name: str, part: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count(gpu_report.BEGIN) == text.count(gpu_report.END) == 1
    found = gpu_report.newest(ROOT / "bench" / "results")
    expected = getattr(gpu_report, part)(*found) if found else gpu_report.NOT_MEASURED
    written = text.partition(gpu_report.BEGIN)[2].partition(gpu_report.END)[0].strip()
    # The model of a step counts the operators of this torch.
    said, right = (re.split(r"(?<=predicted ms )([0-9.]+)", part) for part in (written, expected))
    assert said[::2] == right[::2], "update it: python bench/gpu.py --docs"
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
    gpu_report: ModuleType, written: Callable[..., tuple[str, str]], tmp_path: Path
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
    bars = gpu_report.contestants(rows)
    assert {name: row["pairs/s"] for name, row in bars.items()} == {"ours": 151.25, "padded transformers": 75.625}
    assert (tmp_path / "docs" / "speed.png").read_bytes().startswith(b"\x89PNG")
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
    assert "commit abc1234, def5678" in readme
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
