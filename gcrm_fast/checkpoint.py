"""Hugging Face Llama checkpoints: finding, checking and reading them row by row; writing a reward model that
transformers loads.

A saved model is a ``LlamaForSequenceClassification`` folder (one label) plus

    gcrm.json            which head, projection size, end-token policy, weights fingerprint
    gcrm.safetensors     projection and MLP head, where there are any: what the transformers class cannot hold
    goal.safetensors     the default goal state, tagged with the fingerprint of the weights it was computed from
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gcrm_fast.errors import UserError, one_line
from gcrm_fast.model import ModelConfig, RewardModel, initial_value
from gcrm_fast.tokenization import save_tokenizer

END_POLICY = "completion ends with the tokenizer's eos token, which is scored"
COMPANION = "gcrm.safetensors"
BESIDE = (COMPANION, "value_head.safetensors")  # files read beside the shards; the second is LLaMA-Factory's
HUB_FILES = ["config.json", "gcrm.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
             "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.json", "merges.txt"]  # fmt: skip
# Where reward models keep one linear layer from H to 1, as NAME.weight and, in some, NAME.bias.
HEADS = (
    "score",  # transformers' sequence and token classification, and with them OpenRLHF and veRL
    "v_head.summary",  # TRL, LLaMA-Factory
    "v_head",  # DeepSpeed-Chat, trlX
    "value_head",  # older OpenRLHF, ColossalChat
    "score_head",  # safe-rlhf
    "reward_head",  # MOSS-RLHF
    "regression_head",  # UltraRM
)
FIRST_TENSOR = "layers.0.input_layernorm.weight"  # what stands before it is the trunk's prefix
FLOATS = ("BF16", "F16", "F32", "F64")
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

RowReader = Callable[[str, torch.Size, slice], Tensor]  # (parameter name, its full shape, rows) -> those rows


class Weights(NamedTuple):
    """Where a model's values come from, and what its user should know about it (a line each)."""

    rows: RowReader
    notes: tuple[str, ...] = ()


# --------------------------------------------------------------------------------------------------------- finding


def locate(name: str, flag: str) -> Path:
    """The folder ``name``, or the copy of the hub repository ``name``, downloaded unless it is in the hub's cache.

    Any number of processes may call it at once: the hub's own file locks let one of them download each file. Pickles
    are never downloaded.

    Raises:
        UserError: neither a folder nor a repository that can be had.
    """
    # os.path answers False where pathlib raises: names too long, or folders that may not be entered.
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise UserError(f"{flag} {name}: is a file: name the folder of a Hugging Face model")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"{flag} {name}: no such folder") from None
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns="*/*"))
    except Exception as error:  # the hub lets through errors of its HTTP library, which depends on its version
        raise UserError(
            f"{flag} {name}: no such folder, and not to be had from the Hugging Face hub ({one_line(error)})"
        ) from None


# ---------------------------------------------------------------------------------------------------------- config


def read_config(folder: Path, *, head: str, projection_size: int) -> ModelConfig:
    """The shape of the Llama in ``folder``, from a config.json of transformers 4 or 5.

    Raises:
        UserError: no such file, another architecture, a quantised model or an adapter, a field of the wrong type or
            value, or a RoPE type that is not supported.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: holds an adapter (adapter_config.json): merge it into its base model first")
    path = folder / "config.json"
    raw = read_json(path, "name the folder of a Hugging Face Llama")
    if raw.get("model_type") != "llama":
        raise UserError(f"{path}: field 'model_type' is {raw.get('model_type')!r}: only 'llama' is supported")
    if raw.get("quantization_config"):
        raise UserError(f"{path}: field 'quantization_config': a quantised model cannot be trained: use the original")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: field 'hidden_act' is {raw['hidden_act']!r}: only 'silu' is supported")
    hidden, heads = (_field(raw, path, name, int) for name in ("hidden_size", "num_attention_heads"))
    if raw.get("head_dim") is None and hidden % heads:
        raise UserError(f"{path}: field 'hidden_size' is {hidden}, not a multiple of the {heads} attention heads")
    theta, scaling = _rope(raw, path)
    config = ModelConfig(
        vocab_size=_field(raw, path, "vocab_size", int),
        hidden_size=hidden,
        intermediate_size=_field(raw, path, "intermediate_size", int),
        num_hidden_layers=_field(raw, path, "num_hidden_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=_field(raw, path, "num_key_value_heads", int, heads),
        head_dim=_field(raw, path, "head_dim", int, hidden // heads),
        rms_norm_eps=_field(raw, path, "rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=_field(raw, path, "attention_bias", bool, False),
        mlp_bias=_field(raw, path, "mlp_bias", bool, False),
        max_position_embeddings=_field(raw, path, "max_position_embeddings", int, 2048),
        head=head,
        projection_size=projection_size,
    )
    if heads % config.num_key_value_heads:
        raise UserError(f"{path}: field 'num_key_value_heads' is {config.num_key_value_heads}: must divide {heads}")
    if config.head_dim % 2:
        raise UserError(f"{path}: field 'head_dim' is {config.head_dim}: rotary embeddings need an even one")
    return config


def _field(raw: Mapping[str, Any], path: Path, name: str, kind: type, default: Any = None) -> Any:
    """``raw[name]``: a boolean, or a positive finite number. Absent and null are ``default``, or an error without one.

    ``kind`` is bool, int or float.
    """
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


def _rope(raw: Mapping[str, Any], path: Path) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None) from ``rope_parameters`` (transformers 5) or ``rope_theta``/``rope_scaling`` (4)."""
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    parameters = raw.get(name) or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{path}: field {name!r} is {type(parameters).__name__}: must be an object or null")
    theta = float(_field({"rope_theta": 10000.0, **raw, **parameters}, path, "rope_theta", float))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_FIELDS or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{path}: field {name!r} asks for RoPE of type {kind!r}"
            f"{' on part of each head' if 'partial_rotary_factor' in parameters else ''}: "
            f"supported are {', '.join(ROPE_FIELDS)}"
        )
    if kind == "default":
        return theta, None
    scaling = {field: _field(parameters, path, field, float) for field in ROPE_FIELDS[kind]}
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"{path}: field {name!r}: low_freq_factor must be below high_freq_factor")
    return theta, {**scaling, "rope_type": kind}


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that ends in ``hint``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}): {hint}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object: {hint}")
    return value


