"""Best of n: the estimator, the curve, the fall, and ``gcrm overoptimize``."""

import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcrm_fast.evaluation.overoptimization import best_of_n, curve, fall, fit, gains, kl, sizes
from support.judged import write
from support.training_runs import Gcrm


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("proxy", [[3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 1.0, 2.0, 2.0, 2.0], [0.0] * 5])
def test_best_of_n_is_the_mean_over_all_choices(proxy: list[float], n: int) -> None:
    gold = np.array([7.0, -1.0, 0.5, 2.0, 3.0])
    expected = []
    for chosen in itertools.combinations(range(5), n):
        best = max(proxy[i] for i in chosen)
        expected.append(np.mean([gold[i] for i in chosen if proxy[i] == best]))
    assert best_of_n(np.array(proxy), gold, n) == pytest.approx(np.mean(expected), rel=1e-12)


def test_large_numbers_of_samples_stay_finite() -> None:
    values = np.arange(4096.0)
    assert best_of_n(values, values, 4096) == 4095
    assert best_of_n(values, values, 2) == pytest.approx(4097 * 2 / 3 - 1)


def test_kl_and_sizes() -> None:
    assert (kl(1), kl(2)) == (0.0, pytest.approx(math.log(2) - 0.5))
    assert sizes(1) == [1]
    assert sizes(12) == [1, 2, 4, 8, 12]
    assert sizes(16) == [1, 2, 4, 8, 16]


