"""AdamW, its schedule, and updates that are skipped if not finite, all without waiting for the device."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gcrm_fast.common.torch_compat import quiet_torchao
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.training.config import TrainConfig


def cast_weights(model: LlamaRewardModel, optimizer: str) -> None:
    """Stores the trunk's weights as the optimizer keeps them; the reward head stays float32."""
    if optimizer == "adamw-bf16":
        for part in filter(None, (model.model, model.lm_head)):
            for parameter in part.parameters():  # not buffers: RoPE's frequencies stay float32
                parameter.data = parameter.data.bfloat16()


def learning_rate(applied: Tensor, peak: float, warmup: int, steps: int) -> Tensor:
    """Learning rate of the update after ``applied`` ones (0-dimensional): linear warm-up, then a cosine to 0; float32.

    On the device, because only the device knows how many updates were applied.
    """
    done = applied.double()
    rising = (done + 1) / max(warmup, 1)
    falling = 0.5 * (1 + torch.cos(math.pi * (done - warmup) / max(steps - warmup, 1)))
    return (peak * torch.where(done < warmup, rising, falling)).float()


class Updater:
    """Clipped AdamW updates (0.9, beta2) of a model.

    An update with a loss or gradient that is not finite is skipped: weights stay as they are and the schedule does not
    advance. (``adamw``: nor do the moments. torchao's optimizers have no such switch: their moments decay by one step.)

    Attributes:
        applied: number of updates made, 0-dimensional int64 on the device.
        skipped_in_row: number of updates skipped since the last one made, likewise.
    """

    def __init__(self, model: torch.nn.Module, config: TrainConfig, steps: int, device: torch.device) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.seed, self.clip = config.seed, config.clip
        first = self.parameters[0]
        self.shard = first.device_mesh["shard"].get_local_rank() if isinstance(first, DTensor) else 0
        self.peak = config.lr or (1e-4 if config.lora_rank else 9e-6 if config.model else 1e-3)
        self.steps, self.warmup = steps, math.ceil(config.warmup * steps)
        self.applied = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_row = torch.zeros((), dtype=torch.int64, device=device)
        # A resumed run takes these from its configuration, not from the checkpoint.
        self.settings = {"betas": (0.9, config.beta2), "weight_decay": config.weight_decay}
        values: dict[str, Any] = {"lr": torch.tensor(self.peak, device=device), **self.settings}
        self.optimizer: torch.optim.Optimizer
        self.can_skip = config.optimizer == "adamw"
        if self.can_skip:
            self.optimizer = torch.optim.AdamW(self.parameters, **values, fused=True)
        else:
            quiet_torchao()
            from torchao.optim import AdamW8bit, _AdamW

            kind = AdamW8bit if config.optimizer == "adamw-8bit" else _AdamW
            self.optimizer = kind(self.parameters, **values, bf16_stochastic_round=True)  # of those that are bfloat16

    def update(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(whether it was made [bool], gradient norm before clipping, learning rate), 0-dimensional, on the device.

        ``loss``: this rank's, 0-dimensional; one that is not finite on any rank skips the update on all.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        bad = (~(norm.isfinite() & loss.isfinite())).float()
        dist.all_reduce(bad, dist.ReduceOp.MAX)
        rate = learning_rate(self.applied, self.peak, self.warmup, self.steps)
        if self.can_skip:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # the fused kernel's own switch
        else:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    # Clipping to a norm that is not finite left zeros and NaN.
                    parameter.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self.can_skip else torch.where(bad > 0, 0.0, rate)
        # Stochastic rounding must draw the same numbers in a resumed run and in other copies of the shard: they depend
        # on (seed, step, shard) alone.
        torch.manual_seed(hash((self.seed, step, self.shard)) % 2**63)
        self.optimizer.step()
        self.optimizer.zero_grad()
        made = bad == 0
        self.applied += made
        self.skipped_in_row = torch.where(made, 0, self.skipped_in_row + 1)
        return made, norm, rate
