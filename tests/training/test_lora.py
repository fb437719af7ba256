"""LoRA adapters: equal to what their merged weights compute, trained alone, resumed, saved for peft."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from gcrm_fast import RewardModel
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel, load
from gcrm_fast.train import main
from gcrm_fast.training.accounting import forward_flops, query_key_products, work
from gcrm_fast.training.lora import Lora
from gcrm_fast.training.memory import parameter_counts, predicted_memory
from gcrm_fast.training.objectives import Objective, losses
from gcrm_fast.training.optimizer import Updater
from support.folders import llama
from support.small import memory_shape, small_config, small_model
from support.training_runs import Gcrm, arguments, assert_same, end_in_step_9, torchrun, trained

peft = pytest.importorskip("peft", reason="pip install 'gcrm-fast[lora]'")

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = ("--lora-rank", "4")


def adapters(config: ModelConfig, rank: int = 4, **changes: object) -> Lora:
    values = {"rank": rank, "alpha": 2, "targets": ALL, "dropout": 0.0, "layers": range(config.num_hidden_layers)}
    return Lora(**{**values, **changes})


def adapted(base: LlamaRewardModel, lora: Lora, recompute: str = "none") -> LlamaRewardModel:
    """The same model with adapters, of which B is not 0."""
    state = base.state_dict()
    with torch.device("meta"):
        model = LlamaRewardModel(base.config, "eager", recompute)
        lora.inject(model)
    model.double()
    load(model, torch.device("cpu"), lora.rows(lambda name, shape, rows: state[name][rows], 0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def gradients(model: LlamaRewardModel, pack: Pack) -> dict[str, Tensor]:
    model.zero_grad()
    losses(model(pack), pack.pairs, Objective())[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def pack_of(pairs: list[TokenizedPair]) -> Pack:
    return build_pack([pairs[:2], pairs[2:5], [pairs[6]]], Sampling(samples=2), 0)


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("up_proj",)], ids=["all", "two", "one"])
def test_adapters_compute_what_their_merged_weights_do(pairs: list[TokenizedPair], targets: tuple[str, ...]) -> None:
    base = small_model(small_config(projection_size=8))
    lora, pack = adapters(base.config, targets=targets), pack_of(pairs)
    model, merged = adapted(base, lora), LlamaRewardModel(base.config, "eager").double()
    merged.load_state_dict(lora.merged(model.state_dict(), torch.float64))
    expected, before = merged(pack), base(pack)
    found = model(pack)
    torch.testing.assert_close(found.reward_2N, expected.reward_2N, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.z_RD, expected.z_RD, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found.z_RD, before.z_RD, atol=0.01)


def test_with_full_rank_the_gradients_are_those_of_the_weights(pairs: list[TokenizedPair]) -> None:
    """With A = 1 and scale 1 the gradient of B is that of the weight; head and projection have their own."""
    base = small_model(small_config(projection_size=8, intermediate_size=32))
    lora, pack = adapters(base.config, rank=32, alpha=32), pack_of(pairs)
    model = adapted(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(torch.eye(32))
            if ".lora_B." in name:
                parameter.zero_()
    whole, found = gradients(base, pack), gradients(model, pack)
    weights = [name for name in whole if name.split(".")[-2] in ALL]
    assert len(weights) == 3 * len(ALL)
    for name in weights:
        of_b = found[name.removesuffix("weight") + "lora_B.default.weight"]
        torch.testing.assert_close(of_b, whole[name], rtol=1e-10, atol=1e-10)
    for name in ("score.weight", "projection.weight"):
        torch.testing.assert_close(found[name], whole[name], rtol=1e-10, atol=1e-10)
    assert all(".lora_" in name or name in ("score.weight", "projection.weight") for name in found)


@pytest.mark.parametrize("recompute", ["product", "mlp", "block"])
def test_dropout_is_the_same_when_a_part_is_computed_again(pairs: list[TokenizedPair], recompute: str) -> None:
    base, pack = small_model(small_config()), pack_of(pairs)
    lora = adapters(base.config, dropout=0.4)
    found = []
    for kind in ("none", recompute):
        torch.manual_seed(1)
        found.append(gradients(adapted(base, lora, kind).train(), pack))
    kept, again = found
    assert kept.keys() == again.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-12, atol=1e-12)
    undropped = gradients(adapted(base, lora).eval(), pack)
    assert not torch.allclose(kept["score.weight"], undropped["score.weight"])


def test_operations_and_memory_count_what_is_trained(pairs: list[TokenizedPair]) -> None:
    config, pack = small_config(num_hidden_layers=6), pack_of(pairs)
    lora = adapters(config, layers=range(4, 6))
    held = dict(adapted(small_model(config), lora).named_parameters())
    of_trunk = [p for name, p in held.items() if name not in ("score.weight", "model.norm.weight")]
    trained_here = sum(p.numel() for p in of_trunk if p.requires_grad)
    assert parameter_counts(config, 2, lora, cached_states=False) == (trained_here, sum(p.numel() for p in of_trunk))

    t, r, products = len(pack.input_ids_T), len(pack.read_rows_R), query_key_products(pack)
    top = replace(config, num_hidden_layers=2)
    linear, attention = forward_flops(top, t, 0, r), forward_flops(top, 0, products, 0)
    h, f, kv = config.hidden_size, config.intermediate_size, 16
    whole, tail = (h + h) + 2 * (h + kv), (h + h) + 3 * (h + f)  # in + out: queries, keys, values; all else
    low = 2 * 4 * (2 * t * whole + (t + r) * tail)
    below = forward_flops(config, t, products, r) - linear - attention
    head = 3 * 2 * pack.n_pairs * 2 * h
    assert work(pack, config, "none", 2, lora).model_flops == below + 2 * linear + 3 * (attention + low) + head

    shape = memory_shape(config, trained_layers=2)
    layers, low_rank = (predicted_memory(s, "none", "step") for s in (shape, replace(shape, lora=lora)))
    # Of the layers no gradient, moments, gradient on its way; of the adapters all of these, and weights, also gathered.
    assert layers - low_rank == 16 * config.trained_parameters(2) - 24 * trained_here


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of two layers."""
    config = small_config(vocab_size=300, num_hidden_layers=2)
    tensors = {n: p.detach() for n, p in small_model(config, torch.float32).named_parameters() if n != "score.weight"}
    folder = tmp_path_factory.mktemp("lora") / "base"
    return llama(folder, {**tensors, "lm_head.weight": torch.zeros(300, 32)}, num_hidden_layers=2)


