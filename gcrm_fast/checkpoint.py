"""Hugging Face Llama folders: reading them row by row, writing a reward model that transformers loads.

A saved model is a ``LlamaForSequenceClassification`` folder (one label) plus

    gcrm.json            which head, projection size, end-token policy, weights fingerprint
    gcrm.safetensors     projection and MLP head, where there are any: what the transformers class cannot hold
    goal.safetensors     the default goal state, tagged with the fingerprint of the weights it was computed from
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gcrm_fast.errors import UserError
from gcrm_fast.model import ModelConfig, RewardModel, initial_value

END_POLICY = "completion ends with the tokenizer's eos token, which is scored"
COMPANION = "gcrm.safetensors"

RowReader = Callable[[str, torch.Size, slice], Tensor]  # (parameter name, its full shape, rows) -> those rows


# ---------------------------------------------------------------------------------------------------------- config


def read_config(folder: Path, *, head: str, projection_size: int) -> ModelConfig:
    """The shape of the Llama in ``folder``, from a config.json of transformers 4 or 5.

    Raises:
        UserError: no such folder or file, another architecture, or a RoPE type that is not supported.
    """
    path = folder / "config.json"
    raw = read_json(path, "--model must name a Hugging Face Llama folder")
    if raw.get("model_type") != "llama":
        raise UserError(f"{path}: field 'model_type' is {raw.get('model_type')!r}: only 'llama' is supported")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in names:
        if not isinstance(raw.get(name), int):
            raise UserError(f"{path}: field {name!r} is missing or not an integer")
    theta, scaling = _rope(raw, path)
    heads = raw["num_attention_heads"]
    return ModelConfig(
        **{name: raw[name] for name in names},
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        head=head,
        projection_size=projection_size,
    )


def _rope(raw: Mapping[str, Any], path: Path) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None) from ``rope_parameters`` (transformers 5) or ``rope_theta``/``rope_scaling`` (4)."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"{path}: RoPE type {kind!r} is not supported: use a model with default, linear or llama3 RoPE")
    if kind == "default":
        return theta, None
    return theta, {**{k: v for k, v in parameters.items() if k not in ("type", "rope_theta")}, "rope_type": kind}


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that ends in ``hint``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {hint}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): {hint}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object: {hint}")
    return value


# --------------------------------------------------------------------------------------------------------- reading


def open_weights(folder: Path, config: ModelConfig, seed: int) -> RowReader:
    """A reader of parameter rows for ``parallel.materialize``; checks the folder's names and shapes before returning.

    Trunk tensors are read from safetensors, only the rows asked for. ``score.weight`` is taken where the folder has it;
    heads and projections that it lacks start from ``initial_value``. ``lm_head.weight`` and rotary tables are left
    where they are.

    Raises:
        UserError: no safetensors, a missing shard, an unreadable file, a missing tensor of the trunk, a wrong shape.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(read_json(index, "download the checkpoint again").get("weight_map", {}).values())
    else:
        names = {"model.safetensors"}
    if (folder / COMPANION).exists():
        names.add(COMPANION)
    location, found = {}, {}
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing: weights are read from safetensors files only")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (a file handle, not a dict)
                    location[key] = path
                    found[key] = tuple(file.get_slice(key).get_shape())
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    # A bare LlamaModel is saved without the "model." prefix.
    prefix = "" if "model.embed_tokens.weight" in location else "model."
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in RewardModel(config).named_parameters()}
    for name, shape in shapes.items():
        key = name.removeprefix(prefix)
        if key in found and found[key] != shape:
            raise UserError(f"{location[key]}: tensor {key!r} has shape {found[key]}, config.json asks for {shape}")
        if key not in found and name.startswith("model."):
            raise UserError(f"{folder}: tensor {name!r} is missing from its safetensors files")

    def rows(name: str, shape: torch.Size, rows: slice) -> Tensor:
        key = name.removeprefix(prefix)
        if key not in location:
            return initial_value(name, shape, config, seed)[rows]
        with safe_open(location[key], framework="pt") as file:
            return file.get_slice(key)[rows]

    return rows


def fresh_weights(config: ModelConfig, seed: int) -> RowReader:
    """A reader like ``open_weights`` for a model trained from scratch."""
    return lambda name, shape, rows: initial_value(name, shape, config, seed)[rows]


# --------------------------------------------------------------------------------------------------------- writing


def choose_pad(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> int:
    """Sets and returns a pad token that is below ``vocab_size`` and never ends a completion (so not eos).

    transformers reads the reward at the last token that is not pad: with pad == eos it would read the one before.

    Raises:
        UserError: the tokenizer's ids exceed the embedding, or no token can serve.
    """
    vocab = tokenizer.get_vocab()
    largest = max(vocab.values())
    if largest >= vocab_size:
        raise UserError(
            f"{where}: the tokenizer has ids up to {largest}, the model's vocab_size is {vocab_size}: "
            f"use the tokenizer that belongs to the model"
        )
    known = (tokenizer.pad_token, "<|pad|>", "<|finetune_right_pad_id|>", "<pad>", "<unk>", tokenizer.bos_token)
    for token in known:
        if token is not None and token in vocab and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return int(vocab[token])
    raise UserError(f"{where}: the tokenizer has no pad, unk or bos token that differs from eos: add a pad token")


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}{state[name].dtype}".encode())
        digest.update(state[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def huggingface_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> dict[str, Any]:
    """config.json that transformers 4 and 5 read alike.

    ``problem_type: regression`` keeps servers from putting the reward through a sigmoid. A folder with an MLP head
    names the bare trunk as its architecture, so that nobody loads it with a random linear head by accident.
    """
    rope = config.rope_scaling or {"rope_type": "default"}
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForSequenceClassification" if config.head == "linear" else "LlamaModel"],
        "model_type": "llama",
        "num_labels": 1,
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": name,
        "dtype": name,
    }


def save_model(
    folder: Path, state: Mapping[str, Tensor], config: ModelConfig, tokenizer: PreTrainedTokenizerBase, goal: Tensor,
    goal_count: int,
) -> None:  # fmt: skip
    """Writes the whole model folder. ``goal`` [D or H] is the mean of z over ``goal_count`` preferred end states."""
    folder.mkdir(parents=True)
    held = {k: v for k, v in state.items() if k.startswith("model.") or k == "score.weight"}
    companion = {k: v for k, v in state.items() if k not in held}
    dtype = next(iter(held.values())).dtype
    save_torch_state_dict(held, folder, max_shard_size="5GB")
    if companion:
        save_file(companion, folder / COMPANION, metadata={"format": "pt"})
    weights = fingerprint(state)
    goal_metadata = {"fingerprint": weights, "count": str(goal_count), "end_policy": END_POLICY}
    save_file({"default": goal.float()}, folder / "goal.safetensors", metadata=goal_metadata)
    gcrm = {
        "head": config.head,
        "projection_size": config.projection_size,
        "end_policy": END_POLICY,
        "fingerprint": weights,
    }
    (folder / "gcrm.json").write_text(json.dumps(gcrm, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(huggingface_config(config, tokenizer, dtype), indent=2) + "\n")
    tokenizer.save_pretrained(folder)
