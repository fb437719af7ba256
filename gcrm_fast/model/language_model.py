"""A trunk with an lm_head: the policy whose text is scored. Parameters carry the names of transformers'
``LlamaForCausalLM`` and its like.

Letters: M predicted tokens, H hidden size, V tokens of the vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcrm_fast.model.llama import Llama, ModelConfig

LOGITS = 2**25  # computed at a time: 128 MiB in float32


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


class _TokenLosses(torch.autograd.Function):
    """Each token's loss depends on its own state alone, so that the forward can compute the gradient of the states and
    drop the logits."""

    @staticmethod
    def forward(ctx: Any, hidden_MH: Tensor, weight_VH: Tensor, tokens_M: Tensor) -> Tensor:
        losses: list[Tensor] = []
        grads: list[Tensor] = []
        rows = max(1, LOGITS // len(weight_VH))
        for hidden, tokens in zip(hidden_MH.split(rows), tokens_M.split(rows), strict=True):
            logits = F.linear(hidden, weight_VH)
            log_p = (logits if logits.dtype.itemsize == 8 else logits.float()).log_softmax(1)
            own = tokens.unsqueeze(1)
            losses.append(-log_p.gather(1, own).squeeze(1))
            if ctx.needs_input_grad[0]:
                p = log_p.exp_()
                p.scatter_add_(1, own, p.new_full((1, 1), -1.0).expand_as(own))
                grads.append(p.to(hidden.dtype) @ weight_VH)
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_MH,) = ctx.saved_tensors
        return grad_outputs[0].unsqueeze(1).to(grad_MH.dtype) * grad_MH, None, None


def token_losses(hidden_MH: Tensor, weight_VH: Tensor, tokens_M: Tensor) -> Tensor:
    """-log p of each token, [M], at least float32, by an lm_head without a gradient; ``hidden_MH`` are the states of
    the tokens before. A maximum of LOGITS logits exist at a time."""
    return _TokenLosses.apply(hidden_MH, weight_VH, tokens_M)
