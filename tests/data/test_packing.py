"""Sampling, batches, plans and the inverse index, apart from any model."""

from collections import Counter

import numpy as np
import pytest
import torch

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.batches import Budget, epoch_batches, plan_packs
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack, group_size
from gcrm_fast.data.sampling import Sampling, divergence, draw_samples, quantile_positions
from gcrm_fast.model.segment_attention import segment_attention
from gcrm_kernels import InverseIndex


def many_draws(pair: TokenizedPair, sampling: Sampling, epochs: int = 2000) -> np.ndarray:
    return np.concatenate([draw_samples(pair, sampling, epoch) for epoch in range(epochs)], axis=1)


def test_paper_positives_are_uniform_over_ordered_pairs_and_negatives_over_positions(make_pair) -> None:
    pair = make_pair(3, 4, 5, 7)
    sources, goals, negative_sources, negative_goals = many_draws(pair, Sampling(samples=8))
    counts = Counter(zip(sources.tolist(), goals.tolist(), strict=True))
    assert set(counts) == {(i, j) for j in range(5) for i in range(j)}
    np.testing.assert_allclose(np.array(list(counts.values())) / len(sources), 1 / 10, atol=0.012)
    np.testing.assert_allclose(np.bincount(negative_sources, minlength=5) / len(sources), 1 / 5, atol=0.015)
    np.testing.assert_allclose(np.bincount(negative_goals, minlength=7) / len(sources), 1 / 7, atol=0.015)
    assert abs(np.corrcoef(negative_sources, negative_goals)[0, 1]) < 0.03
    assert abs(np.corrcoef(sources, negative_sources)[0, 1]) < 0.03


def test_repo_positions_follow_the_released_arithmetic(make_pair) -> None:
    """u = sort(rand(2, S), 0); position -floor(((p - 1) u + 1) * na + 1) from the end, p = 0, na text tokens."""
    pair = make_pair(3, 4, 6, 7)
    drawn = draw_samples(pair, Sampling(samples=16, variant="repo", seed=5), epoch=2)
    rng = np.random.Generator(np.random.Philox(key=[5, 2], counter=[0, 0, 0, 3]))
    u = np.sort(rng.random((2, 16)), axis=0)
    for row, values, length in ((0, u[0], 6), (1, u[1], 6), (2, rng.random(16), 6), (3, rng.random(16), 7)):
        expected = [length - int(np.floor(((0 - 1) * value + 1) * (length - 1) + 1)) for value in values]
        assert drawn[row].tolist() == expected
    sources, goals, *_ = many_draws(pair, Sampling(variant="repo"))
    assert (sources <= goals).all()
    assert (sources == goals).any()
    assert set(goals.tolist()) == {1, 2, 3, 4, 5}, "the released arithmetic reaches the first token at u = 0 only"


def share(values: np.ndarray, n: int) -> list[float]:
    return (np.bincount(values, minlength=n) / len(values)).tolist()


def test_late_goals_lie_in_the_last_tenth_and_sources_before_them(make_pair) -> None:
    sources, goals, negative_sources, negative_goals = many_draws(
        make_pair(3, 4, 21, 7), Sampling(samples=8, positions="late_goal")
    )
    assert share(goals, 21) == pytest.approx([0] * 18 + [1 / 3] * 3, abs=0.015)  # ceil(21 / 10) positions
    last = sources[goals == 18]
    assert share(last, 21) == pytest.approx([1 / 18] * 18 + [0] * 3, abs=0.015)
    assert (sources < goals).all()
    assert share(negative_sources, 21) == pytest.approx([1 / 21] * 21, abs=0.015)
    assert set(negative_goals.tolist()) == {6}


def test_late_both_draws_sources_late_too(make_pair) -> None:
    pair = make_pair(3, 4, 21, 7)
    sources, goals, negative_sources, negative_goals = many_draws(pair, Sampling(samples=8, positions="late_both"))
    counts = Counter(zip(sources.tolist(), goals.tolist(), strict=True))
    assert set(counts) == {(18, 19), (18, 20), (19, 20)}
    np.testing.assert_allclose(np.array(list(counts.values())) / len(sources), 1 / 3, atol=0.015)
    assert share(negative_sources, 21) == pytest.approx([0] * 18 + [1 / 3] * 3, abs=0.015)
    assert share(negative_goals, 7) == pytest.approx([0] * 5 + [1 / 2] * 2, abs=0.015)


