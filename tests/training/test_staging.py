"""A checkpoint is written from copies that later training steps do not change."""

import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from gcrm_fast.common.torch_compat import tree_leaves
from gcrm_fast.training import parallel, snapshots
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.training.manifest import FOLDER, checkpoints
from gcrm_fast.training.objectives import STATISTICS
from gcrm_fast.training.optimizer import Updater
from gcrm_fast.training.resume import RunState, Window
from gcrm_fast.training.staging import Staging
from support.devices import DEVICE
from support.small import small_config, small_model


def parts(state: Any) -> list[Tensor]:
    """The plain tensors that a state consists of."""
    found: list[Tensor] = []
    for leaf in tree_leaves(state):
        if hasattr(leaf, "__tensor_flatten__"):
            found += parts([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
        elif isinstance(leaf, Tensor):
            found.append(leaf)
    return found


def pointers(state: Any) -> list[int]:
    return [part.data_ptr() for part in parts(state)]


class Held(snapshots.Checkpoints):
    """Waits for ``released`` before it writes, and keeps the states that it gets."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.released = threading.Event()
        self.states: list[dict[str, Any]] = []

    def _write(self, name: str, state: dict[str, Any], facts: dict[str, Any]) -> None:
        self.states.append(state)
        assert self.released.wait(60)
        super()._write(name, state, facts)


def test_a_checkpoint_holds_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    """Three checkpoints, each written after the state has changed, from the same memory."""
    (tmp_path / FOLDER).mkdir()
    with parallel.process_group() as (mesh, device):
        model = small_model(small_config(), torch.float32).to(device)
        parallel.shard(model, mesh, torch.float32)
        state = RunState(model, Updater(model, TrainConfig(lr=0.1, warmup=0.0), 9, device), Window(STATISTICS, device))
        group = torch.distributed.new_group(backend="gloo")
        saved, expected = Held(tmp_path, 3, "", group), []
        for step in (1, 2, 3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            state.updater.update(step, torch.zeros((), device=device))
            state.window.sums += step
            live = state.tensors()
            expected.append(deepcopy(live))
            saved.released.clear()
            saved.save(step, live, {"step": step, "metrics": {}})
            with torch.no_grad():
                for part in parts(live):
                    part.add_(1)
            saved.released.set()
            saved.wait()
        saved.close()
        first = pointers(saved.states[0])
        assert len(first) > 100
        assert all(pointers(staged) == first for staged in saved.states)
        assert not set(first) & set(pointers(state.tensors()))
        for name, copy in saved.states[2]["model"].items():
            original = live["model"][name]
            assert isinstance(copy, DTensor)
            assert (copy.device_mesh, copy.placements) == (original.device_mesh, original.placements)
        for path, then in zip(checkpoints(tmp_path), expected, strict=True):
            found = deepcopy(then)
            for part in parts(found):
                part.zero_()
            dcp.load(found, checkpoint_id=path, process_group=group)
            assert all(torch.equal(a, b) for a, b in zip(parts(found), parts(then), strict=True))
            assert found["optimizer"]["param_groups"] == then["optimizer"]["param_groups"]


def test_copies_are_on_the_cpu_and_share_nothing() -> None:
    """Whatever the state consists of; pinned where that makes copying faster."""
    state = {
        "weight": torch.randn(3, 4, device=DEVICE, dtype=torch.bfloat16).mT,
        "parameter": torch.nn.Parameter(torch.randn(3, device=DEVICE)),
        "count": torch.tensor(3, device=DEVICE),
        "none": torch.zeros(0, 2, device=DEVICE),
        "on the cpu": torch.ones(2),
        "groups": [{"lr": 0.1, "betas": (torch.tensor(0.9), 0.95)}],
    }
    staging = Staging()
    staged = staging.copy(state)
    for copy, original in zip(parts(staged), parts(state), strict=True):
        assert copy.device.type == "cpu"
        assert copy.is_pinned() == original.is_cuda or not copy.numel()
        assert not copy.requires_grad
        assert torch.equal(copy, original.cpu())
        assert not copy.numel() or copy.data_ptr() != original.data_ptr()
    group = staged["groups"][0]
    assert (group["lr"], group["betas"][1]) == (0.1, 0.95)
    assert group is not state["groups"][0]
    assert pointers(staging.copy(state)) == pointers(staged)
    state["weight"] = torch.ones(2, device=DEVICE)
    assert torch.equal(staging.copy(state)["weight"], torch.ones(2))


def test_sharded_8_bit_states_stay_what_they_are() -> None:
    state8bit = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    with parallel.process_group() as (mesh, device):
        local = state8bit.zeros((4, 256), device=device)
        local.codes.random_(255)
        sharded = DTensor.from_local(local, mesh, run_check=False)
        [copy] = Staging().copy({"moment": sharded}).values()
        assert isinstance(copy.to_local(), state8bit)
        assert all(part.device.type == "cpu" for part in parts(copy))
        assert torch.equal(copy.to_local().dequantize(), local.dequantize().cpu())
        assert not set(pointers(copy)) & set(pointers(sharded))