def call(pair_file: Path, base: Path, output: Path, *more: str) -> list[str]:
    return arguments(pair_file, output, "--model", str(base), *LORA, *more)


TOP = ("--train-layers", "1")


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--lora-dropout", "0.3"), marks=pytest.mark.slow),
        pytest.param((*TOP, "--cache-states", "--projection-size", "8"), marks=pytest.mark.slow),
    ],
    ids=["plain", "dropout", "cached"],
)
def test_a_run_resumes_bit_for_bit(
    pair_file: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    calls = {name: call(pair_file, base, tmp_path / name, *options) for name in ("whole", "resumed")}
    assert main(calls["whole"]) == 0
    end_in_step_9(calls["resumed"], monkeypatch)
    torch.rand(3)
    assert main(calls["resumed"]) == 0
    assert_same(tmp_path / "whole", tmp_path / "resumed")
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in calls)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_only_adapters_and_heads_have_moments_and_change(
    pair_file: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updaters: list[Updater] = []
    update = Updater.update

    def noted(self: Updater, step: int, loss: Tensor) -> object:
        updaters.append(self)
        return update(self, step, loss)

    monkeypatch.setattr(Updater, "update", noted)
    assert main(call(pair_file, base, tmp_path / "a", *TOP, "--lora-targets", "q_proj", "up_proj")) == 0
    state = updaters[-1].optimizer.state
    sizes = sorted(p.numel() for p in state)
    assert sizes == sorted([4 * 32, 4 * 32, 4 * 32, 4 * 48, 32])
    weights, before = trained(tmp_path / "a")[1], load_file(base / "model.safetensors")
    changed = {name for name in before if name in weights and not torch.equal(weights[name], before[name])}
    assert changed == {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"}


@pytest.mark.parametrize("options", [(), TOP], ids=["all layers", "the top layer"])
def test_peft_loads_the_adapter_onto_transformers_classifier(
    pair_file: Path, base: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    assert main(call(pair_file, base, tmp_path / "run", *options)) == 0
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(classifier, tmp_path / "run" / "adapter").eval()
    ours = RewardModel.from_pretrained(tmp_path / "run" / "model", device="cpu", dtype="float32")
    prompts, completions = ["one two", "three"], [" three four", "; six"]
    encoded = ours.encode(prompts, completions)
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([one.ids.tolist()])).logits.item() for one in encoded]
    assert found == pytest.approx(ours.score(prompts, completions), abs=1e-5)


@pytest.mark.slow
def test_two_processes_train_adapters_alike(pair_file: Path, base: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        result = torchrun(*call(pair_file, base, tmp_path / str(processes)), processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = (load_file(tmp_path / str(n) / "adapter" / "adapter_model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LORA, "--lora-rank 4: must be 0 without --model"),
        ((*LORA, "--lora-targets", "query"), "--lora-targets query: must be one of q_proj, k_proj"),
        ((*LORA, "--lora-targets"), "--lora-targets: must be at least one layer"),
    ],
)
def test_impossible_adapters_are_one_line(
    pair_file: Path, tmp_path: Path, gcrm: Gcrm, options: tuple[str, ...], message: str
) -> None:
    result = gcrm("train", *arguments(pair_file, tmp_path / "out", *options))
    assert result.returncode == 2
    assert message in result.stderr
