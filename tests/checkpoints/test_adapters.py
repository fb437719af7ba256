"""LoRA adapters of other projects: scored as peft computes them, trained on, or refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from gcrm_fast import Policy, RewardModel
from gcrm_fast.checkpoints.adapters import Adapter, base_folder
from gcrm_fast.checkpoints.weights import open_reward_model
from gcrm_fast.common.errors import UserError
from gcrm_fast.train import main
from support.folders import VOCAB, llama, tokenizer, trunk
from support.training_runs import TINY

Q = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8}
PROMPTS, COMPLETIONS = ["one two", "three"], [" three four", "; six"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("adapters") / "base", pad_token_id=tokenizer().pad_token_id)


def tensors() -> dict[str, torch.Tensor]:
    """Of one linear layer, and a head."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{Q}.lora_A.weight": (4, 32), f"{Q}.lora_B.weight": (32, 4), "base_model.model.score.weight": (1, 32)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def adapter(folder: Path, base: Path | str, named: dict[str, torch.Tensor] | None = None, **settings: object) -> Path:
    folder.mkdir(parents=True)
    stated = {**SETTINGS, "base_model_name_or_path": str(base), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    save_file(tensors() if named is None else named, folder / "adapter_model.safetensors")
    return folder


def rewards(folder: Path) -> list[float]:
    model = RewardModel.from_pretrained(folder, device="cpu", dtype="float32")
    return [float(reward) for reward in model.score(PROMPTS, COMPLETIONS)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "o_proj": 5}},
        {"modules_to_save": ["score", "embed_tokens"]},
        {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "patterns", "embeddings", "two layers"],
)
def test_scored_as_peft_computes(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="pip install 'gcrm-fast[lora]'")
    settings = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 6, "target_modules": "all-linear", **changes}
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model = peft.get_peft_model(classifier, peft.LoraConfig(**settings)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "adapter")
    ours = RewardModel.from_pretrained(tmp_path / "adapter", device="cpu", dtype="float32")
    ids = [torch.tensor([[*one.ids]]) for one in ours.encode(PROMPTS, COMPLETIONS)]
    with torch.no_grad():
        expected = [model(input_ids=one).logits.item() for one in ids]
    assert rewards(tmp_path / "adapter") == pytest.approx(expected, abs=1e-5)


