"""What a checkpoint of a run holds, and how a run resumes from one."""

import contextlib
import dataclasses
import math
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from gcrm_fast.common.devices import compute_dtype
from gcrm_fast.common.errors import UserError
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.training.manifest import Checkpoint, checkpoints, damage, first_intact, read_manifest
from gcrm_fast.training.objectives import Statistics
from gcrm_fast.training.optimizer import Updater
from gcrm_fast.training.option_checks import OF_BOTTLENECK
from gcrm_fast.training.output_folder import default_output

# Options that change neither what is trained nor the order of the data: free to differ in a resumed run.
FREE = frozenset(
    {
        "allow_overlap",
        "attention",
        "cache",
        "compile",
        "config",
        "deterministic",
        "dry_run",
        "early_stopping",
        "eval_by",
        "eval_data",
        "eval_every",
        "eval_pairs",
        "goal_pairs",
        "keep",
        "keep_best",
        "language",
        "license",
        "log_every",
        "max_skipped",
        "output",
        "overwrite",
        "gather",
        "preset",
        "push_to_hub",
        "recompute",
        "replicas",
        "report_to",
        "resume",
        "resume_force",
        "save_every",
        "template_date",
        "timeout",
        "tokens_per_batch",
        "workers",
    }
)

# Frozen weights are those of --model. (strict would miss them where they are loaded.)
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


class Window:
    """What has accumulated since the last log row, on the device: statistics, pairs, and updates that were skipped."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        """``names``: of the statistics."""
        self.names = names
        self.sums = torch.zeros(len(names) + 1, device=device)
        self.made: list[tuple[int, Tensor]] = []

    def add(self, step: int, statistics: Statistics, n_pairs: int, made: Tensor) -> None:
        """``statistics``: of this rank's ``n_pairs``; they count for nothing unless the update was made."""
        assert statistics.names == self.names
        together = torch.cat([statistics.sums_K, statistics.sums_K.new_full((1,), n_pairs)])
        self.sums += torch.where(made, together, 0)
        self.made.append((step, made))

    def skipped(self) -> list[int]:
        """Steps with a skipped update. Waits for the device."""
        flags = torch.stack([made for _, made in self.made]).tolist() if self.made else []
        return [step for (step, _), made in zip(self.made, flags, strict=True) if not made]

    def read(self) -> tuple[dict[str, float], list[int]]:
        """Means of the statistics over the pairs of all ranks (NaN without a pair), and ``skipped``; starts over."""
        dist.all_reduce(self.sums)
        row = Statistics(self.names, self.sums[:-1]).means(float(self.sums[-1]))
        skipped = self.skipped()
        self.sums.zero_()
        self.made.clear()
        return row, skipped


@dataclasses.dataclass
class RunState:
    """Everything that a run's future depends on, apart from its configuration and data."""

    model: LlamaRewardModel
    updater: Updater
    window: Window

    def tensors(self) -> dict[str, Any]:
        """For ``snapshots``; sharded where the model is."""
        model, optimizer = get_state_dict(self.model, self.updater.optimizer, options=TRAINED_ONLY)
        counts = {"applied": self.updater.applied, "skipped_in_row": self.updater.skipped_in_row}
        return {
            "model": model,
            "optimizer": optimizer,
            "counts": counts,
            "window": {f"rank{dist.get_rank()}": self.window.sums},
        }

    def load(self, checkpoint: Checkpoint, group: dist.ProcessGroup) -> None:
        """Loads the tensors of a checkpoint that any number of ranks wrote."""
        tensors = self.tensors()
        wrote, rank = checkpoint.facts["world_size"], dist.get_rank()
        if wrote == dist.get_world_size():
            sums = {f"rank{rank}": torch.zeros_like(self.window.sums)}
        else:  # what counts is their sum over ranks
            sums = {f"rank{r}": torch.zeros_like(self.window.sums) for r in range(wrote)} if rank == 0 else {}
        tensors["window"] = sums
        # In place: counts, weights and moments are those of the run itself.
        dcp.load(tensors, checkpoint_id=checkpoint.path, process_group=group)
        set_state_dict(
            self.model,
            self.updater.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=TRAINED_ONLY,
        )
        for parameters in self.updater.optimizer.param_groups:
            parameters.update(self.updater.settings)
        self.window.sums.copy_(sum(sums.values(), torch.zeros_like(self.window.sums)))
        device = self.window.sums.device
        self.window.made = [(step, torch.tensor(False, device=device)) for step in checkpoint.facts["skipped"]]


