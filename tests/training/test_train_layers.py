"""Training the top layers only, with and without cached states of those below: equal to what is computed whole."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gcrm_fast.checkpoints.weights import Weights
from gcrm_fast.data.batches import Budget
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.train import main
from gcrm_fast.training.lower_states import LowerLayers, pair_states
from gcrm_fast.training.memory import kept_for_backward, predicted_memory
from gcrm_fast.training.objectives import Objective, losses
from support.small import memory_shape, small_config, small_model
from support.training_runs import Gcrm, arguments, assert_same, end_in_step_9, torchrun, trained

LAYERS = ("--layers", "3", "--train-layers", "2")
BELOW = ("model.embed_tokens.", "model.layers.0.")


def gradients(model: LlamaRewardModel, pack: Pack) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses(model(pack), pack.pairs, Objective())[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def lower(model: LlamaRewardModel, layers: int) -> LowerLayers:
    state = model.state_dict()
    layers = LowerLayers(
        config=replace(model.config, num_hidden_layers=layers),
        weights=Weights(lambda name, shape, rows: state[name][rows]),
        attention="eager",
        budget=Budget(100, 32),
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    layers.network.double()  # RoPE's frequencies too, as in the model itself
    return layers


def test_layers_below_take_no_gradient_and_keep_nothing(pairs: list[TokenizedPair]) -> None:
    config = small_config(num_hidden_layers=6, hidden_size=64, intermediate_size=160)
    model = small_model(config)
    pack = build_pack([pairs[:2], pairs[2:5], [pairs[6]]], Sampling(samples=2), 0)
    whole = gradients(model, pack)
    model.model.train_top(4)
    of_top = gradients(model, pack)
    assert of_top.keys() == {n for n in whole if not n.startswith((*BELOW, "model.layers.1."))}
    assert all(torch.equal(of_top[name], whole[name]) for name in of_top)
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if x.is_floating_point() and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        losses(model(pack), pack.pairs, Objective())
    sizes = len(pack.input_ids_T), len(pack.kv_index_K), len(pack.read_rows_R)
    expected = kept_for_backward(replace(config, num_hidden_layers=4), *sizes, "none", 8, False)
    assert sum(kept.values()) == pytest.approx(expected, rel=0.15)


def test_predicted_memory_counts_what_is_trained() -> None:
    config = small_config(num_hidden_layers=6)
    shape = memory_shape(config)
    whole, part, cached = (
        predicted_memory(s, "none", "step")
        for s in (shape, replace(shape, trained_layers=2), replace(shape, trained_layers=2, cached_states=True))
    )
    frozen = config.parameters() - 2 * config.parameters_per_layer()
    assert whole - part == pytest.approx(12 * frozen, rel=0.4)  # no moments, no gradient
    assert part - cached == pytest.approx(8 * frozen, rel=0.1)  # nor weights, sharded and gathered


def test_cached_states_give_the_states_and_gradients_of_the_whole_model(
    pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    """Groups of several pairs share a shorter start than each pair does; a dummy pack has no states."""
    model = small_model(small_config(num_hidden_layers=4))
    model.model.train_top(2)
    top = LlamaRewardModel(model.config, first=2).double()
    top.load_state_dict({k: v for k, v in model.state_dict().items() if k in dict(top.named_parameters())})
    with_states = pair_states(tmp_path, lower(model, 2), pairs)
    for groups in ([[0, 1], [2, 3, 4], [6]], [[6, 2, 0]], []):
        sampling = Sampling(samples=2)
        plain = build_pack([[pairs[i] for i in group] for group in groups], sampling, 0)
        given = build_pack([[with_states[i] for i in group] for group in groups], sampling, 0)
        expected, found = gradients(model, plain), gradients(top, given)
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10)
        if groups:
            torch.testing.assert_close(top(given).reward_2N, model(plain).reward_2N, rtol=1e-10, atol=1e-10)


def test_states_are_read_again_and_damaged_files_computed_again(
    pairs: list[TokenizedPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(small_config())
    computed: list[int] = []
    states = LowerLayers.states

    def counted(self: LowerLayers, chunk: list[TokenizedPair]) -> np.ndarray:
        computed.append(len(chunk))
        return states(self, chunk)

    monkeypatch.setattr(LowerLayers, "states", counted)
    monkeypatch.setattr("gcrm_fast.training.lower_states.CHUNK", 4)
    first = pair_states(tmp_path, lower(model, 1), pairs)
    assert computed == [4] * (len(pairs) // 4) + ([len(pairs) % 4] if len(pairs) % 4 else [])
    assert not list(tmp_path.glob("*.lock"))
    files = sorted(tmp_path.glob("states-*.npy"))
    content = files[0].read_bytes()
    files[0].unlink()  # what ``first`` reads stays as it is
    files[0].write_bytes(content[:-8])
    computed.clear()
    again = pair_states(tmp_path, lower(model, 1), pairs)
    assert len(computed) == 1
    for a, b in zip(first, again, strict=True):
        assert a.states is not None
        assert b.states is not None
        assert all(np.array_equal(x, y) for x, y in zip(a.states.sequences(), b.states.sequences(), strict=True))
    computed.clear()
    layers = lower(model, 1)
    config = replace(layers.config, head="bottleneck", bottleneck_size=3, projection_size=5, compare="latents")
    pair_states(tmp_path, replace(layers, config=config), pairs)  # another head on the same layers
    assert not computed
    pair_states(tmp_path, lower(small_model(small_config()), 1), pairs)  # other weights
    assert sum(computed) == len(pairs)


def test_an_interrupt_says_that_computed_states_are_kept(
    pairs: list[TokenizedPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, states = lower(small_model(small_config()), 1), LowerLayers.states
    monkeypatch.setattr("gcrm_fast.training.lower_states.CHUNK", 3)

    def interrupted(self: LowerLayers, chunk: list[TokenizedPair]) -> np.ndarray:
        if list(tmp_path.glob("states-*.npy")):
            raise KeyboardInterrupt
        return states(self, chunk)

    monkeypatch.setattr(LowerLayers, "states", interrupted)
    with pytest.raises(KeyboardInterrupt, match=f"kept in {tmp_path}: the same command continues with them"):
        pair_states(tmp_path, layers, pairs)
    assert len(list(tmp_path.glob("states-*.npy"))) == 1
    assert not list(tmp_path.glob("*.partial"))


def test_the_layers_below_stay_and_the_rest_trains(pair_file: Path, tmp_path: Path) -> None:
    for name, *options in (("none", "--lr", "1e-30"), ("two",), ("cached", "--cache-states")):
        assert main(arguments(pair_file, tmp_path / name, *LAYERS, "--save-every", "5", *options)) == 0
    (_, start), (log, two), (log_cached, cached) = (trained(tmp_path / name) for name in ("none", "two", "cached"))
    assert two.keys() == cached.keys() == start.keys()
    for name in two:
        assert torch.equal(two[name], start[name]) == name.startswith(BELOW), name
        torch.testing.assert_close(cached[name], two[name], rtol=1e-4, atol=1e-5)
    assert len(log) == len(log_cached)
    for row, row_cached in zip(log, log_cached, strict=True):
        assert row_cached == pytest.approx(row, rel=1e-3, abs=1e-4)


def test_all_layers_are_the_whole_model(pair_file: Path, tmp_path: Path) -> None:
    for name, *options in (("default",), ("all", "--train-layers", "1", "--cache-states")):
        assert main(arguments(pair_file, tmp_path / name, *options)) == 0
    assert_same(tmp_path / "default", tmp_path / "all")


@pytest.mark.parametrize("options", [(), ("--cache-states",)], ids=["plain", "cached"])
def test_a_run_of_some_layers_resumes_bit_for_bit(
    pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    calls = {name: arguments(pair_file, tmp_path / name, *LAYERS, *options) for name in ("whole", "resumed")}
    assert main(calls["whole"]) == 0
    end_in_step_9(calls["resumed"], monkeypatch)
    assert main(calls["resumed"]) == 0
    assert_same(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.slow
def test_two_processes_train_some_layers_alike(pair_file: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        for name, *options in (("plain", "--gather", "step"), ("cached", "--cache-states")):
            output = tmp_path / f"{name}{processes}"
            result = torchrun(*arguments(pair_file, output, *LAYERS, *options), processes=processes)
            assert result.returncode == 0, result.stderr
    expected = trained(tmp_path / "plain1")[1]
    for name in ("cached1", "plain2", "cached2"):
        weights = trained(tmp_path / name)[1]
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train-layers", "2"), "--train-layers 2: the model has 1 layers: name 1 or fewer"),
        (("--cache-states",), "--train-layers 0: must be 1 or more with --cache-states"),
        (("--train-layers", "1", "--cache-states", "--cache", "none"), "--cache none: must be a folder or auto"),
    ],
)
def test_impossible_layers_are_one_line(
    pair_file: Path, tmp_path: Path, gcrm: Gcrm, options: tuple[str, ...], message: str
) -> None:
    result = gcrm("train", *arguments(pair_file, tmp_path / "out", *options))
    assert result.returncode == 2
    assert message in result.stderr
