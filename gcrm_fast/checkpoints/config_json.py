"""config.json of the FAMILIES: read as transformers 4 or 5 writes it, written for both."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import read_text
from gcrm_fast.model import heads
from gcrm_fast.model.families import FAMILIES, Family
from gcrm_fast.model.llama import ModelConfig

ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

SAME_FIELDS = (  # of ModelConfig and of config.json
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings"),
)


def read_config(folder: Path, **of_head: Any) -> ModelConfig:
    """The shape of the model in ``folder``, from a config.json of transformers 4 or 5. ``of_head``: the fields that it
    has no place for (see ``weights.read_heads``); by default a linear head.

    Raises:
        UserError: no such file, or a model or field that is not supported.
    """
    path = folder / "config.json"
    raw = read_json(path, "name the folder of a Hugging Face model")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{path}: field 'model_type' is {model_type!r}: supported are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    raw = {**family.defaults, **raw}
    if raw.get("quantization_config"):
        raise UserError(f"{path}: field 'quantization_config': a quantized model cannot be trained: use the original")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: field 'hidden_act' is {raw['hidden_act']!r}: only 'silu' is supported")
    hidden, n_heads = (_field(raw, path, name, int) for name in ("hidden_size", "num_attention_heads"))
    if raw.get("head_dim") is None and hidden % n_heads:
        raise UserError(f"{path}: field 'hidden_size' is {hidden}, not a multiple of the {n_heads} attention heads")
    positions = _field(raw, path, "max_position_embeddings", int, family.defaults["max_position_embeddings"])
    theta, scaling = _rope(raw, path)
    config = ModelConfig(
        **{name: _field(raw, path, name, int) for name in ("vocab_size", "intermediate_size", "num_hidden_layers")},
        **{name: _field(raw, path, name, bool, False) for name in family.bias_fields},
        hidden_size=hidden,
        num_attention_heads=n_heads,
        num_key_value_heads=_field(raw, path, "num_key_value_heads", int, n_heads),
        head_dim=_field(raw, path, "head_dim", int, hidden // n_heads),
        rms_norm_eps=_field(raw, path, "rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=positions,
        model_type=model_type,
        sliding_window=_sliding_window(raw, path, family, positions),
        **of_head,
    )
    if n_heads % config.num_key_value_heads:
        raise UserError(f"{path}: field 'num_key_value_heads' is {config.num_key_value_heads}: must divide {n_heads}")
    if config.head_dim % 2:
        raise UserError(f"{path}: field 'head_dim' is {config.head_dim}: rotary embeddings need an even one")
    return config


def _field(raw: Mapping[str, Any], path: Path, name: str, kind: type, default: Any = None) -> Any:
    """``raw[name]`` of ``kind`` bool, or int or float: a positive number. Absent and null are ``default``."""
    value = raw.get(name)
    if value is None:
        if default is None:
            raise UserError(f"{path}: field {name!r} is missing")
        return default
    if kind is bool:
        fits = isinstance(value, bool)
    else:
        accepted = int if kind is int else (int, float)
        fits = isinstance(value, accepted) and not isinstance(value, bool) and 0 < value < 2**31
    if not fits:
        what = {bool: "true or false", int: "a positive integer", float: "a positive number"}[kind]
        raise UserError(f"{path}: field {name!r} is {value!r}: must be {what}")
    return value


def _sliding_window(raw: Mapping[str, Any], path: Path, family: Family, positions: int) -> int | None:
    """Number of tokens that a token attends to, itself included; None for no limit."""
    if family.sliding_window == "never" or raw["sliding_window"] is None:
        return None
    if family.sliding_window == "some layers" and not _field(raw, path, "use_sliding_window", bool, False):
        return None
    window = int(_field(raw, path, "sliding_window", int))
    if family.sliding_window == "all layers":
        return window
    if window < positions:
        what = f"field 'use_sliding_window' is true, with a window of {window} tokens"
        raise UserError(f"{path}: {what}: only attention to all earlier tokens is supported")
    return None


def _rope(raw: Mapping[str, Any], path: Path) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None) from ``rope_parameters`` (transformers 5) or ``rope_theta``/``rope_scaling`` (4)."""
    if raw.get("rope_parameters") and raw.get("rope_scaling") not in (None, {}, raw["rope_parameters"]):
        raise UserError(f"{path}: fields 'rope_parameters' and 'rope_scaling' differ: keep the right one")
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    parameters = raw.get(name) or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{path}: field {name!r} is {type(parameters).__name__}: must be an object or null")
    for field in ("rope_theta", "partial_rotary_factor"):
        one, other = raw.get(field), parameters.get(field)
        if None not in (one, other) and one != other:
            raise UserError(f"{path}: field {field!r} is {one!r}, but {other!r} in {name!r}: keep the right one")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UserError(f"{path}: field {name!r} differs from layer to layer: only one RoPE for all is supported")
    theta = float(_field({"rope_theta": 10000.0, **raw, **parameters}, path, "rope_theta", float))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise UserError(f"{path}: field {name!r} names a RoPE of type {kind!r}: supported are {', '.join(ROPE_FIELDS)}")
    part = _field({**raw, **parameters}, path, "partial_rotary_factor", float, 1.0)
    if part != 1:
        raise UserError(f"{path}: field 'partial_rotary_factor' is {part}: only RoPE on whole heads is supported")
    if kind == "default":
        return theta, None
    scaling = {field: _field(parameters, path, field, float) for field in ROPE_FIELDS[kind]}
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"{path}: field {name!r}: low_freq_factor must be below high_freq_factor")
    return theta, {**scaling, "rope_type": kind}


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that ends in ``hint``."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file: {hint}")
    try:
        value = json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}): {hint}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object: {hint}")
    return value


def huggingface_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> dict[str, Any]:
    """config.json that transformers 4 and 5 read alike.

    ``problem_type: regression`` keeps servers from applying a sigmoid to the reward. With a head that transformers
    lacks, the architecture is the bare trunk, so that nobody loads it with a random linear head by accident.
    """
    family = config.family
    windows: dict[str, dict[str, Any]] = {
        "never": {},
        "all layers": {"sliding_window": config.sliding_window},
        "some layers": {"use_sliding_window": False},
    }
    name = str(dtype).removeprefix("torch.")
    in_transformers = heads.KINDS[config.head].in_transformers
    return {
        "architectures": [family.class_name("ForSequenceClassification" if in_transformers else "Model")],
        "num_labels": 1,
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",
        "hidden_act": "silu",
        **{field: getattr(config, field) for field in (*SAME_FIELDS, *family.bias_fields)},
        "rope_parameters": {**(config.rope_scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta},
        **windows[family.sliding_window],
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": name,
        "dtype": name,
    }