# --------------------------------------------------------------------------------------------------------- reading


class Stored(NamedTuple):
    """A tensor in a safetensors file; ``dtype`` is safetensors' name."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def open_weights(folder: Path, config: ModelConfig, seed: int) -> Weights:
    """A reader of parameter rows for ``parallel.materialize``; all names, shapes and dtypes are checked before it
    returns, and every tensor of the folder is used, known to be of no use (``lm_head``, rotary tables), or an error.

    Tensors are read from safetensors, one at a time and only the rows asked for. The trunk may stand behind any one
    prefix (none, ``model.``, ``pretrained_model.model.`` ...). The linear reward head may have any name of HEADS; its
    bias, if any, is left out with a note, since it moves every reward alike. A head or projection of which the folder
    has no tensor starts from ``initial_value``, with a note.

    Raises:
        UserError: no safetensors, a missing shard, an unreadable file, tensors missing, left over, in two files, or of
            the wrong shape or dtype, a head that is not the one that ``config`` asks for.
    """
    stored = _scan(_weight_files(folder))
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in RewardModel(config).named_parameters()}
    source, notes = _match(stored, wanted, folder, config)

    def rows(name: str, shape: torch.Size, rows: slice) -> Tensor:
        if name not in source:
            return initial_value(name, shape, config, seed)[rows]
        with safe_open(stored[source[name]].path, framework="pt") as file:
            return file.get_slice(source[name])[rows]

    return Weights(rows, notes)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files to read: ``model.safetensors``, or else the shards of its index, and those BESIDE."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = {single.name}
    if index.is_file() and not single.is_file():
        weight_map = read_json(index, "download the checkpoint again").get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else ()
        if not files or any(not isinstance(name, str) or Path(name).name != name for name in files):
            raise UserError(f"{index}: field 'weight_map' must name a file of this folder for each tensor")
        names = set(files)
    for name in sorted(names):
        if not (folder / name).is_file():
            pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
            found = f" ({pickles[0]} is a pickle: convert it)" if pickles else ""
            raise UserError(f"{folder / name}: missing: weights are read from safetensors files only{found}")
    if (folder / "value_head.bin").is_file() and not (folder / "value_head.safetensors").is_file():
        raise UserError(f"{folder / 'value_head.bin'}: a reward head in a pickle: convert it to value_head.safetensors")
    return [folder / name for name in (*sorted(names), *BESIDE) if (folder / name).is_file()]


def _scan(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors of the files, from their headers."""
    stored: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a file handle, not a dict)
                    if name in stored:
                        raise UserError(f"{path}: tensor {name!r} is also in {stored[name].path.name}: remove one")
                    tensor = file.get_slice(name)
                    stored[name] = Stored(path, tuple(tensor.get_shape()), tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({one_line(error)}): download it again") from None
    return stored


def _match(
    stored: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]], folder: Path, config: ModelConfig
) -> tuple[dict[str, str], tuple[str, ...]]:
    """(stored name of each parameter that is not to be started anew, notes). Raises UserError, see open_weights."""
    source = _match_trunk(stored, wanted, folder)
    notes, left_out = [], set()
    head = _linear_head(stored, folder, config)
    if head:
        source["score.weight"] = f"{head}.weight"
        if f"{head}.bias" in stored:
            notes.append(_bias_note(stored, f"{head}.bias"))
            left_out.add(f"{head}.bias")
    for part, what in (("score", "reward head"), ("projection", "projection")):
        own = [name for name in wanted if name.startswith(f"{part}.") and name not in source]
        if any(name in stored for name in own):
            source.update({name: name for name in own})
        elif own:
            notes.append(f"holds no {what}: a new one is started")
    missing = [key for key in source.values() if key not in stored]
    if missing:
        raise UserError(f"{folder}: {_some(missing)} missing from its safetensors files: download it again")
    for name, key in source.items():
        _check(key, stored[key], wanted[name])
    for key in stored.keys() - source.values():
        if f".{key}".endswith(".lm_head.weight"):
            notes.append(f"{key} is left out: a reward model has no use for it")
            left_out.add(key)
        elif key.endswith("rotary_emb.inv_freq"):  # computed from config.json
            left_out.add(key)
    _refuse(sorted(stored.keys() - source.values() - left_out), stored, folder)
    return source, tuple(f"{folder}: {note}" for note in notes)


