"""The weights of a Hugging Face model: located in its safetensors files, checked, and read row by row."""

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gcrm_fast.checkpoints.adapters import MERGE, Update, base_folder, find_adapter, sort_tensors
from gcrm_fast.checkpoints.config_json import read_config, read_json
from gcrm_fast.checkpoints.locating import ADAPTER_WEIGHTS, COMPANION, HEAD_FILE
from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.model import heads
from gcrm_fast.model.families import Family
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LM_HEAD, LlamaRewardModel, RowReader, initial_value

BESIDE = (COMPANION, "value_head.safetensors")  # files read with the shards; the second is LLaMA-Factory's
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
SKIPPED = {  # tensors without a use here: a pattern of their names, after a dot; and why
    "*.lm_head.weight": "a reward model has no use for it",
    "*.rotary_emb.inv_freq": "computed from config.json",
    ".normalizer.*": "it moves and scales all rewards alike",  # safe-rlhf
}
BIAS_SKIPPED = "it moves all rewards alike, so that no comparison changes"
FIRST_TENSOR = "layers.0.input_layernorm.weight"  # what stands before it is the trunk's prefix
MOST_LAYERS = 1000  # a config.json that names more is compared with the files first
FLOATS = ("BF16", "F16", "F32", "F64")


class Weights(NamedTuple):
    """Where a model's values come from, and lines for its user about what was skipped or is new."""

    rows: RowReader
    notes: tuple[str, ...] = ()

    def whole(self, name: str, shape: torch.Size) -> Tensor:
        """All rows of a parameter, on the CPU."""
        return self.rows(name, shape, slice(0, shape[0]))


class Stored(NamedTuple):
    """A tensor in a safetensors file; ``key`` is its name there, ``dtype`` safetensors' name."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


class _Files(NamedTuple):
    """All tensors of a model, and what an adapter adds to them, by the name of the parameter."""

    stored: dict[str, Stored]
    updates: dict[str, Update]

    def rows(self, name: str, key: str, rows: slice) -> Tensor:
        """Rows of the parameter ``name``, which is stored as ``key``."""
        tensor = self.stored[key]
        with safe_open(tensor.path, framework="pt") as file:
            weight = file.get_slice(tensor.key)[rows]
        update = self.updates.get(name)
        return update.added_to(weight, rows) if update else weight

    def check_updates(self, wanted: Mapping[str, torch.Size]) -> None:
        """Raises UserError for an update of what is no weight of the model, or of another shape."""
        for name, update in self.updates.items():
            if name not in wanted:
                raise UserError(f"{update.file}: tensor {update.a!r} belongs to no weight of this model: {MERGE}")
            if update.shape() != tuple(wanted[name]):
                what = f"tensors {update.a!r} and {update.b!r} are for a weight of shape {update.shape()}"
                raise UserError(f"{update.file}: {what}, not {tuple(wanted[name])}: name its own base model")


def open_reward_model(folder: Path) -> tuple[ModelConfig, Weights]:
    """Shape and weights of a trained reward model. Raises UserError, see read_heads, read_config and open_weights."""
    config = read_config(base_folder(folder), **read_heads(folder))
    return config, open_weights(folder, config, seed=None)


def read_heads(folder: Path) -> dict[str, Any]:
    """Fields of a ModelConfig that gcrm.json holds: kind and width of the reward head, width of the projection (0 for
    none), what is compared. Without such a file none, which is a linear head.

    Raises:
        UserError: a damaged gcrm.json.
    """
    path = folder / HEAD_FILE
    if not path.exists():
        return {}
    raw = {"bottleneck_size": 0, "compare": "states", **read_json(path, "save the model again")}
    found: dict[str, Any] = {name: raw.get(name) for name in ("head", "bottleneck_size", "projection_size", "compare")}
    for name, values in (("head", tuple(heads.KINDS)), ("compare", ("states", "latents"))):
        if found[name] not in values:
            raise UserError(f"{path}: field {name!r} is {found[name]!r}: must be one of {', '.join(values)}")
    for name in ("bottleneck_size", "projection_size"):
        size = found[name]
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise UserError(f"{path}: field {name!r} is {size!r}: must be 0 or a positive integer")
    if (found["head"] == "bottleneck") != (found["bottleneck_size"] > 0):
        raise UserError(
            f"{path}: field 'bottleneck_size' is {found['bottleneck_size']} with head {found['head']!r}: it must be "
            "positive for a bottleneck, 0 for other heads"
        )
    return found


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Of the whole network, by name. Raises UserError for sizes that no machine can hold."""
    try:
        with torch.device("meta"):
            return {name: p.shape for name, p in LlamaRewardModel(config).named_parameters()}
    except (RuntimeError, OverflowError, TypeError):  # as torch refuses numbers beyond 64 bits
        sizes = f"{config.vocab_size} x {config.hidden_size} x {config.intermediate_size}, {config.projection_size}"
        raise UserError(f"the model's sizes ({sizes}) are too large: check config.json and gcrm.json") from None


