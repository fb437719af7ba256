"""``gcrm score``: the files that people get, runs that are killed or shared, and records that cannot be scored."""

import functools
import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcrm_fast import cli
from gcrm_fast.commands import score
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.records import read_completions
from gcrm_fast.inference.scoring import RewardModel
from support import models
from support.judged import write
from support.training_runs import Gcrm

LIST = [{"prompt": "one", "completions": ["two", "three four", "two"], "n": 1}, {"prompt": "x", "completions": ["six"]}]
PAIR = [{"question": "one", "correct": "two", "incorrect": "three", "id": "é"}]
NAMED = [{"instruction": "one", "output": "two", "prompt": 3}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "linear"
    models.save(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(folder, device="cpu")


@pytest.fixture
def gcrm(gcrm: Gcrm, folder: Path) -> Gcrm:
    """``gcrm score MODEL ARGUMENTS``."""
    return functools.partial(gcrm, "score", folder)


def many(count: int, prompts: int = 5) -> list[dict[str, Any]]:
    heads, tails = models.texts(count, prompts)
    return [{"prompt": p, "completion": c, "n": i} for i, (p, c) in enumerate(zip(heads, tails, strict=True))]


def read(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "WINDOW_RECORDS", 7)


def test_every_format_gets_its_rewards_beside_its_own_fields(gcrm: Gcrm, model: RewardModel, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = gcrm(write(tmp_path / "a", many(9)), "-o", out)
    assert result.returncode == 0
    assert re.search(r"^scoring: 9 records \[00:\d\d, [\d.]+k?/s\]$", result.stderr, re.MULTILINE)
    rewards = model.score([r["prompt"] for r in many(9)], [r["completion"] for r in many(9)])
    assert [{**r, "reward": None} for r in read(out)] == [{**r, "reward": None} for r in many(9)]
    np.testing.assert_allclose([r["reward"] for r in read(out)], rewards, rtol=0, atol=1e-6)

    def of(prompt: str, *completions: str) -> Any:
        return pytest.approx(model.score([prompt] * len(completions), completions).tolist(), abs=1e-6)

    assert gcrm(write(tmp_path / "b", LIST), "-o", out).returncode == 0
    assert read(out) == [
        LIST[0] | {"rewards": of("one", "two", "three four", "two")},
        LIST[1] | {"rewards": of("x", "six")},
    ]
    assert gcrm(write(tmp_path / "c", PAIR), "-o", out).returncode == 0
    right, wrong = model.score(["one"] * 2, ["two", "three"])
    assert read(out) == [
        PAIR[0] | {"reward_correct": pytest.approx(right, abs=1e-6), "reward_incorrect": pytest.approx(wrong, abs=1e-6)}
    ]
    assert "é" in out.read_text()
    assert gcrm(write(tmp_path / "e", PAIR), "-o", out).stderr.endswith(f"gcrm score: wrote {out}\n")
    assert gcrm(write(tmp_path / "d", NAMED), "-o", out, "--columns", "prompt=instruction,completion=output")[0] == 0
    assert read(out) == [NAMED[0] | {"reward": pytest.approx(right, abs=1e-6)}]


def test_per_token_values(gcrm: Gcrm, model: RewardModel, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl.gz"
    assert gcrm(write(tmp_path / "a", [*LIST]), "-o", out, "--per-token").returncode == 0
    encoded = model.encode(["one"] * 3, LIST[0]["completions"])
    judged = model.judge(encoded, goals_GD=model.goal()[None], per_token=True)
    for found, completion, expected in zip(read(out)[0]["tokens"], encoded, judged, strict=True):
        assert found["ids"] == completion.ids[completion.start :].tolist()
        assert found["texts"] == model.texts(completion)
        np.testing.assert_allclose(found["rewards"], expected.rewards_n, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["q_values"], expected.q_Gn[0], rtol=0, atol=1e-5)
    assert gcrm(write(tmp_path / "b", PAIR), "-o", out, "--per-token").returncode == 0
    [record] = read(out)
    assert record["reward_correct"] == record["tokens_correct"]["rewards"][-1]
    assert record["reward_incorrect"] == record["tokens_incorrect"]["rewards"][-1]


def test_from_a_pipe_into_a_pipe(folder: Path, gcrm: Gcrm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write(tmp_path / "a", many(20))
    assert gcrm(plain, "-o", tmp_path / "out").returncode == 0
    for data in (plain.read_bytes(), gzip.compress(plain.read_bytes())):
        source, target = io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))), io.TextIOWrapper(io.BytesIO())
        monkeypatch.setattr(sys, "stdin", source)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", target)
            assert cli.run("score", [str(folder), "-", "-o", "-"]) == 0
        assert target.buffer.getvalue() == (tmp_path / "out").read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes cannot share stdin"):
        read_completions(["-"])


KILLED = """
import os, signal
from gcrm_fast import cli
from gcrm_fast.commands import score
score.WINDOW_RECORDS = 7
whole, count = os.replace, 0
def replace(*paths):
    global count
    count += 1
    if count == 3:  # the third window is written, but not yet counted
        os.kill(os.getpid(), signal.SIGKILL)
    whole(*paths)
os.replace = replace
cli.run("score", {arguments!r})
"""


@pytest.mark.usefixtures("small_windows")
def test_a_killed_run_goes_on_to_the_same_output(
    gcrm: Gcrm, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out, whole = write(tmp_path / "a", many(40)), tmp_path / "out.gz", tmp_path / "whole.gz"
    assert gcrm(data, "-o", whole).returncode == 0
    code = KILLED.format(arguments=[str(folder), str(data), "-o", str(out)])
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    state = json.loads((tmp_path / "out.gz.partial.json").read_text())
    assert (state["windows"], state["bytes"] < (tmp_path / "out.gz.partial").stat().st_size) == (2, True)
    scored: list[int] = []
    judge = RewardModel.judge
    monkeypatch.setattr(
        RewardModel,
        "judge",
        lambda self, encoded, **options: scored.append(len(encoded)) or judge(self, encoded, **options),
    )
    result = gcrm(data, "-o", out)
    assert (result.returncode, sum(scored)) == (0, 40 - 14)
    assert "resuming after 14 records" in result.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out.gz", "whole.gz"}


@pytest.mark.usefixtures("small_windows")
def test_a_partial_output_of_something_else_is_not_continued(gcrm: Gcrm, tmp_path: Path) -> None:
    def interrupted(name: str) -> Path:
        """A run that ended at a bad record: two windows are done."""
        bad = write(tmp_path / name, [*many(17), {"prompt": 1, "completion": "x"}])
        assert gcrm(bad, "-o", tmp_path / "out").returncode == 2
        assert (tmp_path / "out.partial").stat().st_size
        return bad

    fresh = tmp_path / "fresh"
    data = interrupted("a")
    write(data, many(20))
    assert gcrm(data, "-o", fresh).returncode == 0
    result = gcrm(data, "-o", tmp_path / "out")  # the bad record is fixed: nothing else has changed
    assert "resuming after 14 records" in result.stderr
    assert (tmp_path / "out").read_bytes() == fresh.read_bytes()

    interrupted("a")
    write(data, [{**many(1)[0], "n": "other"}, *many(20)[1:]])
    result = gcrm(data, "-o", tmp_path / "out")
    assert "the partial output was made from other records: starting over" in result.stderr
    assert [r["n"] for r in read(tmp_path / "out")] == ["other", *range(1, 20)]

    data = interrupted("a")
    write(data, many(20))
    result = gcrm(data, "-o", tmp_path / "out", "--per-token")
    assert "was made with another goal, --per-token: starting over" in result.stderr
    assert all("tokens" in record for record in read(tmp_path / "out"))

    interrupted("a")
    (tmp_path / "out.partial.json").write_text("{")
    write(data, many(20))
    assert "cannot be resumed: starting over" in gcrm(data, "-o", tmp_path / "out").stderr
    assert (tmp_path / "out").read_bytes() == fresh.read_bytes()


def test_scoring_loads_no_library_for_plots_or_classifiers(folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a", [{"prompt": "p", "completion": "c"}])
    program = """
import sys
from gcrm_fast.cli import main
assert main() == 0
print(*sorted({name.split(".")[0] for name in sys.modules} & {"matplotlib", "tensorboard", "sklearn", "gcrm_fast"}))
"""
    arguments = ["score", str(folder), str(data), "-o", str(tmp_path / "b"), "--per-token"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["gcrm_fast"], done.stderr


def test_processes_share_the_work_and_write_one_output(gcrm: Gcrm, folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a", [{"prompt": f"p{i % 40}", "completion": f"{i}"} for i in range(2500)])
    assert gcrm(data, "-o", tmp_path / "one").returncode == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "gcrm_fast",
        "score",
        str(folder),
        str(data),
        "-o",
        str(tmp_path / "two"),
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    ours, theirs = read(tmp_path / "one"), read(tmp_path / "two")
    assert [r["completion"] for r in theirs] == [str(i) for i in range(2500)]
    np.testing.assert_allclose([r["reward"] for r in theirs], [r["reward"] for r in ours], rtol=0, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "one", "two"]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 1, "completion": "x"}', r"a:11: field 'prompt' is int, not a string"),
        ('{"prompt": "p"', r"a:11: not valid JSON"),
        ('{"prompt": "p"}', r"a:11: field 'completion' is missing"),
        ('{"prompt": "p", "completion": " "}', r"a:11: field 'completion' is empty"),
        ('{"prompt": "p", "completion": "x", "reward": 1}', r"a:11: field 'reward' already exists"),
        ("[1]", r"a:11: a record must be a JSON object"),
        ('{"prompt": "p", "chosen": "x", "rejected": "y"}', r"a:11: has the format 'prompt, chosen, rejected', but"),
    ],
)
def test_a_bad_record_ends_the_run_with_its_place_and_no_output(
    gcrm: Gcrm, tmp_path: Path, line: str, message: str
) -> None:
    data = write(tmp_path / "a", many(10))
    data.write_text(data.read_text() + line + "\n" + data.read_text())
    result = gcrm(data, "-o", tmp_path / "out")
    assert result.returncode == 2
    complaint = result.stderr.splitlines()[-1]
    assert complaint.startswith("gcrm score: ")
    assert re.search(message, complaint)
    assert not (tmp_path / "out").exists()
    if "reward" not in line:
        result = gcrm(data, "-o", tmp_path / "out", "--on-bad-record", "skip")
        assert result.returncode == 0
        assert [r["n"] for r in read(tmp_path / "out")] == [*range(10), *range(10)]
        assert "bad records skipped: 1; the first: " in result.stderr


def test_records_that_cannot_be_scored_are_skipped_where_asked(
    folder: Path, model: RewardModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command."""
    records = [{**r, "is_correct": bool(r["n"] % 2), "predicted_answer": "x", "expected_answer": "x"} for r in many(20)]
    longest = max(len(c.ids) for c in model.encode([r["prompt"] for r in records], [r["completion"] for r in records]))
    too_long = {**records[1], "completion": " one" * 200}
    data = str(write(tmp_path / "a", [*records[:10], too_long, *records[10:]]))
    common = [str(folder), data, "--tokens-per-batch", str(longest), "-o", str(tmp_path / "out")]
    for command in ("score", "goals", "evaluate", "vote"):
        assert cli.run(command, common) == 2
        assert re.search(r"a:11: field 'completion' needs \d+ tokens", capsys.readouterr().err)
        assert not (tmp_path / "out").exists()
        assert cli.run(command, [*common, "--on-bad-record", "skip"]) == 0
        said = "and 1 bad records" if command == "goals" else "bad records skipped: 1;"
        assert said in "".join(capsys.readouterr())
        if command == "score":
            assert [r["n"] for r in read(tmp_path / "out")] == list(range(20))
        (shutil.rmtree if (tmp_path / "out").is_dir() else os.remove)(tmp_path / "out")


def test_damaged_gzip_and_wrong_calls(gcrm: Gcrm, tmp_path: Path) -> None:
    packed = gzip.compress(write(tmp_path / "a", many(40)).read_bytes())
    (tmp_path / "cut.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "empty").touch()
    out = tmp_path / "out"
    for arguments, message in (
        ([tmp_path / "cut.gz", "-o", out], r"cut.gz:\d+: gzip data is damaged"),
        ([tmp_path / "empty", "-o", out], "empty: contains no records"),
        ([tmp_path / "missing", "-o", out], "missing: cannot be read"),
        ([tmp_path, "-o", out], "not a folder that datasets can load"),
        ([tmp_path / "a", "-o", tmp_path / "a"], "--output .*a: is also an input"),
        ([tmp_path / "a", "-o", tmp_path], "--output .*: is a folder"),
        ([tmp_path / "a", "-o", tmp_path / "no" / "out"], "--output .*: there is no folder"),
        ([tmp_path / "a", "-o", out, "--goal", "x"], "--goal: only --per-token writes Q-values"),
        ([tmp_path / "a", "-o", out, "--goal", "x", "--per-token"], "x: not a readable goal file"),
        ([tmp_path / "a", "-o", out, "--tokens-per-batch", "9"], r"a:\d+: field 'completion' needs \d+ tokens, more"),
        ([tmp_path / "a", "-o", out, "--tokens-per-batch", "0"], "--tokens-per-batch 0: must be at least 1"),
        (["-o", out], "FILE is missing"),
    ):
        result = gcrm(*arguments)
        assert result.returncode == 2
        assert re.search(message, result.stderr.splitlines()[-1]), result.stderr
        assert not out.exists()