def _match_trunk(stored: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, str]:
    """Stored names of the trunk's parameters, whether they are there or not."""
    anchors = [key for key in stored if f".{key}".endswith(f".{FIRST_TENSOR}")]
    if len(anchors) != 1:
        found = _some(anchors) if anchors else f"no tensor {FIRST_TENSOR!r}"
        raise UserError(f"{folder}: {found} in its safetensors files: one Llama is expected there")
    prefix = anchors[0].removesuffix(FIRST_TENSOR)
    source = {name: prefix + name.removeprefix("model.") for name in wanted if name.startswith("model.")}
    # Of two tied tensors safetensors' save_model keeps the first by name.
    embedding = source["model.embed_tokens.weight"]
    tied = read_json(folder / "config.json", "download it again").get("tie_word_embeddings") is True
    if embedding not in stored and tied and "lm_head.weight" in stored:
        source["model.embed_tokens.weight"] = "lm_head.weight"
    return source


def _linear_head(stored: Mapping[str, Stored], folder: Path, config: ModelConfig) -> str:
    """Which of HEADS the files hold; empty for none."""
    heads = [head for head in HEADS if f"{head}.weight" in stored]
    if len(heads) > 1:
        raise UserError(f"{folder}: holds {len(heads)} reward heads ({', '.join(heads)}): remove all but one")
    if heads and config.head != "linear":
        raise UserError(
            f"{folder}: its reward head '{heads[0]}.weight' is linear: leave out --head {config.head}, or start from "
            f"the language model"
        )
    return heads[0] if heads else ""


def _bias_note(stored: Mapping[str, Stored], key: str) -> str:
    _check(key, stored[key], (1,))
    with safe_open(stored[key].path, framework="pt") as file:
        value = file.get_tensor(key).item()
    return f"{key} ({value:g}) is left out: it moves every reward alike, so that no comparison changes"


def _check(key: str, tensor: Stored, shape: tuple[int, ...]) -> None:
    """Raises UserError for a tensor of another shape or a dtype that is no plain float."""
    if tensor.shape != shape:
        cause = "a reward head has one output" if shape[0] == 1 else "see config.json and --projection-size"
        raise UserError(f"{tensor.path}: tensor {key!r} has shape {tensor.shape}, not {shape}: {cause}")
    if tensor.dtype not in FLOATS:
        raise UserError(
            f"{tensor.path}: tensor {key!r} has dtype {tensor.dtype}, not one of {', '.join(FLOATS)}: "
            f"use a checkpoint that is not quantised"
        )


def _refuse(leftover: list[str], stored: Mapping[str, Stored], folder: Path) -> None:
    """Raises UserError for tensors without a place, which would be lost in silence."""
    if not leftover:
        return
    options = []  # of a model that this program saved
    if "score.0.weight" in leftover:
        options.append("--head mlp")
    if "projection.weight" in leftover:
        options.append(f"--projection-size {stored['projection.weight'].shape[0]}")
    hint = "merge adapters into the weights, and make a head one linear layer 'score.weight'"
    if options:
        hint = f"pass {' '.join(options)}, with which it was trained"
    raise UserError(f"{folder}: {_some(leftover)} without a place in this model: {hint}")


def _some(names: list[str]) -> str:
    """How many names and the first few: "5 tensors ('a', 'b', 'c', ...)"."""
    shown = ", ".join(repr(name) for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def fresh_weights(config: ModelConfig, seed: int) -> Weights:
    """Weights for a model trained from scratch."""
    return Weights(lambda name, shape, rows: initial_value(name, shape, config, seed)[rows])


# --------------------------------------------------------------------------------------------------------- writing


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
    save_tokenizer(tokenizer, folder)
