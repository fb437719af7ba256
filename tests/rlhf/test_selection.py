"""Pre-PPO selection and the curriculum, by hand."""

import numpy as np
import pytest

from gcrm_fast.common.errors import UserError
from gcrm_fast.rlhf.selection import SMALL, check_order, curriculum, lowest, normalized, pooled, stages


def test_places_are_within_the_group_and_equal_scores_do_not_follow_the_file() -> None:
    scores_N = np.array([5.0, 1.0, 3.0, -70.0, -90.0])
    groups = ["a", "a", "a", "b", "b"]
    prompts = list("vwxyz")
    places_N = normalized(scores_N, groups, prompts, "rank")
    np.testing.assert_allclose(places_N, [5 / 6, 1 / 6, 3 / 6, 3 / 4, 1 / 4])
    z_N = normalized(scores_N, groups, prompts, "z")
    np.testing.assert_allclose(z_N, [np.sqrt(1.5), -np.sqrt(1.5), 0, 1, -1], atol=1e-12)
    np.testing.assert_allclose(normalized(np.ones(3), ["a"] * 3, prompts[:3], "z"), 0)
    same_N = normalized(np.zeros(1000), ["a"] * 1000, [f"p{i}" for i in range(1000)], "rank")
    assert sorted(same_N) == pytest.approx((np.arange(1000) + 0.5) / 1000)
    kept = np.flatnonzero(same_N < 0.1)
    assert 350 < kept.mean() < 650, "ties that keep the order of the file would keep its first records"
    back_N = normalized(np.zeros(1000), ["a"] * 1000, [f"p{i}" for i in reversed(range(1000))], "rank")
    np.testing.assert_array_equal(back_N, same_N[::-1])


def test_the_lowest_share_of_each_group_or_of_all() -> None:
    scores_N = np.r_[np.arange(40.0), 1000 + np.arange(20.0)]
    groups = ["a"] * 40 + ["b"] * 20
    prompts = [str(i) for i in range(60)]
    kept_N = lowest(normalized(scores_N, groups, prompts, "rank"), 0.1, prompts, "rank")
    assert np.flatnonzero(kept_N).tolist() == [0, 1, 2, 3, 40, 41]
    wide_N = np.r_[[-500.0] * 4, np.zeros(36), 1000 + np.arange(20.0)]
    kept_N = lowest(normalized(wide_N, groups, prompts, "z"), 0.1, prompts, "z")
    assert set(range(4)) < set(np.flatnonzero(kept_N).tolist())
    assert kept_N.sum() == 6
    for how in ("rank", "z"):
        one_N = lowest(normalized(scores_N[:3], ["a"] * 3, prompts[:3], how), 0.01, prompts[:3], how)
        assert one_N.tolist() == [True, False, False]


def test_small_domains_are_compared_together() -> None:
    domains = ["big"] * SMALL + ["x"] * 2 + ["y"] * (SMALL - 1)
    assert pooled(domains) == ["big"] * SMALL + ["x + y"] * (SMALL + 1)
    assert pooled(["big"] * SMALL + ["x"]) == ["big"] * SMALL + ["x"]


def test_stages_and_their_order() -> None:
    domains = ["math", "code", "chat", "math"]
    of_stages = stages("math, code+chat,all", domains)
    assert of_stages == [("math", [0, 3]), ("code+chat", [1, 2]), ("all", [0, 1, 2, 3])]
    check_order("math, code+chat,all", domains)
    with pytest.raises(UserError, match="no prompt has the domain 'law': the domains are chat, code, math, all"):
        check_order("math,code+law", [*domains, "all"])
    with pytest.raises(UserError, match="of the prompts of the domain 'code' none is kept"):
        stages("math,code", ["math", "chat"])
    order = list(curriculum(of_stages, 10, 7))
    assert [stage for _, stage in order] == ["math"] * 3 + ["code+chat"] * 3 + ["all"] * 4
    assert sorted(i for i, _ in order[:2]) == [0, 3], "every prompt of a stage once before any comes again"
    assert sorted(i for i, _ in order[6:]) == [0, 1, 2, 3]
    assert order == list(curriculum(of_stages, 10, 7))
    many = [("all", list(range(50)))]
    long = [i for i, _ in curriculum(many, 120, 0)]
    assert long[:50] != long[50:100]
    assert sorted(long[50:100]) == list(range(50))
    assert long[:70] == [i for i, _ in curriculum(many, 70, 0)], "a longer curriculum begins with the shorter one"
    assert long != [i for i, _ in curriculum(many, 120, 1)]
