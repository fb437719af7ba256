"""The training step: packs built ahead, what it costs, recomputation, compiled blocks, optimizers, no waiting."""

import functools
import importlib.util
import math
import multiprocessing
import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from gcrm_fast import train
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.torch_compat import TorchDispatchMode
from gcrm_fast.data.batches import Budget
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.model import heads
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.llama import linears
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.training import held_out, memory, parallel, run
from gcrm_fast.training.accounting import peak_flops, work
from gcrm_fast.training.config import TrainConfig, parse
from gcrm_fast.training.loader import Step, Steps, load
from gcrm_fast.training.memory import (
    OPTIMIZER_BYTES,
    PLANS,
    check_model_fits,
    choose_plan,
    kept_for_backward,
    largest_pack,
    machine_memory,
    memory_plan,
    predicted_memory,
)
from gcrm_fast.training.objectives import Objective, losses, statistics_of
from gcrm_fast.training.optimizer import Updater, cast_weights
from gcrm_fast.training.prepare import objective_of, prepare
from gcrm_fast.training.resume import Window
from support.small import memory_shape, small_config, small_model
from support.training_runs import arguments, torchrun

CPU = torch.device("cpu")
RECOMPUTE = tuple(dict.fromkeys(recompute for recompute, _ in PLANS))  # the less memory, the more work


def steps_of(pairs: Sequence[TokenizedPair], rank: int = 0, world_size: int = 1, **changes: Any) -> Steps:
    options = {"global_batch_pairs": 3, "group_prompts": 2} | changes
    return Steps(
        pairs=pairs,
        budget=Budget(60, 32),
        sampling=Sampling(samples=4),
        rank=rank,
        world_size=world_size,
        **options,
    )


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__"):
        value = list(vars(value).values())
    return [x for v in value for x in tensors(v)] if isinstance(value, (list, tuple)) else []


