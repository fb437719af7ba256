"""Processes that read other data, models or options than the rest are found before the first step."""

import dataclasses
import hashlib

import torch.distributed as dist

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import flag
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.training.prepare import Prepared

# Options that may differ between machines: what is at a path is compared instead.
OF_ONE_MACHINE = frozenset(
    {
        "attention",
        "cache",
        "config",
        "data",
        "eval_data",
        "model",
        "on_policy",
        "output",
        "resume",
        "tokenizer",
        "workers",
    }
)


def _facts(config: TrainConfig, prepared: Prepared) -> dict[str, str]:
    """What must be equal on all ranks, as it is shown where it is not."""
    shape = hashlib.sha256(repr(prepared.model_config).encode()).hexdigest()
    options = {name: str(value) for name, value in dataclasses.asdict(config).items() if name not in OF_ONE_MACHINE}
    return {
        "training data": f"{len(prepared.train)} pairs (fingerprint {prepared.data_key[:12]})",
        "held-out data": f"{len(prepared.held_out)} pairs (fingerprint {prepared.held_out_key[:12]})",
        "model configuration": f"fingerprint {shape[:12]}",
        **{flag(name): value for name, value in options.items()},
    }


def check_agreement(config: TrainConfig, prepared: Prepared, group: dist.ProcessGroup) -> None:
    """Raises UserError on every rank, in one line that names the ranks and what differs, unless all read the same."""
    gathered: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, _facts(config, prepared), group=group)
    different = [
        f"{name} is " + ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in _ranks_by(gathered, name).items())
        for name in gathered[0]
        if any(facts[name] != gathered[0][name] for facts in gathered)
    ]
    if different:
        raise UserError(
            f"the processes of this run do not agree: {'; '.join(different)}: give all the same files and options"
        )


def _ranks_by(gathered: list[dict[str, str]], name: str) -> dict[str, list[int]]:
    """The ranks with each value of a fact."""
    ranks: dict[str, list[int]] = {}
    for rank, facts in enumerate(gathered):
        ranks.setdefault(facts[name], []).append(rank)
    return ranks


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
