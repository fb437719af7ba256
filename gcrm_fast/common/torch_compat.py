"""The private names of torch that this project uses, and what differs between its releases (2.11 to 2.13).

No other module imports a name of torch that begins with an underscore. Each name here has a test.
"""

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

__all__ = [
    "PYTREE_LOGGER",
    "FakeTensorMode",
    "TorchDispatchMode",
    "cpu_flash_attention",
    "cpu_flash_attention_backward",
    "end_workers",
    "quiet_torchao",
    "set_recompile_limit",
    "tree_leaves",
    "varlen_attention",
]

# Where torch warns of what packages register with it.
PYTREE_LOGGER = "torch.utils._pytree"

# The CPU's flash kernel below autograd, where scaled_dot_product_attention itself would have no backward.
cpu_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# torch 2.11 infers from the shapes that there are fewer key/value heads; later releases take an argument.
_VARLEN_OPTIONS: dict[str, Any] = {"window_size": (-1, 0)}  # causal
if "enable_gqa" in inspect.signature(varlen_attn).parameters:
    _VARLEN_OPTIONS["enable_gqa"] = True


def varlen_attention(
    q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """torch's variable-length attention [T, N, D], causal and aligned bottom-right; see ``packed_attention``."""
    out = varlen_attn(q_TND, k_KGD, v_KGD, cu_q, cu_k, max_q, max_k, **_VARLEN_OPTIONS)
    assert isinstance(out, Tensor)
    return out


def quiet_torchao() -> None:
    """Call before torchao is imported, also by transformers or TRL: it reports kernels that are not used here."""
    for name in ("torchao", PYTREE_LOGGER):
        logging.getLogger(name).setLevel(logging.ERROR)


def set_recompile_limit(limit: int) -> None:
    """How often ``torch.compile`` compiles one function before it falls back to eager mode."""
    torch._dynamo.config.recompile_limit = limit


def end_workers(batches: Iterator[Any]) -> None:
    """Ends the worker processes of a DataLoader's iterator, if it has any."""
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()
