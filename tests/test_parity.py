"""Invariants 5 and 7: transformers' hidden states and rewards, checkpoints in and out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config, small_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaModel

from gcrm_fast.checkpoint import choose_pad, fingerprint, open_weights, read_config, save_model
from gcrm_fast.data import TokenizedPair, train_tokenizer
from gcrm_fast.errors import UserError
from gcrm_fast.model import ModelConfig, RewardModel
from gcrm_fast.packing import Sampling, build_pack

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "gqa": {},
    "multi-head": {"num_key_value_heads": 4},
    "head_dim differs": {"head_dim": 12},
    "attention bias": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
}


def load(folder: Path, config: ModelConfig) -> RewardModel:
    model = RewardModel(config)
    rows = open_weights(folder, config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(rows(name, parameter.shape, slice(None)))
    return model


def tokenizer_of(vocab_size: int = 300):
    return train_tokenizer(["one two three four, five six; seven"] * 30, vocab_size)


def save(folder: Path, config: ModelConfig) -> tuple[RewardModel, dict[str, torch.Tensor]]:
    model = small_model(config, torch.float32)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokenizer = tokenizer_of(config.vocab_size)
    choose_pad(tokenizer, config.vocab_size, "test")
    save_model(folder, state, config, tokenizer, torch.ones(config.projection_size or config.hidden_size), 3)
    return model, state


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_hidden_states_and_rewards_equal_transformers(
    changes: dict[str, object], pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    config = small_config(vocab_size=300, **changes)
    model, _ = save(tmp_path / "m", config)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert theirs.config.num_labels == 1
    pack = build_pack([pairs[:2], pairs[2:5], [pairs[6]]], Sampling(samples=4), 0)
    with torch.no_grad():
        reward_2N, states = model(pack)
        chosen_rows = iter(pack.pairs.end_2N[0].tolist())
        for n, pair in enumerate([*pairs[:5], pairs[6]]):
            for side, ids in enumerate((pair.chosen_ids, pair.rejected_ids)):
                their = theirs(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, 0]
                torch.testing.assert_close(reward_2N[side, n], their, rtol=1e-4, atol=1e-5)
            hidden = theirs.model(torch.from_numpy(pair.chosen_ids.astype(np.int64))[None]).last_hidden_state[0, -1]
            torch.testing.assert_close(states[next(chosen_rows)], hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dialect", ["transformers 4", "transformers 5"])
def test_config_of_either_transformers_version(dialect: str, tmp_path: Path) -> None:
    theirs = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    raw = theirs.to_dict()
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        raw.pop(name, None)
    old = {"rope_theta": 500000.0, "rope_scaling": LLAMA3}
    new = {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}
    (tmp_path / "config.json").write_text(json.dumps(raw | (old if dialect == "transformers 4" else new)))
    config = read_config(tmp_path, head="linear", projection_size=0)
    assert (config.rope_theta, config.rope_scaling, config.head_dim) == (500000.0, LLAMA3, 8)


@pytest.mark.parametrize("changes", [{}, {"head": "mlp", "projection_size": 5}])
def test_round_trip_is_bitwise(changes: dict[str, object], tmp_path: Path) -> None:
    config = small_config(vocab_size=300, **changes)
    _, state = save(tmp_path / "m", config)
    again = load(tmp_path / "m", config)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, state[name]), name
    meta = json.loads((tmp_path / "m" / "gcrm.json").read_text())
    assert meta["fingerprint"] == fingerprint(state)
    assert load_file(tmp_path / "m" / "goal.safetensors")["default"].shape == (config.projection_size or 32,)
    assert ("score.weight" in load_file(tmp_path / "m" / "model.safetensors")) == (config.head == "linear")


def test_a_bare_trunk_and_a_causal_model_load_with_a_new_head(tmp_path: Path) -> None:
    config = small_config(vocab_size=300)
    theirs = LlamaModel(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                    num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    state = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    bare, causal = tmp_path / "bare", tmp_path / "causal"
    for folder, tensors in (
        (bare, state),
        (causal, {f"model.{k}": v for k, v in state.items()} | {"lm_head.weight": torch.zeros(300, 32)}),
    ):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        model = load(folder, config)
        for name, tensor in state.items():
            assert torch.equal(dict(model.model.named_parameters())[name], tensor)
        assert 0 < model.score.weight.std() < 3 / 33  # normal with standard deviation 1 / (H + 1)


def test_saved_config_protects_against_the_usual_accidents(tmp_path: Path) -> None:
    save(tmp_path / "m", small_config(vocab_size=300, rope_scaling=LLAMA3, rope_theta=500000.0))
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    assert raw["problem_type"] == "regression"
    assert raw["architectures"] == ["LlamaForSequenceClassification"]
    assert raw["pad_token_id"] != raw["eos_token_id"]
    assert 0 <= raw["pad_token_id"] < raw["vocab_size"]
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 500000.0
    assert raw["rope_scaling"] == LLAMA3


def test_padding_and_batching_do_not_change_a_reward(pairs: list[TokenizedPair], tmp_path: Path) -> None:
    model, _ = save(tmp_path / "m", small_config(vocab_size=300))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    pad = theirs.config.pad_token_id
    sequences = [p.chosen_ids for p in pairs]
    batch = torch.full((len(sequences), max(map(len, sequences))), pad)
    for i, ids in enumerate(sequences):
        batch[i, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        padded = theirs(batch, attention_mask=(batch != pad).long()).logits[:, 0]
        ours = torch.cat([model(build_pack([[p]], Sampling(), 0)).reward_2N[0] for p in pairs])
    torch.testing.assert_close(ours, padded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: missing"),
        (lambda d: (d / "model.safetensors").write_bytes(b"no"), "not a readable safetensors"),
        (lambda d: (d / "config.json").unlink(), "config.json: cannot be read"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "config.json").write_text('{"model_type": "gpt2"}'), "model_type"),
        (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "vocab_size"),
    ],
)
def test_damaged_folders_are_named(damage, message: str, tmp_path: Path) -> None:
    save(tmp_path / "m", small_config(vocab_size=300))
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path / "m", read_config(tmp_path / "m", head="linear", projection_size=0), 0)


def test_wrong_shape_and_missing_tensor_are_named(tmp_path: Path) -> None:
    save(tmp_path / "m", small_config(vocab_size=300))
    with pytest.raises(UserError, match=r"gate_proj.*shape"):
        load(tmp_path / "m", small_config(vocab_size=300, intermediate_size=64))
    with pytest.raises(UserError, match=r"layers\.3\..*missing"):
        load(tmp_path / "m", small_config(vocab_size=300, num_hidden_layers=4))


def test_pad_is_never_eos_and_tokenizer_must_fit() -> None:
    tokenizer = tokenizer_of()
    tokenizer.pad_token = tokenizer.eos_token
    pad = choose_pad(tokenizer, 300, "test")
    assert pad != tokenizer.eos_token_id
    with pytest.raises(UserError, match="vocab_size"):
        choose_pad(tokenizer, 200, "test")
