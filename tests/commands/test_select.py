"""``gcrm select``: which prompts it keeps, what it writes next to them, and that it resumes."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcrm_fast import RewardModel
from gcrm_fast.commands import select, windows
from support.interrupted import windows_of_an_interrupted_run
from support.judged import write
from support.models import save, texts
from support.training_runs import Gcrm


def records(count: int = 60) -> list[dict[str, Any]]:
    """Two domains, of 20 and 40 prompts; those of math are never solved in every tenth."""
    prompts, samples = texts(3 * count, count)
    return [
        {
            "prompt": f"{prompts[i]} {i}",
            "completions": samples[3 * i : 3 * i + 2],
            "reference": samples[3 * i + 2],
            "is_correct": [i % 10 != 0, i % 20 == 3],
            "domain": "math" if i % 3 == 0 else "chat",
            "id": i,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards") / "model"
    save(folder)
    return folder


@pytest.fixture
def run(gcrm: Gcrm, tmp_path: Path) -> Any:
    write(tmp_path / "s.jsonl", records())
    return functools.partial(gcrm, "select", tmp_path / "s.jsonl", "-o", tmp_path / "next.jsonl", "--domain", "domain")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def differences(model: Path, proxy: bool = False) -> np.ndarray:
    rewards = RewardModel.from_pretrained(model)
    found = []
    for one in records():
        own = rewards.score(one["prompt"], one["completions"]) - rewards.score(one["prompt"], one["reference"])
        found.append(np.mean(1 / (1 + np.exp(-own)) if proxy else own))
    return np.array(found)


@pytest.mark.parametrize("score", ["reward", "proxy"])
def test_the_lowest_of_each_domain_against_their_references(run: Any, model: Path, tmp_path: Path, score: str) -> None:
    """Labels are there, so what no sample solves is dropped first."""
    result = run("--model", model, "--score", score, "--keep", "0.2")
    assert result.returncode == 0, result.stderr
    score_N = differences(model, proxy=score == "proxy")
    expected = set()
    for domain in ("math", "chat"):
        own = [i for i, one in enumerate(records()) if one["domain"] == domain and any(one["is_correct"])]
        expected |= set(sorted(own, key=lambda i: score_N[i])[: round(0.2 * len(own))])
    found = lines(tmp_path / "next.jsonl")
    assert {one["id"] for one in found} == expected
    for one in found:
        assert one.keys() == {"prompt", "reference", "domain", "id", "selection"}
        assert one["selection"]["score"] == pytest.approx(score_N[one["id"]], rel=1e-4, abs=1e-6)
        assert one["selection"]["source"].endswith(f"s.jsonl:{one['id'] + 1}")
    unsolved = lines(tmp_path / "next.jsonl.unanswerable.jsonl")
    assert {one["prompt"] for one in unsolved} == {one["prompt"] for one in records() if not any(one["is_correct"])}
    assert [one["score"] for one in unsolved] == sorted(one["score"] for one in unsolved)
    about = json.loads((tmp_path / "next.jsonl.json").read_text())
    assert (about["prompts"], about["kept"], about["verdicts"]) == (60, len(found), {"labeled": 120})
    assert (about["unsolved"], about["unanswerable"]) == (6, 6)
    assert (tmp_path / "next.jsonl.png").stat().st_size > 1000
    assert "6 prompts solved by no sample: dropped" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "next.jsonl",
        "next.jsonl.json",
        "next.jsonl.png",
        "next.jsonl.unanswerable.jsonl",
        "s.jsonl",
    ]


def test_without_labels_the_lowest_are_listed_not_dropped(run: Any, model: Path, tmp_path: Path) -> None:
    write(tmp_path / "s.jsonl", [{k: v for k, v in one.items() if k != "is_correct"} for one in records()])
    result = run("--model", model, "--keep", "0.5")
    assert result.returncode == 0, result.stderr
    listed = {one["prompt"] for one in lines(tmp_path / "next.jsonl.unanswerable.jsonl")}
    kept = {one["prompt"] for one in lines(tmp_path / "next.jsonl")}
    rewards = RewardModel.from_pretrained(model)
    beaten = {
        one["prompt"]
        for one in records()
        if max(rewards.score(one["prompt"], one["completions"])) <= rewards.score(one["prompt"], one["reference"])
    }
    assert listed == beaten & kept
    assert listed
    assert "kept, but no sample is better than the reference" in result.stdout


def test_shares_of_right_samples_by_a_verifier(run: Any, tmp_path: Path) -> None:
    found = [
        {"prompt": f"p{i}", "completions": [f"#### {(i + s) % 3}" for s in range(4)], "reference": 1, "domain": "math"}
        for i in range(30)
    ]
    found[4] |= {"completions": ["none", "#### 7"]}
    write(tmp_path / "s.jsonl", found)
    result = run("--score", "pass-rate", "--verifier", r"regex:#### (\d)", "--keep", "0.3")
    assert result.returncode == 0, result.stderr
    kept = lines(tmp_path / "next.jsonl")
    assert {one["selection"]["score"] for one in kept} == {0.25}
    assert len(kept) == 9
    assert [one["prompt"] for one in lines(tmp_path / "next.jsonl.unanswerable.jsonl")] == ["p4"]
    assert "samples: 1 unreadable, 117 verified" in result.stdout


def test_merged_prompts_come_first_and_are_not_selected_again(run: Any, model: Path, tmp_path: Path) -> None:
    score_N = differences(model)
    solved = [i for i, one in enumerate(records()) if any(one["is_correct"])]
    lowest = min(solved, key=lambda i: score_N[i])
    before = [{"prompt": "new", "domain": "law"}, {"prompt": records()[lowest]["prompt"], "domain": "math"}]
    merged = write(tmp_path / "original.jsonl", before)
    result = run("--model", model, "--merge", merged)
    assert result.returncode == 0, result.stderr
    found = lines(tmp_path / "next.jsonl")
    assert found[:2] == before
    assert lowest not in {one.get("id") for one in found}
    assert "after 2 of --merge" in result.stdout


def test_small_domains_are_named(run: Any, model: Path, tmp_path: Path) -> None:
    write(tmp_path / "s.jsonl", records(45))  # 14 solved ones of math
    result = run("--model", model)
    assert "fewer than 20 prompts: math: is still compared only within itself" in result.stdout
    assert "math" in json.loads((tmp_path / "next.jsonl.json").read_text())["small_domains"]


def test_the_curriculum_is_the_order_that_a_trainer_reads(run: Any, model: Path, tmp_path: Path) -> None:
    options = ["--model", model, "--keep", "1", "--order", "math,all", "--steps", "10", "--prompts-per-step", "4"]
    assert run(*options).returncode == 0
    first = lines(tmp_path / "next.jsonl.curriculum.jsonl")
    assert [one["stage"] for one in first] == ["math"] * 20 + ["all"] * 20
    assert {one["domain"] for one in first[:20]} == {"math"}
    assert {one["domain"] for one in first[20:]} == {"math", "chat"}
    text = (tmp_path / "next.jsonl.curriculum.jsonl").read_text()
    assert run(*options).returncode == 0
    assert (tmp_path / "next.jsonl.curriculum.jsonl").read_text() == text
    about = json.loads((tmp_path / "next.jsonl.json").read_text())
    assert [about[name] for name in ("order", "steps", "prompts_per_step", "seed")] == ["math,all", 10, 4, 0]
    assert run(*options, "--seed", "1").returncode == 0
    assert (tmp_path / "next.jsonl.curriculum.jsonl").read_text() != text


def test_names_of_stages_are_checked_before_anything_is_scored(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = write(tmp_path / "original.jsonl", [{"prompt": "new", "domain": None}, {"prompt": "other"}])
    options = ["--score", "pass-rate", "--merge", merged, "--steps", "1", "--prompts-per-step", "1"]
    found = [one | {"is_correct": [one["domain"] == "chat"] * 2} for one in records()]
    write(tmp_path / "s.jsonl", found)
    result = run(*options, "--order", "chat,math")
    assert "--order chat,math: of the prompts of the domain 'math' none is kept" in result.stderr
    assert run(*options, "--order", "chat,all").returncode == 0
    monkeypatch.setattr(select, "score_window", None)
    result = run(*options, "--order", "chat+law")
    assert "--order chat+law: no prompt has the domain 'law': the domains are chat, math, all" in result.stderr


def test_an_interrupted_run_resumes_and_writes_the_same(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW", 16)
    call, output = functools.partial(run, "--model", model), tmp_path / "next.jsonl"
    seen = windows_of_an_interrupted_run(call, output, select, "score_window", 3, monkeypatch)
    assert seen == [16, 16, 16, 16, 12], "the two finished windows are not scored again"
    expected = output.read_bytes()
    seen[:] = [0]
    assert run("--model", model, "--score", "proxy").returncode == 130
    result = run("--model", model)
    assert result.returncode == 0
    partial = tmp_path / "next.jsonl.rows.partial"
    assert f"gcrm select: {partial}: was made with another --score: starting over" in result.stderr
    assert output.read_bytes() == expected


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ([], {}, "--score reward: needs a reward model: name one with --model"),
        (["--score", "pass-rate"], {"is_correct": None}, "field 'is_correct' is missing, and no --verifier is for its"),
        (["--score", "pass-rate"], {"domain": None}, "field 'domain', named by --domain, is missing or not a text"),
        (["--score", "pass-rate", "--verifier", "maths"], {}, "verifier 'maths' of task '': is not one of"),
        (["--score", "pass-rate", "--order", "math"], {}, "--order and --steps: a curriculum needs both"),
        (["--score", "pass-rate", "--keep", "0"], {}, "--keep 0"),
        (["--model", "MODEL"], {"reference": None}, "field 'reference' is missing, and so is 'reference_completions'"),
        (["--score", "pass-rate", "--columns", "prompt=id"], {}, "so name all fields of a format"),
    ],
)
def test_what_is_refused_in_one_line(
    run: Any, model: Path, tmp_path: Path, options: list[str], change: dict[str, Any], message: str
) -> None:
    found = records()
    found[7] |= change
    write(tmp_path / "s.jsonl", found)
    result = run(*[str(model) if one == "MODEL" else one for one in options])
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert message in result.stderr
    assert not (tmp_path / "next.jsonl").exists()


def test_no_prompt_is_left(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "s.jsonl", [one | {"is_correct": [False, False]} for one in records(4)])
    result = run("--score", "pass-rate")
    assert "no prompt is left: 4 are solved by no sample, 0 are among those of --merge" in result.stderr