def open_weights(folder: Path, config: ModelConfig, seed: int | None, *, lm_head: bool = False) -> Weights:
    """A reader of the rows of each parameter. Every tensor of the folder is used, known to be useless, or an error.

    Only the requested rows are read. The trunk may have any one prefix (none, ``model.``, ``pretrained_model.model.``
    ...), a linear reward head any name of HEADS. A head or projection that the folder lacks starts from
    ``initial_value`` with a note; without a ``seed`` it is an error. With ``lm_head`` that is read too; of a model that
    ties it to the embedding it is a copy.

    Raises:
        UserError: files missing or unreadable; tensors missing, unknown, in two files, or of the wrong shape or dtype;
            a head of another kind than ``config`` has; no lm_head.
    """
    files = _open(folder)
    layers = sum(key.endswith(".input_layernorm.weight") for key in files.stored)
    if config.num_hidden_layers > max(layers, MOST_LAYERS):  # before a network of that many is built
        what = f"field 'num_hidden_layers' is {config.num_hidden_layers}, but the files hold {layers} layers"
        raise UserError(f"{folder / 'config.json'}: {what}: download it again")
    shapes = parameter_shapes(config)
    if lm_head:
        shapes[LM_HEAD] = shapes["model.embed_tokens.weight"]
    source, notes = _match(files.stored, shapes, folder, config, seed)
    files.check_updates(shapes)

    def rows(name: str, shape: torch.Size, rows: slice) -> Tensor:
        if seed is not None and name not in source:
            return initial_value(name, shape, config, seed)[rows]
        return files.rows(name, source[name], rows)

    return Weights(rows, notes)


def open_language_model(folder: Path) -> tuple[ModelConfig, bool, Weights]:
    """Shape of a language model, whether its lm_head is the embedding, and its weights.

    Raises:
        UserError: see read_config and open_weights; no lm_head.
    """
    config = read_config(base_folder(folder))
    files = _open(folder)
    stored = files.stored
    wanted = {name: shape for name, shape in parameter_shapes(config).items() if name.startswith("model.")}
    source = _match_trunk(stored, wanted, folder)
    tied = _is_tied(folder)
    if not tied:
        source[LM_HEAD] = _lm_head(stored, folder, source)
        wanted[LM_HEAD] = wanted["model.embed_tokens.weight"]
    _check_all(source, stored, wanted, folder)
    files.check_updates(wanted)
    return config, tied, Weights(lambda name, shape, rows: files.rows(name, source[name], rows))


def _open(folder: Path) -> _Files:
    """The files of a model, or of an adapter and its base model.

    Raises:
        UserError: see find_adapter, sort_tensors, _weight_files and _scan.
    """
    adapter = find_adapter(folder)
    stored = _scan(_weight_files(adapter.base if adapter else folder))
    if not adapter:
        return _Files(stored, {})
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: missing: weights are read from safetensors files only")
    tensors = _scan([path])
    whole, updates = sort_tensors(adapter, {name: tensor.shape for name, tensor in tensors.items()})
    own = {name: tensors[key] for name, key in whole.items()} | _scan(_beside(folder))
    trunk = _prefix(stored, adapter.base)
    own = {trunk + name.removeprefix("model.") if name.startswith("model.") else name: own[name] for name in own}
    if any(f"{head}.weight" in own for head in HEADS):
        for head in HEADS:  # the adapter's stands for the base model's
            stored.pop(f"{head}.weight", None)
            stored.pop(f"{head}.bias", None)
    return _Files(stored | own, updates)


