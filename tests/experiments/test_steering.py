"""Goals that steer the style of solutions: styles, pairs, the rows and their report."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gcrm_fast import RewardModel
from gcrm_fast.data.arithmetic import generate
from gcrm_fast.data.records import Pair
from support.models import save
from support.policies import save as save_policy

PROMPT, SOLUTION = "a=3,b=4,c=0,d=2:b+d+a?", "4+2=1;1+3=4;"
TERSE, LONG = "4+2=1\n1+3=4\n", "b=4,d=2,4+2=1\na=3,1+3=4\n"


@pytest.fixture
def steering(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("steering")


def test_both_styles_are_right(steering: ModuleType) -> None:
    assert [steering.in_style(style, PROMPT, SOLUTION) for style in steering.STYLES] == [TERSE, LONG]
    assert [steering.style_of(text) for text in (TERSE, LONG)] == ["terse", "long"]
    assert steering.is_right(PROMPT, TERSE)
    assert steering.is_right(PROMPT, LONG)


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("4+2=1\n1+3=2\n", "terse"),
        ("b=4,d=1,4+2=1\na=3,1+3=4\n", "long"),  # a value restated wrongly
        ("d=2,b=4,4+2=1\na=3,1+3=4\n", "long"),
        ("b=4,d=2,4+2=1\n1+3=4\n", ""),  # the second step in the other style
        (SOLUTION, ""),
        ("4+2=1\n", "terse"),
        ("", ""),
    ],
)
def test_wrong_texts_and_their_style(steering: ModuleType, text: str, style: str) -> None:
    assert steering.style_of(text) == style
    assert not steering.is_right(PROMPT, text)


def test_the_policy_learns_both_styles_evenly_and_is_measured_on_both(
    steering: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[Pair], list[Pair]]] = []
    problems = steering.policies.problems
    monkeypatch.setattr(steering.policies, "problems", lambda options: problems(steering.policies.Options(problems=40)))
    monkeypatch.setattr(steering.policies, "train_on", lambda options, *pairs: asked.append(pairs))
    steering.policy_of(steering.Options(runs=tmp_path))
    [(mixture, held_out)] = asked
    assert [steering.style_of(pair.chosen) for pair in mixture] == ["terse", "long"] * 20
    assert all(steering.is_right(pair.prompt, pair.chosen) for pair in mixture + held_out)
    by_prompt: dict[str, set[str]] = {}
    for pair in held_out:
        by_prompt.setdefault(pair.prompt, set()).add(steering.style_of(pair.chosen))
    assert len(by_prompt) == 500
    assert all(styles == {"terse", "long"} for styles in by_prompt.values())


def test_the_share_of_right_samples_counts_every_right_text_of_a_problem(steering: ModuleType) -> None:
    """A policy for which all tokens are equally likely."""
    policies = steering.policies
    pair = Pair(PROMPT, TERSE, "", where="")
    tokenizer = policies.train_tokenizer([PROMPT + TERSE + LONG], policies.PRESET["vocab_size"])
    policy = policies.new_policy(policies.Options(hidden_size=16, layers=1), tokenizer)
    torch.nn.init.zeros_(policy.lm_head.weight)
    size = policies.PRESET["vocab_size"]
    other = Pair("a=1,b=1,c=1,d=1:b+a?", "1+1=2\n", "", where="")
    one = policies.share_right(policy, tokenizer, [pair, other])
    assert one == pytest.approx((size ** -(len(TERSE) + 1.0) + size**-7.0) / 2, rel=1e-3, abs=0)
    twice = policies.share_right(policy, tokenizer, [other, other, pair])
    assert twice == pytest.approx(size**-7.0, rel=1e-3, abs=0)


def test_pairs_are_within_a_style(
    steering: ModuleType, script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that writes both right texts, one without a style, and a long one that is wrong."""
    monkeypatch.setattr(script("own_samples"), "PROBLEMS", 1)
    pair = generate(4, 0, 0, 3)[0][0]
    terse, long = (steering.in_style(style, pair.prompt, pair.chosen) for style in steering.STYLES)
    wrong = steering.in_style("long", pair.prompt, pair.rejected)

    def written(prompts: list[str], *, max_new_tokens: int, **others: Any) -> list[str]:
        assert len(long) < max_new_tokens
        return [terse, long, "4+", wrong] * (len(prompts) // 4)

    path = steering.pairs_of(steering.Options(runs=tmp_path), SimpleNamespace(generate=written))
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["chosen"], one["rejected"]) for one in kept] == [(terse, "4+"), (long, "4+"), (long, wrong)]


