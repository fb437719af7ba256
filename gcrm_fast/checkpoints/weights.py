"""The weights of a Hugging Face model: found in its safetensors files, checked, and read row by row."""

from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gcrm_fast.checkpoints.config_json import read_json
from gcrm_fast.checkpoints.locating import COMPANION, HEAD_FILE
from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.model import heads
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel, initial_value

BESIDE = (COMPANION, "value_head.safetensors")  # files read beside the shards; the second is LLaMA-Factory's
# Where reward models keep one linear layer from H to 1, as NAME.weight and, in some, NAME.bias.
HEADS = (
    "score",  # transformers' sequence and token classification, and with them OpenRLHF and veRL
    "v_head.summary",  # TRL, LLaMA-Factory
    "v_head",  # DeepSpeed-Chat, trlX
    "value_head",  # older OpenRLHF, ColossalChat
    "score_head",  # safe-rlhf
    "reward_head",  # MOSS-RLHF
    "regression_head",  # UltraRM
    "scalar_head",  # the TL;DR reproduction of Huang et al.
)
LEFT_OUT = {  # tensors that are left out knowingly: a pattern of their names, with a dot before; and why
    "*.lm_head.weight": "a reward model has no use for it",
    "*.rotary_emb.inv_freq": "computed from config.json",
    ".normalizer.*": "it moves and scales all rewards alike",  # safe-rlhf
}
BIAS_LEFT_OUT = "it moves all rewards alike, so that no comparison changes"
FIRST_TENSOR = "layers.0.input_layernorm.weight"  # what stands before it is the trunk's prefix
FLOATS = ("BF16", "F16", "F32", "F64")

RowReader = Callable[[str, torch.Size, slice], Tensor]  # (parameter name, its full shape, rows) -> those rows


class Weights(NamedTuple):
    """Where a model's values come from, and what its user should know about it (a line each)."""

    rows: RowReader
    notes: tuple[str, ...] = ()


class Stored(NamedTuple):
    """A tensor in a safetensors file; ``dtype`` is safetensors' name."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def read_heads(folder: Path) -> tuple[str, int]:
    """Kind of the reward head and size of the projection as ``gcrm.json`` has them; a linear head and no projection
    for a folder that this program did not write.

    Raises:
        UserError: a damaged gcrm.json.
    """
    path = folder / HEAD_FILE
    if not path.is_file():
        return "linear", 0
    raw = read_json(path, "save the model again")
    head, size = raw.get("head"), raw.get("projection_size")
    if head not in heads.KINDS:
        raise UserError(f"{path}: field 'head' is {head!r}: must be one of {', '.join(heads.KINDS)}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise UserError(f"{path}: field 'projection_size' is {size!r}: must be 0 or a positive integer")
    return head, size


def open_weights(folder: Path, config: ModelConfig, seed: int | None) -> Weights:
    """A reader of parameter rows for ``parallel.materialize``; all names, shapes and dtypes are checked before it
    returns, and every tensor of the folder is used, known to be of no use (LEFT_OUT, with a note), or an error.

    Tensors are read from safetensors, one at a time and only the rows asked for. The trunk may stand behind any one
    prefix (none, ``model.``, ``pretrained_model.model.`` ...). The linear reward head may have any name of HEADS; its
    bias, if any, is left out with a note, since it moves every reward alike. A head or projection of which the folder
    has no tensor starts from ``initial_value``, with a note; without a ``seed`` it is an error.

    Raises:
        UserError: no safetensors, a missing shard, an unreadable file, tensors missing, left over, in two files, or of
            the wrong shape or dtype, a head that is not the one that ``config`` asks for.
    """
    stored = _scan(_weight_files(folder))
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in LlamaRewardModel(config).named_parameters()}
    source, notes = _match(stored, wanted, folder, config, seed)

    def rows(name: str, shape: torch.Size, rows: slice) -> Tensor:
        if seed is not None and name not in source:
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
    stored: Mapping[str, Stored],
    wanted: Mapping[str, tuple[int, ...]],
    folder: Path,
    config: ModelConfig,
    seed: int | None,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """(stored name of each parameter that is not to be started anew, notes). Raises UserError, see open_weights."""
    source, left_out, notes = _match_trunk(stored, wanted, folder), dict(LEFT_OUT), []
    head = _linear_head(stored, folder, config)
    if head:
        source["score.weight"] = f"{head}.weight"
        left_out[f".{head}.bias"] = BIAS_LEFT_OUT
        if f"{head}.bias" in stored:
            _check(f"{head}.bias", stored[f"{head}.bias"], (1,))
    for part, what in (("score", "reward head"), ("projection", "projection")):
        own = {name: name for name in wanted if name.startswith(f"{part}.") and name not in source}
        if own.keys() & stored.keys():
            source |= own
        elif own and seed is None:
            raise UserError(f"{folder}: holds no {what}: train one with gcrm train --model {folder}")
        elif own:
            notes.append(f"holds no {what}: a new one is started")
    missing = [key for key in source.values() if key not in stored]
    if missing:
        raise UserError(f"{folder}: {_some(missing)} missing from its safetensors files: download it again")
    for name, key in source.items():
        _check(key, stored[key], wanted[name])
    rest = stored.keys() - source.values()
    for pattern, why in left_out.items():
        known = {key for key in rest if fnmatchcase(f".{key}", pattern)}
        if known:
            notes.append(f"{_some(known)} left out: {why}")
        rest -= known
    if rest:
        raise UserError(f"{folder}: {_some(rest)} without a place in this model: {_hint(rest, stored)}")
    return source, tuple(f"{folder}: {note}" for note in notes)


def _match_trunk(stored: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, str]:
    """Stored names of the trunk's parameters, whether they are there or not."""
    anchors = [key for key in stored if f".{key}".endswith(f".{FIRST_TENSOR}")]
    if len(anchors) != 1:
        found = _some(anchors) if anchors else f"no tensor {FIRST_TENSOR!r}"
        raise UserError(f"{folder}: {found} in its safetensors files: one model is expected there")
    prefix = anchors[0].removesuffix(FIRST_TENSOR)
    source = {name: prefix + name.removeprefix("model.") for name in wanted if name.startswith("model.")}
    # Of two tied tensors safetensors' save_model keeps the first by name.
    embedding = source["model.embed_tokens.weight"]
    if embedding not in stored and "lm_head.weight" in stored and _stated(folder, "tie_word_embeddings") is True:
        source["model.embed_tokens.weight"] = "lm_head.weight"
    return source