def assert_same_steps(found: Sequence[Step], expected: Sequence[Step]) -> None:
    assert [(s.n_pairs, [p.pairs.pair_ids for p in s.packs]) for s in found] == [
        (s.n_pairs, [p.pairs.pair_ids for p in s.packs]) for s in expected
    ]
    for a, b in zip(tensors(list(found)), tensors(list(expected)), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_do_not_depend_on_who_builds_them_or_where_one_starts(pairs: list[TokenizedPair], workers: int) -> None:
    expected = [steps_of(pairs)[i] for i in range(7)]  # two epochs of 3 + 3 + 1 pairs, and one more step
    assert [step.n_pairs for step in expected] == [3, 3, 1, 3, 3, 1, 3]
    for first in (0, 4):
        with load(steps_of(pairs), first, 7, workers, CPU) as found:
            assert_same_steps(list(found), expected[first:])


def test_ranks_share_a_step(pairs: list[TokenizedPair]) -> None:
    for i in range(3):
        whole = steps_of(pairs)[i]
        parts = [steps_of(pairs, rank, 2)[i] for rank in range(2)]
        assert {part.n_pairs for part in parts} == {whole.n_pairs}
        ids = [j for part in parts for pack in part.packs for j in pack.pairs.pair_ids]
        assert sorted(ids) == sorted(j for pack in whole.packs for j in pack.pairs.pair_ids)
        assert len({len(part.packs) for part in parts}) == 1


def test_what_fails_in_a_worker_fails_here(pairs: list[TokenizedPair]) -> None:
    steps = steps_of(pairs)
    steps.budget = Budget(1, 32)
    with (
        pytest.raises(UserError, match="more than --tokens-per-batch 1") as error,
        load(steps, 0, 1, 1, CPU) as found,
    ):
        next(found)
    assert error.traceback, "which holds on to the iterator"
    assert not multiprocessing.active_children()


def test_packs_travel_between_processes_as_arrays(pairs: list[TokenizedPair]) -> None:
    pack = build_pack([pairs[:2], [pairs[3]]], Sampling(variant="dense"), 0)
    data = pickle.dumps(pack)
    assert b"torch" not in data
    assert_same_steps([Step(3, [pickle.loads(data)])], [Step(3, [pack])])


# ------------------------------------------------------------------------------------------------------ what it costs


def attention_flops(pack: Pack, config: Any) -> int:
    """Forward, every layer: 4 D for each key that a query may see, counted one by one."""
    seen = 0
    q, k = pack.cu_seqlens_q.diff().tolist(), pack.cu_seqlens_k.diff().tolist()
    for queries, keys in zip(q, k, strict=True):
        seen += sum(keys - queries + i + 1 for i in range(queries))
    return 4 * seen * config.num_attention_heads * config.head_dim * config.num_hidden_layers


BOTTLENECK = {"head": "bottleneck", "bottleneck_size": 6}
HEADS = [*({"head": head, "projection_size": 7} for head in heads.KINDS), {"compare": "latents"}]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.get("head", "latents"))
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("layers", [2, 3])
def test_counted_operations_are_those_of_the_model(
    pairs: list[TokenizedPair], recompute: str, head: dict[str, Any], layers: int
) -> None:
    config = small_config(**{**BOTTLENECK, **head})
    pack = build_pack([pairs[:2], pairs[2:5], [pairs[6]]], Sampling(samples=2, noise=6), 0)
    model = LlamaRewardModel(config, recompute=recompute)
    model.model.train_top(layers)
    with FlopCounterMode(display=False) as counter:
        output = model(pack)
        (output.reward_2N.sum() + output.z_RD.sum()).backward()
    of_a_layer = attention_flops(pack, config) // config.num_hidden_layers
    attention = of_a_layer * (config.num_hidden_layers + layers * (3 if recompute == "block" else 2))
    done = work(pack, config, recompute, layers)
    assert done.model_flops + done.extra_flops == counter.get_total_flops() + attention
    assert (done.extra_flops > 0) == (recompute in ("mlp", "block"))
    assert (done.pairs, done.tokens) == (6, len(pack.input_ids_T))
    assert done.padded_tokens == 2 * 6 * max(
        len(i) for p in (*pairs[:5], pairs[6]) for i in (p.chosen_ids, p.rejected_ids)
    )


def test_peak_of_this_machine_is_measured() -> None:
    flops, source = peak_flops(CPU, torch.float32)
    assert 1e8 < flops < 1e14
    assert "measured" in source