def facts(step: int, config: TrainConfig, data_key: str, window: Window, metrics: dict[str, float]) -> dict[str, Any]:
    """The facts of a checkpoint's manifest; ``metrics``: of an evaluation at this very step, or none."""
    return {
        "step": step,
        "world_size": dist.get_world_size(),
        "data_key": data_key,
        "skipped": window.skipped(),
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "config": _plain(config),
    }


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The options as JSON gives them back."""
    values = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def differences(config: TrainConfig, data_key: str, checkpoint: Checkpoint) -> list[str]:
    """What a run's future depends on and what differs between a checkpoint and this run."""
    now, then = _plain(config), _plain(TrainConfig()) | checkpoint.facts["config"]  # it may lack a newer option
    if now["dtype"] == "auto":  # which means that of the checkpoint
        now["dtype"] = then["dtype"]
    # They changed nothing without the head, and were accepted once.
    unread = OF_BOTTLENECK if config.head != "bottleneck" else ()
    changed = [
        f"--{name.replace('_', '-')} was {then[name]!r} and is {now[name]!r}"
        for name in now
        if name not in FREE and name not in unread and now[name] != then[name]
    ]
    if checkpoint.facts["data_key"] != data_key:
        changed.append("the training data or its tokens have changed")
    return changed


def with_dtype(
    config: TrainConfig, checkpoint: Checkpoint | None, device: torch.device, group: dist.ProcessGroup
) -> TrainConfig:
    """The configuration with ``--dtype auto`` resolved: as in the checkpoint, else for the device of rank 0, since
    processes may run on different kinds of CPUs."""
    if config.dtype != "auto":
        return config
    own = str(compute_dtype("auto", device, training=True)).removeprefix("torch.")
    decided: list[Any] = [checkpoint.facts["config"]["dtype"] if checkpoint else own]
    dist.broadcast_object_list(decided, src=0, group=group)
    return dataclasses.replace(config, dtype=decided[0])


def with_template_date(config: TrainConfig) -> TrainConfig:
    """The configuration with the date that a chat template writes: the given one, else that of the checkpoint to resume
    from, so that a run reads the same text on each of its days, else today's."""
    if config.template_date or not (config.model or config.tokenizer):
        return config
    folders = [Path(config.resume)] if config.resume not in ("auto", "never") else []
    if config.resume == "auto":
        folders = checkpoints(Path(config.output or default_output(config)))[::-1]
    day = date.today().isoformat()
    for folder in folders:
        with contextlib.suppress(UserError):  # a damaged one, which is named when the run resumes
            day = read_manifest(folder)["facts"]["config"].get("template_date") or day
            break
    return dataclasses.replace(config, template_date=day)


def find_checkpoint(
    config: TrainConfig, output: Path, data_key: str, group: dist.ProcessGroup
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from by ``--resume``, and lines about those that were skipped.

    Raises:
        UserError: a checkpoint that ``--resume`` names is damaged, or it belongs to another configuration.
    """
    notes: list[str] = []
    if config.resume == "never":
        return None, notes
    if config.resume == "auto":
        checkpoint, notes = first_intact(checkpoints(output)[::-1], group)
        if checkpoint is None:
            return None, notes
    else:
        path = Path(config.resume)
        manifest = read_manifest(path)
        checkpoint = Checkpoint(path, manifest["facts"])
        wrong = damage(path, manifest, 0, 1)
        if wrong:
            raise UserError(f"--resume {path}: {wrong}: choose another checkpoint")
    changed = differences(config, data_key, checkpoint)
    if changed and not config.resume_force:
        raise UserError(
            f"{checkpoint.path}: belongs to another run: {'; '.join(changed)}: undo the change, start over with "
            "--resume never, or continue anyway with --resume-force"
        )
    return checkpoint, notes
