"""Shared by the experiments: means with intervals, Markdown tables, and the machine and versions of the numbers."""

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch

from gcrm_fast import train
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.json_lines import finite
from gcrm_fast.common.options import flag
from gcrm_fast.training.config import TrainConfig, parse, read_toml
from gcrm_fast.training.resume import FREE

COVERAGE = 0.95


# Options that a run may change when it resumes, but that its finished model or metrics depend on.
OF_RESULTS = frozenset({"early_stopping", "eval_by", "eval_data", "eval_pairs", "goal_pairs", "keep_best"})


def data_folder(named: str) -> Path:
    """The folder of real data: ``named``, else GCRM_DATA. Raises UserError if neither names a folder."""
    folder = named or os.environ.get("GCRM_DATA", "")
    if not folder:
        raise UserError("no data: set GCRM_DATA or --data to the folder with gsm8k_pairs.jsonl.gz")
    if not Path(folder).is_dir():
        raise UserError(f"{'--data' if named else 'GCRM_DATA'} {folder}: not a folder")
    return Path(folder)


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options of gcrm train by name as words of a command line."""
    return [word for name, value in options.items() for word in (flag(name), str(value))]


def trained(folder: Path, arguments: Sequence[str]) -> Path:
    """The model of the run in ``folder``, trained if there is none. Raises UserError for another run's folder."""
    arguments = [*arguments, "--output", str(folder)]
    if not (folder / "model").is_dir():
        if train.main(arguments):
            raise UserError(f"{folder}: training failed with the error above")
        return folder / "model"
    found, wanted = TrainConfig(**read_toml(folder / "config.toml")), parse(arguments)
    if wanted.dtype == "auto":  # config.toml has the dtype that was chosen
        wanted = dataclasses.replace(wanted, dtype=found.dtype)
    other = [
        field.name
        for field in dataclasses.fields(TrainConfig)
        if field.name not in FREE - OF_RESULTS and getattr(found, field.name) != getattr(wanted, field.name)
    ]
    if other:
        raise UserError(
            f"{folder}: holds another run's model (config.toml differs in: {', '.join(other)}): choose another --runs"
        )
    return folder / "model"


def bind(runs: Path, settings: Mapping[str, Any]) -> None:
    """Notes in the folder which options its files come from. Raises UserError where they come from other ones."""
    path = runs / "settings.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    for name, value in settings.items():
        if kept.get(name) != value:
            option = name.replace("_", "-")
            raise UserError(f"{runs}: holds files of --{option} {kept.get(name)}, not {value}: choose another --runs")
    runs.mkdir(parents=True, exist_ok=True)
    write_aside(path, to_json(settings))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its t-interval over seeds); the width is NaN for one value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    spread = float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)), float(scipy.stats.t.ppf((1 + COVERAGE) / 2, n - 1)) * spread


def two_way_interval(values_SQ: np.ndarray) -> tuple[float, float]:
    """(mean, half the width of its interval) of values of S >= 2 seeds by Q questions, both drawn from many.

    The variance is that of the seeds' means over S plus that of the questions' means over Q: somewhat wide, since each
    also holds a part of the other. NaN counts as missing: a question that is NaN for a seed does not count there.
    """
    seeds = len(values_SQ)
    kept_SQ = values_SQ[:, ~np.isnan(values_SQ).all(0)]
    of_seed, of_question = np.nanmean(kept_SQ, axis=1), np.nanmean(kept_SQ, axis=0)
    variance = of_seed.var(ddof=1) / seeds + of_question.var(ddof=1) / len(of_question)
    return float(of_seed.mean()), float(scipy.stats.t.ppf((1 + COVERAGE) / 2, seeds - 1) * np.sqrt(variance))


def change(mean: float, half: float) -> str:
    """Such as '+0.013 ± 0.021'; with * where the interval excludes 0, and '-' without one."""
    return "-" if math.isnan(half) else f"{mean:+.3f} ± {half:.3f}{' *' if abs(mean) > half else ''}"


def verdict(difference: str, of: str = "") -> str:
    """Of the claim that a difference, as ``change`` writes it, is above 0; ``of`` names the value that differs."""
    if difference == "-":
        return "no claim from fewer than two seeds"
    told = "neither shown nor refuted" if difference[-1] != "*" else "shown" if difference[0] == "+" else "refuted"
    return f"{told}, {of} {difference}" if of else f"{told}, {difference}"


def paired_difference(own: Mapping[int, np.ndarray], base: Mapping[int, np.ndarray]) -> str:
    """Mean difference of values per question, by seed, over the seeds of both, such as '+0.013 ± 0.021'; with * where
    its two-way interval excludes 0, and '-' for fewer than two seeds."""
    seeds = sorted(own.keys() & base.keys())
    if len(seeds) < 2:
        return "-"
    return change(*two_way_interval(np.stack([own[seed] - base[seed] for seed in seeds])))


def cell(values: Sequence[float], sign: str = "") -> str:
    """Such as '0.613 ± 0.021', from values over seeds; ``sign`` '+' shows the sign, for differences."""
    mean, half = mean_interval(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:{sign}.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def machine() -> str:
    """Device, threads and versions of this process, for the head of a report."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        device = f"{next(names, platform.machine())}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    return f"{device}, Python {platform.python_version()}, torch {torch.__version__}"


def status(rows: Sequence[Mapping[str, Any]], left: int) -> str:
    """Sentences of a report: how many rows are missing, and the machines of the others."""
    still = f"{left} rows are still missing; call it again to compute them." if left else "Every row is finished."
    return f"{still} Machines: {'; '.join(dict.fromkeys(row['machine'] for row in rows))}."


def write_aside(path: Path, text: str) -> None:
    """Replaces the file as a whole, or leaves it as it was."""
    with written_aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def with_nan(item: Any) -> Any:
    """What JSON gives back, with NaN for null."""
    if isinstance(item, dict):
        return {key: with_nan(part) for key, part in item.items()}
    if isinstance(item, list):
        return [with_nan(part) for part in item]
    return math.nan if item is None else item


def saved_rows(report: Path) -> list[dict[str, Any]]:
    """The rows of a report so far; without its file none. Numbers that are missing are NaN."""
    path = report.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return [with_nan(row) for row in rows]


def read_rows(report: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``saved_rows``. Raises UserError where other ``settings``, which each row holds, gave them."""
    rows = saved_rows(report)
    for name, value in settings.items():
        if rows and rows[0].get(name) != value:
            path, option = report.with_suffix(".json"), name.replace("_", "-")
            raise UserError(
                f"{path}: holds rows of --{option} {rows[0].get(name)}, not {value}: choose another --report"
            )
    return rows


def save_rows(report: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row per line."""
    lines = ",\n".join(json.dumps(finite(row)) for row in rows)
    write_aside(report.with_suffix(".json"), f'{{"rows": [\n{lines}\n]}}\n')


def to_json(value: Mapping[str, Any]) -> str:
    """Readable and diffable; NaN and infinity become null."""
    return json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n"