# --------------------------------------------------------------------------------------- linear layers of one input


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("needs_input", [False, True])
def test_linear_layers_of_one_input_are_those_layers(bias: bool, needs_input: bool) -> None:
    layers = [torch.nn.Linear(7, n, bias=bias).double() for n in (5, 2, 3)]
    parameters = [p for layer in layers for p in layer.parameters()]
    x = torch.randn(11, 7, dtype=torch.float64, requires_grad=needs_input)
    grads = [torch.randn(11, layer.out_features, dtype=torch.float64) for layer in layers]
    wanted = [x, *parameters] if needs_input else parameters
    expected = [layer(x) for layer in layers]
    found = linears(x, *layers)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    ways = [torch.autograd.grad(outputs, wanted, grads) for outputs in (found, expected)]
    for a, b in zip(*ways, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- recomputing


def backward(model: LlamaRewardModel, pack: Pack) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients, and the bytes of distinct activations that the backward kept."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if x.is_floating_point() and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        total, _ = losses(model(pack), pack.pairs, Objective())
    model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


def test_recomputing_changes_memory_and_nothing_else(pairs: list[TokenizedPair]) -> None:
    """Bitwise the same gradients; and what is kept is what the memory model says."""
    config = small_config(num_hidden_layers=6, hidden_size=64, intermediate_size=160)
    pack = build_pack([pairs[:2], pairs[2:5], [pairs[6]]], Sampling(samples=2), 0)
    plain = small_model(config)
    expected, _ = backward(plain, pack)
    rows = len(pack.read_rows_R)
    kept = []
    for recompute in RECOMPUTE:
        model = LlamaRewardModel(config, recompute=recompute).double()
        model.load_state_dict(plain.state_dict())
        found, size = backward(model, pack)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        predicted = kept_for_backward(config, len(pack.input_ids_T), len(pack.kv_index_K), rows, recompute, 8, False)
        assert size == pytest.approx(predicted, rel=0.15), recompute
        kept.append(size)
    assert kept[0] > 1.1 * kept[1] > 1.2 * kept[2] > 2 * kept[3]


def test_the_fastest_plan_that_fits_is_chosen() -> None:
    shape = memory_shape(small_config(), tokens=10_000, keys=15_000, read_rows=2_000)
    needs = {plan: predicted_memory(shape, *plan) for plan in PLANS}
    for i, (plan, need) in enumerate(needs.items()):
        chosen = choose_plan(int(need / 0.9) + 2, shape)
        assert chosen[:2] in PLANS[: i + 1]
        assert chosen.predicted == needs[chosen[:2]] <= need
        assert choose_plan(int(need / 0.9) + 2, shape, *plan) == (*plan, need)
    assert choose_plan(2**50, shape)[:2] == ("none", "step")
    assert choose_plan(2**50, shape, gather="block")[:2] == ("none", "block")
    assert choose_plan(0, shape)[:2] == ("block", "block")
    assert choose_plan(0, shape, recompute="mlp")[:2] == ("mlp", "block")


def test_a_model_that_no_machine_holds_is_refused_before_it_is_built(pair_file: Path, tmp_path: Path) -> None:
    config = parse(arguments(pair_file, tmp_path))
    prepared = prepare(config)
    parameters = prepared.model_config.parameters()
    check_model_fits(prepared, config, 2, 8 * parameters)
    with pytest.raises(UserError, match=r"M parameters take [\d.]+ GiB per process with --optimizer adamw"):
        check_model_fits(prepared, config, 2, 8 * parameters - 1)
    with pytest.raises(UserError, match="use a smaller model or more processes"):  # two whole copies
        check_model_fits(prepared, replace(config, replicas=2), 2, 8 * parameters)


def test_a_run_whose_model_does_not_fit_ends_in_one_line(
    pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "memory_limit", lambda device: 1000)
    assert train.main(arguments(pair_file, tmp_path)) == 2
    assert "0.0 GiB are free: use a smaller model" in capsys.readouterr().err


def test_memory_of_a_container_counts_where_it_is_less_than_the_machine_has(tmp_path: Path) -> None:
    missing, unlimited, lower = tmp_path / "missing", tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    unlimited.write_text("max\n")
    whole = machine_memory([missing, unlimited])
    assert whole == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lower.write_text(f"{2**20}\n")
    assert machine_memory([missing, unlimited, lower]) == 2**20
    lower.write_text(f"{2**63 - 4096}\n")
    assert machine_memory([lower]) == whole


def test_a_pack_is_no_larger_than_the_pairs_of_a_step() -> None:
    """A bound for any batch of 2 of these pairs, on one process and balanced over several, within the budget."""
    sizes = [5, 30, 10, 20]
    assert largest_pack(sizes, 1000, 2, 1) == 50
    assert largest_pack(sizes, 1000, 2, 2) == 25 + 30
    assert largest_pack(sizes, 40, 2, 1) == 40
    assert largest_pack(sizes, 1000, 64, 1) == 65


def test_predicted_memory_is_that_of_the_data(pair_file: Path, tmp_path: Path) -> None:
    """A run on few short pairs needs little, however large a pack --tokens-per-batch allows."""
    predicted = []
    for tokens in ("16384", "1000000"):
        options = [*arguments(pair_file, tmp_path), "--tokens-per-batch", tokens, "--goal-pairs", "8"]
        config = parse(options)
        prepared = prepare(config)
        plan = memory_plan(prepared, config, 1, CPU, 2**40)
        predicted.append(plan.predicted - memory.in_use(CPU))
    assert predicted[0] == predicted[1]
    total = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in prepared.train)
    kept = kept_for_backward(prepared.model_config, total, total, total, "none", 4, False)
    assert predicted[0] < 20 * prepared.model_config.parameters() + 2 * kept


