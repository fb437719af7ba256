"""``gcrm synthesize``: the pairs that it writes, what it reports, and that they train."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcrm_fast import RewardModel
from gcrm_fast.commands import synthesize, windows
from gcrm_fast.data.arithmetic import generate, is_correct, samples
from gcrm_fast.data.records import read_pairs
from support.interrupted import windows_of_an_interrupted_run
from support.judged import write
from support.models import save
from support.policies import save as save_policy
from support.serving import write_served_model
from support.training_runs import TINY, Gcrm

EACH = 6


def records(count: int = 30) -> list[dict[str, Any]]:
    """Sampled sums, of which most are right; the last digit is the answer."""
    prompts = list(dict.fromkeys(pair.prompt for pair in generate(4000, 0, 0, 3)[0]))[:count]
    texts = [one["completion"] for one in samples(prompts, EACH, 0.5, 0)]
    return [
        {"prompt": prompt, "completions": texts[EACH * i : EACH * (i + 1)], "id": i} for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards") / "model"
    save(folder)
    return folder


@pytest.fixture
def run(gcrm: Gcrm, model: Path, tmp_path: Path) -> Any:
    write(tmp_path / "s.jsonl", records())
    return functools.partial(gcrm, "synthesize", model, tmp_path / "s.jsonl", "-o", tmp_path / "pairs.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_of_the_majority(run: Any, model: Path, tmp_path: Path) -> None:
    result = run("--verifier", "arithmetic")
    assert result.returncode == 0, result.stderr
    rewards = RewardModel.from_pretrained(model)
    pairs = {pair["id"]: pair for pair in lines(tmp_path / "pairs.jsonl")}
    right = wrong = 0
    for one in records():
        answers = [text[-2] for text in one["completions"]]
        counts = sorted((answers.count(answer) for answer in set(answers)), reverse=True)
        gives = len(counts) > 1 and counts[0] >= EACH / 2 and counts[0] > counts[1]
        assert (one["id"] in pairs) == gives
        if not gives:
            continue
        pair = pairs[one["id"]]
        largest = max(set(answers), key=answers.count)
        own = [text for text, answer in zip(one["completions"], answers, strict=True) if answer == largest]
        assert pair["chosen"] == own[int(np.argmax(rewards.score(one["prompt"], own)))]
        assert pair["rejected"] in one["completions"]
        assert pair["rejected"][-2] != largest
        assert pair["synthesis"]["confidence"] == counts[0] / EACH
        assert pair.keys() == {"prompt", "chosen", "rejected", "id", "synthesis"}
        verdicts = is_correct(one["prompt"], pair["chosen"]), is_correct(one["prompt"], pair["rejected"])
        right, wrong = right + (verdicts == (True, False)), wrong + (verdicts == (False, True))
    about = json.loads((tmp_path / "pairs.jsonl.json").read_text())
    assert 5 < len(pairs) < 30
    assert about["coverage"] == pytest.approx(len(pairs) / 30)
    assert about["outcomes"]["pair"] == len(pairs)
    own = about["accuracy"]["pairs"]
    assert (own["right"], own["wrong"]) == (right, wrong)
    assert own["share"] == pytest.approx(right / (right + wrong))
    assert about["tokens"]["chosen"] > 1
    assert f"accuracy, pairs: {right / (right + wrong):.3f} ({right} right, {wrong} wrong" in result.stdout
    assert "accuracy, by reward" in result.stdout
    assert f"{len(pairs)} pairs of 30 records" in result.stdout


def test_the_pairs_train_as_any(run: Any, gcrm: Gcrm, tmp_path: Path) -> None:
    found = [one | {"completions_cut": [True] + [False] * (EACH - 1)} for one in records()]
    write(tmp_path / "s.jsonl", found)
    assert run("--verifier", "arithmetic").returncode == 0
    pairs = lines(tmp_path / "pairs.jsonl")
    assert any(pair.get("chosen_cut") or pair.get("rejected_cut") for pair in pairs)
    few = ["--eval-split", "0.2", *TINY, "--global-batch-pairs", "4", "--steps", "2", "--cache", tmp_path / "cache"]
    result = gcrm("train", "--data", tmp_path / "pairs.jsonl", "--output", tmp_path / "run", *few)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_given_answers_come_first_and_null_is_its_own(run: Any, tmp_path: Path) -> None:
    base = {"prompt": "one?", "completions": [" two", " three", " four", " five"]}
    found = [
        base | {"answers": [1, 1, 2, None], "k": 0},
        base | {"answers": ["1", None, None, None], "k": 1},
        base | {"answers": [1, 1, 1, 1], "k": 2},
        base | {"answers": [1, 1, 2, 3], "k": 3},
    ]
    write(tmp_path / "s.jsonl", found)
    result = run("--verifier", "regex:.*")
    assert result.returncode == 0, result.stderr
    pairs = lines(tmp_path / "pairs.jsonl")
    assert [pair["k"] for pair in pairs] == [0, 3], "records of one prompt stay apart"
    assert all(pair["synthesis"]["answers"]["chosen"] == "1" for pair in pairs)
    assert "no pair: 1 below the threshold, 1 one answer" in result.stdout
    assert "4 answers cannot be read: each is a cluster of its own" in result.stdout
    assert "accuracy" not in result.stdout, "a pattern alone does not know the right answer"
    write(tmp_path / "s.jsonl", [one | {"reference": "x"} for one in found])
    assert "accuracy, pairs: - (0 right, 0 wrong, 2 equal)" in run("--verifier", "regex:.*").stdout


def test_messages_stay_messages(gcrm: Gcrm, run: Any, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "hello?"}]
    answers = [[{"role": "assistant", "content": text}] for text in (" yes.", " no", " world")]
    path = write(tmp_path / "s.jsonl", [{"prompt": asked, "completions": answers, "answers": ["y", "n", "y"]}])
    folder, output = write_served_model(tmp_path / "chat"), tmp_path / "pairs.jsonl"
    result = gcrm("synthesize", folder, path, "-o", output)
    assert result.returncode == 0, result.stderr
    [record] = lines(output)
    assert (record["prompt"], record["rejected"]) == (asked, answers[1])
    [pair] = read_pairs([str(output)], tokenizer=RewardModel.from_pretrained(folder).tokenizer)
    assert pair.prompt == "<|im_start|>user\nhello?<|im_end|>\n<|im_start|>assistant\n"
    result = run()  # its model has no chat template
    assert result.returncode == 2
    assert "s.jsonl:1: " in result.stderr.splitlines()[-1]
    assert "chat template" in result.stderr.splitlines()[-1]


def test_clusters_by_entailment(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FirstLetter:
        def __init__(self, name: str) -> None:
            assert name == "some/nli"

        def clusters(self, prompt: str, texts: list[str]) -> list[int]:
            assert prompt == "one?"
            return [ord(text[0]) for text in texts]

    monkeypatch.setattr(synthesize, "Entailment", FirstLetter)
    write(tmp_path / "s.jsonl", [{"prompt": "one?", "completions": ["a b", "a c", "d"]}])
    assert run("--entailment", "some/nli").returncode == 0
    [pair] = lines(tmp_path / "pairs.jsonl")
    assert pair["rejected"] == "d"
    assert "answers" not in pair["synthesis"]


def test_an_interrupted_run_resumes_and_writes_the_same(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW", 8)
    call, output = functools.partial(run, "--verifier", "arithmetic"), tmp_path / "pairs.jsonl"
    seen = windows_of_an_interrupted_run(call, output, synthesize, "work_window", 2, monkeypatch)
    assert seen == [8, 8, 8, 8, 6]
    expected = output.read_bytes()
    assert run("--verifier", "arithmetic", "--seed", "1").returncode == 0
    assert output.read_bytes() != expected


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ([], {}, "s.jsonl:1: field 'answers' is missing, and no --verifier is for its task"),
        (["--verifier", "arithmetic"], {"completions": ["x"]}, "s.jsonl:8: field 'completions' has 1 entry"),
        (["--verifier", "arithmetic"], {"completions": ["x</b>", "y<|end|>"]}, "samples of another tokenizer"),
        (["--verifier", "support.checks:contains"], {}, "verifier 'support.checks:contains': reads no answers"),
        (["--verifier", "arithmetic", "--threshold", "1.5"], {}, "--threshold 1.5"),
        (["--verifier", "arithmetic", "--threshold", "1"], {}, "no record gives a pair: "),
        (["--entailment", "nothing/here"], {}, "--entailment nothing/here: cannot be loaded"),
    ],
)
def test_what_is_refused_in_one_line(
    run: Any, tmp_path: Path, options: list[str], change: dict[str, Any], message: str
) -> None:
    found = records()
    found[7] |= change
    write(tmp_path / "s.jsonl", found)
    result = run(*options)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "pairs.jsonl").exists()


def test_the_output_of_generate_is_read(run: Any, gcrm: Gcrm, tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy", num_hidden_layers=1, ends=0.5)
    prompts = write(tmp_path / "p.jsonl", [{"question": f"{word}?", "id": word} for word in ("one", "two", "three")])
    sampled = gcrm("generate", policy, prompts, "--samples", 4, "--max-new-tokens", 6, "-o", tmp_path / "s.jsonl")
    assert sampled.returncode == 0, sampled.stderr
    result = run("--verifier", "regex:(?s)^.", "--threshold", "0")
    pairs = lines(tmp_path / "pairs.jsonl") if result.returncode == 0 else []
    found = {record["id"]: record["samples"] for record in lines(tmp_path / "s.jsonl")}
    expected = 0
    for word, own in found.items():
        firsts = [sample["text"][:1].strip() for sample in own]
        counts = sorted((firsts.count(first) for first in set(firsts)), reverse=True)
        expected += len(counts) > 1 and counts[0] > counts[1]
        for pair in pairs:
            if pair["id"] == word:
                assert pair["prompt"] == f"{word}?"
                assert {pair["chosen"], pair["rejected"]} <= {sample["text"] for sample in own}
    assert len(pairs) == expected, result.stderr
    assert expected