def _linear_head(stored: Mapping[str, Stored], folder: Path, config: ModelConfig) -> str:
    """Which of HEADS the files hold; empty for none."""
    found = [head for head in HEADS if f"{head}.weight" in stored]
    if len(found) > 1:
        raise UserError(f"{folder}: holds {len(found)} reward heads ({', '.join(found)}): remove all but one")
    one_layer = heads.KINDS[config.head].in_transformers
    if found and not one_layer:
        raise UserError(
            f"{folder}: its reward head '{found[0]}.weight' is linear: leave out --head {config.head}, or start from "
            f"the language model"
        )
    if not found and one_layer and "Classification" in str(_stated(folder, "architectures")):
        raise UserError(
            f"{folder}: tensor 'score.weight' missing from its safetensors files, though config.json, field "
            f"'architectures', speaks of a head: download it again, or write "
            f"{config.family.class_name('ForCausalLM')} there for a new head"
        )
    return found[0] if found else ""


def _stated(folder: Path, field: str) -> object:
    return read_json(folder / "config.json", "download it again").get(field)


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


def _hint(rest: Collection[str], stored: Mapping[str, Stored]) -> str:
    """What to do about tensors without a place, which would be lost in silence."""
    options = []  # of a model that this program saved
    if "score.0.weight" in rest:
        options.append("--head mlp")
    if "projection.weight" in rest:
        options.append(f"--projection-size {stored['projection.weight'].shape[0]}")
    if options:
        return f"pass {' '.join(options)}, with which it was trained"
    return "merge adapters into the weights, and make a head one linear layer 'score.weight'"


def _some(names: Collection[str]) -> str:
    """How many names and the first few: "5 tensors ('a', 'b', 'c', ...)"."""
    shown = ", ".join(repr(name) for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def fresh_weights(config: ModelConfig, seed: int) -> Weights:
    """Weights for a model trained from scratch."""
    return Weights(lambda name, shape, rows: initial_value(name, shape, config, seed)[rows])