# ------------------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("backend", ["graphs", "aot_eager"])
def test_compiled_blocks_equal_eager_ones_and_compile_once(
    pairs: list[TokenizedPair], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend=kept if backend == "graphs" else backend)
    )
    config = small_config(num_hidden_layers=4)
    eager, compiled = small_model(config), small_model(config)
    compiled.load_state_dict(eager.state_dict())
    compiled.compile_blocks()
    compiled_so_far = []
    for chosen in ([pairs[:2], pairs[2:5]], [[pairs[6]]], [[pairs[0]], [pairs[3]], [pairs[5]]], [pairs[2:5]]):
        pack = build_pack(chosen, Sampling(samples=3), 0)
        for a, b in zip(backward(eager, pack)[0].values(), backward(compiled, pack)[0].values(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
        compiled_so_far.append(len(graphs))
    # The first block, those between and the pruned one; one of them can be handed over twice, when a number in it turns
    # out to be constant.
    assert backend != "graphs" or 3 <= compiled_so_far[0] <= 4
    assert compiled_so_far == compiled_so_far[:1] * 4, "other sizes and layers compile nothing"


class _NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--objective-variant dense",
        "--objective-variant repo",
        "--sampling avg",
        "--sampling end_mix --temperature 0.2",
        "--distance euclidean",
        "--negatives after-divergence",
        "--label-smoothing 0.1 --center-rewards 0.1",
        "--head mlp",
        "--head bottleneck --bottleneck-size 6",
    ],
)
def test_a_step_never_waits_for_the_device(pairs: list[TokenizedPair], words: str) -> None:
    config = parse(["--data", "pairs.jsonl", *words.split()])
    of_head = {"head": config.head, "bottleneck_size": 6 if config.head == "bottleneck" else 0}
    sampling = Sampling(3, config.objective_variant, config.negatives, 0, config.sampling)
    sampling = replace(sampling, noise=of_head["bottleneck_size"])
    with parallel.process_group() as (mesh, device):
        model = LlamaRewardModel(small_config(projection_size=5, **of_head))
        parallel.shard(model, mesh, torch.float32)
        updater = Updater(model, config, 3, device)
        names = statistics_of(config.head, sft=False, loss=config.loss, views=False)
        window = Window(names, device)
        packs = [build_pack([pairs[:2]], sampling, 0), build_pack([[pairs[3]]], sampling, 0)]
        with _NoWaiting():
            sums = train.accumulate(model, packs, 3, objective_of(config), device)
            made, _, _ = updater.update(1, sums["loss"])
            window.add(1, sums, 3, made)


def test_similarity_within_completions_compares_different_tokens_of_each() -> None:
    z = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    # chosen of pair 0: rows 0, 1, 2; rejected of pair 0: row 3 alone; chosen of pair 1: 0, 1; rejected of pair 1: 2, 3
    rows_2NQ = torch.tensor([[[0, 1, 2], [0, 1, 1]], [[3, 3, 3], [2, 3, 3]]])
    total, count = held_out.similarity_within(z, rows_2NQ).tolist()
    assert count == 3
    assert total == pytest.approx(1 / 3 + 1 + math.sqrt(0.5))


