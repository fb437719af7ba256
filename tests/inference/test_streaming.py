"""Streamed Q-values and rewards equal those of one forward, whatever the pushes, drops and orders (invariant 9)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.encoding import CUT, OWN_END, Completion
from gcrm_fast.data.ends import End
from gcrm_fast.inference.scoring import RewardModel
from support import models
from support.folders import VOCAB

EOS = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "linear"
    models.save(path, projection_size=7)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def small_forwards(folder: Path) -> RewardModel:
    """The same model, up to 100 tokens per forward."""
    return RewardModel.from_pretrained(folder, device="cpu", tokens_per_batch=100)


def ids(count: int, seed: int) -> list[int]:
    """Random tokens that are not special."""
    return np.random.default_rng(seed).integers(3, VOCAB, size=count).tolist()


def at_once(
    model: RewardModel, prompt: list[int], row: list[int], goals: torch.Tensor, *, cut: bool = False
) -> tuple[float, np.ndarray]:
    """Reward and Q-values [G, n] of the row's own tokens, by one forward."""
    whole = np.array(prompt + row + ([] if cut else [EOS]), dtype=np.int32)
    completion = Completion(whole, len(prompt), CUT if cut else OWN_END)
    [judged] = model.judge([completion], goals_GD=goals, per_token=True)
    assert judged.q_Gn is not None
    return judged.reward, judged.q_Gn[:, : len(row)]


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, list[tuple[list[int], list[int] | None]]]:
    """Length of the prompt, rows, and pushes: how many tokens each row gets, and then which rows are kept."""
    count = rows = draw(st.integers(1, 5))
    steps: list[tuple[list[int], list[int] | None]] = []
    for _ in range(draw(st.integers(1, 6))):
        lengths = draw(st.lists(st.sampled_from([0, 1, 1, 2, 7, 70, 90]), min_size=count, max_size=count))
        kept = draw(st.none() | st.lists(st.integers(0, count - 1), min_size=1, max_size=6))
        steps.append((lengths, kept))
        count = count if kept is None else len(kept)
    return draw(st.sampled_from([0, 1, 5, 64, 130, 300])), rows, steps


@settings(max_examples=60, deadline=None)
@given(history=histories(), stacked=st.booleans())
def test_streamed_values_equal_those_of_one_forward(
    model: RewardModel,
    small_forwards: RewardModel,
    history: tuple[int, int, list[tuple[list[int], list[int] | None]]],
    stacked: bool,
) -> None:
    length, count, steps = history
    prompt, goals = ids(length, 1), torch.randn(3 if stacked else 1, 7)
    stream = small_forwards.stream(prompt, count, goals if stacked else goals[0])
    rows: list[list[int]] = [[] for _ in range(count)]
    q_values: list[list[np.ndarray]] = [[] for _ in range(count)]
    for step, (lengths, kept) in enumerate(steps):
        new = [ids(n, 100 * step + i) for i, n in enumerate(lengths)]
        for row, own, more, q in zip(rows, q_values, new, stream.push(new), strict=True):
            assert q.shape == ((3, len(more)) if stacked else (len(more),))
            assert q.dtype == np.float32
            row += more
            own.append(np.atleast_2d(q))
        if kept is not None:
            stream.keep(kept)
            rows, q_values = [list(rows[i]) for i in kept], [list(q_values[i]) for i in kept]
    assert len(stream) == len(rows)
    for i, (row, own) in reversed(list(enumerate(zip(rows, q_values, strict=True)))):
        reward, q_Gn = at_once(model, prompt, row, goals)
        np.testing.assert_allclose(np.concatenate(own, axis=1), q_Gn, rtol=0, atol=1e-5)
        assert stream.close(i) == pytest.approx(reward, abs=1e-5)
        assert stream.close(i) == pytest.approx(reward, abs=1e-5)  # again, at no cost


