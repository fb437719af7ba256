"""LoRA adapters in peft's format, of TRL, LLaMA-Factory or this project: read, checked, merged row by row.

An adapter folder holds adapter_config.json, which names the base model, and adapter_model.safetensors: A [rank, in] and
B [out, rank] of linear layers, and whole tensors that replace the base model's (modules_to_save, such as the head).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gcrm_fast.checkpoints.config_json import read_json
from gcrm_fast.checkpoints.locating import ADAPTER, ADAPTER_WEIGHTS, MODEL_FILES, PEFT_PREFIX, locate
from gcrm_fast.common.errors import UserError

MERGE = "merge it with peft (merge_and_unload) and name the folder of the result"
# Fields of adapter_config.json that change what is computed.
UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "monteclora_config", "kasa_config"),
)
INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the base model as it is
LOW_RANK = re.compile(r"(?P<layer>.+)\.lora_(?P<kind>[AB])\.weight")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder; ``base``: the folder of the model that it changes."""

    folder: Path
    base: Path
    settings: Mapping[str, Any]

    @property
    def classifies(self) -> bool:
        """Whether it was trained as transformers' sequence classifier."""
        return bool(self.settings.get("task_type") == "SEQ_CLS")

    def scale(self, layer: str, rank: int) -> float:
        """What B A of a layer is multiplied by."""
        alpha = self.settings.get("lora_alpha", 8)
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alpha = value
                break
        return float(alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank))


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an adapter adds to a weight: scale * B A; ``a`` and ``b`` are names in ``file``."""

    file: Path
    a: str
    b: str
    scale: float

    def shape(self) -> tuple[int, int]:
        """Of the weight. Raises UserError for A and B of different ranks."""
        with safe_open(self.file, framework="pt") as file:
            (rank, inputs), (outputs, other) = (file.get_slice(name).get_shape() for name in (self.a, self.b))
        if rank != other:
            raise UserError(f"{self.file}: tensors {self.a!r} and {self.b!r} have ranks {rank} and {other}")
        return outputs, inputs

    def added_to(self, weight: Tensor, rows: slice) -> Tensor:
        """``rows`` of the weight [out, in], with the update; float32 or wider."""
        with safe_open(self.file, framework="pt") as file:
            a, b = file.get_tensor(self.a), file.get_slice(self.b)[rows]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.addmm(weight.to(dtype), b.to(dtype), a.to(dtype), alpha=self.scale)


def find_adapter(folder: Path) -> Adapter | None:
    """The adapter in ``folder``; None where there is none.

    Raises:
        UserError: an adapter of another kind than LoRA, or with parts that are not read here; its base model is not
            available, or is an adapter too.
    """
    path = folder / ADAPTER
    if not path.is_file():
        return None
    settings = read_json(path, "download it again")
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    if kind != "LORA":
        raise UserError(f"{path}: field 'peft_type' is {kind!r}: only 'LORA' is supported: {MERGE}")
    for name in UNSUPPORTED:
        if settings.get(name):
            raise UserError(f"{path}: field {name!r} is {settings[name]!r}: not supported: {MERGE}")
    if settings.get("init_lora_weights") not in INITIAL:
        what = f"field 'init_lora_weights' is {settings['init_lora_weights']!r}, which changes the base model"
        raise UserError(f"{path}: {what}: {MERGE}")
    remedy = "write the folder or the Hub name of the base model there"
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: field 'base_model_name_or_path' is {base!r}: {remedy}")
    try:
        located = locate(base, f"{path}: field 'base_model_name_or_path'", MODEL_FILES)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None
    if (located / ADAPTER).is_file():
        raise UserError(f"{path}: field 'base_model_name_or_path' is {base!r}, an adapter too: {MERGE}")
    return Adapter(folder=folder, base=located, settings=settings)


def base_folder(folder: Path) -> Path:
    """Where config.json is: the folder of an adapter's base model, or ``folder`` itself. Raises as find_adapter."""
    adapter = find_adapter(folder)
    return adapter.base if adapter else folder


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer is: an adapter's folder may leave it to the base model. Raises as find_adapter."""
    return folder if any(folder.glob("tokenizer*")) else base_folder(folder)


def sort_tensors(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], dict[str, Update]]:
    """({name in the model: name in the file} of whole tensors, updates by the name of their weight).

    ``shapes``: of the file's tensors, by their names there.

    Raises:
        UserError: A without B, or B without A.
    """
    whole: dict[str, str] = {}
    low_rank: dict[str, dict[str, str]] = {}
    for name in shapes:
        plain = name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.", ".").replace(".default.", ".")
        if match := LOW_RANK.fullmatch(plain):
            low_rank.setdefault(match["layer"], {})[match["kind"]] = name
        else:
            whole[plain] = name
    file, updates = adapter.folder / ADAPTER_WEIGHTS, {}
    for layer, names in low_rank.items():
        if len(names) < 2:
            raise UserError(f"{file}: tensor {next(iter(names.values()))!r} lacks its other half: download it again")
        scale = adapter.scale(layer, shapes[names["A"]][0])
        updates[f"{layer}.weight"] = Update(file=file, a=names["A"], b=names["B"], scale=scale)
    return whole, updates
