"""Causal attention over packed segments: one variable-length call, three backends behind one signature.

Letters: T query rows, K gathered key/value rows, N query heads, G key/value heads, D head size, B segments.

Segment b owns the queries cu_seqlens_q[b]:cu_seqlens_q[b + 1] and the keys cu_seqlens_k[b]:cu_seqlens_k[b + 1]. It has
at least as many keys as queries, and its causal mask is aligned bottom-right: the last query sees every key. With keys
gathered as [P C1 | P C2 | ...] that makes one call compute a shared prefix once (see packing.py).
"""

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from gcrm_fast.common.torch_compat import varlen_attention
from gcrm_fast.model.segment_attention import segment_attention

Backend = Literal["auto", "flash_attn", "torch_varlen", "eager"]


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that ``auto`` means here: flash-attn where installed, else torch's varlen attention, both on CUDA in
    half precision only; everywhere else plain matrix products."""
    if name != "auto":
        return name
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "eager"
    return "flash_attn" if importlib.util.find_spec("flash_attn") else "torch_varlen"


def packed_attention(
    q_TND: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    backend: str,
) -> Tensor:
    """Attention output [T, N, D]; scores are scaled by 1/sqrt(D).

    Args:
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, on the device of q.
        max_seqlen_q, max_seqlen_k: longest segment, in rows.
        backend: a ``Backend`` except ``auto``.
    """
    inputs = q_TND, k_KGD, v_KGD, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(*inputs, causal=True, deterministic=deterministic)
    return varlen_attention(*inputs) if backend == "torch_varlen" else segment_attention(*inputs[:5])
