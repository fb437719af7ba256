"""Invariants 5 and 7: transformers' hidden states and rewards, checkpoints in and out."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_model as save_by_safetensors
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from gcrm_fast.checkpoints.saving import fingerprint, save_model
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.data.tokenization import choose_pad
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel
from support.folders import load, tokenizer
from support.small import small_config, small_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama 2 7B": {"num_key_value_heads": 4},
    "Llama 2 70B": {},
    "CodeLlama": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "Llama 3": {"rope_theta": 5e5},
    "Llama 3.1": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "Llama 3.2": {"rope_scaling": LLAMA3 | {"factor": 32.0}, "rope_theta": 5e5, "num_attention_heads": 8},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "head_dim differs": {"head_dim": 12},
    "attention bias": {"attention_bias": True},
    "MLP bias": {"mlp_bias": True},
}


def save(folder: Path, config: ModelConfig) -> tuple[LlamaRewardModel, dict[str, torch.Tensor]]:
    """A random model, saved by us."""
    model = small_model(config, torch.float32)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    choose_pad(tokenizer(), config.vocab_size, "test")
    goal = torch.ones(config.state_size)
    save_model(folder, state, config, tokenizer(), goal, 3)
    return model, state


BOTTLENECK = {"head": "bottleneck", "bottleneck_size": 6}


def theirs_of(config: ModelConfig, kind: type = LlamaForSequenceClassification, **more: object) -> PreTrainedModel:
    """transformers' model with random weights (std 0.1), configured as the installed version does it."""
    raw = asdict(config) | {"num_labels": 1, "pad_token_id": 2} | more
    raw["rope_parameters"] = (config.rope_scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta}
    theirs = kind(LlamaConfig(**raw)).eval()
    theirs.load_state_dict(small_model(config, torch.float32).state_dict(), strict=False)
    return theirs


def write_config(folder: Path, config: ModelConfig, dialect: str) -> None:
    """Writes RoPE to config.json as one version of transformers does."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for name in ("rope_parameters", "rope_scaling", "rope_theta", "torch_dtype", "dtype"):
        raw.pop(name, None)
    scaling = dict(config.rope_scaling or {})
    if dialect == "transformers 5":
        raw["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": config.rope_theta}
        raw["dtype"] = "float32"
    else:
        raw |= {"rope_theta": config.rope_theta, "rope_scaling": scaling or None, "torch_dtype": "float32"}
        if dialect == "transformers 4, old" and scaling:
            scaling["type"] = scaling.pop("rope_type")
    path.write_text(json.dumps(raw))


def assert_same(model: LlamaRewardModel, theirs: PreTrainedModel, pairs: list[TokenizedPair]) -> None:
    """Rewards of both completions and the hidden state at the end of the chosen one."""
    pack = build_pack([pairs[:2], pairs[2:5], [pairs[6]]], Sampling(samples=4), 0)
    with torch.no_grad():
        reward_2N, states, *_ = model.eval()(pack)
        chosen_rows = iter(pack.pairs.end_2N[0].tolist())
        for n, pair in enumerate([*pairs[:5], pairs[6]]):
            for side, ids in enumerate((pair.chosen_ids, pair.rejected_ids)):
                their = theirs(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, 0]
                torch.testing.assert_close(reward_2N[side, n], their, rtol=1e-4, atol=1e-5)
            hidden = theirs.model(torch.from_numpy(pair.chosen_ids.astype(np.int64))[None]).last_hidden_state[0, -1]
            torch.testing.assert_close(states[next(chosen_rows)], hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [*CONFIGS.values(), BOTTLENECK], ids=[*CONFIGS.keys(), "bottleneck"])
def test_what_we_save_transformers_scores_alike(
    changes: dict[str, object], pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    model, _ = save(tmp_path / "m", small_config(vocab_size=300, **changes))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert theirs.config.num_labels == 1
    assert_same(model, theirs, pairs)


@pytest.mark.parametrize("dialect", ["transformers 4, old", "transformers 4", "transformers 5"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_what_transformers_saves_we_score_alike(
    changes: dict[str, object], dialect: str, pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    config = small_config(vocab_size=300, **changes)
    theirs = theirs_of(config)
    theirs.save_pretrained(tmp_path)
    write_config(tmp_path, config, dialect)
    model, weights, read = load(tmp_path)
    assert (read.rope_theta, read.rope_scaling) == (config.rope_theta, config.rope_scaling)
    assert weights.notes == ()
    assert_same(model, theirs, pairs)


@pytest.mark.parametrize("kept", ["embed_tokens", "lm_head"])
def test_tied_embeddings(kept: str, tmp_path: Path) -> None:
    """transformers writes the embedding; safetensors' own save_model writes lm_head in its place."""
    theirs = theirs_of(small_config(vocab_size=300), LlamaForCausalLM, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    if kept == "lm_head":
        save_by_safetensors(theirs, str(tmp_path / "model.safetensors"))
    embeddings = {name for name in load_file(tmp_path / "model.safetensors") if "embed" in name or "lm_head" in name}
    assert embeddings == {"model.embed_tokens.weight" if kept == "embed_tokens" else "lm_head.weight"}
    model, weights, _ = load(tmp_path)
    assert weights.notes == (f"{tmp_path}: holds no reward head: a new one is initialized",)
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(dict(model.model.named_parameters())[name], tensor)


@pytest.mark.parametrize("changes", [{}, {"head": "mlp", "projection_size": 5}, BOTTLENECK | {"compare": "latents"}])
def test_round_trip_is_bitwise(changes: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(vocab_size=300, **changes)
    _, state = save(tmp_path / "m", config)
    again, weights, read = load(tmp_path / "m", **changes)
    assert (read, weights.notes) == (small_config(vocab_size=300, rms_norm_eps=1e-5, **changes), ())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, state[name]), name
    meta = json.loads((tmp_path / "m" / "gcrm.json").read_text())
    assert meta["fingerprint"] == fingerprint(state)
    assert load_file(tmp_path / "m" / "goal.safetensors")["default"].shape == (config.state_size,)
    assert ("score.weight" in load_file(tmp_path / "m" / "model.safetensors")) == (config.head != "mlp")


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
