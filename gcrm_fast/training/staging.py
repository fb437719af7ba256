"""Copies of a run's state on the CPU, in memory that is allocated once: training continues while they are written.

torch's own stagers do not serve: that of 2.11 cannot be used twice and pins new memory every time.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor


class Staging:
    """Copies nested dicts and lists into its own buffers, which the next ``copy`` overwrites."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    @torch.no_grad()
    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """``state`` with every tensor on the CPU, sharded ones still sharded, and nothing shared with the original.

        The caller may change the original afterwards: all copies are finished.
        """
        staged: dict[str, Any] = self._copied(state, ())
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # once, for all the copies
        return staged

    def _copied(self, value: Any, place: tuple[object, ...]) -> Any:
        """``place``: the keys from the state to the value."""
        if isinstance(value, Tensor):
            return self._copied_tensor(value.detach(), place)
        if isinstance(value, Mapping):
            return {key: self._copied(each, (*place, key)) for key, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copied(each, (*place, i)) for i, each in enumerate(value))
        return deepcopy(value)

    def _copied_tensor(self, tensor: Any, place: tuple[object, ...]) -> Tensor:
        if hasattr(tensor, "__tensor_flatten__"):
            # A wrapper around tensors: a DTensor, or an 8-bit state of torchao's. This protocol of torch.compile's
            # rebuilds it around CPU tensors, where DTensor.from_local would move them to the mesh's device.
            names, context = tensor.__tensor_flatten__()
            parts = {name: getattr(tensor, name) for name in names}
            copied = {
                name: self._copied_tensor(part, (*place, name)) if isinstance(part, Tensor) else part  # else a mesh
                for name, part in parts.items()
            }
            rebuilt: Tensor = type(tensor).__tensor_unflatten__(copied, context, tensor.shape, tensor.stride())
            return rebuilt
        buffer = self._buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            # Pinned, or the copy from a GPU would neither run ahead nor at the bus's full speed.
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[place] = buffer
        return buffer.copy_(tensor, non_blocking=True)
