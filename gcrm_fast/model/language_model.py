"""A trunk with an lm_head: the policy whose text is scored. Parameters carry the names of transformers'
``LlamaForCausalLM`` and its like."""

import torch.nn.functional as F
from torch import Tensor, nn

from gcrm_fast.model.llama import Llama, ModelConfig


class LlamaLanguageModel(nn.Module):
    """``tied``: the lm_head is the embedding. ``attention_backend``: see attention.py."""

    def __init__(self, config: ModelConfig, *, tied: bool, attention_backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention_backend
        self.model = Llama(config)
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """[R, V] of the next token, at least float32."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits_RV = F.linear(hidden_RH, weight)
        return logits_RV if logits_RV.dtype.itemsize == 8 else logits_RV.float()