def test_claims_compare_with_each_control_and_with_best_of_n_at_equal_tokens(steering: ModuleType) -> None:
    """Three seeds, four problems; shares that hardly differ between them."""
    wobble = np.linspace(0, 0.001, 4)

    def row(seed: int, arm: str, **values: float) -> dict[str, Any]:
        problems = {name: (value + wobble * (seed + 1)).tolist() for name, value in values.items()}
        return {"objective": steering.DATA, "seed": seed, "arm": arm, "problems": problems}

    sizes = [[float(k) / 32 for k in steering.SIZES]] * 4  # of the best of k, that share
    rows = []
    for seed in range(3):
        for name in steering.arms():
            rows.append(row(seed, name, terse=0.5, long=0.5, right=0.5, tokens=160))
        rows.append(row(seed, "terse, alpha 1", terse=0.7, long=0.3, right=0.5, tokens=160))
        rows.append(row(seed, "long, alpha 1", terse=0.8, long=0.2, right=0.1, tokens=160))
        rows.append(row(seed, steering.UNSTEERED, length=10))
        for goal, style in steering.TOWARD.items():
            rows[-1]["problems"] |= {f"{goal}: {style}": sizes, f"{goal}: right": sizes}
    lines = {
        tuple(line.split(" | ")[:2]): line
        for line in steering.claims(steering.Found(rows, steering.DATA, [0, 1, 2])).splitlines()
    }
    terse, right = lines["| terse", "terse"], lines["| terse", "right"]
    means = [cell.strip().partition(" ")[0] for cell in terse.split("|")[3:9]]
    assert means == ["0.701", "0.500", "+0.200", "-0.100", "+0.200", "+0.201"]
    assert [cell.rpartition(": ")[2].strip() for cell in terse.split("|")[5:9]] == [
        "shown",
        "refuted",
        "shown",
        "shown",
    ]
    assert right.split("|")[6].strip().startswith("+0.400")
    assert right.split("|")[5].strip().endswith(": not distinguished")


def result(steering: ModuleType, prompt: int, texts: list[str]) -> Any:
    samples = [SimpleNamespace(text=text, ids=tuple(text), ending="stop" if text else "length") for text in texts]
    return SimpleNamespace(prompt=prompt, texts=samples, text=texts[0], policy_tokens=7)


