"""DESIGN invariants 1 to 4: the same loss and gradients whatever the packing, the sharing and the read rows."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.batches import Budget, plan_packs
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling, negative_blocks
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.model.views import WIDTH
from gcrm_fast.training.objectives import Objective, losses
from gcrm_kernels import InverseIndex
from support.small import small_config, small_model

Groups = Sequence[Sequence[TokenizedPair]]


def loss_and_gradients(
    model: LlamaRewardModel, packs: Sequence[Groups], sampling: Sampling, objective: Objective
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for groups in packs:
        pack = build_pack(groups, sampling, epoch=3)
        loss, _ = losses(model(pack), pack.pairs, objective)
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    a: tuple[torch.Tensor, dict[str, torch.Tensor]], b: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-12, atol=1e-12)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


BOTTLENECK = {"head": "bottleneck", "bottleneck_size": 6}
VARIANTS = [
    (Sampling(samples=5), Objective(), {}),
    (Sampling(samples=4, variant="repo"), Objective(pairing="grid", reduce="mean_then_log"), {"projection_size": 7}),
    (Sampling(samples=3, negatives="after-divergence"), Objective(temperature=0.3), {"head": "mlp"}),
    (Sampling(variant="dense", negatives="after-divergence"), Objective(dense=True), {"projection_size": 6}),
    (Sampling(samples=4, positions="late_goal"), Objective(distance="dot"), {}),
    (Sampling(samples=4, positions="late_both"), Objective(distance="euclidean"), {"projection_size": 4}),
    (Sampling(samples=4, positions="avg"), Objective(average=True), {}),
    (Sampling(samples=5, positions="end_mix"), Objective(), {}),
    (Sampling(samples=4, noise=6), Objective(term_weights={"kl": 0.3}), BOTTLENECK),
    (Sampling(samples=4, noise=6), Objective(term_weights={"kl": 0.3}), BOTTLENECK | {"compare": "latents"}),
    (Sampling(samples=4, predict=True), Objective(term_weights={"sft": 0.3}), {}),
]


@pytest.mark.parametrize(("sampling", "objective", "config"), VARIANTS)
def test_packed_equals_one_by_one(
    pairs: list[TokenizedPair], sampling: Sampling, objective: Objective, config: dict[str, object]
) -> None:
    model = small_model(small_config(**config), lm_head=sampling.predict)
    alone = loss_and_gradients(model, [[[pair]] for pair in pairs], sampling, objective)
    packed = loss_and_gradients(model, [[[pair] for pair in pairs]], sampling, objective)
    assert_same(alone, packed)
    grouped = [[pairs[:2], pairs[2:5], [pairs[5]], [pairs[6]]]]
    assert_same(alone, loss_and_gradients(model, grouped, sampling, objective))


def test_negatives_of_another_prompt_do_not_depend_on_the_cut_into_packs(pairs: list[TokenizedPair]) -> None:
    model, sampling, objective = small_model(small_config()), Sampling(samples=4, positions="rs"), Objective()
    blocks = negative_blocks([pairs[:2], pairs[2:4], [pairs[4]], [pairs[5]], [pairs[6]]])
    assert [[pair.pair_id for pair in block] for block in blocks] == [[0, 1, 2, 3], [4, 5], [6]]
    whole = loss_and_gradients(model, [blocks], sampling, objective)
    assert_same(whole, loss_and_gradients(model, [[block] for block in blocks], sampling, objective))
    for tokens, world_size in ((150, 2), (1000, 1)):
        plan = plan_packs(blocks, Budget(tokens, 32), world_size, whole=True)
        assert_same(whole, loss_and_gradients(model, plan, sampling, objective))
    with pytest.raises(UserError, match="pair 0 and pair 1 and pair 2 and pair 3 together need"):
        plan_packs(blocks, Budget(50, 32), 1, whole=True)


def test_shared_prefix_equals_two_full_sequences(pairs: list[TokenizedPair], monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling, objective = small_model(small_config()), Sampling(samples=6), Objective()
    shared = loss_and_gradients(model, [[pairs[:2], pairs[2:5]]], sampling, objective)
    tokens_shared = len(build_pack([pairs[:2], pairs[2:5]], sampling, 3).input_ids_T)
    monkeypatch.setattr("gcrm_fast.data.packing.common_prefix", lambda sequences: 0)
    full = loss_and_gradients(model, [[pairs[:2], pairs[2:5]]], sampling, objective)
    assert_same(shared, full)
    # two prompts of 5 and 8 tokens, stored once instead of 4 and 6 times
    assert len(build_pack([pairs[:2], pairs[2:5]], sampling, 3).input_ids_T) == tokens_shared + 3 * 5 + 5 * 8


def test_read_rows_equal_full_last_layer(pairs: list[TokenizedPair]) -> None:
    model = small_model(small_config())
    pack = build_pack([[pair] for pair in pairs], Sampling(samples=2), 0)
    tokens = len(pack.input_ids_T)
    assert len(pack.read_rows_R) < tokens
    everything = replace(
        pack, read_rows_R=torch.arange(tokens), read_inverse=InverseIndex.of(np.arange(tokens), tokens)
    )
    pruned, full = model.model(pack, "eager"), model.model(everything, "eager")
    torch.testing.assert_close(pruned, full[pack.read_rows_R], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_any_cut_into_packs_gives_the_same_loss(pairs: list[TokenizedPair], world_size: int) -> None:
    model, sampling, objective = small_model(small_config()), Sampling(samples=4), Objective()
    whole = loss_and_gradients(model, [[[pair] for pair in pairs]], sampling, objective)
    for tokens in (50, 80, 1000):
        plan = plan_packs([[pair] for pair in pairs], Budget(tokens, 32), world_size)
        assert len(plan) % world_size == 0
        assert_same(whole, loss_and_gradients(model, plan, sampling, objective))


@pytest.mark.parametrize("config", [{"projection_size": 5, "head": "mlp"}, BOTTLENECK])
@pytest.mark.parametrize("variant", ["paper", "dense"])
def test_a_dummy_pack_touches_every_parameter_and_adds_nothing(variant: str, config: dict[str, object]) -> None:
    model = small_model(small_config(**config), views=True)
    sampling = Sampling(variant=variant, noise=model.config.bottleneck_size, views=WIDTH)
    weights = {"kl": 0.1} if sampling.noise else {}
    objective = Objective(dense=variant == "dense", term_weights=weights, views_weight=0.5)
    loss, gradients = loss_and_gradients(model, [[]], sampling, objective)
    assert loss.item() == 0.0
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(not g.any() for g in gradients.values())


def test_ranking_alone_leaves_the_projection_without_a_contrastive_gradient(pairs: list[TokenizedPair]) -> None:
    model = small_model(small_config(projection_size=5))
    _, gradients = loss_and_gradients(model, [[pairs]], Sampling(), Objective(contrastive_weight=0.0))
    assert not gradients["projection.weight"].any()
    _, gradients = loss_and_gradients(model, [[pairs]], Sampling(), Objective(contrastive_weight=0.5))
    assert gradients["projection.weight"].any()
