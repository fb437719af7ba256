"""make gpu: what it needs, parts that hang or die, and the parts that run without a GPU."""

import argparse
import importlib
import json
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch


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
    """Replaces bench/gpu_parts.py."""
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
