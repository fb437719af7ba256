"""The trunk: a Llama, or one of its relatives (families.py), over a packed token axis.

Letters: T tokens of a pack, K gathered key rows, R read rows, H hidden size, N query heads, G key/value heads,
D head size, F width of the MLP.

Modules and parameters carry the names of transformers' ``LlamaModel`` and its like. The last layer computes keys and
values for all tokens, but its output projection, second norm, MLP and the final norm run at the read rows only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gcrm_fast.model.attention import packed_attention, resolve_backend
from gcrm_fast.model.cached_attention import Block as AttentionBlock
from gcrm_fast.model.cached_attention import blocks_of, cached_attention
from gcrm_fast.model.families import FAMILIES, Family
from gcrm_fast.model.inputs import CachedAxis, TokenAxis
from gcrm_kernels import gather_rows, rms_norm, rotate_and_gather, swiglu


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the trunk and its heads. Field names are those of a Hugging Face ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, float | int | str] | None = None  # {"rope_type": "linear" | "llama3", ...}
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 4096
    head: str = "linear"  # or another of heads.KINDS
    bottleneck_size: int = 0  # D of the latents of a bottleneck head; 0 for other heads
    projection_size: int = 0  # D of the projection W [D, H] that the contrastive loss compares; 0 for none
    compare: str = "states"  # what the contrastive loss and goals compare, or "latents": those of the head
    model_type: str = "llama"  # of FAMILIES
    sliding_window: int | None = None  # tokens up to which attention to all of them is the model's; None for any number

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def state_size(self) -> int:
        """Width D of the states that the contrastive loss and goals compare."""
        return self.bottleneck_size if self.compare == "latents" else self.projection_size or self.hidden_size

    def parameters_per_layer(self) -> int:
        h, q, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return 2 * h * q + 2 * h * kv + 3 * h * self.intermediate_size + 2 * h

    def parameters(self) -> int:
        """Of the trunk, without biases."""
        return self.vocab_size * self.hidden_size + self.num_hidden_layers * self.parameters_per_layer()

    def trained_parameters(self, layers: int) -> int:
        """Those of ``parameters`` that are trained with the top ``layers`` blocks, see ``Llama.train_top``."""
        return self.parameters() if layers == self.num_hidden_layers else layers * self.parameters_per_layer()


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """RoPE inverse frequencies [D/2] float32: plain, ``linear`` (divided by factor) or ``llama3`` (long wavelengths
    divided by factor, short ones kept, those between interpolated; Llama 3.1 report, section 3.4.1 and its release)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "default":
        return inv_freq
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return inv_freq / factor
    context = float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    keep = ((context * inv_freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inv_freq / factor + keep * inv_freq


# The first cosine of a process, computed by several threads of a CPU, may be wrong by 1e-4 in all but one thread's part
# while MKL sets itself up. Cosines of one element, which one thread computes, come before it.
torch.zeros(1, device="cpu").cos(), torch.zeros(1, device="cpu").sin()


class Shared(NamedTuple):
    """What all layers read: the packed tokens, (cos, sin) [T, D] of their rotary angles, the attention backend. With a
    cache also the layer's own keys and values [S, G, D], and how attention to them is cut (None: they are gathered)."""

    axis: TokenAxis
    rope: tuple[Tensor, Tensor]
    backend: str
    slots: tuple[Tensor, Tensor] | None = None
    blocks: Sequence[AttentionBlock] | None = None


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h, d, family = config.hidden_size, config.head_dim, config.family
        bias = config.attention_bias or family.qkv_bias
        self.head_dim = d
        self.eps = config.rms_norm_eps
        self.q_proj = nn.Linear(h, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(h, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(h, config.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, h, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(d, config.rms_norm_eps) if family.qk_norm else None
        self.k_norm = nn.RMSNorm(d, config.rms_norm_eps) if family.qk_norm else None

    def forward(self, x_TH: Tensor, shared: Shared) -> Tensor:
        """Attention output before o_proj, [T, N * D]."""
        axis = shared.axis
        projected = linears(x_TH, self.q_proj, self.k_proj, self.v_proj)
        q_TND, k_TGD, v_TGD = (rearrange(x, "t (n d) -> t n d", d=self.head_dim) for x in projected)
        q_TND, k_TGD = self._normed(q_TND, self.q_norm), self._normed(k_TGD, self.k_norm)
        if shared.slots is None:
            q_TND, k_KGD, v_KGD = rotate_and_gather(q_TND, k_TGD, v_TGD, *shared.rope, axis.kv_index_K, axis.kv_inverse)
        else:
            q_TND = self._write(q_TND, k_TGD, v_TGD, shared)
            if shared.blocks is not None:
                out_TND = cached_attention(q_TND, *shared.slots, shared.blocks)
                return rearrange(out_TND, "t n d -> t (n d)")
            k_KGD, v_KGD = (x_SGD.index_select(0, axis.kv_index_K) for x_SGD in shared.slots)
        segments = axis.cu_seqlens_q, axis.cu_seqlens_k, axis.max_seqlen_q, axis.max_seqlen_k
        out_TND = packed_attention(q_TND, k_KGD, v_KGD, *segments, shared.backend)
        return rearrange(out_TND, "t n d -> t (n d)")

    def _write(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, shared: Shared) -> Tensor:
        """Queries rotated; rotated keys and values go into the cache."""
        axis = shared.axis
        assert isinstance(axis, CachedAxis)
        assert shared.slots is not None
        q_TND, *new = rotate_and_gather(q_TND, k_TGD, v_TGD, *shared.rope, None, None)
        for x_SGD, new_TGD in zip(shared.slots, new, strict=True):
            x_SGD.index_copy_(0, axis.slots_T, new_TGD)
        return q_TND

    def _normed(self, x_TND: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """RMSNorm of each head, with one weight [D] for all; unchanged without a norm."""
        if norm is None:
            return x_TND
        normed = rms_norm(rearrange(x_TND, "t n d -> (t n) d"), norm.weight, self.eps)
        return rearrange(normed, "(t n) d -> t n d", n=x_TND.shape[1])


def maybe_recomputed(again: bool, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``; with ``again`` the backward computes it a second time, from its arguments and the random
    state that it started from, instead of keeping what lies between."""
    if not again or not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=True)


class _LinearsOfOneInput(torch.autograd.Function):
    """Several linear layers of one input. Gradients of the input accumulate in one buffer inside the products, where
    autograd would write each one and read them all again to add them."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, *weights_and_biases: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = weights_and_biases[::2], weights_and_biases[1::2]
        ctx.save_for_backward(x_TH, *weights)
        return tuple(F.linear(x_TH, w, b) for w, b in zip(weights, biases, strict=True) if w is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, *weights = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        dx_TH = None
        of_parameters: list[Tensor | None] = []
        for grad, weight, needs_weight, needs_bias in zip(grads, weights, needs[::2], needs[1::2], strict=True):
            of_parameters += [grad.mT @ x_TH if needs_weight else None, grad.sum(0) if needs_bias else None]
            if needs_x:
                dx_TH = grad @ weight if dx_TH is None else torch.addmm(dx_TH, grad, weight, out=dx_TH)
        return dx_TH, *of_parameters


def linears(x_TH: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """``tuple(layer(x_TH) for layer in layers)``; also where a layer computes more than its weight (LoRA)."""
    if not torch.is_grad_enabled() or any(type(layer) is not nn.Linear for layer in layers):
        return tuple(layer(x_TH) for layer in layers)
    return _LinearsOfOneInput.apply(x_TH, *(p for layer in layers for p in (layer.weight, layer.bias)))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(h, f, bias=bias)
        self.up_proj = nn.Linear(h, f, bias=bias)
        self.down_proj = nn.Linear(f, h, bias=bias)

    def forward(self, x_TH: Tensor, recompute_product: bool) -> Tensor:
        gate_TF, up_TF = linears(x_TH, self.gate_proj, self.up_proj)
        return maybe_recomputed(recompute_product, self._down, gate_TF, up_TF)

    def _down(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        return self.down_proj(swiglu(gate_TF, up_TF))


class Block(nn.Module):
    """Its norms hold the weights only: each is computed together with the addition of what comes before it.

    ``recompute``: what the backward recomputes instead of keeping: ``none``, ``product`` (of the MLP's gate and
    up), ``mlp`` or ``block``.
    """

    def __init__(self, config: ModelConfig, recompute: str) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.recompute = recompute
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_TH: Tensor, branch_TH: Tensor | None, shared: Shared, prune: bool) -> tuple[Tensor, Tensor]:
        """(x, branch), which sum to the block's states: [T, H] each, or with ``prune`` [R, H] at the read rows.

        ``branch_TH`` is the MLP's output of the block before, still to be added to its x; None in the first block.
        """
        again = self.recompute == "block"
        if again and branch_TH is not None:  # one tensor to keep instead of two
            x_TH, branch_TH = x_TH + branch_TH, None
        return maybe_recomputed(again, self._forward, x_TH, branch_TH, shared, prune)

    def _forward(self, x_TH: Tensor, branch_TH: Tensor | None, shared: Shared, prune: bool) -> tuple[Tensor, Tensor]:
        if branch_TH is None:
            normed_TH = rms_norm(x_TH, self.input_layernorm.weight, self.eps)
        else:
            normed_TH, x_TH = rms_norm(branch_TH, self.input_layernorm.weight, self.eps, residual_TH=x_TH)
        attended, axis = self.self_attn(normed_TH, shared), shared.axis
        if prune:
            attended, x_TH = (gather_rows(x, axis.read_rows_R, axis.read_inverse) for x in (attended, x_TH))
        normed_TH, x_TH = rms_norm(
            self.self_attn.o_proj(attended), self.post_attention_layernorm.weight, self.eps, residual_TH=x_TH
        )
        return x_TH, maybe_recomputed(self.recompute == "mlp", self.mlp, normed_TH, self.recompute == "product")


Cache = Sequence[tuple[Tensor, Tensor]]


class Llama(nn.Module):
    """``first``: the lowest block. One above 0 stands on the states of a pack instead of its tokens; the embeddings and
    the blocks below are absent."""

    def __init__(self, config: ModelConfig, recompute: str = "none", first: int = 0) -> None:
        super().__init__()
        self.config = config
        self.first = first
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if first:
            del self.embed_tokens
        self.layers = nn.ModuleList(
            Block(config, recompute) if i >= first else nn.Identity() for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def reset_inv_freq(self) -> None:
        """Fills the buffer again after ``to_empty``."""
        self.inv_freq.copy_(inverse_frequencies(self.config))

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers that are present, from the lowest."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def train_top(self, layers: int) -> None:
        """Freezes all below the top ``layers`` blocks: no gradient, no kept activations. With all blocks the embeddings
        are trained too."""
        if layers < len(self.layers):
            for part in (*([] if self.first else [self.embed_tokens]), *self.layers[:-layers]):
                part.requires_grad_(False)

    def forward(self, axis: TokenAxis, attention_backend: str, cache: Cache | None = None) -> Tensor:
        """Hidden states after the final norm at the read rows, [R, H]. ``cache``: keys and values [S, G, D] of each
        layer, which those of the tokens of a CachedAxis join."""
        x, branch = self._blocks(axis, attention_backend, cache, prune=True)
        return rms_norm(branch, self.norm.weight, self.config.rms_norm_eps, residual_TH=x)[0]

    def before_norm(self, axis: TokenAxis, attention_backend: str) -> Tensor:
        """States of the last block at all tokens, [T, H]."""
        x, branch = self._blocks(axis, attention_backend, None, prune=False)
        return x + branch

    def _given(self, axis: TokenAxis) -> Tensor:
        """The states [T, H] that a pack brings; 0 for a dummy pack, which has none."""
        if axis.states_TH is None:
            return self.norm.weight.new_zeros(len(axis.input_ids_T), self.config.hidden_size)
        return axis.states_TH.view(torch.bfloat16) if axis.states_TH.dtype == torch.int16 else axis.states_TH

    def _blocks(
        self, axis: TokenAxis, attention_backend: str, cache: Cache | None, *, prune: bool
    ) -> tuple[Tensor, Tensor]:
        """(x, branch) of the last block, see ``Block``."""
        x = self._given(axis) if self.first else self.embed_tokens(axis.input_ids_T)
        backend = resolve_backend(attention_backend, x.device, x.dtype)
        angles = repeat(torch.outer(axis.position_ids_T.float(), self.inv_freq), "t d -> t (two d)", two=2)
        shared = Shared(axis, (angles.cos().to(x.dtype), angles.sin().to(x.dtype)), backend)
        if isinstance(axis, CachedAxis) and cache is not None and backend == "eager":
            r = self.config.num_attention_heads // self.config.num_key_value_heads
            shared = shared._replace(blocks=blocks_of(axis, len(cache[0][0]), r, x.dtype))
        branch: Tensor | None = None
        for i, layer in enumerate(self.blocks, self.first):
            own = shared if cache is None else shared._replace(slots=cache[i])
            x, branch = layer(x, branch, own, prune=prune and i == len(self.layers) - 1)
        assert branch is not None  # there is at least one layer
        return x, branch