def questions(rng: np.random.Generator, count: int, over: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """16 samples each: gold follows the proxy up to its value ``over``, and then falls twice as fast."""
    proxy = [rng.normal(size=16) for _ in range(count)]
    return proxy, [np.where(p > over, over - 2 * (p - over), p) + 0.1 * rng.normal(size=16) for p in proxy]


def test_a_proxy_that_is_wrong_at_its_top_is_over_optimized(rng: np.random.Generator) -> None:
    n_K = sizes(16)
    proxy, gold = questions(rng, 80, over=0.8)
    gold_CK, proxy_CK = gains(proxy, gold, n_K)
    half_C = np.arange(80) % 2 == 0
    change = fall(gold_CK, n_K, half_C)
    assert change.shown
    assert change.peak in (2, 4)
    points = curve(gold_CK, proxy_CK, n_K)
    assert points[0].gold == pytest.approx(0)
    assert (np.diff([p.proxy for p in points]) > 0).all()
    assert all(p.low < p.gold < p.high for p in points[1:])
    alpha, beta = fit(points)
    assert alpha > 0
    assert beta > 0


def test_a_perfect_proxy_and_a_blind_one_show_no_fall(rng: np.random.Generator) -> None:
    n_K, half_C = sizes(16), np.arange(60) % 2 == 0
    proxy, gold = questions(rng, 60, over=9.0)
    assert not fall(gains(proxy, gold, n_K)[0], n_K, half_C).shown
    blind = [rng.normal(size=16) for _ in range(60)]
    found = [fall(gains([rng.permutation(p) for p in proxy], blind, n_K)[0], n_K, half_C).shown for _ in range(20)]
    assert sum(found) <= 3, "the highest of noisy means is not followed by a fall"


def test_rounding_is_no_fall(rng: np.random.Generator) -> None:
    """Gold that is 1 for all samples is the sum of the weights, which is not exactly 1."""
    n_K, half_C = sizes(16), np.arange(40) % 2 == 0
    gold_CK, _ = gains([rng.normal(size=16) for _ in range(40)], [np.ones(16)] * 40, n_K)
    found = fall(gold_CK, n_K, half_C)
    assert not found.shown
    assert not found._replace(high=-1e-15).shown
    assert found._replace(high=-1e-3).shown


def test_the_peak_is_found_on_the_other_half() -> None:
    """Each half has its peak where the other has its lowest gold."""
    gold_CK, even_C = np.array([[1, 0, 0.5], [0, 1, 0.5]] * 10), np.arange(20) % 2 == 0
    assert fall(gold_CK, [1, 2, 4], even_C).change == pytest.approx(0.5)


def test_the_fit_finds_its_own_curve(rng: np.random.Generator) -> None:
    n_K = sizes(64)
    d_K = np.sqrt([kl(n) for n in n_K])
    gold_CK = np.tile(d_K * (1.5 - 0.4 * d_K), (30, 1))
    assert fit(curve(gold_CK, gold_CK, n_K)) == pytest.approx((1.5, 0.4))
    assert np.isnan(fit(curve(gold_CK[:, :2], gold_CK[:, :2], n_K[:2]))).all()


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(gcrm: Gcrm, tmp_path: Path) -> Any:
    return functools.partial(gcrm, "overoptimize", "-o", tmp_path / "out")


def lists(rng: np.random.Generator, over: float) -> list[dict[str, Any]]:
    proxy, gold = questions(rng, 40, over)
    return [
        {"prompt": f"p{i}", "completions": list("abcdefghijklmnop"), "reward": list(p), "truth": list(g)}
        for i, (p, g) in enumerate(zip(proxy, gold, strict=True))
    ]


def test_the_command_writes_the_curve(run: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    result = run(write(tmp_path / "s.jsonl", lists(rng, 0.8)), "--gold", "truth")
    assert result.returncode == 0, result.stderr
    assert "over-optimized: from best of" in result.stdout
    rows = {row["measure"]: row for row in json.loads((tmp_path / "out/results.json").read_text())["rows"]}
    assert rows["questions"]["value"] == 40
    assert rows["fall"]["high"] < 0
    assert {f"gold@{n}" for n in (1, 2, 4, 8, 16)} <= rows.keys()
    assert (tmp_path / "out/overoptimization.png").stat().st_size > 1000
    assert "contains files" in run(tmp_path / "s.jsonl", "--gold", "truth").stderr
    assert run(tmp_path / "s.jsonl", "--gold", "truth", "--overwrite").returncode == 0


def test_prompts_may_be_messages(run: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    """Those of one conversation are one question, as the same samples with text for a prompt are."""
    records = lists(rng, 0.8)

    def found(name: str, prompts: list[Any]) -> list[Any]:
        given = [record | {"prompt": prompt} for record, prompt in zip(records, prompts, strict=True)]
        result = run(write(tmp_path / f"{name}.jsonl", given), "--gold", "truth", "--overwrite")
        assert result.returncode == 0, result.stderr
        rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
        return [(row["measure"], row["value"]) for row in rows if row["measure"] not in ("peak", "fall")]

    turns = [[{"role": "user", "content": record["prompt"]}] for record in records]
    assert found("turns", turns) == found("text", [record["prompt"] for record in records])
    same = dict(found("same", [turns[0], turns[0], *turns[2:]]))
    assert same["questions"] == 39


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"truth": None}, "field 'truth', named by --gold, is 'None', not a number"),
        ({"truth": [10**400] * 16}, "field 'truth', named by --gold, is not a finite number between -1e+30 and 1e+30"),
        ({"truth": [math.nan] * 16}, "field 'truth', named by --gold, is not a finite number between -1e+30 and 1e+30"),
        ({"reward": ["high"] * 16}, "field 'reward', named by --proxy, is 'high', not a number"),
        ({"completions": ["a"], "reward": [1], "truth": [1]}, "one sample of the question 'p7'"),
        ({"reward": [0.0] * 15}, "field 'reward' has 15 entries, none for completions[15]"),
    ],
)
def test_samples_that_say_nothing_are_refused_in_one_line(
    run: Any, rng: np.random.Generator, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    records = lists(rng, 0.8)
    records[7] |= change
    result = run(write(tmp_path / "s.jsonl", records), "--gold", "truth")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "name"), [("--proxy", "reward"), ("--gold", "truth")])
def test_a_constant_score_is_refused(
    option: str, name: str, run: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    records = [record | {name: [1.0] * 16} for record in lists(rng, 0.8)]
    result = run(write(tmp_path / "s.jsonl", records), "--gold", "truth")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert f"{option} {name} is the same for all samples of each question" in result.stderr
    assert not (tmp_path / "out").exists()


def test_two_samples_per_question_have_no_fit(run: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    short = ("completions", "reward", "truth")
    records = [record | {name: record[name][:2] for name in short} for record in lists(rng, 0.8)]
    result = run(write(tmp_path / "s.jsonl", records), "--gold", "truth")
    assert result.returncode == 0, result.stderr
    assert "no fit: it takes 3 or more samples of each question" in result.stdout
    assert "nan" not in result.stdout
