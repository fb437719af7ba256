"""Live Q on real text: the dialogues, the rows and their report, and the whole on a tiny model (slow)."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from support.chat import CHATML
from support.policies import save as save_policy

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


@pytest.fixture
def live_text(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("live_text")


def test_turns_of_a_dialogue(live_text: ModuleType) -> None:
    prompt = "\n\nHuman: Hi\nthere?\n\nAssistant: Yes. \n\nHuman: Why?\n\nAssistant:"
    first, answer, last = live_text.messages_of(prompt)
    assert first == {"role": "user", "content": "Hi\nthere?"}
    assert answer == {"role": "assistant", "content": "Yes."}
    assert last == {"role": "user", "content": "Why?"}


def write_data(folder: Path) -> Path:
    """Dialogues of seven first questions, some of which occur again; in one kind, and one without an answer."""
    folder.mkdir()
    for name, count in (("hh_pairs_train.jsonl.gz", 160), ("hh_pairs_test.jsonl.gz", 30)):
        records = []
        for i in range(count):
            opening = f"\n\nHuman: {WORDS[i % 7]} {WORDS[i // 7 % 7]}?"
            more = "\n\nAssistant: two\n\nHuman: three?" if i % 5 == 1 else ""
            pair = {"chosen": f" {WORDS[i % 3]} one", "rejected": f" {WORDS[i % 4]} two"}
            kind = "harmless" if i % 8 == 3 else "helpful"
            records.append({"prompt": f"{opening}{more}\n\nAssistant:", **pair, "kind": kind})
        records.append({"prompt": "\n\nHuman: six?\n\nAssistant:", "chosen": "", "rejected": "x", "kind": "helpful"})
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return folder


def test_steering_and_judging_models_share_no_question(live_text: ModuleType, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    firsts = []
    for half in (0, 1):
        path = live_text.pairs_of(data, half, 40, tmp_path / f"{half}.jsonl")
        pairs = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(pairs) == 40
        assert all(pair["chosen"][0]["content"] for pair in pairs)
        firsts.append({pair["prompt"][0]["content"] for pair in pairs})
    assert firsts[0].isdisjoint(firsts[1])
    assert all(firsts)
    with pytest.raises(live_text.UserError, match=r"half 0 has \d+ pairs, fewer than 900"):
        live_text.pairs_of(data, 0, 900, tmp_path / "more.jsonl")
    asked = live_text.questions_of(data, 9)
    assert len({question[0]["content"] for question in asked}) == len(asked) == 9


def row(arm: str, seed: int, **more: Any) -> dict[str, Any]:
    one: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "judged": [3.0, 5.0],
        "tokens": [100, 300],
        "reward_tokens": [400] * 2,
    }
    return {**one, "answer_tokens": 50.0, **more}


def samples(seed: int) -> dict[str, Any]:
    best = [[1.0, 1.5, 2.0, 2.5, 3.0, 4.0], [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]]
    return {"arm": "samples", "seed": seed, "best": best, "spread": 2.0, "length": 50.0}


def test_differences_are_from_as_many_tokens_in_units_of_the_judge(live_text: ModuleType) -> None:
    rows = [samples(seed) for seed in range(2)] + [row("reject by halves", seed) for seed in range(2)]
    rows += [row("reject by halves, shuffled goal", seed, judged=[2.0, 4.0]) for seed in range(2)]
    [line] = [line for line in live_text.table(rows).splitlines() if line.startswith("| reject by halves |")]
    assert line.startswith("| reject by halves | 2 | 200 | 400 | 50 | +1.000 ±")  # ((3 - 1) + (5 - 3)) / 2 / 2
    assert "| +0.625 ±" in line  # 200 tokens are 4 samples: ((3 - 2.5) + (5 - 3)) / 2 / 2
    assert line.endswith("| +0.500 ± 0.000 * |")
    assert "| less one sample | +0.125 ±" in live_text.best_of_n(rows)


def test_a_text_without_words_has_the_least_reward(live_text: ModuleType) -> None:
    class Model:
        def score(self, prompts: list[Any], completions: list[Any]) -> np.ndarray:
            return np.array([float(len(one[0]["content"])) for one in completions])

    questions = [[{"role": "user", "content": "one?"}]] * 3
    assert live_text.scores_of(Model(), questions, ["four", " \n", "to"]) == [4.0, 2.0, 2.0]


@pytest.mark.slow
def test_live_text_on_a_tiny_model_and_again(
    live_text: ModuleType, trainings: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_policy(tmp_path / "model", ends=1.0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    monkeypatch.setenv("GCRM_DATA", str(write_data(tmp_path / "data")))
    options = ["--model", str(model), "--runs", str(tmp_path / "runs"), "-o", str(tmp_path / "report")]
    options += ["--train-layers", "1", "--pairs", "24", "--judge-pairs", "32", "--questions", "3", "--new-tokens", "48"]
    assert live_text.main([*options, "--seeds", "2"]) == 0
    assert [arguments[arguments.index("--objective") + 1] for arguments in trainings] == ["ranking", "gcrm", "gcrm"]
    judged_on, steered_by = (
        {json.loads(line)["prompt"][0]["content"] for line in (tmp_path / f"runs/{name}.jsonl").open()}
        for name in ("hh-judge", "hh-steering")
    )
    assert judged_on.isdisjoint(steered_by)
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert len(rows) == 2 * (1 + len(live_text.WANTED))
    assert all(len(one["judged"]) == 3 for one in rows if one["arm"] != live_text.UNSTEERED)
    assert "Every row is finished." in (tmp_path / "report.md").read_text()
    (tmp_path / "report.json").write_text(json.dumps({"rows": rows[:-1]}))
    assert live_text.main([*options, "--seeds", "2"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == rows
    assert len(trainings) == 3
    assert live_text.main([*options, "--questions", "4"]) == 2