def test_held_out_passes_run_in_evaluation_mode_without_gradients(pairs: list[TokenizedPair]) -> None:
    """And leave the model in the mode in which they found it, its weights sharded."""
    seen: list[tuple[bool, bool]] = []
    budget, sampling = Budget(60, 32), Sampling(samples=4)
    with parallel.process_group() as (mesh, device):
        model = small_model(small_config(), torch.float32)
        parallel.shard(model, mesh, torch.float32, gather="step")
        model.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, torch.is_grad_enabled())))
        for training in (True, False):
            model.train(training)
            states = held_out.end_states(model, pairs, budget, device)
            held_out.score_pairs(model, pairs, states[0][0], Objective(), budget, sampling, device)
            assert {module.training for module in model.modules()} == {training}
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert len(seen) > 4
    assert set(seen) == {(False, False)}


def test_end_states_compute_chosen_completions_alone(pairs: list[TokenizedPair]) -> None:
    tokens: list[int] = []
    with parallel.process_group() as (mesh, device):
        model = small_model(small_config(), torch.float32)
        parallel.shard(model, mesh, torch.float32, gather="step")
        pack = build_pack([[pair] for pair in pairs], Sampling(samples=0), 0)
        expected = model(pack).z_RD[pack.pairs.end_2N[0]].detach()
        model.register_forward_pre_hook(lambda module, inputs: tokens.append(len(inputs[0].input_ids_T)))
        states = held_out.end_states(model, pairs, Budget(60, 32), device)
    assert sum(tokens) == sum(len(pair.chosen_ids) for pair in pairs)
    assert len(tokens) > 1
    torch.testing.assert_close(torch.cat(states).sum(0), expected.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(negatives="after-divergence"), Sampling(positions="rs")])
def test_every_token_is_scored_wherever_the_loss_draws(pairs: list[TokenizedPair], sampling: Sampling) -> None:
    with parallel.process_group() as (mesh, device):
        model = small_model(small_config(), torch.float32)
        parallel.shard(model, mesh, torch.float32, gather="step")
        found = held_out.score_tokens(model, pairs, torch.ones(32), Budget(200, 32), sampling, device)
    for pair in pairs:
        chosen, rejected = found[pair.pair_id]
        assert chosen.shape == (2, len(pair.chosen_ids) - pair.chosen_start)
        assert rejected.shape == (2, len(pair.rejected_ids) - pair.rejected_start)


def test_weights_gathered_once_per_step_train_the_same(pairs: list[TokenizedPair]) -> None:
    """Several packs per step and several steps: the same bits as with weights gathered for every pass, and each unit is
    gathered once per step."""
    gathered: list[int] = []

    def count(unit: torch.nn.Module, inputs: Any) -> None:
        gathered[-1] += isinstance(next(unit.parameters()), DTensor)

    packs = [build_pack([[pair]], Sampling(samples=4), 0) for pair in pairs[:3]]
    initial = small_model(small_config(), torch.float32).state_dict()
    found = []
    with parallel.process_group() as (mesh, device):
        for gather in ("block", "step"):
            gathered.append(0)
            model = small_model(small_config(), torch.float32)
            model.load_state_dict(initial)
            parallel.shard(model, mesh, torch.bfloat16, gather=gather)
            for unit in (*model.model.layers, model.score, model):
                unit.register_forward_pre_hook(count, prepend=True)  # before FSDP's own, which gathers
            updater = Updater(model, TrainConfig(lr=1e-2, warmup=0.0), 4, device)
            for step in range(2):
                updater.update(step, train.accumulate(model, packs, 3, Objective(), device)["loss"])
            found.append(parallel.full_state(model, torch.float32))
            with torch.no_grad():
                model(packs[0].to(device))
            assert isinstance(model.score.weight, DTensor) == (gather == "block")
            parallel.reshard(model)
            assert all(isinstance(p, DTensor) for p in model.parameters())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    units = small_config().num_hidden_layers + 2  # blocks, head, root
    assert gathered[1] == 3 * units  # two steps and the forward without a backward
    assert gathered[0] == 7 * units  # every forward; the backward gathers again