def test_goals_at_the_end_are_those_of_inference(make_pair) -> None:
    pair = make_pair(3, 4, 5, 7, shared=4)
    sources, goals, negative_sources, negative_goals = many_draws(pair, Sampling(samples=8, positions="end"))
    assert share(sources, 5) == pytest.approx([1 / 4] * 4 + [0], abs=0.015)
    assert set(goals.tolist()) == set(negative_sources.tolist()) == {4}
    assert share(negative_goals, 7) == pytest.approx([0] * 4 + [1 / 3] * 3, abs=0.015), "where it differs from chosen"
    mixed = draw_samples(pair, Sampling(samples=7, positions="end_mix"), 0)
    assert (mixed[1:3, :4] == 4).all()
    later = np.concatenate(
        [draw_samples(pair, Sampling(samples=7, positions="end_mix"), e)[:, 4:] for e in range(500)], 1
    )
    assert share(later[2], 5) == pytest.approx([1 / 5] * 5, abs=0.05)
    assert share(later[3], 7) == pytest.approx([1 / 7] * 7, abs=0.05)


@pytest.mark.parametrize("positions", ["random", "late_goal", "late_both", "end", "end_mix"])
@pytest.mark.parametrize(("chosen", "rejected"), [(1, 1), (1, 9), (2, 1), (2, 2)])
def test_short_completions_have_samples_of_every_kind(make_pair, positions: str, chosen: int, rejected: int) -> None:
    drawn_4S = many_draws(make_pair(0, 3, chosen, rejected), Sampling(samples=3, positions=positions), 50)
    assert drawn_4S.shape == (4, 150)
    assert (drawn_4S >= 0).all()
    assert (drawn_4S[:3] < chosen).all()
    assert (drawn_4S[3] < rejected).all()
    if chosen > 1:
        assert (drawn_4S[0] < drawn_4S[1]).all()


def test_negative_goals_of_rs_are_rejected_tokens_of_the_next_other_prompt(make_pair) -> None:
    a, b = (make_pair(i, 5, 4, 6, prompt_key=1) for i in (0, 1))
    c, d = (make_pair(i, 7, 3, 9, prompt_key=2) for i in (2, 3))
    sampling = Sampling(samples=64, positions="rs")
    pack = build_pack([[a, b, c, d]], sampling, 0)
    assert len(pack.input_ids_T) == group_size([a, b]).tokens + group_size([c, d]).tokens, "prompts are computed once"
    goals_NS = pack.input_ids_T[pack.read_rows_R][pack.pairs.samples_4NS[3]].tolist()
    for goals, other in zip(goals_NS, (c, c, a, a), strict=True):
        assert set(goals) == set(other.rejected_ids[other.rejected_start :].tolist())
    assert pack.pairs.has_negative_N.all()
    assert not build_pack([[a, b]], sampling, 0).pairs.has_negative_N.any()
    assert build_pack([[a, b]], Sampling(), 0).pairs.has_negative_N.all()


@pytest.mark.parametrize("positions", ["random", "late_goal", "late_both", "end", "end_mix"])
def test_samples_depend_on_seed_epoch_and_pair_alone(make_pair, positions: str) -> None:
    pair, other = make_pair(1, 4, 29, 39), make_pair(2, 4, 29, 39)
    base = draw_samples(pair, Sampling(seed=1, positions=positions), 0)
    assert np.array_equal(base, draw_samples(pair, Sampling(seed=1, positions=positions), 0))
    for changed in (
        draw_samples(pair, Sampling(seed=2, positions=positions), 0),
        draw_samples(pair, Sampling(seed=1, positions=positions), 1),
        draw_samples(other, Sampling(seed=1, positions=positions), 0),
    ):
        assert not np.array_equal(base, changed)