def _beside(folder: Path) -> list[Path]:
    """The files of BESIDE that are there. Raises UserError for a head in a pickle."""
    if (folder / "value_head.bin").is_file() and not (folder / "value_head.safetensors").is_file():
        raise UserError(f"{folder / 'value_head.bin'}: a reward head in a pickle: convert it to value_head.safetensors")
    return [folder / name for name in BESIDE if (folder / name).is_file()]


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
            pickle = f" ({pickles[0]} is a pickle: convert it)" if pickles else ""
            raise UserError(f"{folder / name}: missing: weights are read from safetensors files only{pickle}")
    return [*(folder / name for name in sorted(names)), *_beside(folder)]


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
                    stored[name] = Stored(path, name, tuple(tensor.get_shape()), tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({one_line(error)}): download it again") from None
    return stored


def _match(
    stored: Mapping[str, Stored], wanted: Mapping[str, torch.Size], folder: Path, config: ModelConfig, seed: int | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """(stored name of each parameter that the folder holds, notes). Raises UserError, see open_weights."""
    source, skipped, notes = _match_trunk(stored, wanted, folder), dict(SKIPPED), []
    if LM_HEAD in wanted:
        source[LM_HEAD] = _lm_head(stored, folder, source)
    of_head = {name: name for name in wanted if name.startswith("score.")}
    if "score.weight" not in of_head and of_head.keys() & stored.keys():
        stored = {key: tensor for key, tensor in stored.items() if key != "score.weight"}  # made of these when saved
    if head := _linear_head(stored, folder, config.head, "score.weight" in of_head, config.family):
        source["score.weight"] = f"{head}.weight"
        skipped[f".{head}.bias"] = BIAS_SKIPPED
        if f"{head}.bias" in stored:
            _check(f"{head}.bias", stored[f"{head}.bias"], torch.Size([1]))
    for part, what in (("score", "reward head"), ("projection", "projection")):
        own = {name: name for name in wanted if name.startswith(f"{part}.") and name not in source}
        if own.keys() & stored.keys():
            source |= own
        elif own and seed is None:
            raise UserError(f"{folder}: holds no {what}: train one with gcrm train --model {folder}")
        elif own:
            notes.append(f"holds no {what}: a new one is initialized")
    _check_all(source, stored, wanted, folder)
    rest = stored.keys() - source.values()
    for pattern, why in skipped.items():
        if known := {key for key in rest if fnmatchcase(f".{key}", pattern)}:
            notes.append(f"{_some(known)} skipped: {why}")
        rest -= known
    if rest:
        raise UserError(f"{folder}: {_some(rest)} without a place in this model: {_hint(rest, stored)}")
    return source, tuple(f"{folder}: {note}" for note in notes)


def _match_trunk(stored: Mapping[str, Stored], wanted: Mapping[str, torch.Size], folder: Path) -> dict[str, str]:
    """Names that the trunk's parameters have in this folder's files, if they are there."""
    prefix = _prefix(stored, folder)
    source = {name: prefix + name.removeprefix("model.") for name in wanted if name.startswith("model.")}
    # Of two tied tensors safetensors' save_model keeps the first by name.
    embedding = source["model.embed_tokens.weight"]
    if embedding not in stored and LM_HEAD in stored and _stated(folder, "tie_word_embeddings") is True:
        source["model.embed_tokens.weight"] = LM_HEAD
    return source


def _is_tied(folder: Path) -> bool:
    """Whether the embedding is also the lm_head; a sequence classifier has none, whatever its config.json says."""
    classifies = "Classification" in str(_stated(folder, "architectures"))
    return _stated(folder, "tie_word_embeddings") is True and not classifies


def _lm_head(stored: Mapping[str, Stored], folder: Path, source: Mapping[str, str]) -> str:
    """The name that the lm_head has in this folder's files. Raises UserError where there is none."""
    own = [key for key in stored if f".{key}".endswith(f".{LM_HEAD}")]
    if not own and not _is_tied(folder):
        raise UserError(f"{folder}: holds no lm_head: name a language model; a reward model writes no text")
    return own[0] if own else source["model.embed_tokens.weight"]


def _prefix(stored: Mapping[str, Stored], folder: Path) -> str:
    """Of the trunk's names. Raises UserError where the files hold no trunk, or several."""
    anchors = [key for key in stored if f".{key}".endswith(f".{FIRST_TENSOR}")]
    if len(anchors) != 1:
        held = _some(anchors) if anchors else f"no tensor {FIRST_TENSOR!r}"
        raise UserError(f"{folder}: {held} in its safetensors files: one model is expected there")
    return anchors[0].removesuffix(FIRST_TENSOR)


def _linear_head(stored: Mapping[str, Stored], folder: Path, kind: str, one_layer: bool, family: Family) -> str:
    """Which of HEADS the files hold; empty for none. ``one_layer``: whether the head of that ``kind`` is one."""
    present = [head for head in HEADS if f"{head}.weight" in stored]
    if len(present) > 1:
        raise UserError(f"{folder}: holds {len(present)} reward heads ({', '.join(present)}): remove all but one")
    if present and not one_layer:
        what = f"its reward head '{present[0]}.weight' is linear"
        raise UserError(f"{folder}: {what}: omit --head {kind}, or start from the language model")
    if not present and one_layer and "Classification" in str(_stated(folder, "architectures")):
        raise UserError(
            f"{folder}: tensor 'score.weight' missing from its safetensors files, but config.json, field "
            f"'architectures', names a classifier: download it again, or for a new head write "
            f"{family.class_name('ForCausalLM')} there"
        )
    return present[0] if present else ""


def _stated(folder: Path, field: str) -> object:
    return read_json(base_folder(folder) / "config.json", "download it again").get(field)


def _check_all(
    source: Mapping[str, str], stored: Mapping[str, Stored], wanted: Mapping[str, torch.Size], folder: Path
) -> None:
    """Raises UserError for parameters without a tensor, or with an unsuitable one."""
    if missing := [key for key in source.values() if key not in stored]:
        raise UserError(f"{folder}: {_some(missing)} missing from its safetensors files: download it again")
    for name, key in source.items():
        _check(key, stored[key], wanted[name])


def _check(key: str, tensor: Stored, shape: torch.Size) -> None:
    """Raises UserError for a tensor of another shape or a dtype that is not a plain float."""
    if tensor.shape != tuple(shape):
        cause = "a reward head has one output" if shape[0] == 1 else "see config.json and --projection-size"
        raise UserError(f"{tensor.path}: tensor {key!r} has shape {tensor.shape}, not {tuple(shape)}: {cause}")
    if tensor.dtype not in FLOATS:
        what = f"tensor {key!r} has dtype {tensor.dtype}, not one of {', '.join(FLOATS)}"
        raise UserError(f"{tensor.path}: {what}: use a checkpoint that is not quantized")


def _hint(rest: Collection[str], stored: Mapping[str, Stored]) -> str:
    """What to do about tensors without a place; a model that this program saved needs its options."""
    options = ["--head mlp"] if "score.0.weight" in rest else []
    if "score.reward.weight" in rest:
        options.append(f"--head bottleneck --bottleneck-size {stored['score.reward.weight'].shape[1]}")
    if "projection.weight" in rest:
        options.append(f"--projection-size {stored['projection.weight'].shape[0]}")
    if options:
        return f"pass {' '.join(options)}, with which it was trained"
    if any(".lora_" in name or ".modules_to_save" in name for name in rest):
        return f"an adapter: {MERGE}"
    return "make a head one linear layer 'score.weight'"


def _some(names: Collection[str]) -> str:
    """How many names and the first few: "5 tensors ('a', 'b', 'c', ...)"."""
    shown = ", ".join(repr(name) for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def fresh_weights(config: ModelConfig, seed: int) -> Weights:
    """Weights for a model trained from scratch."""
    return Weights(lambda name, shape, rows: initial_value(name, shape, config, seed)[rows])