@pytest.mark.parametrize("name", ["adamw", "adamw-bf16", pytest.param("adamw-8bit", marks=pytest.mark.slow)])
def test_optimizers_learn_with_the_memory_they_promise(pairs: list[TokenizedPair], name: str) -> None:
    if name != "adamw":
        pytest.importorskip("torchao")
    pack = build_pack([[pair] for pair in pairs], Sampling(samples=4), 0)
    # Compiled, as it is meant to run: 8-bit states of sharded parameters work no other way.
    with parallel.process_group() as (mesh, device):
        model = small_model(small_config(hidden_size=128, intermediate_size=256), torch.float32)
        cast_weights(model, name)
        parallel.shard(model, mesh, torch.float32)
        assert model.model.inv_freq.dtype == torch.float32, "RoPE angles of far positions need it"
        updater = Updater(model, TrainConfig(optimizer=name, lr=3e-3, warmup=0.0), 30, device)
        sums = []
        for step in range(30):
            loss = train.accumulate(model, [pack], len(pairs), Objective(), device)["loss"]
            sums.append(loss.item() / len(pairs))
            gradients = sum(bytes_of(p.grad) for p in model.model.layers.parameters())
            updater.update(step, loss)
        size = sum(p.numel() for p in model.model.layers.parameters())
        held = gradients + sum(
            bytes_of(p) + sum(map(bytes_of, updater.optimizer.state[p].values()))
            for p in model.model.layers.parameters()
        )
    assert sums[-1] < 0.7 * sums[0]
    assert held / size == pytest.approx(OPTIMIZER_BYTES[name], rel=0.03)


def bytes_of(x: Any) -> int:
    x = x.to_local() if isinstance(x, DTensor) else x
    if hasattr(x, "__tensor_flatten__"):
        return sum(bytes_of(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.nbytes


def test_stochastic_rounding_keeps_small_updates() -> None:
    """Plain bfloat16 weights of 1 would never move by steps of 1e-4."""
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"), parallel.process_group() as (_, device):
        model = torch.nn.Linear(64, 64, bias=False, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            model.weight.fill_(1.0)
        config = TrainConfig(optimizer="adamw-bf16", lr=1e-4, warmup=0.0)
        updater = Updater(model, config, 10**6, device)
        for step in range(20):
            model.weight.grad = torch.ones_like(model.weight)
            updater.update(step, torch.tensor(1.0, device=device))
    assert float(model.weight.detach().double().mean()) == pytest.approx(1 - 20e-4, abs=4e-4)
    assert len(np.unique(model.weight.detach().float().cpu().numpy())) > 1


COPIES = """
import torch, torch.distributed as dist
from gcrm_fast.checkpoints.weights import fresh_weights
from gcrm_fast.training import parallel
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.training.optimizer import Updater, cast_weights
config = ModelConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8)
with parallel.process_group(replicas=2) as (mesh, device):
    with torch.device("meta"):
        model = LlamaRewardModel(config)
    cast_weights(model, "adamw-bf16")
    parallel.shard(model, mesh, torch.float32)
    parallel.materialize(model, mesh, device, fresh_weights(config, 0).rows)
    updater = Updater(model, TrainConfig(optimizer="adamw-bf16", warmup=0.0, lr=1e-4), 9, device)
    before = [p.to_local().clone() for p in model.parameters()]
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        updater.update(step, torch.zeros(()))
    for p, old in zip(model.parameters(), before):
        copies = [torch.empty_like(old) for _ in range(2)]
        dist.all_gather(copies, p.to_local().detach())
        assert torch.equal(*copies)
    assert any(not torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_copies_of_a_shard_round_alike(tmp_path: Path) -> None:
    script = tmp_path / "copies.py"
    script.write_text(COPIES)
    result = torchrun(processes=2, script=str(script))
    assert result.returncode == 0, result.stderr
