"""Small Hugging Face folders for tests: a Llama of one layer, as people have it on their disks."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gcrm_fast.checkpoints.config_json import read_config
from gcrm_fast.checkpoints.weights import Weights, open_weights
from gcrm_fast.data.tokenization import train_tokenizer
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel
from support.small import small_config, small_model

VOCAB = 300
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB tokens. Shared: do not change it."""
    return train_tokenizer(["one two three four, five six; seven"] * 30, VOCAB)


@cache
def trunk() -> dict[str, Tensor]:
    """The trunk's tensors of CONFIG under transformers' names. Shared: do not change it."""
    model = small_model(small_config(vocab_size=VOCAB, num_hidden_layers=1), torch.float32)
    return {name: p.detach() for name, p in model.named_parameters() if name.startswith("model.")}


def llama(folder: Path, tensors: Mapping[str, Tensor] | None = None, **config: object) -> Path:
    """Writes a Llama folder of one safetensors file; ``tensors`` defaults to a language model, ``config`` changes
    fields of CONFIG (None removes one)."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {name: value for name, value in (CONFIG | config).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    if tensors is None:
        tensors = trunk() | {"lm_head.weight": torch.zeros(VOCAB, 32)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, **of_head: Any) -> tuple[LlamaRewardModel, Weights, ModelConfig]:
    """The model in ``folder`` in float32 on the CPU, as read for training."""
    config = read_config(folder, **of_head)
    weights = open_weights(folder, config, seed=0)
    model = LlamaRewardModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.rows(name, parameter.shape, slice(None)))
    return model, weights, config
