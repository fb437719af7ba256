"""Model families: all differences between them, in one record each.

A record has the family's names in Hugging Face's config.json and classes, what its layers have that others lack, and
the values of absent fields of config.json (transformers' own defaults).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family. ``defaults`` are values of config.json's fields where it has none; null is a value."""

    class_prefix: str  # of transformers' classes: LlamaModel, LlamaForSequenceClassification, ...
    defaults: Mapping[str, int]
    bias_fields: tuple[str, ...] = ()  # of config.json and ModelConfig: which linear layers have biases
    qkv_bias: bool = False  # biases of queries, keys and values, but none of the output, whatever config.json says
    qk_norm: bool = False  # RMSNorm of every head's queries and keys, before RoPE
    # Tokens attend to the last 'sliding_window' tokens only: never; in all layers, unless that is null; or in some of
    # them, where 'use_sliding_window' says so.
    sliding_window: Literal["never", "all layers", "some layers"] = "never"
    # What may pad, best first, instead of the tokenizer's own pad token: tokens that never end a completion.
    pad_tokens: tuple[str, ...] = ("<|pad|>", "<|finetune_right_pad_id|>", "<pad>", "<unk>")

    def class_name(self, task: str) -> str:
        """Of transformers: ``task`` is Model, ForCausalLM, ForSequenceClassification or ForTokenClassification."""
        return self.class_prefix + task


_QWEN_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}
_QWEN_PAD_TOKENS = ("<|fim_pad|>", "<|im_start|>")  # Qwen2 has only the second

# By config.json's 'model_type'.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        class_prefix="Llama",
        defaults={"max_position_embeddings": 2048},
        bias_fields=("attention_bias", "mlp_bias"),
    ),
    "mistral": Family(
        class_prefix="Mistral",
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        sliding_window="all layers",
    ),
    "qwen2": Family(  # and Qwen2.5
        class_prefix="Qwen2",
        defaults=_QWEN_DEFAULTS,
        qkv_bias=True,
        sliding_window="some layers",
        pad_tokens=_QWEN_PAD_TOKENS,
    ),
    "qwen3": Family(
        class_prefix="Qwen3",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        bias_fields=("attention_bias",),
        qk_norm=True,
        sliding_window="some layers",
        pad_tokens=_QWEN_PAD_TOKENS,
    ),
}
