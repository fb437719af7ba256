"""Each private name of torch that the project uses still does what it is used for."""

import importlib
import inspect
import subprocess
import sys
from logging import Logger
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.data import DataLoader

from gcrm_fast.common import torch_compat

ROOT = Path(__file__).resolve().parents[2]


def test_cpu_flash_attention_and_its_backward() -> None:
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    grad = torch.randn_like(expected)
    with torch.no_grad():
        out, lse = torch_compat.cpu_flash_attention(q, k, v, is_causal=True, attn_mask=None)
        gradients = torch_compat.cpu_flash_attention_backward(grad, q, k, v, out, lse, 0.0, True, attn_mask=None)
    scores = (q @ k.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(lse, scores.logsumexp(-1).detach())
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_varlen_attention_passes_the_options_of_this_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are compared on a GPU (tests/model/test_attention_cuda.py)."""
    calls: list[inspect.BoundArguments] = []

    def recorded(*args: object, **kwargs: object) -> Tensor:
        calls.append(inspect.signature(varlen_attn).bind(*args, **kwargs))
        return torch.empty(0)

    monkeypatch.setattr(torch_compat, "varlen_attn", recorded)
    q, kv, cu = torch.empty(4, 4, 8), torch.empty(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    torch_compat.varlen_attention(q, kv, kv, cu, cu, 4, 4)
    arguments = calls[0].arguments
    assert arguments["window_size"] == (-1, 0)
    assert arguments.get("enable_gqa", True) is True


def test_the_recompile_limit_is_set() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        compiled.append(1)
        return graph

    @torch.compile(backend=backend, dynamic=False)
    def double(x: Tensor) -> Tensor:
        return x * 2

    torch_compat.set_recompile_limit(3)
    try:
        for n in range(2, 9):
            double(torch.ones(n))
    finally:
        torch_compat.set_recompile_limit(8)
    assert len(compiled) == 3


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_are_ended(workers: int) -> None:
    batches = iter(DataLoader(Numbers(), num_workers=workers))
    next(batches)
    torch_compat.end_workers(batches)
    assert len(list(batches)) == (0 if workers else 99)


def test_dispatch_mode_sees_operators() -> None:
    seen: list[str] = []

    class Names(torch_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Names():
        torch.ones(2).add(1)
    assert seen[-1] == "add"


def test_fake_tensors_take_no_memory() -> None:
    with torch_compat.FakeTensorMode():
        assert (torch.empty(2**40) + 1).shape == (2**40,)


def test_leaves_of_nested_state() -> None:
    assert torch_compat.tree_leaves({"a": [1, (2, 3)], "b": 4}) == [1, 2, 3, 4]


def test_the_import_of_torchao_is_quiet() -> None:
    """In a process of its own, where nothing has imported torchao yet."""
    pytest.importorskip("torchao")
    program = "from gcrm_fast.common.torch_compat import quiet_torchao; quiet_torchao(); import torchao.optim"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == ""


def test_the_logger_of_pytrees() -> None:
    module = importlib.import_module(torch_compat.PYTREE_LOGGER)
    assert torch_compat.PYTREE_LOGGER in {value.name for value in vars(module).values() if isinstance(value, Logger)}


def test_no_other_module_uses_private_names_of_torch() -> None:
    private = r"from torch[a-z_.]* import _[a-z]|(from|import) torch[a-z.]*\._[a-z]|\btorch\.([a-z]+\.)*_[a-z]"
    listed = subprocess.run(
        ["git", "grep", "-nP", private, "--", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    allowed = ("gcrm_fast/common/torch_compat.py:", "tests/common/test_torch_compat.py:")
    assert [line for line in listed.stdout.splitlines() if not line.startswith(allowed)] == []