@pytest.mark.parametrize("variant", ["paper", "repo"])
def test_negative_goals_after_divergence(make_pair, variant: str) -> None:
    pair = make_pair(0, 4, 12, 15, shared=6)
    assert divergence(pair) == 4 + 6
    everywhere = many_draws(pair, Sampling(variant=variant), 200)[3]
    after = many_draws(pair, Sampling(variant=variant, negatives="after-divergence"), 200)[3]
    assert everywhere.min() < 6
    first = 6 if variant == "paper" else 7  # the released arithmetic reaches the first token at u = 0 only
    assert set(after.tolist()) == set(range(first, 15))
    shared = build_pack([[pair]], Sampling(samples=64, variant=variant), 0).pairs.shared_negatives_N
    assert 0.1 < shared.item() < 0.8
    assert build_pack([[pair]], Sampling(negatives="after-divergence"), 0).pairs.shared_negatives_N.item() == 0


def test_sampled_rows_hold_the_sampled_tokens(pairs: list[TokenizedPair]) -> None:
    sampling = Sampling(samples=7)
    pack = build_pack([pairs[:2], pairs[2:5], [pairs[5]], [pairs[6]]], sampling, epoch=4, quantiles=True)
    token_of = pack.input_ids_T[pack.read_rows_R]
    place_of = pack.position_ids_T[pack.read_rows_R]
    assert pack.pairs.pair_ids == tuple(range(7))
    for n, pair in enumerate(pairs):
        drawn = draw_samples(pair, sampling, 4)
        for a in range(4):
            ids, start = (pair.rejected_ids, pair.rejected_start) if a == 3 else (pair.chosen_ids, pair.chosen_start)
            rows = pack.pairs.samples_4NS[a, n]
            assert token_of[rows].tolist() == ids[start + drawn[a]].tolist()
            assert place_of[rows].tolist() == (start + drawn[a]).tolist()
        sides = (pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)
        for side, (ids, start) in enumerate(sides):
            assert place_of[pack.pairs.end_2N[side, n]] == len(ids) - 1
            expected = [*(start + quantile_positions(len(ids) - start)), max(len(ids) - 2, start)]
            assert place_of[pack.pairs.quantiles_2NQ[side, n]].tolist() == expected
    assert pack.pairs.has_positive_N.tolist() == [True, True, False, True, True, True, True]
    rows = pack.read_rows_R
    assert (rows[1:] > rows[:-1]).all(), "read rows are distinct and ascending"