def test_read_where_transformers_reads(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewards(adapter(tmp_path / "a", base))
    assert "adapter_config.json names a sequence classifier" in caplog.text


def test_an_adapter_may_bring_its_own_tokenizer(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", base)
    inherited = RewardModel.from_pretrained(folder, device="cpu").tokenizer
    own = tokenizer().__class__.from_pretrained(base)
    own.model_max_length = 77
    own.save_pretrained(folder)
    assert RewardModel.from_pretrained(folder, device="cpu").tokenizer.model_max_length == 77
    assert inherited.model_max_length != 77


def test_the_value_head_of_llama_factory(base: Path, tmp_path: Path) -> None:
    """An adapter of the language model, and the head in a file of its own."""
    named = tensors()
    head = named.pop("base_model.model.score.weight")
    folder = adapter(tmp_path / "a", base, named, task_type="CAUSAL_LM")
    save_file({"v_head.summary.weight": head, "v_head.summary.bias": torch.zeros(1)}, folder / "value_head.safetensors")
    other = adapter(tmp_path / "b", base)
    ours, theirs = (RewardModel.from_pretrained(f, device="cpu", end="eos") for f in (folder, other))
    assert ours.score(PROMPTS, COMPLETIONS).tolist() == theirs.score(PROMPTS, COMPLETIONS).tolist()


def test_the_adapters_head_stands_for_that_of_its_base(base: Path, tmp_path: Path) -> None:
    scored = llama(
        tmp_path / "scored",
        trunk() | {"score.weight": torch.ones(1, 32)},
        architectures=["LlamaForSequenceClassification"],
        pad_token_id=tokenizer().pad_token_id,
    )
    assert rewards(adapter(tmp_path / "a", scored)) == rewards(adapter(tmp_path / "b", base))


def test_rows_of_a_part_are_those_of_the_whole(base: Path, tmp_path: Path) -> None:
    _, weights = open_reward_model(adapter(tmp_path / "a", base))
    name, shape = "model.layers.0.self_attn.q_proj.weight", torch.Size([32, 32])
    whole = weights.whole(name, shape)
    named = tensors()
    update = 2 * named[f"{Q}.lora_B.weight"] @ named[f"{Q}.lora_A.weight"]
    torch.testing.assert_close(whole, trunk()[name] + update)
    torch.testing.assert_close(weights.rows(name, shape, slice(5, 9)), whole[5:9])


def test_training_starts_from_the_merged_weights(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", base)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "one", "chosen": " two", "rejected": " six"}\n' * 4)
    options = ["--data", str(tmp_path / "pairs.jsonl"), "--model", str(folder), "--steps", "1", "--lr", "1e-30"]
    assert main([*options, *TINY, "--output", str(tmp_path / "run"), "--global-batch-pairs", "2"]) == 0
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    _, weights = open_reward_model(folder)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, weights.whole(name, tensor.shape).float())


def test_a_policy_with_an_adapter(base: Path, tmp_path: Path) -> None:
    named = {name: tensor for name, tensor in tensors().items() if "score" not in name}
    merged = trunk() | {"lm_head.weight": torch.eye(VOCAB, 32)}
    own_head = llama(tmp_path / "lm", merged)
    q = "model.layers.0.self_attn.q_proj.weight"
    update = 2 * named[f"{Q}.lora_B.weight"] @ named[f"{Q}.lora_A.weight"]
    whole = llama(tmp_path / "merged", merged | {q: merged[q] + update})
    folder = adapter(tmp_path / "a", own_head, named, task_type="CAUSAL_LM")
    ours, theirs = (Policy.from_pretrained(f, device="cpu", dtype="float32") for f in (folder, whole))
    for name, parameter in ours.network.named_parameters():
        torch.testing.assert_close(parameter, theirs.network.get_parameter(name))


def changed(**settings: object) -> Callable[[Path, Path], object]:
    return lambda folder, base: adapter(folder, base, **settings)


def without(name: str) -> Callable[[Path, Path], object]:
    return lambda folder, base: adapter(folder, base, {k: v for k, v in tensors().items() if name not in k})


def with_tensor(name: str, *shape: int) -> Callable[[Path, Path], object]:
    return lambda folder, base: adapter(folder, base, tensors() | {name: torch.zeros(shape)})


def nested(folder: Path, base: Path) -> None:
    adapter(folder, adapter(folder.parent / "inner", base))


def no_weights(folder: Path, base: Path) -> None:
    (adapter(folder, base) / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed(base_model_name_or_path="/gone/base"), r"field 'base_model_name_or_path' /gone/base: no such folder"),
        (changed(base_model_name_or_path="/gone/base"), r"write the folder or the Hub name of the base model there"),
        (changed(base_model_name_or_path=None), r"field 'base_model_name_or_path' is None: write the folder"),
        (changed(peft_type="IA3"), r"field 'peft_type' is 'IA3': only 'LORA' is supported: merge it with peft"),
        (changed(use_dora=True), r"field 'use_dora' is True: not supported: merge it with peft"),
        (changed(init_lora_weights="pissa"), r"'init_lora_weights' is 'pissa', which changes the base model: merge"),
        (nested, r"inner', an adapter too: merge it with peft"),
        (no_weights, r"adapter_model\.safetensors: missing"),
        (without("lora_B"), r"lora_A\.weight' lacks its other half"),
        (without("score"), r"holds no reward head: train one with gcrm train"),
        (with_tensor(f"{Q}.lora_B.weight", 32, 3), r"have ranks 4 and 3"),
        (with_tensor(f"{Q}.lora_B.weight", 16, 4), r"are for a weight of shape \(16, 32\), not \(32, 32\)"),
        (with_tensor(f"{Q}.lora_magnitude_vector.weight", 32), r"without a place in this model: an adapter: merge"),
        (with_tensor("base_model.model.score.weight", 2, 32), r"a reward head has one output"),
    ],
)
def test_refused_in_one_line(base: Path, tmp_path: Path, make: Callable[[Path, Path], object], message: str) -> None:
    make(tmp_path / "a", base)
    with pytest.raises(UserError, match=message):
        open_reward_model(tmp_path / "a")


def test_an_update_of_no_weight_is_refused(base: Path, tmp_path: Path) -> None:
    """Such as that of a language model's head, which a reward model lacks."""
    head = {f"base_model.model.lm_head.lora_{kind}.weight": torch.zeros(4, 4) for kind in "AB"}
    with pytest.raises(UserError, match=r"lm_head\.lora_A\.weight' belongs to no weight of this model: merge"):
        open_reward_model(adapter(tmp_path / "a", base, tensors() | head))


def test_no_adapters_on_an_adapter(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="pip install 'gcrm-fast[lora]'")
    folder = adapter(tmp_path / "a", base)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "one", "chosen": " two", "rejected": " six"}\n')
    assert main(["--data", str(tmp_path / "pairs.jsonl"), "--model", str(folder), "--lora-rank", "4"]) == 2
    assert "is already an adapter, and --lora-rank cannot add another: merge it with peft" in capsys.readouterr().err


def test_a_folder_without_an_adapter_is_its_own_base(base: Path) -> None:
    assert base_folder(base) == base
    assert Adapter(folder=base, base=base, settings=SETTINGS).scale("layer", 4) == 2