@pytest.mark.parametrize(
    ("kind", "tail"),
    [
        *((kind, tail) for kind in ("eos", "as-is", "transformers", "pad is eos") for tail in ([], [EOS], [5, EOS])),
        ("eos", [EOS, 222]),
        ("as-is", [EOS, 222]),
    ],
)
def test_reward_is_read_where_scoring_reads_it(
    model: RewardModel, tail: list[int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = model.tokenizer
    blank = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    end = End("transformers", EOS) if kind == "pad is eos" else End(kind, 2)
    monkeypatch.setattr(model, "end", end)
    tail = [blank if token == 222 else token for token in tail]
    prompt = tokenizer("one two")["input_ids"]
    answer = tokenizer(" three, four", add_special_tokens=False)["input_ids"] + tail
    stream = model.stream(prompt, 1, torch.ones(7))
    stream.push([answer])
    text = tokenizer.decode(answer)
    assert stream.close(0) == pytest.approx(model.score(["one two"], [text])[0], abs=1e-5)


def test_a_cut_row_is_read_at_its_last_token(model: RewardModel) -> None:
    prompt, row, goals = ids(4, 0), ids(6, 1), torch.ones(1, 7)
    stream = model.stream(prompt, 2, goals)
    with pytest.raises(UserError, match="has no token"):
        stream.close(0, cut=True)
    stream.push([row, row])
    assert stream.close(0, cut=True) == pytest.approx(at_once(model, prompt, row, goals, cut=True)[0], abs=1e-5)
    assert stream.close(0) != pytest.approx(stream.close(1), abs=1e-3)


def test_bfloat16_stays_within_its_own_error(model: RewardModel, tmp_path: Path) -> None:
    models.save(tmp_path / "m")
    exact = RewardModel.from_pretrained(tmp_path / "m", device="cpu")
    rounded = RewardModel.from_pretrained(tmp_path / "m", device="cpu", dtype="bfloat16")
    prompt, row, goals = ids(30, 0), ids(80, 1), torch.randn(4, 32)
    reward, q_Gn = at_once(exact, prompt, row, goals)
    budget_reward, budget_q = at_once(rounded, prompt, row, goals)
    stream = rounded.stream(prompt, 3, goals)
    streamed = [stream.push([row[a : a + 9]] * 3)[1] for a in range(0, len(row), 9)]
    error = np.abs(np.concatenate(streamed, axis=1) - q_Gn).max()
    assert error <= 2 * np.abs(budget_q - q_Gn).max()
    assert abs(stream.close(1) - reward) <= 2 * abs(budget_reward - reward) + 0.02


def test_the_prompt_is_computed_once_and_a_drop_frees_its_place(model: RewardModel) -> None:
    stream = model.stream(ids(100, 0), 8, torch.ones(7))
    trunk = stream._scorer.trunk
    assert (trunk.computed, trunk.cache.taken) == (100, 100)
    stream.push([ids(10, i) for i in range(8)])
    assert trunk.computed == 180
    held = trunk.cache.taken
    stream.keep([5, 0, 5])
    assert trunk.computed == 180
    assert trunk.cache.taken == held - 6 * 64  # an extent for each of six rows
    stream.keep([])
    assert stream.push([]) == []
    assert trunk.cache.taken == 0


def test_what_is_wrong_is_said_and_changes_nothing(model: RewardModel, small_forwards: RewardModel) -> None:
    goals = torch.ones(1, 7)
    prompt, row = ids(5, 0), ids(4, 1)
    stream = small_forwards.stream(prompt, 2, goals, cache_tokens=300)
    stream.push([row, []])
    with pytest.raises(ValueError, match="1 lists of tokens for 2 rows"):
        stream.push([[3]])
    with pytest.raises(IndexError, match="there is no row 2"):
        stream.keep([0, 2])
    with pytest.raises(UserError, match=r"row 1 has a token that is not between 0 and 299"):
        stream.push([[3], [VOCAB]])
    with pytest.raises(UserError, match=r"the cache .* is full: the maximum is 300"):
        stream.push([[3], ids(291, 2)])
    with pytest.raises(UserError, match="the prompt has a token"):
        model.stream([-1], 1, goals)
    [q, _] = stream.push([[7], []])
    reward, q_Gn = at_once(model, prompt, [*row, 7], goals)
    np.testing.assert_allclose(q, q_Gn[:, -1:], rtol=0, atol=1e-5)
    assert stream.close(0) == pytest.approx(reward, abs=1e-5)
    with pytest.raises(ValueError, match="row 0 is closed"):
        stream.push([[3], []])
    stream.push([[], [4]])


def test_values_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    models.save(tmp_path / "m")
    broken = RewardModel.from_pretrained(tmp_path / "m", device="cpu")
    with torch.no_grad():
        broken.network.model.embed_tokens.weight[7] = torch.nan
    stream = broken.stream([3, 4], 2)
    with pytest.raises(UserError, match="row 1 has a Q-value that is not finite"):
        stream.push([[5], [6, 7]])
    first, second = stream.push([[5], [6]])
    assert np.isfinite([*first, *second]).all()


def test_more_tokens_than_the_sliding_window(tmp_path: Path) -> None:
    models.save(tmp_path / "m", model_type="mistral", sliding_window=12)
    narrow = RewardModel.from_pretrained(tmp_path / "m", device="cpu")
    stream = narrow.stream(ids(8, 0), 1)
    stream.push([ids(4, 1)])
    with pytest.raises(UserError, match="row 0 has more tokens than the model's sliding window of 12"):
        stream.push([[3]])


@pytest.mark.parametrize("device", ["blocks", "gathered"])
def test_both_attention_paths(model: RewardModel, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products on the cache itself, and the variable-length call on gathered keys, which a GPU takes."""
    if device == "gathered":
        monkeypatch.setattr("gcrm_fast.model.llama.blocks_of", lambda *_: None)
    goals, prompt = torch.randn(2, 7), ids(20, 0)
    stream = model.stream(prompt, 3, goals)
    rows = [ids(n, n) for n in (3, 70, 20)]
    first = stream.push([row[:2] for row in rows])
    stream.keep([2, 0, 1])
    second = stream.push([rows[i][2:] for i in (2, 0, 1)])
    for place, i in enumerate((2, 0, 1)):
        reward, q_Gn = at_once(model, prompt, rows[i], goals)
        np.testing.assert_allclose(np.hstack([first[i], second[place]]), q_Gn, rtol=0, atol=1e-5)
        assert stream.close(place) == pytest.approx(reward, abs=1e-5)


def test_rows_that_do_not_exist(model: RewardModel) -> None:
    for rows in (0, -1):
        with pytest.raises(ValueError, match=f"rows is {rows}: must be at least 1"):
            model.stream(ids(8, 0), rows)
    stream = model.stream(ids(8, 0), 2)
    for row in (-1, 2, 7):
        with pytest.raises(IndexError, match=f"there is no row {row}: the stream has 2"):
            stream.close(row)
    stream.push([[3], [4]])  # none was closed
