"""Goal files: named goal states of one model, with what they were made from.

A goal state is the mean of z at the last token of preferred completions (GCRM, section 4.2). The metadata of the
safetensors file name the weights it belongs to: a cosine to the states of another model means nothing.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gcrm_fast.checkpoints.reading import POLICIES
from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.data.ends import Kind

GOAL_FILE = "goal.safetensors"  # of a model's folder
DEFAULT = "default"
FACTS = "gcrm"  # of the file's metadata


def write_goals(
    path: Path, goals: Mapping[str, Tensor], counts: Mapping[str, int], fingerprint: str, end: Kind = "eos"
) -> None:
    """Writes goal states [D], each the mean over ``counts[name]`` completions that end so, of the model with that
    fingerprint. Raises UserError for a name that check_goal_name refuses."""
    for name in goals:
        check_goal_name(name)
    facts = {"fingerprint": fingerprint, "counts": json.dumps(dict(counts)), "end_policy": POLICIES[end]}
    # One entry, as safetensors writes several in another order each time.
    save_file(
        {name: goal.float().contiguous() for name, goal in goals.items()}, path, metadata={FACTS: json.dumps(facts)}
    )


def check_goal_name(name: str) -> None:
    """Raises UserError for a name that FILE:NAME could not name, or a terminal not show."""
    if not name.strip() or ":" in name or not name.isprintable():
        raise UserError(f"goal {name!r}: a goal's name must be visible text without a colon")


def read_goals(path: Path, fingerprint: str, width: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(goal states [D] float32 on the CPU, numbers of completions), by name, the default goal first.

    Raises:
        UserError: not a readable goal file, or one of a model with another fingerprint or ``width`` D of the states, or
            with unknown ends.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file: make one with gcrm goals")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            metadata |= json.loads(metadata.get(FACTS, "{}"))  # older files have an entry for each
            counts = dict(json.loads(metadata.get("counts", "{}")))
            goals = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a readable goal file ({one_line(error)}): make one with gcrm goals") from None
    if "fingerprint" not in metadata or not goals:
        raise UserError(f"{path}: not a goal file (no fingerprint, or no goal): make one with gcrm goals")
    if metadata["fingerprint"] != fingerprint:
        raise UserError(f"{path}: its goals are of another model's weights: make them with gcrm goals for this one")
    if metadata.get("end_policy") not in POLICIES.values():
        raise UserError(
            f"{path}: its goals are of completions that end in an unknown way: make them again with gcrm goals"
        )
    for name, goal in goals.items():
        check_goal_name(name)
        if goal.shape != (width,) or not goal.is_floating_point() or not goal.isfinite().all():
            what = f"goal {name!r} is {goal.dtype} of shape {tuple(goal.shape)}"
            raise UserError(f"{path}: {what}, not {width} finite numbers: make it again with gcrm goals")
    goals = dict(sorted(goals.items(), key=lambda item: item[0] != DEFAULT))
    return {name: goal.float() for name, goal in goals.items()}, counts


def named_goal(name: str, fingerprint: str, width: int) -> Tensor:
    """The goal state [D] that FILE[:NAME] names; without NAME the default one. Raises UserError, see read_goals."""
    file, colon, goal = (name, "", "") if os.path.exists(name) else name.rpartition(":")
    if not colon:
        return next(iter(read_goals(Path(name), fingerprint, width)[0].values()))
    goals, _ = read_goals(Path(file), fingerprint, width)
    check_goal_name(goal)
    if goal not in goals:
        raise UserError(f"{file}: holds no goal {goal!r}: it has {', '.join(goals)}")
    return goals[goal]
