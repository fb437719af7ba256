"""Process group, FSDP2 sharding, and moving whole tensors in and out of sharded parameters."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from gcrm_fast.common import processes
from gcrm_fast.common.devices import default_device
from gcrm_fast.model.reward_model import LlamaRewardModel, RowReader, load


@contextmanager
def process_group(*, replicas: int = 1, timeout: float = 600.0) -> Iterator[tuple[DeviceMesh, torch.device]]:
    """The default process group (nccl on CUDA, else gloo), as a mesh, and this rank's device.

    The mesh has one dimension, or with ``replicas`` two: copies of the model, and the processes that share a copy.
    Works under torchrun, and without it as a group of one. ``timeout``: of a collective, in seconds. On one Linux
    machine the processes use ``lo``, unless GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME say otherwise.
    """
    if sys.platform == "linux" and processes.world_size() == processes.local_world_size():
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # else they look up this host's name
            os.environ.setdefault(variable, "lo")
    device, backend = default_device(), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    limit = timedelta(seconds=timeout)
    if processes.launched():
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store survives a restart of the workers: without a prefix they find the addresses of dead ones.
            # (Each node counts its own restarts: on several, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store.)
            store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    try:
        world = dist.get_world_size()
        shape, names = (
            ((world,), ("shard",)) if replicas == 1 else ((replicas, world // replicas), ("replicate", "shard"))
        )
        yield init_device_mesh(device.type, shape, mesh_dim_names=names), device
    finally:
        dist.destroy_process_group()


def cpu_group(timeout: float) -> dist.ProcessGroup:
    """A group of all ranks for CPU tensors and objects; ``timeout``: of a collective, in seconds."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


def shard(model: LlamaRewardModel, mesh: DeviceMesh, compute_dtype: torch.dtype, *, gather: str = "block") -> None:
    """FSDP2: one unit per block, the reward head and the networks of views in float32, the rest in the root. Parameters
    stay float32 (master).

    ``gather``: ``block`` drops a block's whole weights after its forward and again after its backward; with ``step``
    they stay until ``reshard``, or the backward that ``last_backward`` announces.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    head_policy = MixedPrecisionPolicy(param_dtype=torch.float32)
    for block in model.model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for part in filter(None, (model.score, model.views)):
        fully_shard(part, mesh=mesh, mp_policy=head_policy)
    for method in model.score.forwards:
        register_fsdp_forward_method(model.score, method)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    set_gather(model, gather)


def set_gather(model: LlamaRewardModel, gather: str) -> None:
    """See ``shard``."""
    model.gather = gather
    for unit in filter(None, (*model.model.blocks, model.score, model.views)):
        assert isinstance(unit, FSDPModule)
        unit.set_reshard_after_forward(gather == "block")


def last_backward(model: LlamaRewardModel, last: bool) -> None:
    """Says whether the next backward is the last one before the optimizer: then gradients are reduced, and weights that
    were gathered for the step are dropped."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last or model.gather == "block")


def reshard(model: nn.Module) -> None:
    """Drops gathered weights, after forward passes without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_rows(rows: int, mesh: DeviceMesh) -> slice:
    """The rows of a [rows, ...] parameter that this rank holds: FSDP2 cuts as torch.chunk does."""
    shards = mesh["shard"]
    chunk = -(-rows // shards.size())
    start = min(shards.get_local_rank() * chunk, rows)
    return slice(start, min(start + chunk, rows))


def materialize(model: LlamaRewardModel, mesh: DeviceMesh, device: torch.device, value: RowReader) -> None:
    """Gives a sharded model on the meta device its memory and this rank's values, see ``reward_model.load``."""
    load(model, device, value, lambda rows: local_rows(rows, mesh))


@torch.no_grad()
def full_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """All full parameters on the CPU in ``dtype``, on rank 0; other ranks must call it too and get an empty dict."""
    state = {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if dist.get_rank() == 0:
            # A clone: what full_tensor returns can be a view of a buffer padded for uneven shards.
            state[name] = full.to("cpu", dtype).clone(memory_format=torch.contiguous_format)
    return state