def test_quantile_positions_follow_the_formula() -> None:
    for n in (1, 2, 7, 10, 33):
        assert quantile_positions(n).tolist() == [max(n * i // 10 - 1, 0) for i in range(11)]


def test_repeated_completions_of_a_prompt_are_stored_once(make_pair) -> None:
    a, b = make_pair(0, 6, 5, 8), make_pair(1, 6, 4, 7)
    twin = TokenizedPair(
        pair_id=2, chosen_ids=a.chosen_ids, rejected_ids=b.rejected_ids, chosen_start=6, rejected_start=6
    )
    together = build_pack([[a, b, twin]], Sampling(samples=2), 0)
    assert (
        len(together.input_ids_T) == len(build_pack([[a, b]], Sampling(samples=2), 0).input_ids_T) == 6 + 5 + 8 + 4 + 7
    )
    assert len(together.input_ids_T) == group_size([a, b, twin]).tokens
    assert len(together.kv_index_K) == group_size([a, b, twin]).keys


@pytest.mark.parametrize("group_prompts", [1, 2, 5])
def test_every_pair_comes_once_an_epoch_in_full_batches(group_prompts: int) -> None:
    keys = np.random.default_rng(0).integers(12, size=103)
    batches = list(epoch_batches(keys, 16, group_prompts, seed=3, epoch=1))
    assert [sum(map(len, batch)) for batch in batches] == [16] * 6 + [7]
    assert sorted(i for batch in batches for group in batch for i in group) == list(range(103))
    for batch in batches:
        for group in batch:
            assert len(group) <= group_prompts
            assert len(set(keys[group])) == 1
    assert batches == list(epoch_batches(keys, 16, group_prompts, seed=3, epoch=1))
    assert batches != list(epoch_batches(keys, 16, group_prompts, seed=3, epoch=2))
    assert batches != list(epoch_batches(keys, 16, group_prompts, seed=4, epoch=1))
    if group_prompts > 1:
        assert max(len(group) for batch in batches for group in batch) == group_prompts


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_plans_keep_the_budget_lose_nothing_and_balance(make_pair, world_size: int) -> None:
    rng = np.random.default_rng(1)
    groups = [[make_pair(i, *rng.integers(2, 60, size=3).tolist(), prompt_key=i)] for i in range(40)]
    budget = Budget(400, 64)
    plan = plan_packs(groups, budget, world_size)
    assert len(plan) % world_size == 0
    assert sorted(p.pair_id for pack in plan for group in pack for p in group) == list(range(40))
    costs = []
    for pack in plan:
        assert len(build_pack(pack, Sampling(), 0).input_ids_T) <= 400
        costs.append(sum(budget.cost(group_size(group)) for group in pack))
    assert max(costs) < 1.25 * min(costs)


def test_groups_over_budget_are_split_and_a_pair_over_budget_is_an_error(make_pair) -> None:
    group = [make_pair(i, 30, 10, 10, prompt_key=5) for i in range(8)]
    plan = plan_packs([group], Budget(120, 64), 1)
    assert len(plan) > 1
    assert sorted(p.pair_id for pack in plan for part in pack for p in part) == list(range(8))
    with pytest.raises(UserError, match=r"pair 3 .*--tokens-per-batch 40"):
        plan_packs([[group[3]]], Budget(40, 64), 1)


def test_inverse_index_lists_the_uses_of_each_row_in_order() -> None:
    inverse = InverseIndex.of(np.array([2, 0, 2, 4, 2]), 5)
    uses = [inverse.order[a:b].tolist() for a, b in zip(inverse.offsets[:-1], inverse.offsets[1:], strict=True)]
    assert uses == [[1], [], [0, 2, 4], [], [3]]


def test_segment_attention_gradcheck_with_shared_keys_and_grouped_heads() -> None:
    # Square and not; alone, and two of different lengths that are padded to one shape; one long enough to be alone.
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 7, 27, 30, 34, 99], [0, 5, 11, 31, 34, 43, 110]))
    q = torch.randn(99, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(110, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k, v: segment_attention(q, k, v, cu_q, cu_k), (q, k, v), fast_mode=True)
    torch.library.opcheck(torch.ops.gcrm.segment_attention.default, (q, k, v, cu_q, cu_k))
    for b in range(6):
        rows_q, rows_k = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
        mask = torch.ones(rows_q.stop - rows_q.start, rows_k.stop - rows_k.start, dtype=torch.bool)
        mask = mask.tril(mask.shape[1] - mask.shape[0])
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[rows_q].transpose(0, 1), k[rows_k].transpose(0, 1), v[rows_k].transpose(0, 1), mask, enable_gqa=True
        )
        out = segment_attention(q, k, v, cu_q, cu_k)[rows_q].transpose(0, 1)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("negatives", ["anywhere", "after-divergence"])
def test_dense_positions_are_the_tokens_of_both_completions(pairs: list[TokenizedPair], negatives: str) -> None:
    pack = build_pack(
        [pairs[:2], pairs[2:5], [pairs[5]], [pairs[6]]], Sampling(variant="dense", negatives=negatives), 0
    )
    rows = pack.pairs
    assert rows.samples_4NS.shape == (4, 7, 0)
    tokens = pack.input_ids_T[pack.read_rows_R][rows.positions_M].split(rows.positions_cu_seqlens.diff().tolist())
    lengths = []
    for n, pair in enumerate(pairs):
        first = 0 if negatives == "anywhere" else max(divergence(pair) - pair.rejected_start, 0)
        assert tokens[2 * n].tolist() == pair.chosen_ids[pair.chosen_start :].tolist()
        assert tokens[2 * n + 1].tolist() == pair.rejected_ids[pair.rejected_start + first :].tolist()
        lengths.append(len(tokens[2 * n]) + len(tokens[2 * n + 1]))
        before = max(divergence(pair) - pair.rejected_start, 0) / (len(pair.rejected_ids) - pair.rejected_start)
        assert rows.shared_negatives_N[n].item() == pytest.approx(before if first == 0 else 0.0)
    assert rows.max_pair_length == max(lengths)
