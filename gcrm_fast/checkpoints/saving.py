"""Writing a reward model that transformers loads.

A saved model is a folder of transformers' sequence classifier of its family, e.g. ``LlamaForSequenceClassification``,
with one label, plus

    gcrm.json            which head, projection size, end-token policy, how special tokens are read, whether prompts
                         were messages or text (with a chat template), whether Q-values can be trusted (of a run),
                         weights fingerprint
    gcrm.safetensors     projection and heads of several layers: what the transformers class cannot hold
    goal.safetensors     the default goal state (see goals.py)
    README.md            the model card, of a run (see model_card.py)

The folder of an adapter has peft's adapter_config.json and adapter_model.safetensors, no config.json and no goal.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gcrm_fast.checkpoints.config_json import huggingface_config
from gcrm_fast.checkpoints.goals import DEFAULT, GOAL_FILE, write_goals
from gcrm_fast.checkpoints.locating import ADAPTER_WEIGHTS, COMPANION, HEAD_FILE, PEFT_PREFIX
from gcrm_fast.checkpoints.reading import POLICIES
from gcrm_fast.data.chat import ending_at_the_reward, prompt_forms
from gcrm_fast.data.ends import Kind
from gcrm_fast.data.special_tokens import Reading
from gcrm_fast.data.tokenization import save_tokenizer
from gcrm_fast.model import heads
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import RowReader

if TYPE_CHECKING:
    from peft import LoraConfig


def add_tensor(update: Callable[[Any], None], name: str, tensor: Tensor) -> None:
    """Adds name, shape, dtype and bytes of a tensor on the CPU to a fingerprint, whose ``update`` is given."""
    update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    update(tensor.contiguous().view(torch.uint8).numpy().data)


def hashed(read: RowReader, update: Callable[[Any], None]) -> RowReader:
    """``read``, which adds to a fingerprint what it reads."""

    def value(name: str, shape: torch.Size, rows: slice) -> Tensor:
        stored = read(name, shape, rows)
        add_tensor(update, name, stored)
        return stored

    return value


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 of whole tensors on the CPU, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        add_tensor(digest.update, name, tensor)
    return digest.hexdigest()


def save_model(
    folder: Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    goal: Tensor,
    goal_count: int,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes the whole model folder. ``goal`` [D or H] is the mean of z over ``goal_count`` preferred end states;
    ``about``, further fields of gcrm.json."""
    weights = write_model(folder, state, config, tokenizer, about=about)
    write_goals(folder / GOAL_FILE, {DEFAULT: goal}, {DEFAULT: goal_count}, weights)


def write_model(
    folder: Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bias: Tensor | None = None,
    fields: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    end: Kind = "eos",
) -> str:
    """Writes weights, configuration and tokenizer; returns the fingerprint of the weights.

    For other programs (see commands/export.py): ``bias`` [1] of the reward head, which has none here; ``fields`` and
    ``about``, further fields of config.json and of gcrm.json; ``end``, where rewards are read.
    """
    folder.mkdir(parents=True)
    held = {k: v for k, v in state.items() if k.startswith("model.") or k == "score.weight"}
    companion = {k: v for k, v in state.items() if k not in held}
    dtype = state["model.norm.weight"].dtype
    held |= heads.KINDS[config.head].exported(state)
    save_torch_state_dict(held if bias is None else held | {"score.bias": bias}, folder, max_shard_size="5GB")
    _index(folder, [*held, *(["score.bias"] if bias is not None else [])])
    raw = {**huggingface_config(config, tokenizer, dtype), **(fields or {})}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    weights = fingerprint(state)
    _write_companions(folder, companion, config, tokenizer, end, {"fingerprint": weights, **(about or {})})
    return weights


def write_adapter(
    folder: Path,
    settings: "LoraConfig",
    adapters: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Writes a folder that peft loads onto the model which ``settings`` name. ``adapters`` have peft's names; the head
    and the projection are in ``state``."""
    folder.mkdir(parents=True)
    settings.save_pretrained(str(folder))
    own = {name: tensor for name, tensor in state.items() if not name.startswith("model.")}
    held = {name: own.pop(name) for name in ("score.weight",) if name in own} | heads.KINDS[config.head].exported(state)
    of_peft = {PEFT_PREFIX + name: tensor for name, tensor in held.items()}
    save_file({**adapters, **of_peft}, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    _write_companions(folder, own, config, tokenizer, "eos", {})


def _write_companions(
    folder: Path,
    companion: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    end: Kind,
    about: Mapping[str, Any],
) -> None:
    """What stands next to the weights: tensors that transformers cannot hold, gcrm.json, the tokenizer."""
    if companion:
        save_file(dict(companion), folder / COMPANION, metadata={"format": "pt"})
    own = {"head": config.head, "projection_size": config.projection_size, "end_policy": POLICIES[end]}
    if config.bottleneck_size:
        own |= {"bottleneck_size": config.bottleneck_size, "compare": config.compare}
    reading: Reading = "text" if tokenizer.split_special_tokens else "tokens"
    if forms := prompt_forms(tokenizer):
        own["prompts"] = forms
    (folder / HEAD_FILE).write_text(json.dumps({**own, "special_tokens": reading, **about}, indent=2) + "\n")
    if end == "eos":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = ending_at_the_reward(tokenizer)
    save_tokenizer(tokenizer, folder)


def _index(folder: Path, names: Iterable[str]) -> None:
    """An index also for a single file: without one vLLM reads every safetensors file of the folder, the goal's too."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        single = folder / "model.safetensors"
        index = {"metadata": {"total_size": single.stat().st_size}, "weight_map": dict.fromkeys(names, single.name)}
        path.write_text(json.dumps(index, indent=2) + "\n")
