"""The folder of a run: its default name, and what may not be there when it starts."""

import re
from pathlib import Path

from gcrm_fast.common.errors import UserError
from gcrm_fast.training.config import TrainConfig

OF_A_RUN = {"metrics.jsonl", "checkpoints", "skipped_records.txt"}  # what an unfinished run leaves in its folder
LOGS = (".log", ".out", ".err")  # may be there before a run starts


def default_output(config: TrainConfig) -> str:
    """runs/<data>-<loss>-seed<n> or runs/<data>-gcrm-<variant>-seed<n>, e.g. runs/arithmetic-gcrm-paper-seed0."""
    name = re.split(r"[.:]", Path(config.data[0]).name)[0]
    objective = config.loss if config.objective == "ranking" else f"gcrm-{config.objective_variant}"
    return f"runs/{name}-{objective}-seed{config.seed}"


def finished(output: Path, config: TrainConfig) -> str:
    """Why a run may not write to ``output``, "" where it may: a finished run is overwritten only with --overwrite."""
    if not (output / "model").exists() or config.overwrite:
        return ""
    return f"{output}: holds a finished model: choose another --output or pass --overwrite"


def check_unfinished(output: Path, config: TrainConfig) -> None:
    """Raises UserError where a finished run would be overwritten; --dry-run writes nothing."""
    if not config.dry_run and (refused := finished(output, config)):
        raise UserError(refused)


def check_output(config: TrainConfig) -> Path:
    """The folder of the run. Raises UserError where it cannot be that, or holds what --overwrite must allow: a finished
    model, or files of something else."""
    output = Path(config.output or default_output(config))
    check_unfinished(output, config)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is not a folder")
    checkpoints = output / "checkpoints"
    if checkpoints.is_symlink() and not checkpoints.is_dir():
        raise UserError(f"{checkpoints}: links to no folder: make it or remove the link")
    present = sorted(path.name for path in output.iterdir()) if output.exists() else []
    others = [name for name in present if not name.startswith(".") and not name.endswith(LOGS)]
    if others and not OF_A_RUN.intersection(others) and not config.overwrite:
        raise UserError(
            f"--output {output}: holds no run, but other files, such as {others[0]}: choose another folder, or pass "
            "--overwrite to write next to them"
        )
    return output