def test_the_best_of_n_by_each_goal(steering: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends whose cosines to the goals are known: 0.9 to the goal of their style, 0.1 to the other, less where wrong."""
    wrong = "4+2=3\n3+3=1\n"
    cosines = {TERSE: (0.5, 0.9, 0.1), LONG: (0.5, 0.1, 0.9), wrong: (0.2, 0.8, 0.1), "": (1.0, 1.0, 1.0)}

    def judge(texts: list[str], goals_GD: torch.Tensor) -> list[Any]:
        return [SimpleNamespace(q_Gn=np.array([[0.0] * 3, cosines[text]]).T) for text in texts]

    reward = SimpleNamespace(encode=lambda prompts, texts: texts, judge=judge)
    states = {"default": torch.ones(2), "terse": torch.tensor([1.0, 0.0]), "long": torch.tensor([0.0, 1.0])}
    monkeypatch.setattr(steering, "SIZES", (1, 4))
    values, known = steering.of_samples(reward, states, [PROMPT], [result(steering, 0, [TERSE, LONG, wrong, ""])])
    assert values["terse"] == [0.5]
    assert values["terse, right"] == values["long, right"] == [0.25]
    assert values["length"] == [pytest.approx((len(TERSE) + len(LONG) + len(wrong)) / 4)]
    assert values["terse: terse"] == [[0.5, 1.0]]
    assert values["long: long"] == values["long less terse: long"] == [[0.25, 1.0]]
    assert values["long: right"] == [[0.5, 1.0]]
    assert known["cosine of the goals"] == pytest.approx(0.0)
    assert known["terse: AUROC of its style"] == known["long less terse: AUROC of its style"] == 1.0
    assert known["default: AUROC of right"] == pytest.approx(0.5)


@pytest.fixture
def small(steering: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A random policy and random reward models; the seeds of those that were asked for."""
    runs = tmp_path / "runs"
    save_policy(runs / "right-50", ends=1.0)
    pairs = [
        {"prompt": pair.prompt, "chosen": steering.in_style(style, pair.prompt, pair.chosen), "rejected": "1"}
        for pair in generate(90, 0, 0, 3)[0]
        for style in steering.STYLES
    ]
    (runs / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    asked: list[int] = []

    def reward_model(options: Any, policy: Path, data: Path, seed: int) -> RewardModel:
        asked.append(seed)
        folder = runs / f"reward-model-{seed}"
        if not folder.exists():
            save(folder)
        return RewardModel.from_pretrained(folder)

    monkeypatch.setattr(steering, "reward_model", reward_model)
    monkeypatch.setattr(steering, "LONGEST", 6)
    return asked


def test_what_steers_each_row(
    steering: ModuleType, small: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def decode(*given: Any, **others: Any) -> Any:
        asked.append(others)
        return original(*given, **others)

    original = steering.decode
    monkeypatch.setattr(steering, "decode", decode)
    words = ["--runs", str(tmp_path / "runs"), "-o", str(tmp_path / "report"), "--problems", "1", "--seeds", "1"]
    assert steering.main(words) == 0
    sampled, *others = asked
    assert (sampled["method"].kind, sampled["method"].samples) == ("sample", 32)
    given = dict(zip(steering.arms(), others, strict=True))
    assert given[steering.BASE]["method"].alpha == 0
    assert given["long less terse, alpha 4"]["method"].alpha == 4
    terse, long, less = (given[f"{name}, alpha 1"]["goals"] for name in ("terse", "long", "long less terse"))
    assert less.weights_G.tolist() == [0.5, -0.5]
    assert torch.equal(less.states_GD, torch.cat([long.states_GD, terse.states_GD]))
    control = given["terse, alpha 1, shuffled"]["goals"].states_GD
    assert not torch.equal(control, terse.states_GD)
    assert torch.equal(control.sort().values, terse.states_GD.sort().values)


def test_rows_are_kept_and_the_missing_ones_added(
    steering: ModuleType,
    small: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(steering, "ALPHAS", (steering.CONTROLLED,))
    words = ["--runs", str(tmp_path / "runs"), "-o", str(tmp_path / "report"), "--problems", "2"]
    assert steering.main([*words, "--seeds", "1"]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == [steering.UNSTEERED, *steering.arms()]
    assert all(len(values) == 2 for row in rows for values in row["problems"].values())
    (tmp_path / "report.json").write_text(json.dumps({"rows": rows[:-1]}))
    assert steering.main([*words, "--seeds", "2"]) == 0
    assert small == [0, 0, 1]
    again = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert again[: len(rows)] == rows
    assert [row["seed"] for row in again] == [0] * len(rows) + [1] * len(rows)
    text = (tmp_path / "report.md").read_text()
    assert "Every row is finished." in text
    assert text.count("| long less terse, alpha 1, shuffled |") == 1
    assert text.count("| long less terse | right |") == 3, "over both seeds, and of each"
    capsys.readouterr()
    assert steering.main([*words, "--problems", "3"]) == 2
    assert "its rows are of another number of problems: choose another --report" in capsys.readouterr().err
