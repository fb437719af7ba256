"""bench/step_model.py: the operators, bytes and copies that it charges for a training step."""

from types import ModuleType
from typing import Any

import pytest
import torch

from gcrm_fast.common.torch_compat import TorchDispatchMode
from gcrm_fast.training import accounting, parallel
from gcrm_fast.training.config import TrainConfig
from support.small import small_config

CONFIG = small_config(vocab_size=32_000)


def test_operators_are_charged_for_what_they_read_and_write(step_model: ModuleType) -> None:
    a, b = torch.zeros(4, 8), torch.zeros(8, 2)
    with step_model.Counter(1e3, 10.0, 0.0) as counter:
        (a @ b).t().unsqueeze(0) + 1  # views move nothing
    assert counter.totals == {
        step_model.MATMUL: [2 * 4 * 8 * 2, 4 * (32 + 16 + 8), 4 * (32 + 16 + 8) / 10],
        step_model.REST: [0.0, 4 * (8 + 8), 4 * (8 + 8) / 10],
    }


def test_the_model_of_a_step_has_the_operations_of_the_log(step_model: ModuleType) -> None:
    [pack] = step_model.packs_of(CONFIG, 20, 30, 6, 500)
    assert pack.n_pairs == 6
    counter = step_model.count(CONFIG, pack, 1e12, 1e12)
    operations = {part: total[0] for part, total in counter.totals.items()}
    assert operations[step_model.ATTENTION] > 0
    assert sum(operations.values()) == pytest.approx(accounting.work(pack, CONFIG, "none").model_flops, rel=1e-3)
    assert counter.totals[step_model.KERNELS][1] > 0


def test_the_numbers_of_a_step_add_up(step_model: ModuleType) -> None:
    packs, rates = step_model.packs_of(CONFIG, 20, 30, 9, 320), (1e12, 1e9)
    assert [pack.n_pairs for pack in packs] == [3, 3, 3]
    whole, one = step_model.step(CONFIG, packs, *rates, "step"), step_model.count(CONFIG, packs[-1], *rates)
    for part, (work, moved, seconds) in one.totals.items():
        assert whole.totals[part] == pytest.approx([3 * work, 3 * moved, 3 * seconds])
    weights = CONFIG.parameters()
    gathered, reduced = 10, 6 + 10 + 10 + 16
    assert whole.totals[step_model.FSDP] == pytest.approx(
        [0.0, (gathered + reduced) * weights, (gathered + reduced) * weights / 1e9]
    )
    assert whole.totals[step_model.OPTIMIZER][1] == 28 * weights
    assert whole.seconds == pytest.approx(sum(seconds for _, _, seconds in whole.totals.values()))

    def milliseconds(tokens: int, gather: str) -> float:
        return step_model.predicted_ms(CONFIG, (20, 30), 9, tokens, 1.0, 0.001, gather)

    assert milliseconds(320, "step") == pytest.approx(1e3 * whole.seconds)
    assert milliseconds(320, "step") > milliseconds(480, "step") > milliseconds(1000, "step")
    assert milliseconds(320, "block") > milliseconds(320, "step")


class Moved(TorchDispatchMode):
    """Bytes that copies and additions read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.name()
        if name == "aten::_to_copy":
            self.bytes += args[0].nbytes + result.nbytes
        elif name == "aten::copy_":
            self.bytes += args[0].nbytes + args[1].nbytes
        elif name == "aten::add_.Tensor":
            self.bytes += 2 * args[0].nbytes + args[1].nbytes
        elif name == "fsdp::chunk_cat":
            self.bytes += sum(x.nbytes for x in args[0]) + (kwargs or {})["out"].nbytes
        return result


@pytest.mark.parametrize("gather", ["step", "block"])
@pytest.mark.parametrize("pairs_per_pack", [1, 3])
def test_fsdp_copies_what_the_model_of_a_step_says(
    step_model: ModuleType, our_step: ModuleType, gather: str, pairs_per_pack: int
) -> None:
    config = small_config(vocab_size=32_000, intermediate_size=8192)  # most weights are the blocks'
    packs = step_model.packs_of(config, 20, 30, 3, 80 * pairs_per_pack + 10)
    assert [pack.n_pairs for pack in packs] == 3 // pairs_per_pack * [pairs_per_pack]
    with parallel.process_group() as (mesh, device):
        ours = our_step.Ours(config, TrainConfig(gather=gather), torch.bfloat16, mesh, device)
        with Moved() as moved:
            ours.accumulate(packs, 3)
    assert moved.bytes == pytest.approx(step_model.fsdp_bytes(config, len(packs), gather), rel=0.01)
